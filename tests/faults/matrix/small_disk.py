"""A small file system, which is soon full. Mounting it takes root."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pdp.closing import Closing

_SIZE: Final = "16m"
_BLOCK: Final = bytes(64 * 1024)


class SmallDisk(Closing):
    """Mounted over a folder that exists."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        options = f"size={_SIZE},mode=0700"
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "pdp-matrix", str(folder)],  # noqa: S607 - the system's
            check=True,
        )

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Not one byte more has room."""
        ballast = self._folder / "ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(_BLOCK)
        assert shutil.disk_usage(self._folder).free == 0
        try:
            yield
        finally:
            ballast.unlink()

    def close(self) -> None:
        """Lazily, as what is stopped may still let go of its files."""
        subprocess.run(["umount", "--lazy", str(self._folder)], check=True)  # noqa: S607 - as above
