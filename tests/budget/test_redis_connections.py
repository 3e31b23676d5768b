"""Connections to the shared store, as many as are needed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pdp.config import RedisSettings
from pdp.redis_store import FREE_SECONDS, RedisStore, _PoolSender, open_redis
from tests.budget.redis_server import RedisServer


def clients(server: RedisServer) -> int:
    (line,) = (
        line
        for line in server.command("INFO", "clients").decode().splitlines()
        if line.startswith("connected_clients:")
    )
    return int(line.partition(":")[2]) - 1


async def look(store: RedisStore) -> None:
    await store.complete(lambda: store.command("pdp:any", "GET", "pdp:any"))


async def until_there_are(number: int, server: RedisServer) -> None:
    async with asyncio.timeout(10):
        while clients(server) != number:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.005)


def test_connections_that_one_moment_needed_are_closed_when_no_other_does(tmp_path: Path) -> None:
    server = RedisServer(tmp_path).start()
    now = 1_000.0

    async def work() -> None:
        nonlocal now
        store = await open_redis(RedisSettings(unix=server.socket))
        assert isinstance(store._sender, _PoolSender)
        store._sender._clock = lambda: now
        await asyncio.gather(*(look(store) for _ in range(8)))
        await until_there_are(8, server)
        now += FREE_SECONDS
        await look(store)
        await until_there_are(8, server)  # each was needed within that time
        now += 1
        for _ in range(20):
            await look(store)
        await until_there_are(1, server)
        await asyncio.gather(*(look(store) for _ in range(8)))
        await until_there_are(8, server)  # and they come back
        await store.close()
        await until_there_are(0, server)

    try:
        asyncio.run(work())
    finally:
        server.stop()
