"""Generated from proto/ by scripts/generate_api.py; nothing here by hand."""
