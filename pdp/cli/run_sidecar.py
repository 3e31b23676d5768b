"""Run the sidecar: what ``pdp serve`` does, once its arguments are read.

Apart from the command, for typer and the pydantic that it imports take more time than a
third of all else that is imported here, and stay in memory.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pdp.cli import exit_codes


def run(config: Path) -> int:
    """Run the sidecar until SIGTERM, and return the exit code."""
    # Until it serves: what imports and a large policy make is there to stay.
    gc.disable()
    from pdp.config import ConfigError, load_config  # noqa: PLC0415 - not before that
    from pdp.errors import PdpError  # noqa: PLC0415

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        settings = load_config(config, os.environ, files_must_exist=True)
    except ConfigError as error:
        _say(error.message)
        return exit_codes.USAGE

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
            sidecar.serve(settings, loaded=policy, started=lambda line: _say(f"pdp: {line}"))
        )
    except PdpError as error:
        _say(f"pdp: {error.message}")
        return exit_codes.CAN_NOT_START
    except OSError as error:
        _say(f"pdp: can not start: {error.filename}: {error.strerror}.")
        return exit_codes.CAN_NOT_START
    return exit_codes.OK


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
