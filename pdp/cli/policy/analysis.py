"""``pdp policy matrix``, ``diff``, ``prove-isolation`` and ``replay``."""

from __future__ import annotations

import typer

app = typer.Typer()
