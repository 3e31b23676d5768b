"""The command ``pdp``: one file per command."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point."""
    # The package itself imports nothing, and a sidecar that starts no other command.
    if sys.argv[1:2] == ["serve"]:
        from pdp.cli.serve import app  # noqa: PLC0415
    else:
        from pdp.cli.app import app  # noqa: PLC0415

    app()
