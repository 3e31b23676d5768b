"""The command ``pdp``: one file per command."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    """The entry point."""
    # The package itself imports nothing, and a sidecar that starts no other command. Told
    # no more than its configuration, it needs none of what reads arguments either.
    match sys.argv[1:]:
        case ["serve", "--config" | "-c", path] if not path.startswith("-"):
            try:
                from pdp.cli.run_sidecar import run  # noqa: PLC0415

                sys.exit(run(Path(path)))
            except KeyboardInterrupt:
                sys.exit(130)  # as typer does
        case ["serve", *_]:
            from pdp.cli.serve import app  # noqa: PLC0415
        case _:
            from pdp.cli.app import app  # noqa: PLC0415
    app()
