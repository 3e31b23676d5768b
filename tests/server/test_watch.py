from __future__ import annotations

import asyncio
from typing import cast

import pytest

from pdp.errors import PdpError
from pdp.policy.engine import ActivePolicy
from pdp.server.watch import MAX_WATCHERS_PER_TENANT, Watchers


class Policy:
    """In force until it is told otherwise."""

    def __init__(self) -> None:
        self.revision = "1"
        self._changed = asyncio.Event()

    def change(self, revision: str) -> None:
        self.revision = revision
        self._changed.set()

    async def changed_from(self, revision: str) -> str:
        while self.revision == revision:
            self._changed.clear()
            await self._changed.wait()
        return self.revision


def watchers(policy: Policy, *, seconds: float = 60) -> tuple[Watchers, asyncio.Event]:
    draining = asyncio.Event()
    return Watchers(cast("ActivePolicy", policy), draining=draining, seconds=seconds), draining


def test_each_revision_is_told_and_then_the_end() -> None:
    async def run() -> None:
        policy = Policy()
        everybody, draining = watchers(policy)
        events = everybody.events("acme")
        assert (await anext(events)).policy.revision == "1"
        policy.change("2")
        assert (await anext(events)).policy.revision == "2"
        draining.set()
        assert (await anext(events)).HasField("draining")
        assert [event async for event in events] == []

    asyncio.run(run())


def test_a_watch_ends_after_its_time() -> None:
    async def run() -> None:
        everybody, _ = watchers(Policy(), seconds=0.01)
        assert len([event async for event in everybody.events("acme")]) == 1

    asyncio.run(run())


def test_one_tenant_can_not_take_all_the_places() -> None:
    async def run() -> None:
        everybody, _ = watchers(Policy())
        watching = [everybody.events("acme") for _ in range(MAX_WATCHERS_PER_TENANT)]
        for events in watching:
            await anext(events)
        with pytest.raises(PdpError) as refused:
            await anext(everybody.events("acme"))
        assert refused.value.reason_code == "rate_limited"
        other = everybody.events("globex")
        assert (await anext(other)).policy.revision == "1"
        # A client that goes makes room.
        await watching.pop().aclose()
        again = everybody.events("acme")
        assert (await anext(again)).policy.revision == "1"
        for events in (*watching, other, again):
            await events.aclose()

    asyncio.run(run())
