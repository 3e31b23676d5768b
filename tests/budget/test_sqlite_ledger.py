"""What the ledger in SQLite promises beyond the port."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdp.budget.bounds import MAX_HOLD_SECONDS
from pdp.budget.ledger import Window
from pdp.budget.sqlite import PRUNE_BATCH, SqliteLedger
from pdp.budget.sqlite_schema import SCHEMA_VERSION
from pdp.storage import Durability, StorageError
from tests.budget.stores import SqliteStore
from tests.budget.teller import DAY, NOON, Teller, calls, limit


@pytest.fixture
def teller(tmp_path: Path) -> Iterator[Teller]:
    teller = Teller(SqliteStore(tmp_path))
    yield teller
    teller.close()


def test_clearing_away_takes_a_few_rows_at_a_time_and_leaves_nothing(teller: Teller) -> None:
    minute = limit(1000, window=Window.MINUTE)
    ever = limit(1000, name="ever", window=Window.LIFETIME)
    many = PRUNE_BATCH * 3
    for number in range(many):
        teller.now = NOON + 60 * number
        teller.reserve(calls(1), limits=[minute, ever])
    rows = row_counts(teller)
    teller.now += DAY + MAX_HOLD_SECONDS + 60
    teller.charge(calls(1), limits=[minute, ever])
    assert row_counts(teller)["answer"] == rows["answer"] + 1 - PRUNE_BATCH
    for _ in range(many):
        teller.charge(calls(1), limits=[minute, ever])
    rows = row_counts(teller)
    assert rows == {"account": 2, "hold": many + 1, "live_part": 0, "answer": many + 1}
    assert teller.counts(ever) == [(many + 1, 0)]


def test_a_hold_outlives_its_window_until_it_is_cleared_away(teller: Teller) -> None:
    minute = limit(1000, window=Window.MINUTE)
    for _ in range(16):
        last = teller.reserve(calls(1), limits=[minute])
    teller.now = NOON + DAY + MAX_HOLD_SECONDS + 60
    teller.charge(calls(1))
    assert teller.settle(last.id).late


def row_counts(teller: Teller) -> dict[str, int]:
    tables = ("account", "hold", "live_part", "answer")
    ledger = teller.ledger
    assert isinstance(ledger, SqliteLedger)
    return teller.do(
        ledger._writer.run(
            lambda db: {
                table: int(db.execute(f"SELECT count(*) FROM {table}").get)  # noqa: S608 - our own names
                for table in tables
            }
        )
    )


def test_a_second_ledger_on_the_same_file_is_refused(teller: Teller) -> None:
    assert isinstance(teller.store, SqliteStore)
    with pytest.raises(StorageError, match="is in use"):
        SqliteLedger(teller.store.path, durability=Durability.PROCESS)


def test_a_file_of_another_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    file = store.path
    teller = Teller(store)
    teller.charge(calls(1))
    teller.close()
    with contextlib.closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION - 1}")
    with pytest.raises(StorageError, match="use the sidecar that wrote it"):
        SqliteLedger(file, durability=Durability.PROCESS)
    with contextlib.closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION - 1,)
