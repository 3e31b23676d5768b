"""The newest lines of a log, and those that follow."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdp.audit.record import AuditReceipt, AuditRecord
from pdp.audit.tail import Position, follow_lines, newest_lines

MakeRecord = Callable[..., AuditRecord]
WriteLog = Callable[..., list[AuditReceipt]]


def any_line(_line: bytes) -> bool:
    return True


def sequences(lines: list[bytes]) -> list[int]:
    return [json.loads(line)["seq"] for line in lines]


@pytest.mark.parametrize("segment_max_bytes", (1, 1_000, 2**20))
@pytest.mark.parametrize("size", (1, 30_000))
def test_the_newest_lines_come_in_their_order_from_as_many_segments_as_need_be(
    directory: Path, record: MakeRecord, write_log: WriteLog, segment_max_bytes: int, size: int
) -> None:
    write_log(directory, [record(request_id="x" * size)] * 8, segment_max_bytes=segment_max_bytes)
    for count in (0, 1, 3, 9, 10, 11):
        lines, _ = newest_lines(directory, count=count, wanted=any_line)
        assert sequences(lines) == list(range(1, 11))[max(0, 10 - count) :]
    lines, _ = newest_lines(directory, count=2, wanted=lambda line: json.loads(line)["seq"] < 5)
    assert sequences(lines) == [3, 4]


def test_a_torn_line_is_not_shown(directory: Path, record: MakeRecord, write_log: WriteLog) -> None:
    write_log(directory, [record()])
    (segment,) = directory.iterdir()
    whole = segment.stat().st_size
    with segment.open("ab") as file:
        file.write(b'{"action"')
    lines, position = newest_lines(segment, count=1, wanted=any_line)
    assert sequences(lines) == [3]
    assert position == Position(segment, whole)


class NothingNewError(Exception):
    """Raised instead of waiting."""


def take_until_waiting(follower: Iterator[bytes]) -> list[int]:
    taken: list[int] = []
    with contextlib.suppress(NothingNewError):
        taken.extend(json.loads(line)["seq"] for line in follower)
    return taken


def test_following_goes_on_over_segments_and_starts(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    directory.mkdir()
    waits = itertools.count()

    def work_while_waiting() -> None:
        turn = next(waits)
        if turn == 3:
            raise NothingNewError
        write_log(directory, [record()] * 3, segment_max_bytes=1_000)

    lines, position = newest_lines(directory, count=10, wanted=any_line)
    assert (lines, position) == ([], Position(None, 0))
    follower = follow_lines(directory, position, wait=work_while_waiting)
    assert take_until_waiting(follower) == list(range(1, 16))


def test_following_shows_a_line_once_it_is_whole(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    write_log(directory, [record()])
    (segment,) = directory.iterdir()
    start, written, stop = segment.read_bytes().splitlines(keepends=True)
    states = iter((start + written[:10], start + written + stop[:5], start, start + written))
    segment.write_bytes(start)
    _, position = newest_lines(directory, count=0, wanted=any_line)

    def go_on() -> None:
        content = next(states, None)
        if content is None:
            raise NothingNewError
        segment.write_bytes(content)

    # The last line was taken back, as after a write that failed, and written again.
    assert take_until_waiting(follow_lines(directory, position, wait=go_on)) == [2, 2]
