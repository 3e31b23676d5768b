"""``pdp policy init``, ``build``, ``sign``, ``verify``, ``check``, ``test``, ``fmt``."""

from __future__ import annotations

import typer

app = typer.Typer()
