"""``pdp serve``: run the sidecar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pdp.cli import exit_codes

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
    import gc  # noqa: PLC0415 - start-up imports only what the command needs
    import logging  # noqa: PLC0415
    import os  # noqa: PLC0415
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    # Until it serves: what imports and a large policy make is there to stay.
    gc.disable()
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

    # Read when gRPC is imported. Its handlers would otherwise run in each OPA that is begun
    # while calls are under way, before that becomes OPA, and crash it now and then.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
    # Also read then. Below errors it writes what a peer says of itself, line ends included, into
    # the log: anybody could write lines of ours there.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # gRPC's newer kind of listener hands each message to a thread of its own before ours sees
    # it, which costs a sixth of an empty round trip. A version without the older kind says so
    # in the log, and goes on.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

    # Compiling the policy takes about as long as importing the rest: both at once. Imports
    # of two threads slow each other down, so what compiles is imported first.
    from pdp.server.policy import load_policy  # noqa: PLC0415

    if settings.policy.engine == "embedded":
        import pdp.policy.wasm  # noqa: F401, PLC0415 - for the loader
    loader = ThreadPoolExecutor(1, thread_name_prefix="policy-loader")
    policy = loader.submit(load_policy, settings.policy, settings.state_dir)
    loader.shutdown(wait=False)
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
