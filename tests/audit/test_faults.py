"""What the log promises when a write, a sync, or the process ends too early."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdp.audit import log as audit_log
from pdp.audit.chain import Problem
from pdp.audit.log import ChainedAuditLog
from pdp.audit.record import AuditError, AuditReceipt, AuditRecord
from pdp.audit.recovery import CHECKED_BYTES
from pdp.audit.verify import verify
from pdp.off_loop import run_off_loop
from pdp.storage import Durability

MakeRecord = Callable[..., AuditRecord]
OpenLog = Callable[..., ChainedAuditLog]
WriteLog = Callable[..., list[AuditReceipt]]

FIRST_SEGMENT = "audit-0000000000000001.jsonl"


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def restart(directory: Path, open_log: OpenLog) -> None:
    asyncio.run(open_log(directory).close())


def test_a_torn_record_is_cut_off_wherever_it_was_torn(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record(request_id="r1")])
    segment = directory / FIRST_SEGMENT
    start, written, last = segment.read_bytes().splitlines(keepends=True)
    for length in range(len(last)):
        for path in directory.iterdir():
            path.unlink()
        segment.write_bytes(start + written + last[:length])
        report = verify(directory)
        assert report.is_intact
        assert (report.records, report.torn_bytes, report.is_closed) == (2, length, False)
        restart(directory, open_log)
        report = verify(directory)
        assert report.is_intact
        assert (report.records, report.epochs, report.torn_bytes) == (4, 2, 0)
        detail = json.loads(segment.read_bytes().splitlines()[2])["detail"]
        torn = directory / "audit-0000000000000001.torn-2"
        if length:
            assert detail["torn_bytes"] == length
            assert torn.read_bytes() == last[:length]
            assert torn.stat().st_mode & 0o777 == 0o600
        else:
            assert "torn_bytes" not in detail
            assert not torn.exists()


@pytest.mark.parametrize(
    "torn", (b"\x00" * 300, b"\x00" * 300_000, b'{"v":1,"a\x00\x00\x00\n', b"\n", b'"text"\n')
)
def test_what_loss_of_power_leaves_at_the_end_is_cut_off(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog, torn: bytes
) -> None:
    write_log(directory, [record()])
    segment = directory / FIRST_SEGMENT
    with segment.open("ab") as file:
        file.write(torn)
    restart(directory, open_log)
    assert verify(directory).is_intact
    assert segment.with_name("audit-0000000000000001.torn-2").read_bytes() == torn


@pytest.mark.parametrize("hole", (1, 512, 4096))
def test_records_after_a_page_that_never_reached_the_disk_are_cut_off_with_it(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog, hole: int
) -> None:
    write_log(directory, [record(request_id=f"r{number}") for number in range(40)])
    segment = directory / FIRST_SEGMENT
    written = segment.read_bytes()
    lost_at = written.index(b'"r20"') + 2
    segment.write_bytes(written[:lost_at] + bytes(hole) + written[lost_at + hole :])
    whole = written[:lost_at].rindex(b"\n") + 1

    restart(directory, open_log)

    assert segment.read_bytes().startswith(written[:whole])
    report = verify(directory)
    assert report.is_intact
    assert report.epochs == 2
    torn = segment.with_name("audit-0000000000000001.torn-2").read_bytes()
    assert torn == written[whole:lost_at] + bytes(hole) + written[lost_at + hole :]


def test_zeros_before_the_start_of_a_later_epoch_are_no_loss_of_power(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record(request_id=f"r{number}") for number in range(5)])
    write_log(directory, [record(request_id="later")])
    segment = directory / FIRST_SEGMENT
    written = segment.read_bytes()
    damaged = written.replace(b'"r2"', b'"\x002"')
    segment.write_bytes(damaged)

    with pytest.raises(AuditError, match="is broken: before record 8 stand zeros"):
        open_log(directory)

    assert segment.read_bytes() == damaged
    assert names_in(directory) == [FIRST_SEGMENT]


def test_a_log_whose_first_record_was_torn_begins_anew(directory: Path, open_log: OpenLog) -> None:
    directory.mkdir()
    (directory / FIRST_SEGMENT).write_bytes(b'{"action":"audit.st')
    restart(directory, open_log)
    report = verify(directory)
    assert report.is_intact
    assert (report.records, report.epochs, report.first_sequence) == (2, 1, 1)


def test_a_new_segment_that_is_still_empty_is_gone_on_with(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record()])
    (directory / "audit-0000000000000004.jsonl").write_bytes(b'{"action"')
    restart(directory, open_log)
    report = verify(directory)
    assert report.is_intact
    assert (report.records, report.epochs, report.segments) == (5, 2, 2)


def test_an_empty_segment_with_the_wrong_name_stops_the_start(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record()])
    (directory / "audit-0000000000000007.jsonl").touch()
    with pytest.raises(AuditError, match="records before it are missing"):
        open_log(directory)
    assert verify(directory).fault is not None


def test_torn_bytes_of_an_earlier_try_to_start_are_kept(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record()])
    torn = directory / "audit-0000000000000001.torn-2"
    torn.write_bytes(b"earlier ")
    with (directory / FIRST_SEGMENT).open("ab") as file:
        file.write(b"later")
    restart(directory, open_log)
    assert torn.read_bytes() == b"earlier later"


@pytest.mark.parametrize("line", (0, 1, 2))
def test_a_broken_record_stops_the_start_and_names_the_command(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog, line: int
) -> None:
    write_log(directory, [record()])
    segment = directory / FIRST_SEGMENT
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"outcome":"', b'"outcome":"x')
    segment.write_bytes(b"".join(lines))
    before = segment.read_bytes()
    with pytest.raises(AuditError) as refusal:
        open_log(directory)
    assert f"record {line + 1}: the content does not match" in refusal.value.message
    assert f"pdp audit verify {directory}" in refusal.value.message
    assert segment.read_bytes() == before
    assert names_in(directory) == [FIRST_SEGMENT]


def test_an_unreadable_line_that_is_not_the_last_stops_the_start(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record()])
    segment = directory / FIRST_SEGMENT
    for damaged in (b"{}\n" + segment.read_bytes(), segment.read_bytes() + b"garbage\ntorn"):
        segment.write_bytes(damaged)
        with pytest.raises(AuditError, match="pdp audit verify"):
            open_log(directory)


def test_a_record_missing_near_the_end_stops_the_start(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record()])
    segment = directory / FIRST_SEGMENT
    start, _, stop = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(start + stop)
    with pytest.raises(AuditError, match="records between them are missing"):
        open_log(directory)


def test_a_segment_that_ends_torn_though_it_is_not_the_newest_stops_the_start(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record()])
    segment = directory / FIRST_SEGMENT
    segment.write_bytes(segment.read_bytes()[:-1])
    (directory / "audit-0000000000000004.jsonl").touch()
    with pytest.raises(AuditError, match="does not end with a whole record"):
        open_log(directory)


def test_a_long_segment_is_gone_on_with_from_its_end(
    directory: Path, record: MakeRecord, write_log: WriteLog, open_log: OpenLog
) -> None:
    write_log(directory, [record(request_id="x" * 50_000)] * 30)
    assert (directory / FIRST_SEGMENT).stat().st_size > CHECKED_BYTES
    restart(directory, open_log)
    report = verify(directory)
    assert report.is_intact
    assert (report.records, report.epochs) == (34, 2)


def test_a_directory_that_can_not_be_used_is_an_audit_error(
    tmp_path: Path, open_log: OpenLog
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AuditError, match="can not be written: File exists"):
        open_log(tmp_path / "file")
    (tmp_path / "linked").mkdir(mode=0o700)
    (tmp_path / "linked" / FIRST_SEGMENT).symlink_to(tmp_path / "file")
    with pytest.raises(AuditError, match="can not be written: Too many levels of symbolic links"):
        open_log(tmp_path / "linked")


class FailingDisk:
    """Writes a part of what it is given, then has no space, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 100
        self._write = os.write
        monkeypatch.setattr(os, "write", self._cramped_write)

    def _cramped_write(self, descriptor: int, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written

    def mend(self) -> None:
        self.room = sys.maxsize


async def until_health_is(log: ChainedAuditLog, *, healthy: bool) -> None:
    async with asyncio.timeout(30):
        while log.healthy is not healthy:  # noqa: ASYNC110 - set by the log's own threads
            await asyncio.sleep(0.01)


def test_a_full_disk_refuses_takes_back_and_recovers_by_itself(
    directory: Path,
    record: MakeRecord,
    open_log: OpenLog,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(audit_log, "RETRY_INTERVAL_SECONDS", 0.01)
    log = open_log(directory)
    disk = FailingDisk(monkeypatch)

    async def run() -> None:
        refusals = await asyncio.gather(
            *(log.append(record(request_id="secret-7")) for _ in range(5)), return_exceptions=True
        )
        for refusal in refusals:
            assert isinstance(refusal, AuditError)
            assert refusal.reason_code == "audit_unavailable"
        assert not log.healthy
        assert len((directory / FIRST_SEGMENT).read_bytes().splitlines()) == 1
        disk.mend()
        await until_health_is(log, healthy=True)
        assert (await log.append(record())).sequence == 3
        await log.close()

    asyncio.run(run())
    report = verify(directory)
    assert report.is_intact
    assert report.is_closed
    gap = json.loads((directory / FIRST_SEGMENT).read_bytes().splitlines()[1])
    assert (gap["type"], gap["detail"], gap["seq"]) == ("gap", {"refused": 5}, 2)
    assert "secret-7" not in caplog.text
    messages = [each.message for each in caplog.records]
    assert messages == [
        "audit: records can not be written: No space left on device (errno 28)",
        "audit: records are written again; 5 were refused",
    ]


def test_a_disk_that_takes_nothing_and_gives_nothing_back_does_not_close_the_log(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file system that became read-only does."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(audit_log, "RETRY_INTERVAL_SECONDS", 0.01)

    async def run() -> None:
        log = open_log(directory)
        with monkeypatch.context() as read_only:
            read_only.setattr(os, "write", refuse)
            read_only.setattr(os, "ftruncate", refuse)
            with pytest.raises(AuditError):
                await log.append(record())
        await until_health_is(log, healthy=True)
        await log.append(record())
        await log.close()

    asyncio.run(run())
    assert verify(directory).is_intact


def test_a_log_that_failed_off_the_event_loop_recovers_by_itself_too(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "RETRY_INTERVAL_SECONDS", 0.01)
    log = open_log(directory)
    disk = FailingDisk(monkeypatch)
    for _ in range(2):
        with pytest.raises(AuditError) as refusal:
            run_off_loop(log.append(record()))
        assert refusal.value.reason_code == "audit_unavailable"
    assert not log.healthy
    disk.mend()

    async def run() -> None:
        await until_health_is(log, healthy=True)
        await log.close()

    asyncio.run(run())
    assert verify(directory).is_intact
    gap = json.loads((directory / FIRST_SEGMENT).read_bytes().splitlines()[1])
    assert (gap["type"], gap["detail"]) == ("gap", {"refused": 2})


def test_an_append_after_the_disk_is_mended_is_written_with_the_gap_before_it(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "RETRY_INTERVAL_SECONDS", 60)
    log = open_log(directory)
    disk = FailingDisk(monkeypatch)

    async def run() -> None:
        with pytest.raises(AuditError):
            await log.append(record())
        disk.mend()
        assert (await log.append(record())).sequence == 3
        assert log.healthy
        await log.close()

    asyncio.run(run())
    assert verify(directory).is_intact


def test_no_room_for_a_new_segment_refuses_and_recovers(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(directory, segment_max_bytes=1)
    opened = os.open

    def refusing_open(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, flags, mode)

    async def run() -> None:
        monkeypatch.setattr(os, "open", refusing_open)
        with pytest.raises(AuditError):
            await log.append(record())
        monkeypatch.setattr(os, "open", opened)
        # The segment is made, and the write fails: it is gone on with later.
        disk = FailingDisk(monkeypatch)
        with pytest.raises(AuditError):
            await log.append(record())
        disk.mend()
        await log.append(record())
        await log.close()

    asyncio.run(run())
    assert verify(directory).is_intact


def test_a_new_segment_whose_name_can_not_be_synced_is_not_left_behind(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(directory, segment_max_bytes=1)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def run() -> None:
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", fail)
            with pytest.raises(AuditError):
                await log.append(record())
        assert names_in(directory) == [FIRST_SEGMENT]
        await log.append(record())
        await log.close()

    asyncio.run(run())
    assert verify(directory).is_intact


class NotingDisk:
    """Notes what is written and synced, and in which file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[tuple[str, str]] = []
        for name in ("write", "fsync", "fdatasync"):
            monkeypatch.setattr(os, name, self._noting(name, getattr(os, name)))

    def _noting(self, name: str, operation: Callable[..., int | None]) -> Callable[..., int | None]:
        def note(descriptor: int, *arguments: object) -> int | None:
            file = Path(f"/proc/self/fd/{descriptor}").readlink().name
            self.notes.append((name, file))
            return operation(descriptor, *arguments)

        return note

    def has_in_order(self, *notes: tuple[str, str]) -> bool:
        rest = iter(self.notes)
        return all(note in rest for note in notes)


def test_a_segment_is_on_disk_before_the_next_and_its_name_before_its_records(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(directory, segment_max_bytes=1)
    disk = NotingDisk(monkeypatch)

    async def run() -> None:
        await log.append(record())
        await log.close()

    asyncio.run(run())
    second, third = (f"audit-000000000000000{sequence}.jsonl" for sequence in (2, 3))
    assert disk.has_in_order(
        ("fdatasync", FIRST_SEGMENT),
        ("fsync", "audit"),
        ("write", second),
        ("fdatasync", second),
        ("fsync", "audit"),
        ("write", third),
        ("fdatasync", third),
    )
    assert disk.notes[-1] == ("fdatasync", third)


def test_torn_bytes_are_on_disk_before_they_are_cut_off(
    directory: Path,
    record: MakeRecord,
    write_log: WriteLog,
    open_log: OpenLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_log(directory, [record()])
    with (directory / FIRST_SEGMENT).open("ab") as file:
        file.write(b"torn")
    disk = NotingDisk(monkeypatch)
    restart(directory, open_log)
    assert disk.has_in_order(
        ("fsync", "audit-0000000000000001.torn-2"),
        ("fsync", "audit"),
        ("fsync", FIRST_SEGMENT),
        ("write", FIRST_SEGMENT),
    )


def test_no_write_holds_more_than_a_batch(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(directory)
    write = os.write
    sizes: list[int] = []

    def noting_write(descriptor: int, data: memoryview) -> int:
        sizes.append(bytes(data).count(b"\n"))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", noting_write)

    async def run() -> None:
        await asyncio.gather(*(log.append(record()) for _ in range(2_000)))
        await log.close()

    asyncio.run(run())
    assert sum(sizes) == 2_001
    assert max(sizes) <= audit_log.MAX_BATCH


def test_a_write_that_can_not_be_taken_back_closes_the_log_for_writing(
    directory: Path,
    record: MakeRecord,
    open_log: OpenLog,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = open_log(directory)

    def fail(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async def run() -> None:
        disk = FailingDisk(monkeypatch)
        monkeypatch.setattr(os, "ftruncate", fail)
        with pytest.raises(AuditError):
            await log.append(record())
        disk.mend()
        with pytest.raises(AuditError):
            await log.append(record())
        assert not log.healthy
        await log.close()

    asyncio.run(run())
    assert "until the sidecar starts again, after: Input/output error" in caplog.text
    assert verify(directory).torn_bytes == 100
    restart(directory, open_log)
    assert verify(directory).is_intact


@pytest.mark.parametrize("durability", Durability)
def test_a_failed_sync_is_never_trusted_again(
    directory: Path,
    record: MakeRecord,
    open_log: OpenLog,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    durability: Durability,
) -> None:
    log = open_log(directory, durability=durability)
    sync = os.fdatasync

    def fail_once(descriptor: int) -> None:
        monkeypatch.setattr(os, "fdatasync", sync)
        raise OSError(errno.EIO, "Input/output error")

    async def run() -> None:
        monkeypatch.setattr(os, "fdatasync", fail_once)
        if durability is Durability.POWER:
            with pytest.raises(AuditError):
                await log.append(record())
        else:
            await log.append(record())
        await until_health_is(log, healthy=False)
        with pytest.raises(AuditError):
            await log.append(record())
        await log.close()

    asyncio.run(run())
    assert "until the sidecar starts again" in caplog.text
    report = verify(directory)
    assert report.is_intact
    assert not report.is_closed
    # Nobody was told of the record that was not synced, so it is not there.
    assert report.records == (1 if durability is Durability.POWER else 2)
    restart(directory, open_log)
    assert verify(directory).is_intact


def test_a_fault_of_its_own_leaves_nobody_waiting(
    directory: Path, record: MakeRecord, open_log: OpenLog, caplog: pytest.LogCaptureFixture
) -> None:
    times = iter([0])
    log = open_log(directory, clock=lambda: next(times))

    async def run() -> None:
        for _ in range(2):
            with pytest.raises(AuditError) as refusal:
                await log.append(record())
            assert refusal.value.reason_code == "audit_unavailable"
        assert not log.healthy
        await log.close()

    asyncio.run(run())
    assert "StopIteration" in caplog.text


# No file may grow beyond a size; Python ignores the signal, so the write fails.
CRAMPED = """
import asyncio, resource, sys
from pathlib import Path
from pdp.audit.log import ChainedAuditLog
from pdp.audit.record import AuditError, AuditRecord, Outcome
from pdp.storage import Durability

async def main():
    log = ChainedAuditLog(
        Path(sys.argv[1]), instance="cramped", durability=Durability(sys.argv[2]))

    async def append(number):
        try:
            receipt = await log.append(AuditRecord(
                type="decision", tenant_id="acme", actor_id="alice", action="orders.update",
                outcome=Outcome.ALLOWED, reason_code="ok", request_id=f"r{number}"))
        except AuditError as error:
            assert error.reason_code == "audit_unavailable", error.reason_code
            return False
        print(receipt.sequence, receipt.hash, f"r{number}")
        return True

    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    done = [await asyncio.gather(*(append(n) for n in range(start, start + 20)))
            for start in range(0, 400, 20)]
    assert any(map(any, done)) and not all(map(any, done)) and not log.healthy
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert await append(1000) and log.healthy
    await log.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("durability", Durability)
def test_a_file_that_may_not_grow_refuses_and_recovers(
    directory: Path, durability: Durability
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRAMPED, str(directory), durability],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    acknowledged = [line.split() for line in done.stdout.splitlines()]
    report = verify(directory)
    assert report.is_intact
    assert report.is_closed
    # Besides what was acknowledged: start, gap and stop.
    assert report.records == len(acknowledged) + 3
    assert_all_are_there(directory, acknowledged)


def assert_all_are_there(directory: Path, acknowledged: list[list[str]]) -> None:
    written = {
        (str(read["seq"]), read["hash"], read.get("request_id"))
        for path in directory.glob("audit-*.jsonl")
        for read in map(json.loads, path.read_bytes().splitlines())
    }
    assert {tuple(receipt) for receipt in acknowledged} <= written


WORKER = """
import asyncio, sys
from pathlib import Path
from pdp.audit.log import ChainedAuditLog
from pdp.audit.record import AuditRecord, Outcome
from pdp.storage import Durability

async def work(log, name):
    number = 0
    while True:
        request = f"{name}-{number}"
        receipt = await log.append(AuditRecord(
            type="decision", tenant_id="acme", actor_id="alice", action="orders.update",
            outcome=Outcome.ALLOWED, reason_code="ok", request_id=request))
        print(receipt.sequence, receipt.hash, request, flush=True)
        number += 1

async def main():
    log = ChainedAuditLog(Path(sys.argv[1]), instance="worker", segment_max_bytes=200_000,
                          durability=Durability.PROCESS)
    await asyncio.gather(*(work(log, f"{sys.argv[2]}-{n}") for n in range(16)))

asyncio.run(main())
"""


@pytest.mark.slow
def test_twenty_kills_lose_no_acknowledged_record(directory: Path, open_log: OpenLog) -> None:
    dice = random.Random(918)  # noqa: S311 - a repeatable choice
    acknowledged = [
        receipt
        for kill in range(20)
        for receipt in killed_while_writing(directory, str(kill), lines=dice.randrange(1, 1000))
    ]
    report = verify(directory)
    assert report.is_intact, report.fault
    assert not report.is_closed
    restart(directory, open_log)
    report = verify(directory)
    assert report.is_intact, report.fault
    assert (report.epochs, report.is_closed, report.torn_bytes) == (21, True, 0)
    assert report.segments > 1
    assert_all_are_there(directory, acknowledged)


def killed_while_writing(directory: Path, name: str, lines: int) -> Iterator[list[str]]:
    """The receipts that a worker printed until it was killed, about ``lines`` in."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(directory), name], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    for count, line in enumerate(worker.stdout):
        if count == lines:
            worker.kill()
        if line.endswith("\n"):
            yield line.split()
    worker.stdout.close()
    assert worker.wait() == -9


def test_a_torn_line_within_the_log_is_a_fault(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    write_log(directory, [record()])
    segment = directory / FIRST_SEGMENT
    segment.write_bytes(segment.read_bytes() + b"garbage\n")
    fault = verify(directory).fault
    assert fault is not None
    assert (fault.line, fault.problem) == (4, Problem.UNREADABLE)
