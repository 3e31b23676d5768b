from __future__ import annotations

import asyncio

import pytest

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.live import LivePolicy


class Engine:
    """Answers with its own revision, when it is let."""

    def __init__(self, revision: str) -> None:
        self.revision = revision
        self._closed = False
        self.let = asyncio.Event()
        self.let.set()

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        assert not self._closed
        await self.let.wait()
        assert not self._closed
        return self.revision

    async def close(self) -> None:
        self._closed = True

    def is_closed(self) -> bool:
        return self._closed


async def answers(policy: LivePolicy) -> list[JsonValue]:
    """What one call gets for its questions."""
    with policy.pin() as engine:
        return [await engine.evaluate(entrypoint, {}) for entrypoint in Entrypoint]


def test_a_call_keeps_its_revision_while_another_is_activated() -> None:
    async def run() -> None:
        first, second = Engine("1"), Engine("2")
        policy = LivePolicy(first)
        first.let.clear()
        early = asyncio.create_task(answers(policy))
        await asyncio.sleep(0)
        policy.activate(second)
        assert await answers(policy) == ["2"] * len(Entrypoint)
        assert not first.is_closed()
        first.let.set()
        assert await early == ["1"] * len(Entrypoint)
        await policy.close()
        assert first.is_closed()
        assert second.is_closed()

    asyncio.run(run())


def test_an_engine_that_nobody_uses_is_closed_when_it_is_replaced() -> None:
    async def run() -> None:
        first = Engine("1")
        policy = LivePolicy(first)
        assert await answers(policy) == ["1"] * len(Entrypoint)
        policy.activate(Engine("2"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert first.is_closed()

    asyncio.run(run())


def test_a_cancelled_call_lets_go_of_its_engine() -> None:
    async def run() -> None:
        first = Engine("1")
        first.let.clear()
        policy = LivePolicy(first)
        call = asyncio.create_task(answers(policy))
        await asyncio.sleep(0)
        policy.activate(Engine("2"))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await policy.close()
        assert first.is_closed()

    asyncio.run(run())


@pytest.mark.parametrize("deny", (True, False))
def test_a_policy_past_its_age_is_denied_or_served_as_configured(*, deny: bool) -> None:
    async def run() -> None:
        now = [1000.0]
        policy = LivePolicy(
            Engine("1"), max_age_seconds=60, deny_when_stale=deny, clock=lambda: now[0]
        )
        now[0] += 60
        ages = [policy.stale]
        now[0] += 1
        ages.append(policy.stale)
        assert ages == [False, True]
        assert policy.answers is not deny
        if deny:
            with pytest.raises(PolicyError) as refused:
                await answers(policy)
            assert refused.value.reason_code == "policy_stale"
        else:
            assert await answers(policy) == ["1"] * len(Entrypoint)
        policy.checked_at = now[0]
        assert await answers(policy) == ["1"] * len(Entrypoint)

    asyncio.run(run())


def test_who_waits_for_another_revision_gets_it() -> None:
    async def run() -> None:
        policy = LivePolicy(Engine("1"))
        waiting = asyncio.create_task(policy.changed_from("1"))
        await asyncio.sleep(0)
        policy.activate(Engine("1"))  # the same rules, for example with another engine
        policy.activate(Engine("2"))
        assert await waiting == "2"
        assert await policy.changed_from("1") == "2"

    asyncio.run(run())


def test_a_time_of_a_clock_that_ran_ahead_does_not_keep_a_policy_young() -> None:
    now = 1_000_000.0
    policy = LivePolicy(Engine("1"), max_age_seconds=60, checked_at=now + 30, clock=lambda: now)
    assert not policy.stale
    policy.checked_at = now + 61
    assert policy.stale


def test_an_engine_is_not_closed_while_it_is_asked_for_its_health() -> None:
    class SlowlyHealthy(Engine):
        async def healthy(self) -> bool:
            await self.let.wait()
            return not self.is_closed()

    async def run() -> None:
        first = SlowlyHealthy("1")
        policy = LivePolicy(first)
        first.let.clear()
        asked = asyncio.create_task(policy.healthy())
        await asyncio.sleep(0)
        policy.activate(Engine("2"))
        await asyncio.sleep(0)
        first.let.set()
        assert await asked
        await policy.close()
        assert first.is_closed()

    asyncio.run(run())
