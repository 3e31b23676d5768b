"""Every store in turn, and a teller at each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.budget.stores import MemoryStore, RedisStoreOfTests, SqliteStore, Store
from tests.budget.teller import Teller


@pytest.fixture(params=("memory", "sqlite", "redis"))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "sqlite":
        return SqliteStore(tmp_path)
    return RedisStoreOfTests(request.getfixturevalue("redis_server"))


@pytest.fixture
def teller(store: Store) -> Iterator[Teller]:
    teller = Teller(store)
    yield teller
    teller.close()
