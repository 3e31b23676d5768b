"""Many stubs in one process: each with a connection of its own, acting for one user.

A job comes as one line of JSON on standard input, and so does each word of the run that
steers it; what came of it goes to standard output. See :mod:`bench.scale.crowd`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bench.scale.bundles import CHARGED_TOOL, FREE_TOOL
from pdp.client import AsyncGuard, PermitDenied, current_permit


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One stub: where it asks, and for whom."""

    target: str
    token: str = field(repr=False)
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the stubs of a process do."""

    seats: Sequence[Seat]
    calls_per_second: float
    """Of each stub on average, at random times."""
    charged_share: float
    """Of the calls, those that cost a unit."""
    seconds: float
    seed: int


COUNTED: Final = ("executed", "spent", "refused")


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came of the calls."""

    executed: Counter[str] = field(default_factory=Counter)
    """By tool."""
    spent: Counter[str] = field(default_factory=Counter)
    """Units, by tenant."""
    refused: Counter[str] = field(default_factory=Counter)
    """By reason code."""
    strays: int = 0
    """Calls that ran for another tenant than the stub's own."""
    late: int = 0
    """Calls that began more than a second after their time: the machine was overloaded."""

    def to_json(self) -> dict[str, Any]:
        counts = {name: dict(getattr(self, name)) for name in COUNTED}
        return {**counts, "strays": self.strays, "late": self.late}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Tally:
        return cls(**said | {name: Counter(said[name]) for name in COUNTED})

    def add(self, other: Tally) -> None:
        for name in COUNTED:
            getattr(self, name).update(getattr(other, name))
        self.strays += other.strays
        self.late += other.late


class Stub:
    def __init__(self, seat: Seat, tally: Tally) -> None:
        self._seat = seat
        self._tally = tally
        self.guard = AsyncGuard(seat.target, timeout_seconds=20)
        self._read = self.guard.tool(FREE_TOOL)(self._read_order)
        self._update = self.guard.tool(CHARGED_TOOL)(self._update_order)

    async def _read_order(self, order_id: str) -> str:
        self._ran(FREE_TOOL, 0)
        return f"order {order_id}"

    async def _update_order(self, order_id: str, status: str) -> str:
        self._ran(CHARGED_TOOL, 1)
        return f"order {order_id} is {status}"

    def _ran(self, tool: str, units: int) -> None:
        tenant = current_permit().tenant
        self._tally.strays += tenant != self._seat.tenant
        self._tally.executed[tool] += 1
        self._tally.spent[self._seat.tenant] += units

    async def call(self, number: int, *, charged: bool) -> None:
        with self.guard.acting_for(self._seat.token):
            try:
                if charged:
                    await self._update(str(number), status="shipped")
                else:
                    await self._read(str(number))
            except PermitDenied as denied:
                self._tally.refused[denied.reason_code] += 1

    async def work(self, job: Job, draw: random.Random) -> None:
        """Call at the times of a Poisson process, one call after the other."""
        begun_at = time.monotonic()
        at = draw.expovariate(job.calls_per_second)
        number = 0
        while at < job.seconds:
            behind = time.monotonic() - begun_at - at
            self._tally.late += behind > 1
            await asyncio.sleep(max(0.0, -behind))
            number += 1
            await self.call(number, charged=draw.random() < job.charged_share)
            at += draw.expovariate(job.calls_per_second)


async def run(job: Job, told: Callable[[], Awaitable[str]], say: Callable[[Any], None]) -> None:
    """Connect, say so, work when told, say what came of it, and leave when told."""
    tally = Tally()
    stubs = [Stub(seat, tally) for seat in job.seats]
    for stub in stubs:
        await stub.call(0, charged=False)
    tally.executed.clear()
    say("connected")
    await told()
    draw = random.Random(job.seed)  # noqa: S311 - traffic, and the same each time
    draws = [random.Random(draw.random()) for _ in stubs]  # noqa: S311 - as above
    await asyncio.gather(*(stub.work(job, mine) for stub, mine in zip(stubs, draws, strict=True)))
    say(tally.to_json())
    await told()
    await asyncio.gather(*(stub.guard.close() for stub in stubs))


def main() -> None:
    job = json.loads(sys.stdin.readline())
    job["seats"] = [Seat(**seat) for seat in job["seats"]]

    async def told() -> str:
        return await asyncio.to_thread(sys.stdin.readline)

    asyncio.run(run(Job(**job), told, lambda what: print(json.dumps(what), flush=True)))


if __name__ == "__main__":
    main()
