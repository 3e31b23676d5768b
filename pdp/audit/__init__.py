"""Audit: what happened, provably."""
