"""A permit is redeemed once, at whichever of the sidecars that share a store."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pdp.config import RedisSettings
from pdp.permit import Permit, PermitError
from pdp.permit.redis_uses import RedisPermitUses
from pdp.permit.uses import KEEP_SECONDS
from pdp.redis_store import RedisStore, open_redis
from tests.budget.redis_server import RedisServer
from tests.permit.test_uses import NOW, attempt, permit


async def open_stores(server: RedisServer, number: int) -> list[RedisStore]:
    settings = RedisSettings(unix=server.socket, timeout_ms=10_000)
    return [await open_redis(settings) for _ in range(number)]


async def close(stores: list[RedisStore]) -> None:
    for store in stores:
        await store.close()


def test_of_a_hundred_redeemers_at_four_sidecars_one_succeeds(redis_server: RedisServer) -> None:
    async def scene() -> list[str]:
        stores = await open_stores(redis_server, 4)
        uses = [RedisPermitUses(store) for store in stores]
        results = await asyncio.gather(
            *(attempt(uses[number % 4], f"tool-{number}") for number in range(100))
        )
        await close(stores)
        return list(results)

    assert sorted(asyncio.run(scene())) == ["ok"] + ["permit_used"] * 99


def test_a_redemption_that_is_tried_again_elsewhere_gets_its_first_answer(
    redis_server: RedisServer,
) -> None:
    async def scene() -> None:
        stores = await open_stores(redis_server, 2)
        here, there = (RedisPermitUses(store) for store in stores)
        assert await attempt(here, "tool-1") == "ok"
        assert await attempt(there, "tool-1") == "again"
        assert await attempt(there, "tool-2") == "permit_used"
        await close(stores)

    asyncio.run(scene())


def test_a_permit_closed_at_one_sidecar_is_redeemed_at_no_other(redis_server: RedisServer) -> None:
    async def scene() -> None:
        stores = await open_stores(redis_server, 2)
        here, there = (RedisPermitUses(store) for store in stores)
        await here.close_permit(permit("unused"))
        assert await attempt(there, "tool-1", "unused") == "permit_used"
        assert await attempt(here, "tool-1", "used") == "ok"
        await there.close_permit(permit("used"))
        assert await attempt(here, "tool-1", "used") == "permit_used"
        await close(stores)

    asyncio.run(scene())


def test_a_use_is_forgotten_in_the_end_and_not_before(redis_server: RedisServer) -> None:
    """Long expired by this machine's clock, or long to come: a day at least."""

    async def scene(one: Permit) -> None:
        stores = await open_stores(redis_server, 1)
        await RedisPermitUses(stores[0]).redeem(one, key="k")
        await close(stores)

    for number, expires_at in enumerate((1_000_000_000, NOW)):
        name = f"permit-{number}"
        asyncio.run(scene(replace(permit(name), expires_at=expires_at)))
        reply = redis_server.command("TTL", f"pdp:{{t:tenant_acme}}:permit:{name}")
        assert int(reply[1:]) >= KEEP_SECONDS - 5


def test_without_its_store_no_permit_is_redeemed(redis_server: RedisServer) -> None:
    async def scene() -> None:
        stores = await open_stores(redis_server, 1)
        await close(stores)
        uses = RedisPermitUses(stores[0])
        with pytest.raises(PermitError) as caught:
            await uses.redeem(permit(), key="k")
        assert caught.value.reason_code == "permit_unavailable"

    asyncio.run(scene())
