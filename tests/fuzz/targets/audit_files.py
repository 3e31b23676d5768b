"""Audit logs, as a crash, a broken disk or a liar leaves them (pdp.audit)."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from pdp.audit.chain import FIRST_PREV_HASH, START, STOP, encode, seal
from pdp.audit.record import AuditError, AuditReceipt, AuditRecord, Outcome
from pdp.audit.recovery import find_chain_end
from pdp.audit.segments import segment_path
from pdp.audit.verify import VerifyReport, verify
from tests.fuzz.choices import Choices, edited_bytes
from tests.fuzz.contract import SECRET, refuses

SPACE: Final = Path(tempfile.mkdtemp(prefix="fuzz-audit-"))
atexit.register(shutil.rmtree, SPACE, ignore_errors=True)
RECORDS: Final = 6


def _written() -> Iterator[tuple[bytes, str]]:
    """Lines of a log in good order, and the hash of each."""
    previous = FIRST_PREV_HASH
    kinds = [START, "decision", "budget", STOP, START, "outcome"]
    for sequence, kind in enumerate(kinds, 1):
        record = AuditRecord(
            type=kind,
            tenant_id="tenant_acme",
            actor_id=SECRET,
            action="orders.update",
            outcome=Outcome.ALLOWED,
            reason_code="allowed",
            detail={"n": [0.5, "\u20ac\r", None]},
        )
        line, previous = seal(
            encode(record, instance="i-1"),
            sequence=sequence,
            epoch=1 if sequence < 5 else 2,
            time_ns=1_800_000_000_000_000_000 + sequence,
            prev_hash=previous,
        )
        yield line, previous


WRITTEN: Final[Sequence[tuple[bytes, str]]] = list(_written())
LINES: Final = [line for line, _ in WRITTEN]
RECEIPT: Final = AuditReceipt(RECORDS, WRITTEN[-1][1])


def samples() -> Iterable[bytes]:
    yield b"\0"
    yield b"\1\0"
    yield b"\3"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    split = choices.number(RECORDS)
    """How many lines stand in a first segment; 0: there is one segment."""
    segments = {1: b"".join(LINES[split:])}
    if split:
        segments = {1: b"".join(LINES[:split]), split + 1: b"".join(LINES[split:])}
    if choices.yes():
        lines = _moved(choices)
        segments = {1: b"".join(lines)}
    changed = {
        first + choices.number(2) * choices.number(4): edited_bytes(content, choices)
        for first, content in segments.items()
    }
    return _check(changed, by_receipt=choices.number(2) == 0)


def _moved(choices: Choices) -> list[bytes]:
    """Lines left out, doubled and in another order."""
    lines = list(LINES)
    for _ in range(choices.number(4)):
        at = choices.number(len(lines))
        match choices.number(3):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(choices.number(len(lines)), lines[at])
            case _:
                lines.append(lines.pop(at))
    return lines


def _check(segments: dict[int, bytes], *, by_receipt: bool) -> bool:
    for path in SPACE.iterdir():
        path.unlink()
    for first, content in segments.items():
        segment_path(SPACE, first).write_bytes(content)
    before = _verified(by_receipt=by_receipt)
    content = b"".join(content for _, content in sorted(segments.items()))
    if before.is_intact:
        # Nothing is taken for whole that was not written, in its order and from its start.
        kept = len(content) - before.torn_bytes
        assert b"".join(LINES).startswith(content[:kept])
        assert content[:kept].count(b"\n") == before.records
        if by_receipt:
            assert before.records == RECORDS, "a cut log holds the record of the receipt"
    end = refuses(lambda: find_chain_end(SPACE), AuditError)
    if end is None:
        assert not before.is_intact, "a log in good order can not be written any more"
        return False
    # Whatever was whole is still there, and what was cut off lies beside it.
    after = b"".join(segment_path(SPACE, first).read_bytes() for first in sorted(segments))
    torn = b"".join(path.read_bytes() for path in sorted(SPACE.glob("*.torn-*")))
    assert after + torn == content
    assert len(torn) == end.torn_bytes
    assert after == b"" or after.endswith(b"\n")
    if before.is_intact:
        assert before.torn_bytes == end.torn_bytes
        assert (end.last.sequence if end.last else 0) == before.records
    else:
        # What recovery has let pass in a log that is broken is what it says it does not look
        # at, or a torn write that ends like a line. Whole records are cut off only behind
        # zeros, which stand for what the disk never had.
        whole = torn.partition(b"\0")[0] if b"\0" in torn else torn
        assert not set(LINES) & set(whole.splitlines(keepends=True))
    again = find_chain_end(SPACE)
    assert (again.last, again.torn_bytes) == (end.last, 0)
    return before.is_intact


def _verified(*, by_receipt: bool) -> VerifyReport:
    report = verify(SPACE, receipt=RECEIPT if by_receipt else None)
    assert SECRET not in str(report)
    return report
