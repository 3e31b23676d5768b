"""``pdp policy``: write, check, compare and release policy bundles."""

from __future__ import annotations

import typer

from pdp.cli.policy import analysis, authoring

app = typer.Typer(no_args_is_help=True)
app.add_typer(authoring.app)
app.add_typer(analysis.app)
