"""The command ``pdp``: one file per command."""

from __future__ import annotations


def main() -> None:
    """The entry point."""
    from pdp.cli.app import app  # noqa: PLC0415 - the package itself imports nothing

    app()
