"""The files of a log: each holds the records from one sequence number on."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from pathlib import Path
from typing import Final, NamedTuple

from pdp.private_files import sync_directory


class Segment(NamedTuple):
    """A file of the log, as its name says."""

    first_sequence: int
    path: Path


class DamagedError(Exception):
    """It can not be told any more what the file holds, or will hold after a loss
    of power: nothing may be written after it.
    """


def segment_path(directory: Path, first_sequence: int) -> Path:
    """Where the segment that begins with a record lies."""
    return directory / f"audit-{first_sequence:016d}.jsonl"


def list_segments(directory: Path) -> list[Segment]:
    """The segments in a directory, in their order. Raises OSError."""
    return sorted(
        Segment(int(match[1]), path)
        for path in directory.iterdir()
        if (match := _SEGMENT_NAME.fullmatch(path.name)) is not None
    )


def end_of_last_line(path: Path, size: int) -> int:
    """The offset after the last line feed within ``size``; 0 if there is none.
    Raises OSError.
    """
    with path.open("rb") as file:
        end = size
        while end > 0:
            start = max(0, end - _CHUNK_BYTES)
            found = os.pread(file.fileno(), end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def create_segment(path: Path) -> int:
    """Create a file that nobody but its owner may read, to append to, and make
    its name durable. Raises OSError, and leaves no file then.
    """
    descriptor = os.open(path, _APPEND | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        sync_directory(path.parent)
    except OSError:
        os.close(descriptor)
        path.unlink()
        raise
    return descriptor


class SegmentWriter:
    """Appends to the newest segment, and begins a new one past ``max_bytes``.

    ``newest`` is the segment to go on with, if there is one; it ends with a whole
    record. Only one thread may write; another one may sync meanwhile.
    """

    def __init__(self, directory: Path, *, max_bytes: int, newest: Path | None) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._descriptor: int | None = None
        self._size = 0
        self._exchange = threading.Lock()
        """Held while the descriptor is synced or exchanged."""
        if newest is not None:
            self._descriptor = os.open(newest, _APPEND)
            os.fchmod(self._descriptor, 0o600)
            self._size = os.fstat(self._descriptor).st_size

    def write(self, lines: bytes, *, first_sequence: int, sync: bool) -> None:
        """Append whole lines, whose first record has ``first_sequence``: all of
        them, or nothing and OSError. DamagedError when it can be neither, or when
        they were to be synced and could not be.
        """
        descriptor = self._descriptor
        if descriptor is None or (self._size and self._size + len(lines) > self._max_bytes):
            descriptor = self._begin(first_sequence)
        try:
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            # A disk that takes no bytes, such as one that became read-only, may not let
            # any be cut off either; and there are none.
            if len(rest) < len(lines):
                self._take_back(descriptor)
            raise
        if sync:
            try:
                self.sync()
            except DamagedError:
                # Nobody gets an answer, so the next start had better not find them.
                with contextlib.suppress(DamagedError):
                    self._take_back(descriptor)
                raise
        self._size += len(lines)

    def sync(self) -> None:
        """Wait until the disk holds what was written. Raises DamagedError.

        After a sync that failed, Linux marks the pages clean all the same, and
        the next sync succeeds without having written them ("fsyncgate",
        https://lwn.net/Articles/752063/). So it is never tried again: the log
        stays closed for writing until a new process reads the file anew.
        """
        with self._exchange:
            if self._descriptor is not None:
                try:
                    os.fdatasync(self._descriptor)
                except OSError as error:
                    raise DamagedError from error

    def close(self) -> None:
        """Let go of the file, without a sync."""
        with self._exchange:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _begin(self, first_sequence: int) -> int:
        # A segment is whole on disk before there is a next one, so that only the
        # newest can end torn.
        self.sync()
        path = segment_path(self._directory, first_sequence)
        descriptor = create_segment(path)
        with self._exchange:
            if self._descriptor is not None:
                with contextlib.suppress(OSError):  # it is synced
                    os.close(self._descriptor)
            self._descriptor = descriptor
            self._size = 0
        return descriptor

    def _take_back(self, descriptor: int) -> None:
        """Cut off what was written after the last whole write."""
        try:
            os.ftruncate(descriptor, self._size)
        except OSError as error:
            raise DamagedError from error


_SEGMENT_NAME: Final = re.compile(r"audit-([0-9]{16})\.jsonl")
_CHUNK_BYTES: Final = 64 * 1024
_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
