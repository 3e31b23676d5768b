"""Every permit is redeemed once, whoever asks and however often."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pdp.permit import Permit, PermitError
from pdp.permit.uses import PermitUses, UsedPermits
from pdp.storage import Durability

NOW = 1_800_000_000


def permit(name: str = "p-1") -> Permit:
    return Permit(
        id=name,
        issuer="agent-pdp",
        audience="orders",
        tenant="tenant_acme",
        actor="user-7",
        tool="orders.update",
        arguments_sha256="0" * 64,
        scopes=(),
        transaction="req-1",
        decision_id="d-1",
        policy_revision="r-1",
        ledger="ledger-1",
        issued_at=NOW,
        expires_at=NOW + 60,
    )


def uses(path: Path, now: float = NOW) -> PermitUses:
    return PermitUses(path / "permits.db", durability=Durability.PROCESS, clock=lambda: now)


async def attempt(store: UsedPermits, key: str, name: str = "p-1") -> str:
    try:
        return "again" if await store.redeem(permit(name), key=key) else "ok"
    except PermitError as error:
        return error.reason_code


def test_of_a_hundred_concurrent_redeemers_one_succeeds(tmp_path: Path) -> None:
    async def scene() -> list[str]:
        store = uses(tmp_path)
        try:
            return list(await asyncio.gather(*(attempt(store, f"tool-{n}") for n in range(100))))
        finally:
            await store.close()

    results = asyncio.run(scene())
    assert sorted(results) == ["ok"] + ["permit_used"] * 99


def test_a_redemption_that_is_tried_again_gets_its_first_answer(tmp_path: Path) -> None:
    async def scene() -> None:
        store = uses(tmp_path)
        assert await attempt(store, "tool-1") == "ok"
        assert await attempt(store, "tool-1") == "again"
        assert await attempt(store, "tool-2") == "permit_used"
        await store.close()
        # ... also after a restart.
        store = uses(tmp_path)
        assert await attempt(store, "tool-1") == "again"
        assert await attempt(store, "tool-2") == "permit_used"
        await store.close()

    asyncio.run(scene())


def test_once_its_outcome_is_reported_a_permit_can_not_be_redeemed(tmp_path: Path) -> None:
    async def scene() -> None:
        store = uses(tmp_path)
        await store.close_permit(permit("unused"))
        assert await attempt(store, "tool-1", "unused") == "permit_used"
        assert await attempt(store, "tool-1", "used") == "ok"
        await store.close_permit(permit("used"))
        assert await attempt(store, "tool-1", "used") == "permit_used"
        await store.close()

    asyncio.run(scene())


def test_old_uses_are_forgotten_long_after_the_permit_has_expired(tmp_path: Path) -> None:
    async def scene() -> int:
        store = uses(tmp_path)
        for number in range(20):
            await store.redeem(permit(f"old-{number}"), key="k")
        await store.close()
        later = uses(tmp_path, now=NOW + 2 * 86_400)
        for number in range(5):
            await later.redeem(permit(f"new-{number}"), key="k")
        count = await later._writer.run(
            lambda connection: connection.execute("SELECT count(*) FROM permit_use").get
        )
        await later.close()
        assert isinstance(count, int)
        return count

    assert asyncio.run(scene()) <= 5


def test_a_closed_store_says_so_and_spends_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        store = uses(tmp_path)
        await store.close()
        with pytest.raises(PermitError) as caught:
            await store.redeem(permit(), key="k")
        assert caught.value.reason_code == "permit_unavailable"

    asyncio.run(scene())
