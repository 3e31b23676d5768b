"""What the log promises while the disk works."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

import pdp
from pdp.audit.chain import HASH_PREFIX, MAX_RECORD_BYTES
from pdp.audit.log import ChainedAuditLog
from pdp.audit.record import AuditError, AuditReceipt, AuditRecord, Outcome
from pdp.audit.verify import verify
from pdp.off_loop import run_off_loop
from pdp.storage import Durability

MakeRecord = Callable[..., AuditRecord]
OpenLog = Callable[..., ChainedAuditLog]
WriteLog = Callable[..., list[AuditReceipt]]


def lines_of(directory: Path) -> list[bytes]:
    return [
        line
        for path in sorted(directory.glob("audit-*.jsonl"))
        for line in path.read_bytes().splitlines(keepends=True)
    ]


def records_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(directory)]


def test_a_record_has_exactly_its_fields_and_its_place(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    (receipt,) = write_log(directory, [record(charges=({"budget": "tools", "amount": 1},))])
    first, written, last = records_of(directory)
    assert written == {
        "v": 1,
        "seq": 2,
        "time": "2026-11-24T12:00:00.123456Z",
        "instance": "test",
        "epoch": 1,
        "prev_hash": first["hash"],
        "hash": receipt.hash,
        "type": "decision",
        "tenant_id": "acme",
        "actor_id": "alice",
        "action": "orders.update",
        "outcome": "allowed",
        "reason_code": "ok",
        "charges": [{"budget": "tools", "amount": 1}],
    }
    assert (first["type"], first["detail"]) == ("start", {"version": pdp.__version__})
    assert first["prev_hash"] == "0" * 64
    assert (last["type"], last["seq"]) == ("stop", 3)


def test_no_identity_is_written_as_null_and_other_empty_fields_are_left_out(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    write_log(directory, [record(tenant_id=None, actor_id=None)])
    written = records_of(directory)[1]
    assert written["tenant_id"] is None
    assert written["actor_id"] is None
    assert None not in [value for name, value in written.items() if not name.endswith("_id")]
    assert "decision_id" not in written


def test_each_line_is_rfc_8785_and_hashed_over_the_prefix_and_the_rest(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    write_log(directory, [record(detail={"é": "\x7f\u2028\x01", "a": [1.5, None, True]})])
    previous = "0" * 64
    for line in lines_of(directory):
        parsed = json.loads(line)
        assert line == rfc8785.dumps(parsed) + b"\n"
        assert parsed["prev_hash"] == previous
        previous = parsed.pop("hash")
        assert previous == hashlib.sha256(HASH_PREFIX + rfc8785.dumps(parsed)).hexdigest()


texts = st.text(max_size=40)
objects = st.dictionaries(
    texts,
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)
records = st.builds(
    AuditRecord,
    type=texts.filter(lambda text: text not in ("start", "stop")),
    tenant_id=st.none() | texts,
    actor_id=st.none() | texts,
    action=texts,
    outcome=st.sampled_from(Outcome),
    reason_code=texts,
    decision_id=st.none() | texts,
    request_id=st.none() | texts,
    trace_id=st.none() | texts,
    resource=st.none() | objects,
    policy_revision=st.none() | texts,
    arguments_digest=st.none() | texts,
    permit_id=st.none() | texts,
    hold_id=st.none() | texts,
    charges=st.none() | st.lists(objects, max_size=3).map(tuple),
    limit_id=st.none() | texts,
    detail=st.none() | objects,
    replayed=st.none() | st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(written=st.lists(records, max_size=5), segment_max_bytes=st.sampled_from((1, 2_000, 2**20)))
def test_any_text_in_any_field_is_read_back_and_verifies(
    written: list[AuditRecord], segment_max_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "audit"

        async def run() -> list[AuditReceipt]:
            log = ChainedAuditLog(
                directory,
                instance="tëst\n",
                durability=Durability.PROCESS,
                segment_max_bytes=segment_max_bytes,
            )
            receipts = [await log.append(each) for each in written]
            await log.close()
            return receipts

        receipts = asyncio.run(run())
        report = verify(directory)
        assert report.is_intact, report.fault
        assert report.is_closed
        assert report.records == len(written) + 2
        _, *found, _ = records_of(directory)
        for each, receipt, read in zip(written, receipts, found, strict=True):
            assert (read["seq"], read["hash"]) == (receipt.sequence, receipt.hash)
            for field in dataclasses.fields(each):
                value = getattr(each, field.name)
                expected = list(value) if isinstance(value, tuple) else value
                assert read.get(field.name) == expected
                assert (field.name in read) == (
                    value is not None or field.name in ("tenant_id", "actor_id")
                )


@pytest.mark.parametrize("breaker", ("\n", "\r\n", "\x85", "\u2028", "\x00", '"}\n{"seq":9}\n'))
def test_no_value_can_forge_a_line(
    directory: Path, record: MakeRecord, write_log: WriteLog, breaker: str
) -> None:
    forged = f'x{breaker}{{"type":"decision","outcome":"allowed"}}{breaker}'
    write_log(directory, [record(request_id=forged, detail={forged: forged})])
    content = b"".join(lines_of(directory))
    assert content.count(b"\n") == 3
    assert not any(byte < 0x20 and byte != 0x0A for byte in content)
    assert records_of(directory)[1]["request_id"] == forged
    assert verify(directory).is_intact


@pytest.mark.parametrize(
    "field",
    (
        {"request_id": "x" * MAX_RECORD_BYTES},
        {"detail": {"text": "\x01" * (MAX_RECORD_BYTES // 6)}},
        {"request_id": "\ud800"},
        {"detail": {"\udfff": 1}},
        {"detail": {"number": 2**53}},
        {"detail": {"number": float("nan")}},
        {"detail": {"number": 2.0**60}},
        {"detail": {"bytes": b"secret-7"}},
    ),
)
def test_a_record_that_could_not_be_read_back_is_refused_and_the_next_is_not(
    directory: Path, record: MakeRecord, open_log: OpenLog, field: dict[str, Any]
) -> None:
    async def run() -> None:
        log = open_log(directory)
        with pytest.raises(AuditError) as refusal:
            await log.append(record(**field))
        assert refusal.value.reason_code == "audit_unavailable"
        assert "secret-7" not in f"{refusal.value} {refusal.value!r}"
        assert log.healthy
        assert (await log.append(record())).sequence == 2
        await log.close()

    asyncio.run(run())
    assert verify(directory).is_intact


def test_deeply_nested_detail_is_refused_or_verifies(
    directory: Path, record: MakeRecord, open_log: OpenLog
) -> None:
    async def run() -> int:
        log = open_log(directory)
        taken = 0
        for depth in (10, 61, 62, 63, 64, 65, 5_000):
            detail: Any = 1
            for _ in range(depth):
                detail = [detail]
            try:
                await log.append(record(detail={"nested": detail}))
            except AuditError:
                continue
            taken += 1
        await log.close()
        return taken

    assert asyncio.run(run()) in range(2, 6)
    assert verify(directory).is_intact


def test_a_record_of_just_the_allowed_size_is_written_and_verifies(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    write_log(directory, [record(request_id="x" * (MAX_RECORD_BYTES - 400))] * 3)
    assert verify(directory).is_intact


def test_a_thousand_concurrent_appends_get_consecutive_sequences(
    directory: Path, record: MakeRecord, open_log: OpenLog
) -> None:
    async def run() -> list[AuditReceipt]:
        log = open_log(directory, segment_max_bytes=100_000)
        receipts = await asyncio.gather(
            *(log.append(record(request_id=f"r{number}")) for number in range(1000))
        )
        await log.close()
        return receipts

    receipts = asyncio.run(run())
    assert sorted(receipt.sequence for receipt in receipts) == list(range(2, 1002))
    by_sequence = {read["seq"]: read for read in records_of(directory)}
    for number, receipt in enumerate(receipts):
        read = by_sequence[receipt.sequence]
        assert (read["request_id"], read["hash"]) == (f"r{number}", receipt.hash)
    report = verify(directory)
    assert report.is_intact
    assert report.segments > 1


def test_appends_from_many_event_loops_each_get_their_own_answer(
    directory: Path, record: MakeRecord, open_log: OpenLog
) -> None:
    log = open_log(directory)
    found: dict[str, AuditReceipt] = {}

    def work(name: str) -> None:
        async def run() -> None:
            for number in range(50):
                request = f"{name}-{number}"
                found[request] = await log.append(record(request_id=request))

        asyncio.run(run())

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asyncio.run(log.close())
    written = {read.get("request_id"): read["hash"] for read in records_of(directory)}
    assert {request: receipt.hash for request, receipt in found.items()}.items() <= written.items()
    assert len(found) == 200


def test_appends_on_and_off_the_event_loop_make_one_chain(
    directory: Path, record: MakeRecord, open_log: OpenLog
) -> None:
    log = open_log(directory, segment_max_bytes=20_000)

    def work() -> list[AuditReceipt]:
        return [run_off_loop(log.append(record())) for _ in range(50)]

    async def run() -> list[AuditReceipt]:
        in_threads = [asyncio.to_thread(work) for _ in range(3)]
        in_tasks = [log.append(record()) for _ in range(50)]
        *receipts, by_tasks = await asyncio.gather(*in_threads, asyncio.gather(*in_tasks))
        await log.close()
        with pytest.raises(AuditError, match="closed"):
            await asyncio.to_thread(work)
        return [receipt for each in (*receipts, by_tasks) for receipt in each]

    receipts = asyncio.run(run())
    assert sorted(receipt.sequence for receipt in receipts) == list(range(2, 202))
    hashes = {read["seq"]: read["hash"] for read in records_of(directory)}
    assert all(hashes[receipt.sequence] == receipt.hash for receipt in receipts)
    assert verify(directory).is_intact


def test_the_chain_goes_on_over_segments_and_starts(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    for epoch in range(1, 5):
        write_log(directory, [record()] * 5, segment_max_bytes=1_000)
        assert records_of(directory)[-1]["epoch"] == epoch
    assert [read["seq"] for read in records_of(directory)] == list(range(1, 29))
    names = [path.name for path in sorted(directory.iterdir())]
    assert len(names) > 4
    assert names[0] == "audit-0000000000000001.jsonl"
    for path in directory.iterdir():
        assert path.stat().st_size <= 1_000
        first = json.loads(path.read_bytes().splitlines()[0])
        assert path.name == f"audit-{first['seq']:016d}.jsonl"
    report = verify(directory)
    assert report.is_intact
    assert (report.records, report.epochs, report.segments) == (28, 4, len(names))


def test_only_the_owner_can_read_the_log(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    directory.mkdir(mode=0o755)
    earlier = os.umask(0)
    try:
        write_log(directory, [record()] * 5, segment_max_bytes=1_000)
    finally:
        os.umask(earlier)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


def test_a_second_log_on_the_directory_is_refused(
    directory: Path, record: MakeRecord, open_log: OpenLog, write_log: WriteLog
) -> None:
    log = open_log(directory)
    with pytest.raises(AuditError, match="in use by another sidecar"):
        open_log(directory)
    asyncio.run(log.close())
    write_log(directory, [record()])


def test_a_closed_log_takes_nothing_and_may_be_closed_again(
    directory: Path, record: MakeRecord, open_log: OpenLog
) -> None:
    async def run() -> None:
        log = open_log(directory)
        health = [log.healthy]
        await log.close()
        await log.close()
        health.append(log.healthy)
        assert health == [True, False]
        with pytest.raises(AuditError, match="closed"):
            await log.append(record())

    asyncio.run(run())
    assert verify(directory).records == 2


def test_close_writes_what_was_taken_in(
    directory: Path, record: MakeRecord, open_log: OpenLog
) -> None:
    async def run() -> None:
        log = open_log(directory)
        waiting = [asyncio.create_task(log.append(record())) for _ in range(100)]
        await asyncio.sleep(0)
        await log.close()
        assert [receipt.sequence for receipt in await asyncio.gather(*waiting)] == list(
            range(2, 102)
        )

    asyncio.run(run())
    assert verify(directory).is_closed


class SlowDisk:
    """Holds every write back until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self._gate = threading.Event()
        self._write = os.write
        monkeypatch.setattr(os, "write", self._slow_write)

    def _slow_write(self, descriptor: int, data: memoryview) -> int:
        self.begun.set()
        self._gate.wait()
        return self._write(descriptor, data)

    def let_go(self) -> None:
        self._gate.set()


@pytest.fixture
def slow_log(
    directory: Path, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[ChainedAuditLog, SlowDisk]]:
    log = open_log(directory, max_pending=10)
    disk = SlowDisk(monkeypatch)
    yield log, disk
    disk.let_go()


def test_a_full_queue_refuses_at_once(
    directory: Path, record: MakeRecord, slow_log: tuple[ChainedAuditLog, SlowDisk]
) -> None:
    log, disk = slow_log

    async def run() -> None:
        first = asyncio.create_task(log.append(record()))
        await asyncio.to_thread(disk.begun.wait)
        waiting = [asyncio.create_task(log.append(record())) for _ in range(10)]
        await asyncio.sleep(0)
        with pytest.raises(AuditError, match="Too many records wait") as refusal:
            await log.append(record())
        assert refusal.value.reason_code == "audit_unavailable"
        assert not first.done()
        disk.let_go()
        receipts = await asyncio.gather(first, *waiting)
        assert [receipt.sequence for receipt in receipts] == list(range(2, 13))
        await log.close()

    asyncio.run(run())
    assert verify(directory).is_intact


def test_cancelling_neither_loses_a_record_nor_mixes_answers(
    directory: Path, record: MakeRecord, slow_log: tuple[ChainedAuditLog, SlowDisk]
) -> None:
    log, disk = slow_log

    async def run() -> dict[str, AuditReceipt]:
        first = asyncio.create_task(log.append(record()))
        await asyncio.to_thread(disk.begun.wait)
        tasks = {
            f"r{number}": asyncio.create_task(log.append(record(request_id=f"r{number}")))
            for number in range(10)
        }
        await asyncio.sleep(0)
        for name in ("r0", "r3", "r9"):
            tasks.pop(name).cancel()
        await asyncio.sleep(0)
        disk.let_go()
        await first
        receipts = {name: await task for name, task in tasks.items()}
        await log.close()
        return receipts

    receipts = asyncio.run(run())
    written = {read.get("request_id"): read["hash"] for read in records_of(directory)}
    assert written.keys() >= {f"r{number}" for number in range(10)}
    for name, receipt in receipts.items():
        assert written[name] == receipt.hash
    assert verify(directory).is_intact


def test_an_event_loop_that_is_gone_does_not_stop_the_others(
    directory: Path, record: MakeRecord, slow_log: tuple[ChainedAuditLog, SlowDisk]
) -> None:
    log, disk = slow_log

    async def leave() -> None:
        task = asyncio.create_task(log.append(record(request_id="left")))
        await asyncio.to_thread(disk.begun.wait)
        task.cancel()

    asyncio.run(leave())
    disk.let_go()

    async def stay() -> None:
        assert (await log.append(record())).sequence == 3
        await log.close()

    asyncio.run(stay())
    assert records_of(directory)[1]["request_id"] == "left"


def test_power_durability_answers_only_after_the_disk_has_it(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(directory, durability=Durability.POWER)
    order: list[str] = []
    write, sync = os.write, os.fdatasync

    def noting_write(descriptor: int, data: memoryview) -> int:
        order.append("write")
        return write(descriptor, data)

    def noting_sync(descriptor: int) -> None:
        sync(descriptor)
        order.append("sync")

    monkeypatch.setattr(os, "write", noting_write)
    monkeypatch.setattr(os, "fdatasync", noting_sync)

    async def run() -> None:
        for _ in range(3):
            await log.append(record())
            order.append("answer")
        await log.close()

    asyncio.run(run())
    assert order[:9] == ["write", "sync", "answer"] * 3


def test_process_durability_syncs_in_the_background(
    directory: Path, record: MakeRecord, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(directory)
    synced = threading.Event()
    sync = os.fdatasync

    def noting_sync(descriptor: int) -> None:
        sync(descriptor)
        synced.set()

    monkeypatch.setattr(os, "fdatasync", noting_sync)

    async def run() -> None:
        await log.append(record())
        assert await asyncio.to_thread(synced.wait, 30)
        await log.close()

    asyncio.run(run())
