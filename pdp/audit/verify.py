"""Whether a log is what was written: every record, and every link between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pdp.audit.chain import (
    MAX_LINE_BYTES,
    STOP,
    BrokenRecordError,
    Link,
    Problem,
    check_first,
    check_follows,
    read_link,
)
from pdp.audit.record import AuditError, AuditReceipt
from pdp.audit.segments import Segment, list_segments
from pdp.reason import ReasonCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The first record that is wrong."""

    file: str
    line: int | None
    """From 1; None when it is not a line that is wrong, but one that is missing."""
    sequence: int | None
    """As the record itself says, if it can be read."""
    problem: Problem
    message: str
    """What is wrong, without the record's content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was found, up to the first fault."""

    records: int
    segments: int
    epochs: int
    first_sequence: int | None
    last_sequence: int | None
    last_hash: str | None
    is_closed: bool
    """The last record ends its epoch cleanly. When it does not, the log is in use,
    its sidecar was killed, or its end was cut off."""
    torn_bytes: int
    """What follows the last line feed of the newest segment: a write that did not
    end, so nobody was told that it is recorded."""
    has_receipt: bool | None
    """The record of the expected receipt is there; None if none was given."""
    fault: Fault | None

    @property
    def is_intact(self) -> bool:
        """Nothing is wrong. A cut tail shows only against a receipt, or by a stop
        record that should be there.
        """
        return self.fault is None


def verify(path: Path, *, receipt: AuditReceipt | None = None) -> VerifyReport:
    """Verify a directory of segments, which must begin with record 1, or one
    segment. Reads line by line, in constant memory, and stops at the first fault.

    Raises AuditError when there is nothing to verify, and OSError when it can not
    be read.
    """
    is_whole_log = path.is_dir()
    segments = list_segments(path) if is_whole_log else [Segment(0, path)]
    if not segments:
        raise AuditError(
            ReasonCode.AUDIT_UNAVAILABLE,
            f"{path} holds no audit log: name the directory with the files audit-*.jsonl.",
        )
    walk = _Walk(is_whole_log=is_whole_log, receipt=receipt)
    fault = walk.through(segments)
    if fault is None and receipt is not None and not walk.has_receipt:
        fault = Fault(
            file=segments[-1].path.name,
            line=None,
            sequence=receipt.sequence,
            problem=Problem.RECEIPT_MISSING,
            message="the log does not hold the record of the receipt: it was cut off",
        )
    return VerifyReport(
        records=walk.records,
        segments=walk.segments,
        epochs=walk.epochs,
        first_sequence=walk.first_sequence,
        last_sequence=walk.last.sequence if walk.last else None,
        last_hash=walk.last.hash if walk.last else None,
        is_closed=walk.last is not None and walk.last.type == STOP and not walk.torn_bytes,
        torn_bytes=walk.torn_bytes,
        has_receipt=None if receipt is None else walk.has_receipt,
        fault=fault,
    )


class _Walk:
    """Goes through the records in their order, and counts."""

    def __init__(self, *, is_whole_log: bool, receipt: AuditReceipt | None) -> None:
        self._is_whole_log = is_whole_log
        self._receipt = receipt
        self.records = 0
        self.segments = 0
        self.epochs = 0
        self.first_sequence: int | None = None
        self.last: Link | None = None
        self.torn_bytes = 0
        self.has_receipt = False

    def through(self, segments: Sequence[Segment]) -> Fault | None:
        """The first fault, if there is one."""
        for segment in segments:
            self.segments += 1
            number = 0
            try:
                for number, line in enumerate(_lines(segment.path), 1):
                    if line.is_ended:
                        self._take(line.text, segment if number == 1 else None)
                    elif segment is segments[-1]:
                        self.torn_bytes = line.size
                    else:
                        raise BrokenRecordError(Problem.UNREADABLE, "the line does not end")
                if number == (1 if self.torn_bytes else 0):
                    # No whole record says where it belongs, so its name does.
                    self._check_place(segment, segment.first_sequence)
            except BrokenRecordError as error:
                return Fault(
                    file=segment.path.name,
                    line=number or None,
                    sequence=error.sequence,
                    problem=error.problem,
                    message=error.message,
                )
        return None

    def _take(self, line: bytes, begins: Segment | None) -> None:
        """Check the next line, which may begin a segment. Raises BrokenRecordError."""
        link = read_link(line)
        if begins is not None:
            self._check_place(begins, link.sequence)
        if self.last is not None:
            check_follows(link, self.last)
        elif link.sequence == 1:
            check_first(link)
        if self._receipt is not None and link.sequence == self._receipt.sequence:
            if link.hash != self._receipt.hash:
                raise BrokenRecordError(
                    Problem.RECEIPT_MISMATCH,
                    "the record is not that of the receipt: the log was written anew",
                    sequence=link.sequence,
                )
            self.has_receipt = True
        if self.last is None or link.epoch != self.last.epoch:
            self.epochs += 1
        if self.first_sequence is None:
            self.first_sequence = link.sequence
        self.records += 1
        self.last = link

    def _check_place(self, segment: Segment, sequence: int) -> None:
        """Check that a segment which begins with ``sequence`` is the next one."""
        if not self._is_whole_log:
            return
        due = self.last.sequence + 1 if self.last else 1
        if sequence > due:
            raise BrokenRecordError(
                Problem.SEGMENT_MISSING,
                f"the segment begins with record {sequence}, and {due} is due: the records"
                " between them are missing",
                sequence=sequence,
            )
        if sequence == due != segment.first_sequence:
            raise BrokenRecordError(
                Problem.SEGMENT_MISNAMED,
                f"the segment begins with record {sequence}, and its name says otherwise",
                sequence=sequence,
            )


class _Line(NamedTuple):
    text: bytes
    """Without its line feed, and no more of it than makes it too long."""
    size: int
    is_ended: bool


def _lines(path: Path) -> Iterator[_Line]:
    with path.open("rb") as file:
        while text := file.readline(MAX_LINE_BYTES + 1):
            size, part = len(text), text
            while not part.endswith(b"\n") and (part := file.readline(MAX_LINE_BYTES)):
                size += len(part)
            yield _Line(text.removesuffix(b"\n"), size, is_ended=part.endswith(b"\n"))
