"""``pdp serve``: run the sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="pdp", pretty_exceptions_enable=False, add_completion=False)
"""``pdp`` with this command alone, which takes less time to import than all of them."""


@app.callback()
def _root() -> None:
    pass


@app.command()
def serve(
    config: Annotated[Path, typer.Option("--config", "-c", help="The configuration, in YAML.")],
) -> None:
    """Run the sidecar until SIGTERM.

    Exit codes: 0 stopped in order, 2 the configuration is wrong, 3 can not start.
    """
    # Only here: what reads arguments needs nothing of the sidecar.
    from pdp.cli.run_sidecar import run  # noqa: PLC0415

    raise typer.Exit(run(config))
