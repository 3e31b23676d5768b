"""``pdp serve``: run the sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdp.cli import exit_codes

if TYPE_CHECKING:
    from pdp.config import Config
    from pdp.server.policy import Loaded


def serve(
    config: Annotated[Path, typer.Option("--config", "-c", help="The configuration, in YAML.")],
) -> None:
    """Run the sidecar until SIGTERM.

    Exit codes: 0 stopped in order, 2 the configuration is wrong, 3 can not start.
    """
    import logging  # noqa: PLC0415 - start-up imports only what the command needs
    import os  # noqa: PLC0415
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    from pdp.config import ConfigError, load_config  # noqa: PLC0415
    from pdp.errors import PdpError  # noqa: PLC0415

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        settings = load_config(config, os.environ, files_must_exist=True)
    except ConfigError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(exit_codes.USAGE) from None

    # Compiling the policy takes about as long as importing the rest: both at once.
    loader = ThreadPoolExecutor(1, thread_name_prefix="policy-loader")
    policy = loader.submit(_load_policy, settings)
    loader.shutdown(wait=False)

    # Read when gRPC is imported. Its handlers would otherwise run in each OPA that is begun
    # while calls are under way, before that becomes OPA, and crash it now and then.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    import uvloop  # noqa: PLC0415

    from pdp.server import sidecar  # noqa: PLC0415

    try:
        uvloop.run(
            sidecar.serve(
                settings, loaded=policy, started=lambda line: typer.echo(f"pdp: {line}", err=True)
            )
        )
    except PdpError as error:
        typer.echo(f"pdp: {error.message}", err=True)
        raise typer.Exit(exit_codes.CAN_NOT_START) from None
    except OSError as error:
        typer.echo(f"pdp: can not start: {error.filename}: {error.strerror}.", err=True)
        raise typer.Exit(exit_codes.CAN_NOT_START) from None


def _load_policy(config: Config) -> Loaded:
    from pdp.server.policy import load_policy  # noqa: PLC0415 - off the main thread

    return load_policy(config.policy, config.state_dir)
