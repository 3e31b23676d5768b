"""Where the chain ends, when a log is opened again after whatever happened to it.

What a write that did not end left behind was never acknowledged, and what loss of
power left of records that were not synced counts as lost: it is cut off and kept beside
the log. Anything else that is wrong is not repaired.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from pdp.audit.chain import (
    MAX_LINE_BYTES,
    START,
    BrokenRecordError,
    Link,
    Problem,
    check_follows,
    read_link,
)
from pdp.audit.record import AuditError
from pdp.audit.segments import Segment, end_of_last_line, list_segments
from pdp.private_files import sync_directory
from pdp.reason import ReasonCode

CHECKED_BYTES: Final = 1024 * 1024
"""How much of the newest segment's end is checked before it is written to, so that
a start takes no longer when the log is long. ``pdp audit verify`` checks all."""

UNSYNCED_BYTES: Final = 16 * 1024 * 1024
"""How much of the newest segment's end may not have reached the disk when power was lost:
more than is written between two syncs."""

_CHUNK_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """Where to go on."""

    last: Link | None
    """The last record; None in a new log."""
    segment: Path | None
    """The newest segment, which ends with a whole record or is empty."""
    torn_bytes: int
    """How much was cut off its end."""


def find_chain_end(directory: Path) -> ChainEnd:
    """Find the last record, and cut off what a torn write left after it.

    Raises OSError, and AuditError when the log is broken.
    """
    segments = list_segments(directory)
    if not segments:
        return ChainEnd(last=None, segment=None, torn_bytes=0)
    newest = segments[-1]
    size, last, torn_bytes = _read_end(newest)
    if last is None:
        if len(segments) > 1:
            last = _last_of(segments[-2])
        if newest.first_sequence != (last.sequence + 1 if last else 1):
            raise _broken(newest, "records before it are missing")
    if torn_bytes:
        _cut(newest.path, size, epoch=last.epoch + 1 if last else 1)
    return ChainEnd(last=last, segment=newest.path, torn_bytes=torn_bytes)


def _last_of(segment: Segment) -> Link:
    """The last record of a segment that is not the newest, so can not be torn."""
    _, last, torn_bytes = _read_end(segment)
    if last is None or torn_bytes:
        raise _broken(segment, "it does not end with a whole record")
    return last


def _read_end(segment: Segment) -> tuple[int, Link | None, int]:
    """How many bytes are whole records, the last of these, and how many bytes of a
    torn write follow. Memory is bounded, however long the segment is.
    """
    with segment.path.open("rb") as file:
        file_size = file.seek(0, os.SEEK_END)
        hole = _find_hole(file, file_size)
        _check_unsynced(segment, file, hole)
        whole = end_of_last_line(segment.path, hole)
        start = max(0, whole - CHECKED_BYTES)
        file.seek(start)
        lines = file.read(whole - start).splitlines(keepends=True)
    if start:
        del lines[0]  # it began before
    last: Link | None = None
    for number, line in enumerate(lines, 1):
        try:
            link = read_link(line[:-1])
            if last is not None:
                check_follows(link, last)
        except BrokenRecordError as error:
            is_torn = error.problem is Problem.UNREADABLE and number == len(lines)
            if is_torn and whole == file_size:
                whole -= len(line)
                break
            name = "a record" if error.sequence is None else f"record {error.sequence}"
            raise _broken(segment, f"{name}: {error.message}") from None
        last = link
    return whole, last, file_size - whole


def _find_hole(file: BinaryIO, size: int) -> int:
    """Where the first zero byte is that was not synced; ``size`` if there is none.

    Loss of power can keep a page from the disk and not the one after it. What is missing
    then reads as zeros, which no record holds, and what follows it, whole as it may be, was
    not synced either.
    """
    start = max(0, size - UNSYNCED_BYTES)
    file.seek(start)
    for offset in range(start, size, _CHUNK_BYTES):
        found = file.read(_CHUNK_BYTES).find(0)
        if found >= 0:
            return offset + found
    return size


def _check_unsynced(segment: Segment, file: BinaryIO, hole: int) -> None:
    """Check that what follows the hole may not have been synced. An epoch begins after all
    before it was, so zeros there are no loss of power. Raises AuditError.
    """
    file.seek(hole)
    while line := file.readline(MAX_LINE_BYTES):
        try:
            link = read_link(line[:-1])
        except BrokenRecordError:
            continue
        if link.type == START:
            raise _broken(segment, f"before record {link.sequence} stand zeros")


def _cut(path: Path, size: int, *, epoch: int) -> None:
    """Move what lies past ``size`` into a file of its own."""
    torn_path = path.with_name(f"{path.stem}.torn-{epoch}")
    # Appended, since an earlier start of this epoch may have failed right here.
    torn = os.open(
        torn_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    with path.open("r+b") as file, os.fdopen(torn, "wb") as copy:
        file.seek(size)
        while chunk := file.read(_CHUNK_BYTES):
            copy.write(chunk)
        copy.flush()
        os.fsync(copy.fileno())
        sync_directory(path.parent)
        file.truncate(size)
        os.fsync(file.fileno())


def _broken(segment: Segment, what: str) -> AuditError:
    return AuditError(
        ReasonCode.AUDIT_UNAVAILABLE,
        f"{segment.path} is broken: {what}. Run `pdp audit verify {segment.path.parent}` to see"
        " all of it, put the directory aside as evidence, and start with another one.",
    )
