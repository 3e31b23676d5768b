"""A Redis for the session, emptied for each test, and every store in turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.budget.redis_server import RedisServer
from tests.budget.stores import MemoryStore, RedisStoreOfTests, SqliteStore, Store


@pytest.fixture(scope="session")
def session_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(session_redis: RedisServer) -> RedisServer:
    """Empty, with appendonly on."""
    session_redis.command("FLUSHALL")
    session_redis.command("SCRIPT", "FLUSH")
    return session_redis


@pytest.fixture(params=("memory", "sqlite", "redis"))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "sqlite":
        return SqliteStore(tmp_path)
    return RedisStoreOfTests(request.getfixturevalue("redis_server"))
