"""A permit is redeemed as often as it allows, whoever asks, where and how often."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdp.permit import Permit, PermitError
from pdp.permit.claims import MAX_USES
from pdp.permit.uses import PermitUses, Use, UsedPermits
from pdp.storage import Durability, SqliteWriter, StorageError
from tests.permit.use_stores import NOW, RedisUses, SqliteUses, UseStore

Act = Callable[[Sequence[UsedPermits]], Coroutine[Any, Any, None]]


@pytest.fixture(params=("sqlite", "redis"))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> UseStore:
    if request.param == "sqlite":
        return SqliteUses(tmp_path)
    return RedisUses(request.getfixturevalue("redis_server"))


def permit(name: str = "p-1", *, max_uses: int = 1) -> Permit:
    return Permit(
        id=name,
        issuer="agent-pdp",
        audience="orders",
        tenant="tenant_acme",
        actor="user-7",
        tool="orders.update",
        arguments_sha256="0" * 64 if max_uses == 1 else "",
        scopes=(),
        transaction="req-1",
        decision_id="d-1",
        policy_revision="r-1",
        ledger="ledger-1",
        issued_at=NOW,
        expires_at=NOW + 60,
        max_uses=max_uses,
    )


async def attempt(uses: UsedPermits, key: str, one: Permit | None = None) -> str:
    try:
        return "again" if (await uses.redeem(one or permit(), key=key)).replayed else "ok"
    except PermitError as error:
        return error.reason_code


def play(store: UseStore, act: Act, *, sidecars: int = 2) -> None:
    async def scene() -> None:
        async with store.opened(sidecars) as opened:
            await act(opened)

    asyncio.run(scene())


@pytest.mark.parametrize("max_uses", (1, 7))
def test_of_a_hundred_redeemers_at_four_sidecars_as_many_succeed_as_may(
    store: UseStore, max_uses: int
) -> None:
    async def act(sidecars: Sequence[UsedPermits]) -> None:
        one = permit(max_uses=max_uses)
        results = await asyncio.gather(
            *(attempt(sidecars[number % 4], f"tool-{number}", one) for number in range(100))
        )
        assert sorted(results) == ["ok"] * max_uses + ["permit_used"] * (100 - max_uses)

    play(store, act, sidecars=4)


def test_a_redemption_that_is_tried_again_elsewhere_gets_its_first_answer(store: UseStore) -> None:
    async def act(sidecars: Sequence[UsedPermits]) -> None:
        here, there = sidecars
        assert await attempt(here, "tool-1") == "ok"
        assert await attempt(there, "tool-1") == "again"
        assert await attempt(there, "tool-2") == "permit_used"

    async def act_after_a_restart(sidecars: Sequence[UsedPermits]) -> None:
        assert await attempt(sidecars[0], "tool-1") == "again"
        assert await attempt(sidecars[1], "tool-2") == "permit_used"

    play(store, act)
    play(store, act_after_a_restart)


def test_a_permit_for_several_calls_tells_how_many_are_left(store: UseStore) -> None:
    async def act(sidecars: Sequence[UsedPermits]) -> None:
        here, there = sidecars
        one = permit(max_uses=3)
        assert await here.redeem(one, key="a") == Use(replayed=False, uses_left=2)
        assert await there.redeem(one, key="b") == Use(replayed=False, uses_left=1)
        assert await there.redeem(one, key="a") == Use(replayed=True, uses_left=1)
        assert await here.redeem(one, key="c") == Use(replayed=False, uses_left=0)
        assert await here.redeem(one, key="b") == Use(replayed=True, uses_left=0)
        assert await attempt(there, "d", one) == "permit_used"

    play(store, act)


def test_every_use_of_the_longest_permit_can_be_spent(store: UseStore) -> None:
    async def act(sidecars: Sequence[UsedPermits]) -> None:
        one = permit(max_uses=MAX_USES)
        results = await asyncio.gather(
            *(attempt(sidecars[0], f"tool-{number}", one) for number in range(MAX_USES + 10))
        )
        assert (results.count("ok"), results.count("permit_used")) == (MAX_USES, 10)
        assert await sidecars[1].close_permit(one) == MAX_USES

    play(store, act)


@pytest.mark.parametrize("max_uses", (1, 3))
def test_once_it_is_closed_a_permit_is_redeemed_nowhere(store: UseStore, max_uses: int) -> None:
    async def act(sidecars: Sequence[UsedPermits]) -> None:
        here, there = sidecars
        unused, used = (permit(name, max_uses=max_uses) for name in ("unused", "used"))
        assert await here.close_permit(unused) == 0
        assert await attempt(there, "tool-1", unused) == "permit_used"
        assert await attempt(here, "tool-1", used) == "ok"
        assert await there.close_permit(used) == 1
        assert await attempt(here, "tool-1", used) == "permit_used"
        assert await attempt(here, "tool-2", used) == "permit_used"
        assert await here.close_permit(used) == 1, "as the first time"

    play(store, act)


def test_it_can_be_asked_whether_a_permit_is_closed(store: UseStore) -> None:
    async def act(sidecars: Sequence[UsedPermits]) -> None:
        here, there = sidecars
        assert not await here.is_closed(permit())
        await here.redeem(permit(), key="tool-1")
        assert not await there.is_closed(permit()), "used up is not closed"
        await here.close_permit(permit())
        assert await there.is_closed(permit())
        assert not await there.is_closed(permit("p-2"))

    play(store, act)


def test_a_closed_store_says_so_and_spends_nothing(store: UseStore) -> None:
    async def scene() -> None:
        async with store.opened() as opened:
            (uses,) = opened
        calls: list[Coroutine[Any, Any, object]] = [
            uses.redeem(permit(), key="k"), uses.close_permit(permit()), uses.is_closed(permit())
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(PermitError) as caught:
                await call
            assert caught.value.reason_code == "permit_unavailable"

    asyncio.run(scene())


# Whatever comes in whatever order

NAMES = itertools.count()
KEYS = ("a", "b", "c", "d", "e")
steps = st.tuples(st.integers(0, 2), st.sampled_from([*KEYS, *KEYS, "close"]))
at_once = st.lists(steps, min_size=1, max_size=8)


async def taken_at_once(
    store: UseStore, one: Permit, steps_at_once: list[tuple[int, str]]
) -> tuple[list[str | int], bool]:
    """What each step answers, and whether the permit is closed in the end."""

    async def take(uses: UsedPermits, what: str) -> str | int:
        return await (uses.close_permit(one) if what == "close" else attempt(uses, what, one))

    async with store.opened(3) as sidecars:
        answers = await asyncio.gather(
            *(take(sidecars[where], what) for where, what in steps_at_once)
        )
        return list(answers), await sidecars[0].is_closed(one)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(max_uses=st.integers(1, 4), rounds=st.lists(at_once, min_size=1, max_size=4))
def test_no_order_of_things_lets_a_permit_be_redeemed_more_often_than_it_allows(
    store: UseStore, max_uses: int, rounds: list[list[tuple[int, str]]]
) -> None:
    """The steps of a round are taken at once, at three sidecars, which start anew for the
    next one.
    """
    one = permit(f"random-{next(NAMES)}", max_uses=max_uses)
    spent: set[str] = set()
    closed = False

    for steps_at_once in rounds:
        answers, is_closed = asyncio.run(taken_at_once(store, one, steps_at_once))
        assert is_closed is (closed or any(what == "close" for _, what in steps_at_once))
        taken = [(what, answer) for (_, what), answer in zip(steps_at_once, answers, strict=True)]
        first_times = [what for what, answer in taken if answer == "ok"]
        assert len(first_times) == len(set(first_times)), "one key spends once"
        assert spent.isdisjoint(first_times)
        assert not (closed and first_times)
        spent.update(first_times)
        assert len(spent) <= max_uses
        closing = {answer for what, answer in taken if what == "close"}
        assert closing <= {len(spent)}, "nothing is spent once it is closed"
        for what, answer in taken:
            if answer == "again":
                assert what in spent
            if answer == "permit_used":
                assert closed or closing or (what not in spent and len(spent) == max_uses)
        closed = closed or bool(closing)


# The embedded store


def test_old_uses_are_forgotten_long_after_the_permit_has_expired(tmp_path: Path) -> None:
    def opened(now: float) -> PermitUses:
        return PermitUses(tmp_path / "permits.db", durability=Durability.PROCESS, clock=lambda: now)

    async def scene() -> int:
        uses = opened(NOW)
        for number in range(5):
            for key in KEYS:
                await uses.redeem(permit(f"old-{number}", max_uses=5), key=key)
        await uses.close()
        later = opened(NOW + 2 * 86_400)
        for number in range(5):
            await later.redeem(permit(f"new-{number}"), key="k")
        count = await later._writer.run(
            lambda connection: connection.execute("SELECT count(*) FROM permit_use").get
        )
        await later.close()
        assert isinstance(count, int)
        return count

    assert asyncio.run(scene()) <= 5


def test_a_file_of_another_form_is_not_taken_for_one_in_which_nothing_is_spent(
    tmp_path: Path,
) -> None:
    async def scene() -> None:
        writer = SqliteWriter(
            tmp_path / "permits.db",
            schema="CREATE TABLE permit_use (permit_id TEXT PRIMARY KEY);",
            durability=Durability.PROCESS,
        )
        await writer.close()

    asyncio.run(scene())
    with pytest.raises(StorageError, match="schema version 1"):
        PermitUses(tmp_path / "permits.db", durability=Durability.PROCESS)
