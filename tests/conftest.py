"""A Redis for the session, emptied for each test that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.budget.redis_server import RedisServer


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
