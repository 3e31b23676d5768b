"""A machine whose clock and disk go wrong, for the processes that run on it.

They run with ``faulty_machine.c`` preloaded. A real clock can not be set for one process,
and a real disk can not be made to hang; that a disk is full needs none of this, and is
tried with a small file system.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import subprocess
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Final

from pdp.closing import Closing
from tests.faults.disk import compiler

_SOURCE: Final = Path(__file__).with_name("faulty_machine.c")
_ORDERS: Final = struct.Struct("=qii4096s")


class Trouble(IntEnum):
    """What is the matter with the disk. As in faulty_machine.c."""

    WELL = 0
    GONE = 1
    """Every access fails: EIO."""
    SLOW = 2
    """Every write and sync takes 50 ms."""
    HANGING = 3
    """No access ends before it is well again."""
    TORN = 4
    """Of each write a half arrives, and the rest fails: EIO."""
    READ_ONLY = 5
    """No write succeeds, in files that are open already either: EROFS. So Linux goes on with
    a file system in which it has found errors."""


class Machine(Closing):
    """The clock, and the disk that all files lie on whose path begins with ``files``. Processes
    get there with ``environment``.
    """

    def __init__(self, tools: Path, files: Path) -> None:
        cc = compiler()
        assert cc is not None, "no C compiler"
        library = tools / "faulty_machine.so"
        subprocess.run([cc, "-O2", "-shared", "-fPIC", "-o", library, _SOURCE, "-ldl"], check=True)
        self._file = tools / "faulty_machine.orders"
        self._file.write_bytes(_ORDERS.pack(0, Trouble.WELL, 0, bytes(files)))
        with self._file.open("r+b") as file:
            self._orders = mmap.mmap(file.fileno(), _ORDERS.size)
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(library),
            "FAULTY_MACHINE": str(self._file),
        }

    @contextlib.contextmanager
    def ahead(self, seconds: int) -> Iterator[None]:
        """The wall clock is so far ahead, or behind where that is negative."""
        self._orders[:8] = struct.pack("=q", seconds)
        try:
            yield
        finally:
            self._orders[:8] = struct.pack("=q", 0)

    @contextlib.contextmanager
    def disk(self, trouble: Trouble) -> Iterator[None]:
        """Something is the matter with these files."""
        self._orders[8:12] = struct.pack("=i", trouble)
        try:
            yield
        finally:
            self._orders[8:12] = struct.pack("=i", Trouble.WELL)

    @property
    def struck(self) -> int:
        """How often there was trouble with the disk."""
        struck: int = _ORDERS.unpack(self._orders)[2]
        return struck

    def close(self) -> None:
        self._orders.close()
