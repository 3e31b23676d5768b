"""``pdp budget``: what stands, what was done, and corrections by hand."""

from __future__ import annotations

import typer

from pdp.cli.budget import changes, history, standing

app = typer.Typer(no_args_is_help=True)
app.add_typer(standing.app)
app.add_typer(changes.app)
app.add_typer(history.app)
