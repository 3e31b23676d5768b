"""What verify finds, and what it can not find."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from pdp.audit.chain import HASH_PREFIX, MAX_LINE_BYTES, Problem
from pdp.audit.record import AuditError, AuditReceipt, AuditRecord
from pdp.audit.verify import Fault, verify

MakeRecord = Callable[..., AuditRecord]
WriteLog = Callable[..., list[AuditReceipt]]

FIRST_SEGMENT = "audit-0000000000000001.jsonl"


@pytest.fixture
def segment(directory: Path, record: MakeRecord, write_log: WriteLog) -> Path:
    """A log of one file with six records: start, r2 to r5, stop."""
    write_log(directory, [record(request_id=f"r{number}") for number in range(2, 6)])
    return directory / FIRST_SEGMENT


def fault_of(path: Path) -> Fault:
    fault = verify(path).fault
    assert fault is not None
    return fault


def lines_of(segment: Path) -> list[bytes]:
    return segment.read_bytes().splitlines(keepends=True)


def seal_anew(fields: dict[str, Any]) -> bytes:
    """A line whose hash is right, as one who can write the file would make it."""
    fields = {name: value for name, value in fields.items() if name != "hash"}
    digest = hashlib.sha256(HASH_PREFIX + rfc8785.dumps(fields)).hexdigest()
    return rfc8785.dumps(fields | {"hash": digest}) + b"\n"


def test_an_intact_log_is_counted(segment: Path) -> None:
    last = json.loads(lines_of(segment)[-1])
    for path in (segment, segment.parent):
        report = verify(path)
        assert report.is_intact
        assert (report.records, report.segments, report.epochs) == (6, 1, 1)
        assert (report.first_sequence, report.last_sequence) == (1, 6)
        assert report.last_hash == last["hash"]
        assert report.is_closed
        assert report.torn_bytes == 0
        assert report.has_receipt is None


def test_every_change_of_a_bit_is_found(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    write_log(directory, [record(detail={"n": 1})])
    segment = directory / FIRST_SEGMENT
    content = segment.read_bytes()
    missed = []
    descriptor = os.open(segment, os.O_RDWR)
    for offset, byte in enumerate(content):
        for bit in range(8):
            os.pwrite(descriptor, bytes([byte ^ 1 << bit]), offset)
            report = verify(segment)
            # Without its line feed the last line is a write that did not end.
            if report.is_intact and not (offset == len(content) - 1 and report.torn_bytes):
                missed.append((offset, bit))
        os.pwrite(descriptor, bytes([byte]), offset)
    os.close(descriptor)
    assert missed == []
    assert verify(segment).is_intact


def test_a_deleted_line_is_found(segment: Path) -> None:
    lines = lines_of(segment)
    for index in range(len(lines) - 1):
        segment.write_bytes(b"".join(lines[:index] + lines[index + 1 :]))
        fault = fault_of(segment.parent)
        assert fault.line == index + 1
        assert fault.sequence == index + 2
        assert fault.problem is (Problem.SEQUENCE_GAP if index else Problem.SEGMENT_MISSING)


def test_a_duplicated_line_is_found(segment: Path) -> None:
    lines = lines_of(segment)
    for source in range(len(lines)):
        for target in range(source + 1, len(lines) + 1):
            segment.write_bytes(b"".join([*lines[:target], lines[source], *lines[target:]]))
            fault = fault_of(segment)
            assert (fault.line, fault.problem) == (target + 1, Problem.DUPLICATE)


def test_two_swapped_lines_are_found(segment: Path) -> None:
    lines = lines_of(segment)
    for first in range(len(lines)):
        for second in range(first + 1, len(lines)):
            swapped = list(lines)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            segment.write_bytes(b"".join(swapped))
            assert fault_of(segment.parent).line == first + 1


def test_any_part_cut_out_of_the_middle_is_found(segment: Path) -> None:
    content = segment.read_bytes()
    for start in range(0, len(content) - 1, 37):
        for length in (1, 2, 100, len(lines_of(segment)[0])):
            if start + length < len(content):
                segment.write_bytes(content[:start] + content[start + length :])
                assert not verify(segment.parent).is_intact, (start, length)
        segment.write_bytes(content)


def test_a_log_that_is_sealed_anew_from_a_change_on_shows_against_a_receipt(
    segment: Path,
) -> None:
    lines = [json.loads(line) for line in lines_of(segment)]
    receipt = AuditReceipt(lines[3]["seq"], lines[3]["hash"])
    report = verify(segment.parent, receipt=receipt)
    assert report.is_intact
    assert report.has_receipt
    lines[2]["outcome"] = "denied"
    forged = []
    previous = lines[1]["hash"]
    for fields in lines[2:]:
        forged.append(seal_anew(fields | {"prev_hash": previous}))
        previous = json.loads(forged[-1])["hash"]
    segment.write_bytes(b"".join(lines_of(segment)[:2] + forged))
    assert verify(segment.parent).is_intact
    fault = verify(segment.parent, receipt=receipt).fault
    assert fault is not None
    assert (fault.line, fault.sequence, fault.problem) == (4, 4, Problem.RECEIPT_MISMATCH)


def test_a_cut_tail_shows_only_by_the_missing_stop_and_against_a_receipt(segment: Path) -> None:
    lines = lines_of(segment)
    receipt = AuditReceipt(5, json.loads(lines[4])["hash"])
    segment.write_bytes(b"".join(lines[:4]))
    report = verify(segment.parent)
    assert report.is_intact
    assert not report.is_closed
    report = verify(segment.parent, receipt=receipt)
    assert not report.has_receipt
    assert report.fault is not None
    assert (report.fault.line, report.fault.sequence) == (None, 5)
    assert report.fault.problem is Problem.RECEIPT_MISSING


def test_a_torn_tail_is_no_fault_and_is_counted(segment: Path) -> None:
    for torn in (b'{"action"', b"\x00" * 200_000):
        segment.write_bytes(segment.read_bytes() + torn)
    report = verify(segment.parent)
    assert report.is_intact
    assert report.torn_bytes == 200_009
    assert not report.is_closed


def test_a_line_that_is_too_long_is_a_fault(segment: Path) -> None:
    intact = segment.read_bytes()
    for length in (MAX_LINE_BYTES - 1, MAX_LINE_BYTES, 5 * MAX_LINE_BYTES):
        segment.write_bytes(intact + b" " * length + b"\n")
        fault = fault_of(segment)
        assert (fault.line, fault.problem) == (7, Problem.UNREADABLE)


@pytest.mark.parametrize(
    ("line", "problem"),
    (
        (b"", Problem.UNREADABLE),
        (b"[]", Problem.UNREADABLE),
        (b"\xff", Problem.UNREADABLE),
        (b'{"a":1,"a":1}', Problem.UNREADABLE),
        (b'{"a":NaN}', Problem.UNREADABLE),
        (b'{"a":9007199254740993}', Problem.UNREADABLE),
        (b"[" * 100_000, Problem.UNREADABLE),
        (b"{}", Problem.FIELD_MISSING),
    ),
)
def test_a_line_that_is_no_record_is_a_fault(segment: Path, line: bytes, problem: Problem) -> None:
    lines = lines_of(segment)
    segment.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    fault = fault_of(segment)
    assert (fault.file, fault.line, fault.problem) == (FIRST_SEGMENT, 3, problem)


REQUIRED = (
    *("v", "seq", "epoch", "time", "instance", "prev_hash", "type"),
    *("tenant_id", "actor_id", "action", "outcome", "reason_code"),
)


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_required_field_is_named(segment: Path, name: str) -> None:
    lines = lines_of(segment)
    fields = json.loads(lines[2])
    del fields[name]
    segment.write_bytes(b"".join([*lines[:2], seal_anew(fields), *lines[3:]]))
    fault = fault_of(segment)
    assert (fault.line, fault.problem) == (3, Problem.FIELD_MISSING)
    assert fault.message == f"{name} is missing"
    assert fault.sequence == (None if name == "seq" else 3)


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("v", 2),
        ("v", True),
        ("seq", "3"),
        ("seq", 0),
        ("seq", True),
        ("epoch", None),
        ("time", "2026-11-24T12:00:00Z"),
        ("time", "٢٠٢٦-11-24T12:00:00.000000Z"),
        ("prev_hash", "0" * 63),
        ("prev_hash", "A" * 64),
        ("tenant_id", 1),
        ("outcome", None),
        ("né", 1),
    ),
)
def test_a_field_of_another_form_is_a_fault(segment: Path, name: str, value: object) -> None:
    lines = lines_of(segment)
    fields = json.loads(lines[2]) | {name: value}
    segment.write_bytes(b"".join([*lines[:2], seal_anew(fields), *lines[3:]]))
    fault = fault_of(segment)
    assert (fault.line, fault.problem) == (3, Problem.FIELD_INVALID)


def test_a_field_of_a_later_version_is_no_fault(segment: Path) -> None:
    lines = lines_of(segment)
    fields = json.loads(lines[5]) | {"new_field": [1.5, "é"]}
    segment.write_bytes(b"".join([*lines[:5], seal_anew(fields)]))
    assert verify(segment).is_intact


@pytest.mark.parametrize(
    "spelling",
    (
        lambda fields: json.dumps(fields, sort_keys=True).encode(),
        lambda fields: json.dumps(fields, separators=(",", ":")).encode(),
        lambda fields: rfc8785.dumps(fields).replace(b"r3", b"\\u0072\\u0033"),
        lambda fields: rfc8785.dumps(fields).replace(b'"v":1', b'"v":1 '),
        lambda fields: rfc8785.dumps(fields) + b"\r",
    ),
)
def test_the_same_content_in_other_bytes_is_a_fault(
    segment: Path, spelling: Callable[[dict[str, Any]], bytes]
) -> None:
    lines = lines_of(segment)
    fields = dict(reversed(json.loads(lines[2]).items()))
    segment.write_bytes(b"".join([*lines[:2], spelling(fields) + b"\n", *lines[3:]]))
    fault = fault_of(segment)
    assert (fault.line, fault.sequence, fault.problem) == (3, 3, Problem.NOT_CANONICAL)


@pytest.mark.parametrize(
    ("index", "change", "problem"),
    (
        (0, {"prev_hash": "1" * 64}, Problem.PREV_HASH_MISMATCH),
        (0, {"epoch": 2}, Problem.EPOCH_INVALID),
        (0, {"type": "decision"}, Problem.EPOCH_INVALID),
        (2, {"prev_hash": "1" * 64}, Problem.PREV_HASH_MISMATCH),
        (2, {"epoch": 2}, Problem.EPOCH_INVALID),
        (2, {"type": "start"}, Problem.EPOCH_INVALID),
        (2, {"seq": 2}, Problem.DUPLICATE),
        (2, {"seq": 5}, Problem.SEQUENCE_GAP),
        (2, {"hash": "1" * 64}, Problem.HASH_MISMATCH),
    ),
)
def test_a_record_that_does_not_follow_is_a_fault(
    segment: Path, index: int, change: dict[str, Any], problem: Problem
) -> None:
    lines = lines_of(segment)
    fields = json.loads(lines[index]) | change
    line = rfc8785.dumps(fields) + b"\n" if "hash" in change else seal_anew(fields)
    segment.write_bytes(b"".join([*lines[:index], line, *lines[index + 1 :]]))
    fault = fault_of(segment.parent)
    assert (fault.line, fault.problem) == (index + 1, problem)


def test_nothing_follows_a_stop_record_but_a_start(segment: Path) -> None:
    lines = lines_of(segment)
    stop = json.loads(lines[5])
    after = seal_anew(json.loads(lines[2]) | {"seq": 7, "prev_hash": stop["hash"]})
    segment.write_bytes(b"".join([*lines, after]))
    fault = fault_of(segment)
    assert (fault.line, fault.problem) == (7, Problem.EPOCH_INVALID)


@pytest.fixture
def segments(directory: Path, record: MakeRecord, write_log: WriteLog) -> list[Path]:
    """A log of five files with two records each."""
    write_log(directory, [record(request_id="x" * 100)] * 8, segment_max_bytes=1_000)
    paths = sorted(directory.iterdir())
    assert len(paths) == 5
    return paths


def test_a_missing_segment_is_found_unless_it_is_the_newest(segments: list[Path]) -> None:
    for missing, following in itertools.pairwise(segments):
        content = missing.read_bytes()
        missing.unlink()
        fault = fault_of(missing.parent)
        assert (fault.file, fault.line) == (following.name, 1)
        assert fault.problem is Problem.SEGMENT_MISSING
        missing.write_bytes(content)
    segments[-1].unlink()
    report = verify(segments[0].parent)
    assert report.is_intact
    assert not report.is_closed


def test_each_segment_verifies_on_its_own_and_a_change_in_it_is_found(
    segments: list[Path],
) -> None:
    for number, path in enumerate(segments):
        report = verify(path)
        assert report.is_intact
        assert (report.records, report.first_sequence) == (2, 1 + 2 * number)
        path.write_bytes(path.read_bytes().replace(b"audit.st", b"audit.ts").replace(b"xx", b"xy"))
        assert fault_of(path).problem is Problem.HASH_MISMATCH


@pytest.mark.parametrize("left", (b"", b"{", b"\0" * 100))
def test_a_segment_without_a_whole_record_tells_by_its_name_what_is_missing(
    segments: list[Path], left: bytes
) -> None:
    segments[-1].write_bytes(left)
    assert verify(segments[0].parent).is_intact
    segments[-2].unlink()
    assert fault_of(segments[0].parent).problem is Problem.SEGMENT_MISSING


def test_a_copied_emptied_renamed_or_torn_segment_is_found(segments: list[Path]) -> None:
    directory = segments[0].parent
    copy = directory / "audit-0000000000000099.jsonl"
    shutil.copy(segments[1], copy)
    assert fault_of(directory).problem is Problem.DUPLICATE
    copy.write_bytes(b"")
    assert fault_of(directory).problem is Problem.SEGMENT_MISSING
    copy.unlink()
    segments[-1].rename(copy)
    assert fault_of(directory).problem is Problem.SEGMENT_MISNAMED
    copy.rename(segments[-1])
    segments[1].write_bytes(segments[1].read_bytes()[:-1])
    fault = fault_of(directory)
    assert (fault.file, fault.line, fault.problem) == (segments[1].name, 2, Problem.UNREADABLE)


def test_other_files_in_the_directory_are_no_part_of_the_log(segments: list[Path]) -> None:
    for name in ("audit-0000000000000001.torn-2", "audit-1.jsonl", "notes", "xaudit-1.jsonl"):
        (segments[0].parent / name).write_bytes(b"garbage")
    assert verify(segments[0].parent).is_intact


def test_nothing_to_verify_is_an_error_and_never_intact(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="holds no audit log"):
        verify(tmp_path)
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "absent")


def test_a_fault_never_shows_the_content(segment: Path) -> None:
    lines = lines_of(segment)
    for broken in (b'{"secret-7":', b'{"secret-7":1}', lines[2].replace(b"r3", b"secret-7")):
        segment.write_bytes(b"".join([*lines[:2], broken.rstrip() + b"\n"]))
        assert "secret-7" not in repr(verify(segment))
