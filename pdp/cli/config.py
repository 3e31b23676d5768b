"""``pdp config``: check and describe the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdp.cli import exit_codes

app = typer.Typer(no_args_is_help=True)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file."""
    import json  # noqa: PLC0415

    from pdp.config_reference import json_schema  # noqa: PLC0415

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="The configuration, in YAML.")],
) -> None:
    """Check a configuration, with the PDP_* variables of this environment.

    Exit codes: 0 it is good, 2 it is not, with a line for every fault.
    """
    import os  # noqa: PLC0415

    from pdp.config import ConfigError, load_config  # noqa: PLC0415

    try:
        load_config(config, os.environ, files_must_exist=True, bundles_must_exist=True)
    except ConfigError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(exit_codes.USAGE) from None
    typer.echo(f"{config}: ok")
