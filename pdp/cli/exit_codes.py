"""Exit codes of the commands; docs/cli.md lists them for people."""

from __future__ import annotations

from typing import Final

OK: Final = 0
"""Done."""
FAILED: Final = 1
"""What was asked for was done and the answer is no: a broken chain, a failed demo."""
USAGE: Final = 2
"""The command line or the configuration is wrong, or a file can not be read."""
CAN_NOT_START: Final = 3
"""The sidecar can not start: socket, state directory, key or bundle."""
