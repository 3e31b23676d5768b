"""``python -m pdp``."""

from __future__ import annotations

from pdp.cli import main

main()
