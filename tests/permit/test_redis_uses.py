"""How long a shared store remembers uses, and that it takes none for another's."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from pdp.permit import Permit
from pdp.permit.uses import KEEP_SECONDS
from tests.budget.redis_server import RedisServer
from tests.permit.test_uses import attempt, permit
from tests.permit.use_stores import NOW, RedisUses


def test_a_use_is_forgotten_in_the_end_and_not_before(redis_server: RedisServer) -> None:
    """Long expired by this machine's clock, or long to come: a day at least."""

    async def scene(one: Permit) -> None:
        async with RedisUses(redis_server).opened() as (uses,):
            await uses.redeem(one, key="k")

    for number, expires_at in enumerate((1_000_000_000, NOW)):
        name = f"permit-{number}"
        asyncio.run(scene(replace(permit(name), expires_at=expires_at)))
        reply = redis_server.command("TTL", f"pdp:{{t:tenant_acme}}:permit:{name}")
        assert int(reply[1:]) >= KEEP_SECONDS - 5


def test_a_redemption_s_key_can_not_pass_for_the_mark_of_a_closed_permit(
    redis_server: RedisServer,
) -> None:
    async def scene() -> None:
        async with RedisUses(redis_server).opened() as (uses,):
            one = permit(max_uses=2)
            assert await attempt(uses, "closed", one) == "ok"
            assert not await uses.is_closed(one)
            assert await attempt(uses, "other", one) == "ok"

    asyncio.run(scene())


def test_what_an_older_sidecar_has_spent_stays_spent(redis_server: RedisServer) -> None:
    key = "pdp:{t:tenant_acme}:permit:p-1"
    redis_server.command("HSET", key, "key", "tool-1", "closed", "0", "attempt", "a-1")

    async def scene() -> None:
        async with RedisUses(redis_server).opened() as (uses,):
            assert await attempt(uses, "tool-1") == "permit_used"
            assert await attempt(uses, "tool-2") == "permit_used"

    asyncio.run(scene())
