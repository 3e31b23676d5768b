"""Many sidecars that lease from one Redis, at the same time."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdp.budget.lease_pool import LeaseTerms
from pdp.budget.leased_ledger import LeasedLedger, open_leased
from pdp.budget.ledger import IdempotencyKey, Ledger, LedgerError, Limit, Receipt, Scope, Window
from pdp.budget.local_ledger import is_local
from pdp.budget.redis_ledger import RedisLedger
from pdp.config import OnOutage, RedisSettings
from pdp.redis_store import open_redis
from pdp.storage import Durability
from tests.budget.redis_server import RedisServer
from tests.budget.teller import ALICE, SAME, calls, limit

_keys = itertools.count()


def lifetime(most: int) -> tuple[Limit, ...]:
    return (
        limit(most, name="tenant", window=Window.LIFETIME),
        limit(most, name="actor", window=Window.LIFETIME, scope=Scope.ACTOR),
    )


def key(operation: str) -> IdempotencyKey:
    return IdempotencyKey(
        operation=operation, key=f"key-{next(_keys)}", content_sha256=SAME, note=""
    )


def made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


async def open_one(
    server: RedisServer, folder: Path, terms: LeaseTerms | None = None, timeout_ms: int = 30_000
) -> LeasedLedger:
    store = await open_redis(RedisSettings(unix=server.socket, timeout_ms=timeout_ms))
    return await open_leased(
        RedisLedger(store),
        made(folder),
        durability=Durability.PROCESS,
        terms=terms or LeaseTerms(),
        holder=folder.name,
    )


@asynccontextmanager
async def sidecars(
    server: RedisServer, folder: Path, number: int = 8
) -> AsyncIterator[list[LeasedLedger]]:
    ledgers = [await open_one(server, folder / str(each)) for each in range(number)]
    yield ledgers
    await asyncio.gather(*(ledger.close() for ledger in ledgers))


async def reserve(ledger: Ledger, limits: Sequence[Limit]) -> Receipt:
    return await ledger.reserve(
        ALICE, key("reserve"), charges=(calls(1),), limits=limits, ttl_seconds=60
    )


async def reserve_and_settle(ledger: Ledger, limits: Sequence[Limit]) -> str:
    """The id of the hold; empty when it was refused."""
    held = await reserve(ledger, limits)
    if held.refused_by is None:
        await ledger.settle(ALICE, key("settle"), hold_id=held.id, charges=None)
    return held.id


async def let_in(ledger: Ledger, limits: Sequence[Limit]) -> list[str]:
    """Reserve and settle until it is refused: the ids of the holds."""
    ids = []
    while hold_id := await reserve_and_settle(ledger, limits):
        ids.append(hold_id)
    return ids


async def counts(server: RedisServer, limits: Sequence[Limit]) -> list[tuple[int, int]]:
    ledger = RedisLedger(await open_redis(RedisSettings(unix=server.socket)))
    states = await ledger.state(ALICE, limits=limits)
    await ledger.close()
    return [(state.spent, state.held) for state in states]


def test_of_a_thousand_at_once_exactly_as_many_get_in_as_the_limit_says(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    async def run() -> None:
        async with sidecars(redis_server, tmp_path) as ledgers:
            receipts = await asyncio.gather(
                *(reserve(ledgers[number % 8], lifetime(50)) for number in range(1000))
            )
            assert sum(receipt.refused_by is None for receipt in receipts) == 50

    asyncio.run(run())


def test_leases_let_no_more_in_than_the_limit_says_and_lose_none_of_it(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    most = 1500
    limits = lifetime(most)

    async def run() -> None:
        async with sidecars(redis_server, tmp_path) as ledgers:
            callers = [let_in(ledgers[number % 8], limits) for number in range(32)]
            got_in = [each for ids in await asyncio.gather(*callers) for each in ids]
            assert len(got_in) <= most
            leased = [each for each in got_in if is_local(each)]
            assert len(leased) > most / 3
        assert await counts(redis_server, limits) == [(len(got_in), 0)] * 2
        async with sidecars(redis_server, tmp_path, 1) as [ledger]:
            assert len(got_in) + len(await let_in(ledger, limits)) == most

    asyncio.run(run())


async def until(done: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    async with asyncio.timeout(30):
        while not await done():  # noqa: ASYNC110 - another process does it
            await asyncio.sleep(0.01)


async def is_leasing(ledger: LeasedLedger, limits: Sequence[Limit]) -> bool:
    return is_local((await reserve(ledger, limits)).id)


@pytest.mark.parametrize("on_outage", OnOutage)
def test_while_the_server_is_away_only_what_is_leased_is_spent(
    tmp_path: Path, on_outage: OnOutage
) -> None:
    limits = lifetime(100_000)
    server = RedisServer(tmp_path / "redis", "appendfsync always").start()

    async def run() -> None:
        terms = LeaseTerms(seconds=600, on_outage=on_outage)
        ledger = await open_one(server, tmp_path / "one", terms, timeout_ms=300)
        await until(lambda: is_leasing(ledger, limits))
        server.kill()
        with pytest.raises(LedgerError) as caught:
            await reserve(ledger, (replace(limits[0], id="other"),))
        assert caught.value.reason_code == "budget_unavailable"
        if on_outage is OnOutage.SPEND_LEASE:
            assert await is_leasing(ledger, limits)
        else:
            with pytest.raises(LedgerError):
                await reserve(ledger, limits)
        server.start()
        await until(lambda: is_leasing_again(ledger, limits))
        [(before, _), _] = await counts(server, limits)
        assert before <= 100_000
        await ledger.close()

    async def is_leasing_again(ledger: LeasedLedger, limits: Sequence[Limit]) -> bool:
        try:
            return await is_leasing(ledger, limits)
        except LedgerError:
            return False

    try:
        asyncio.run(run())
    finally:
        server.stop()


def test_a_sidecar_leases_and_reports_by_itself(redis_server: RedisServer, tmp_path: Path) -> None:
    limits = lifetime(100_000)

    async def run() -> None:
        ledger = await open_one(redis_server, tmp_path / "one", LeaseTerms(seconds=2))
        for _ in range(500):
            assert await reserve_and_settle(ledger, limits)

        async def is_reported() -> bool:
            return await counts(redis_server, limits) == [(500, 0), (500, 0)]

        await until(is_reported)
        await ledger.close()

    asyncio.run(run())
