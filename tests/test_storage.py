from __future__ import annotations

import asyncio
import logging
import random
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Self

import apsw
import pytest

from pdp.off_loop import run_off_loop
from pdp.storage import (
    MAX_BATCH,
    MAX_QUEUED,
    Durability,
    SqliteWriter,
    StorageError,
    _refuse_old_sqlite,
)

SCHEMA = "CREATE TABLE entry (number INTEGER NOT NULL, text TEXT) STRICT;"


def open_writer(path: Path, durability: Durability = Durability.PROCESS) -> SqliteWriter:
    return SqliteWriter(path, schema=SCHEMA, durability=durability)


def with_writer(path: Path, scenario: Callable[[SqliteWriter], Awaitable[None]]) -> None:
    """Run the scenario with a writer on the file, and close it."""

    async def run() -> None:
        writer = open_writer(path)
        try:
            await scenario(writer)
        finally:
            await writer.close()

    asyncio.run(run())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.sqlite"


def add(number: int) -> Callable[[apsw.Connection], int]:
    def operation(db: apsw.Connection) -> int:
        db.execute("INSERT INTO entry (number) VALUES (?)", (number,))
        return number

    return operation


def numbers(db: apsw.Connection) -> list[int]:
    rows: list[Any] = db.execute("SELECT number FROM entry ORDER BY rowid").fetchall()
    return [number for (number,) in rows]


class Gate:
    """Holds the writer thread up, so that what comes next is committed together."""

    def __init__(self, writer: SqliteWriter) -> None:
        self._reached = threading.Event()
        self._opened = threading.Event()
        self._writer = writer
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._writer.run(self._wait))
        await asyncio.to_thread(self._reached.wait)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._opened.set()
        assert self._task is not None
        await self._task

    def _wait(self, _db: apsw.Connection) -> None:
        self._reached.set()
        self._opened.wait()


def start(
    writer: SqliteWriter, *operations: Callable[[apsw.Connection], int]
) -> list[asyncio.Task[int]]:
    return [asyncio.create_task(writer.run(operation)) for operation in operations]


def count_commits(db: apsw.Connection, events: list[str]) -> None:
    def commit() -> bool:
        events.append("commit")
        return False

    db.set_commit_hook(commit)


def fail_commits(db: apsw.Connection) -> None:
    db.set_commit_hook(lambda: True)


# Commits


def test_an_answer_comes_after_its_commit(path: Path) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        events: list[str] = []
        await writer.run(lambda db: count_commits(db, events))
        events.clear()
        assert await writer.run(add(1)) == 1
        events.append("answer")
        assert events == ["commit", "answer"]

    with_writer(path, scenario)


def test_what_waits_is_committed_together_in_bounded_batches(path: Path) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        events: list[str] = []
        await writer.run(lambda db: count_commits(db, events))
        async with Gate(writer):
            tasks = start(writer, *map(add, range(MAX_BATCH + 1)))
            await asyncio.sleep(0)  # all of them are queued
            events.clear()
        assert await asyncio.gather(*tasks) == list(range(MAX_BATCH + 1))
        # The gate's own commit, a full batch, and the one operation beyond it.
        assert len(events) == 3
        assert await writer.run(numbers) == list(range(MAX_BATCH + 1))

    with_writer(path, scenario)


def test_an_operation_that_raises_undoes_only_its_own_changes(path: Path) -> None:
    def add_and_raise(db: apsw.Connection) -> int:
        add(2)(db)
        raise LookupError("mine")

    async def scenario(writer: SqliteWriter) -> None:
        async with Gate(writer):
            tasks = start(writer, add(1), add_and_raise, add(3))
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers[0] == 1
        assert isinstance(answers[1], LookupError)
        assert answers[2] == 3
        with pytest.raises(LookupError, match="mine"):
            await writer.run(add_and_raise)
        assert await writer.run(numbers) == [1, 3]

    with_writer(path, scenario)


def test_a_commit_that_fails_fails_the_whole_batch_and_later_ones_work(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        await writer.run(add(0))
        async with Gate(writer):
            first = start(writer, add(1))
            await asyncio.sleep(0)
            hooked = asyncio.create_task(writer.run(fail_commits))
            last = start(writer, add(2))
            await asyncio.sleep(0)
        for answer in await asyncio.gather(*first, hooked, *last, return_exceptions=True):
            assert isinstance(answer, StorageError)
        for number in (3, 4):
            with pytest.raises(StorageError, match="nothing was done"):
                await writer.run(add(number))
        writer._connection.set_commit_hook(None)
        assert await writer.run(add(5)) == 5
        assert await writer.run(numbers) == [0, 5]

    with caplog.at_level(logging.WARNING, logger="pdp.storage"):
        with_writer(path, scenario)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "works again" in caplog.records[1].getMessage()


def test_a_transaction_that_stays_open_after_its_commit_failed_is_rolled_back(
    path: Path,
) -> None:
    schema = (
        SCHEMA + "CREATE TABLE owner (id INTEGER PRIMARY KEY);"
        "CREATE TABLE owned (owner INTEGER REFERENCES owner DEFERRABLE INITIALLY DEFERRED);"
    )

    def orphan(db: apsw.Connection) -> int:
        db.execute("INSERT INTO owned VALUES (1)")
        return 1

    async def scenario() -> None:
        writer = SqliteWriter(path, schema=schema, durability=Durability.PROCESS)
        writer._connection.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(StorageError):
            await writer.run(orphan)
        assert await writer.run(add(1)) == 1
        assert await writer.run(lambda db: db.execute("SELECT count(*) FROM owned").get) == 0
        await writer.close()

    asyncio.run(scenario())


def test_a_full_disk_is_refused_and_works_again_when_there_is_room(path: Path) -> None:
    def fill(db: apsw.Connection) -> None:
        db.execute("INSERT INTO entry VALUES (0, ?)", ("x" * 100_000,))

    async def scenario(writer: SqliteWriter) -> None:
        await writer.run(add(1))
        pages: int = await writer.run(lambda db: db.pragma("page_count"))
        await writer.run(lambda db: db.pragma("max_page_count", pages + 2))
        async with Gate(writer):
            small = start(writer, add(2))
            large = asyncio.create_task(writer.run(fill))
            await asyncio.sleep(0)
        answers = await asyncio.gather(*small, large, return_exceptions=True)
        # SQLite may give up the whole transaction, but never a part of an answer.
        assert isinstance(answers[1], StorageError)
        kept = [1] if isinstance(answers[0], StorageError) else [1, 2]
        assert await writer.run(numbers) == kept
        await writer.run(lambda db: db.pragma("max_page_count", 2**20))
        await writer.run(fill)
        assert await writer.run(numbers) == [*kept, 0]

    with_writer(path, scenario)


def test_an_operation_that_raises_stop_iteration_does_not_hang_the_others(path: Path) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        async with Gate(writer):
            tasks = start(writer, lambda _db: next(iter(())), add(1))
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[0], RuntimeError)
        assert answers[1] == 1

    with_writer(path, scenario)


# Waiting


def test_one_more_than_the_queue_takes_is_refused_at_once(path: Path) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        async with Gate(writer):
            tasks = start(writer, *map(add, range(MAX_QUEUED)))
            await asyncio.sleep(0)
            with pytest.raises(StorageError, match="Try again later"):
                await writer.run(add(-1))
        assert await asyncio.gather(*tasks) == list(range(MAX_QUEUED))
        assert -1 not in await writer.run(numbers)

    with_writer(path, scenario)


def test_cancelled_operations_are_done_and_nobody_gets_the_answer_of_another(
    path: Path,
) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        dice = random.Random(4)  # noqa: S311 - a repeatable choice
        started = []
        for number in range(2000):
            task = asyncio.create_task(writer.run(add(number)))
            started.append(task)
            if dice.random() < 0.3:
                await asyncio.sleep(0)
            if dice.random() < 0.3:
                dice.choice(started[-20:]).cancel()
        answers = await asyncio.gather(*started, return_exceptions=True)
        cancelled = [n for n, a in enumerate(answers) if isinstance(a, asyncio.CancelledError)]
        assert 100 < len(cancelled) < 1900
        for number, answer in enumerate(answers):
            assert number in cancelled or answer == number
        done = await writer.run(numbers)
        assert len(set(done)) == len(done)
        # What was cancelled before it began left no trace, what had begun is done.
        assert set(range(2000)) - set(done) <= set(cancelled)

    with_writer(path, scenario)


def test_two_event_loops_get_their_own_answers(path: Path) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        async def ask(numbers: range) -> list[int]:
            return await asyncio.gather(*(writer.run(add(number)) for number in numbers))

        there = asyncio.to_thread(lambda: asyncio.run(ask(range(1000, 1300))))
        here, elsewhere = await asyncio.gather(ask(range(300)), there)
        assert here == list(range(300))
        assert elsewhere == list(range(1000, 1300))

    with_writer(path, scenario)


def test_a_loop_that_is_gone_does_not_stop_the_writer(path: Path) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        async def leave() -> None:
            task = asyncio.create_task(writer.run(add(1)))
            await asyncio.sleep(0)
            task.cancel()

        async with Gate(writer):
            await asyncio.to_thread(lambda: asyncio.run(leave()))
        assert await writer.run(numbers) == [1]

    with_writer(path, scenario)


# Opening and closing


def test_closing_finishes_what_waits_and_leaves_one_whole_file(path: Path) -> None:
    async def scenario() -> None:
        writer = open_writer(path)
        async with Gate(writer):
            tasks = start(writer, *map(add, range(300)))
            await asyncio.sleep(0)
            closing = asyncio.create_task(writer.close())
            await asyncio.sleep(0)
            with pytest.raises(StorageError, match="closed"):
                await writer.run(add(-1))
        await closing
        assert await asyncio.gather(*tasks) == list(range(300))
        await writer.close()

    asyncio.run(scenario())
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert numbers(apsw.Connection(str(path))) == list(range(300))


@pytest.mark.parametrize(
    ("durability", "synchronous"), ((Durability.PROCESS, 1), (Durability.POWER, 2))
)
def test_durability_decides_whether_a_commit_waits_for_the_disk(
    path: Path, durability: Durability, synchronous: int
) -> None:
    async def scenario() -> None:
        writer = open_writer(path, durability)
        assert await writer.run(lambda db: db.pragma("synchronous")) == synchronous
        assert await writer.run(lambda db: db.pragma("journal_mode")) == "wal"
        await writer.close()

    asyncio.run(scenario())


def test_only_the_owner_can_read_the_files(path: Path) -> None:
    path.touch(mode=0o644)

    async def scenario(writer: SqliteWriter) -> None:
        await writer.run(add(1))
        for each in path.parent.iterdir():
            assert stat.S_IMODE(each.stat().st_mode) == 0o600

    with_writer(path, scenario)


def test_a_symbolic_link_is_not_followed(path: Path) -> None:
    path.symlink_to(path.parent / "elsewhere")
    with pytest.raises(StorageError, match="can not be opened"):
        open_writer(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=re.escape(str(tmp_path / "no"))):
        open_writer(tmp_path / "no" / "store.sqlite")


def test_a_file_of_another_kind_is_refused(path: Path) -> None:
    path.write_text("not a database\n" * 100)
    with pytest.raises(StorageError, match="can not be used as a store"):
        open_writer(path)


def test_a_file_of_a_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    with_writer(path, lambda writer: writer.run(lambda db: db.pragma("user_version", 2)))
    before = path.read_bytes()
    with pytest.raises(StorageError, match="schema version 2, and this sidecar reads version 1"):
        open_writer(path)
    assert path.read_bytes() == before


def test_a_file_is_for_one_writer(path: Path) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        await writer.run(add(1))
        with pytest.raises(StorageError, match="is in use"):
            open_writer(path)
        script = (
            "import sys, pathlib, pdp.storage as s\n"
            "s.SqliteWriter(pathlib.Path(sys.argv[1]), schema='', durability=s.Durability.PROCESS)"
        )
        other = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", script, str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert other.returncode == 1
        assert "is in use by another process" in other.stderr
        assert await writer.run(numbers) == [1]

    with_writer(path, scenario)


@pytest.mark.parametrize("version", ("3.40.1", "3.51.2"))
def test_a_sqlite_that_can_lose_commits_is_refused(version: str) -> None:
    with pytest.raises(StorageError, match="can lose commits"):
        _refuse_old_sqlite(version)


@pytest.mark.parametrize("version", ("3.51.3", "3.54.1", "4.0.0"))
def test_a_sqlite_without_that_bug_is_taken(version: str) -> None:
    _refuse_old_sqlite(version)


def test_off_the_event_loop_the_thread_that_asks_commits_by_itself(path: Path) -> None:
    threads: list[int] = []

    def noting(db: apsw.Connection) -> None:
        threads.append(threading.get_ident())
        add(1)(db)

    def ask(writer: SqliteWriter) -> int:
        run_off_loop(writer.run(noting))
        with pytest.raises(KeyError):
            run_off_loop(writer.run(add_and_fail))
        return threading.get_ident()

    def add_and_fail(db: apsw.Connection) -> None:
        add(2)(db)
        raise KeyError

    async def scenario(writer: SqliteWriter) -> None:
        asked_by = await asyncio.to_thread(ask, writer)
        assert threads == [asked_by]
        assert await writer.run(numbers) == [1]

    with_writer(path, scenario)


def test_threads_and_tasks_that_ask_together_each_get_their_own_answer(path: Path) -> None:
    async def scenario(writer: SqliteWriter) -> None:
        def ask(first: int) -> list[int]:
            return [run_off_loop(writer.run(add(number))) for number in range(first, first + 50)]

        in_threads = [asyncio.to_thread(ask, first) for first in (0, 50, 100)]
        in_tasks = [writer.run(add(number)) for number in range(150, 200)]
        answers = await asyncio.gather(*in_threads, asyncio.gather(*in_tasks))
        assert sorted(number for each in answers for number in each) == list(range(200))
        assert sorted(await writer.run(numbers)) == list(range(200))

    with_writer(path, scenario)


def test_a_closed_writer_takes_nothing_off_the_event_loop(path: Path) -> None:
    writer = open_writer(path)
    asyncio.run(writer.close())
    with pytest.raises(StorageError, match="closed"):
        run_off_loop(writer.run(add(1)))
