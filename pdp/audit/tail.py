"""The newest records of a log, and those that come after them, as lines.

Nothing is verified here: a reader of the newest lines wants them at once.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdp.audit.segments import end_of_last_line, list_segments

_CHUNK_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Position:
    """How far a log is read."""

    file: Path | None
    """None while there is no file."""
    offset: int


def newest_lines(
    path: Path, *, count: int, wanted: Callable[[bytes], bool]
) -> tuple[list[bytes], Position]:
    """The last ``count`` whole lines that are wanted, oldest first, and where the
    log goes on. ``path`` is a directory of segments or one of them. Raises OSError.
    """
    files = _files(path)
    if not files:
        return [], Position(None, 0)
    end = end_of_last_line(files[-1], files[-1].stat().st_size)
    backwards = itertools.chain(
        _lines_backwards(files[-1], end),
        *(_lines_backwards(file, file.stat().st_size) for file in reversed(files[:-1])),
    )
    lines = list(itertools.islice(filter(wanted, backwards), count))
    return lines[::-1], Position(files[-1], end)


def follow_lines(path: Path, position: Position, *, wait: Callable[[], None]) -> Iterator[bytes]:
    """Whole lines from ``position`` on, for ever; calls ``wait`` when there is none
    yet. Goes on to the next segment when there is one. Raises OSError.
    """
    file, offset = position.file, position.offset
    while True:
        files = _files(path)  # before the lines: a segment is whole when it has a next
        if file is not None:
            for line in _lines_from(file, offset):
                offset += len(line)
                yield line[:-1]
            # The log takes back a write that failed half way.
            offset = min(offset, file.stat().st_size)
        later = [each for each in files if file is None or each > file]
        if later:
            file, offset = later[0], 0
        else:
            wait()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [segment.path for segment in list_segments(path)]
    return [path]


def _lines_backwards(path: Path, end: int) -> Iterator[bytes]:
    """The lines before ``end``, which is the end of one, the last one first."""
    if end == 0:
        return
    with path.open("rb") as file:
        rest = b""
        position = end - 1
        while position > 0:
            start = max(0, position - _CHUNK_BYTES)
            first, *lines = (os.pread(file.fileno(), position - start, start) + rest).split(b"\n")
            yield from reversed(lines)
            rest, position = first, start
        yield rest


def _lines_from(path: Path, offset: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if line.endswith(b"\n"):
                yield line
