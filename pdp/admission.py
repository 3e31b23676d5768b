"""Who is let in, and in whose turn: one tenant must not starve another.

Calls are admitted once it is known whose they are, and before anything is done for
them that costs. A tenant has a rate and a number of calls at once of its own; past
them it is refused, however quiet the sidecar is. Where the sidecar itself is full,
tenants take turns, by weight (weighted round robin: deficit round robin, Shreedhar and
Varghese 1995, with calls that all cost the same), each tenant's calls in the order in
which they came. Who waits is bounded; the place of a call that comes then is taken
from whoever waits with most calls for its weight, so a full queue locks nobody out.

What finishes that which was begun has a lane of its own: a tenant that floods new
questions can still report what it did, and one that floods reports holds up only
other reports of its own.

All of it happens on one event loop, without a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pdp.errors import PdpError
from pdp.reason import ReasonCode

ENDINGS_PER_QUESTION: Final = 4
"""Rate and burst of endings, as a multiple of the questions': each may be redeemed and
reported, and either tried again."""
BUSY_SECONDS: Final = 0.1
"""When to ask again, at the least, where that depends on calls that are under way."""
MAX_RETRY_AFTER_SECONDS: Final = 5.0
"""No refused caller is told to wait longer, unless the rate itself asks for it."""
MAX_HELD_BACK_SECONDS: Final = 1.0
"""How long the answer to a call too many is held back at most."""
MAX_HELD_BACK: Final = 1_024
"""Such answers at the same time; one more is given at once."""
_INSTANT_SECONDS: Final = 1e-6
"""No wait at all: what rounding makes of one."""
RECORDED_BURST: Final = 10
"""Refusals of one tenant that go on record at once."""
RECORDED_PER_SECOND: Final = 0.1
"""And then so many a second; the rest is counted, and the number is in the next record."""


class Priority(StrEnum):
    """Who is served first when the sidecar is full; nobody is never served."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def weight(self) -> int:
        """Calls that are let in when it is the tenant's turn."""
        return _WEIGHTS[self]


_WEIGHTS: Final = {Priority.HIGH: 4, Priority.NORMAL: 2, Priority.LOW: 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceClass:
    """What a tenant may use of the sidecar."""

    priority: Priority
    max_concurrent_calls: int
    """Under way or waiting at the same time; at least 1."""
    calls_per_second: float
    """On average; above 0."""
    burst: int
    """At once, after a pause; at least 1."""

    def __post_init__(self) -> None:
        if self.max_concurrent_calls < 1 or self.calls_per_second <= 0 or self.burst < 1:
            raise ValueError("a service class must let at least one call in")


class Lane(StrEnum):
    """What a call is for. Each lane has its own places, rates and turns."""

    QUESTIONS = "questions"
    """New work: may this be done, or spent?"""
    ENDINGS = "endings"
    """Finishes what was begun: redeem, report, settle, release."""


class Refusal(StrEnum):
    """What a call was one too many for."""

    RATE = "rate"
    CONCURRENCY = "concurrency"
    FULL = "full"


_MESSAGES: Final = {
    Refusal.RATE: "The tenant's calls come faster than it may ask; try again later.",
    Refusal.CONCURRENCY: "Too many of the tenant's calls are under way; try again later.",
    Refusal.FULL: "Too many calls are under way; try again later.",
}


class AdmissionError(PdpError):
    """The call is one too many (rate_limited)."""

    def __init__(
        self, kind: Refusal, *, retry_after_seconds: float, unrecorded: int | None = None
    ) -> None:
        super().__init__(ReasonCode.RATE_LIMITED, _MESSAGES[kind])
        self.kind = kind
        self.retry_after_seconds = retry_after_seconds
        """A caller's own time: those who keep to it come back one after the other."""
        self.unrecorded = unrecorded
        """Refusals of the tenant that went unrecorded before this one; None when this one
        is not to be recorded either."""


class Admission:
    """Lets calls in, up to a number at a time in each lane."""

    def __init__(
        self,
        *,
        max_concurrent_calls: int,
        max_waiting_calls: int,
        classes: Callable[[str], ServiceClass],
        max_idle_tenants: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = random.random,
    ) -> None:
        """``max_waiting_calls`` bounds each lane too. ``classes`` tells what a tenant may
        use, as of now; it is asked for every call. Tenants without a call that are
        beyond ``max_idle_tenants`` are forgotten, and begin anew.
        """
        self._sleep = sleep
        self._random = random
        self._held_back = 0
        self._waiting_tasks: set[asyncio.Task[object]] = set()
        self._parts: dict[asyncio.Task[object], Iterable[asyncio.Task[object]]] = {}
        self._lanes = {
            lane: _Lane(
                places=max_concurrent_calls,
                max_waiting=max_waiting_calls,
                classes=classes,
                per_question=ENDINGS_PER_QUESTION if lane is Lane.ENDINGS else 1,
                max_idle_tenants=max_idle_tenants,
                may_be_abandoned=self._may_be_abandoned,
                clock=clock,
            )
            for lane in Lane
        }
        self.max_calls = len(Lane) * (max_concurrent_calls + max_waiting_calls) + MAX_HELD_BACK
        """Calls that are under way or wait at the same time, at the very most, those whose
        refusal is held back included."""

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return sum(lane.waiting for lane in self._lanes.values())

    @property
    def under_way(self) -> int:
        """Calls that were let in, and have not ended."""
        return sum(lane.under_way for lane in self._lanes.values())

    def admitted(self, tenant: str, lane: Lane) -> contextlib.AbstractAsyncContextManager[None]:
        """Let a call of a verified tenant in, when it is its turn, and hold its place
        for as long as the context lasts. Raises AdmissionError.
        """
        return _Place(self._lanes[lane], tenant)

    async def hold_back(self, error: AdmissionError) -> None:
        """Wait before the refusal is answered, for no longer than there is no use in
        asking again, and take that off what the caller is told. Even a refusal costs, and
        who asks again at once would have the sidecar do little else.
        """
        if self._held_back >= MAX_HELD_BACK:
            return
        # Spread, so that callers who were refused together do not come back together.
        seconds = min(error.retry_after_seconds, MAX_HELD_BACK_SECONDS) * (1 - self._random() / 2)
        self._held_back += 1
        try:
            with self._may_be_abandoned():
                await self._sleep(seconds)
        finally:
            self._held_back -= 1
        error.retry_after_seconds -= seconds

    @contextlib.contextmanager
    def _may_be_abandoned(self) -> Iterator[None]:
        task = _running()
        self._waiting_tasks.add(task)
        try:
            yield
        finally:
            self._waiting_tasks.discard(task)

    @contextlib.contextmanager
    def together(self, parts: Iterable[asyncio.Task[object]]) -> Iterator[None]:
        """While the running task waits for these, they have the same caller as it has."""
        task = _running()
        self._parts[task] = parts
        try:
            yield
        finally:
            del self._parts[task]

    def abandon(self, task: asyncio.Task[object]) -> None:
        """The caller of a task has gone: if it still waits, it leaves. What was let in
        goes on.
        """
        for each in (task, *self._parts.get(task, ())):
            if each in self._waiting_tasks:
                each.cancel()


class _Place(contextlib.AbstractAsyncContextManager[None]):
    """One in a lane, for a call of a tenant."""

    __slots__ = ("_held_by", "_lane", "_tenant")

    _held_by: _Tenant

    def __init__(self, lane: _Lane, tenant: str) -> None:
        self._lane = lane
        self._tenant = tenant

    async def __aenter__(self) -> None:
        self._held_by = await self._lane.enter(self._tenant)

    async def __aexit__(self, *failure: object) -> None:
        self._lane.leave(self._held_by)


def _running() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - within a coroutine
    return task


class Pace:
    """A rate with a burst: the generic cell rate algorithm (ITU-T I.371), as virtual
    scheduling.
    """

    __slots__ = ("_full_at",)

    def __init__(self) -> None:
        self._full_at = 0.0
        """When the whole burst can be had again."""

    def wait_seconds(self, now: float, *, per_second: float, burst: int) -> float:
        """How long until one more may be taken; 0 for now."""
        longest = burst / per_second
        # After a change of class, what is owed is owed in terms of the new one.
        self._full_at = min(self._full_at, now + longest)
        wait = max(self._full_at, now) + 1 / per_second - longest - now
        return wait if wait > _INSTANT_SECONDS else 0.0

    def take(self, now: float, *, per_second: float) -> None:
        """Take one."""
        self._full_at = max(self._full_at, now) + 1 / per_second


@dataclass(slots=True, eq=False)
class _Tenant:
    """What is known of a tenant in one lane."""

    name: str
    calls: int = 0
    """Under way and waiting."""
    waiting: dict[asyncio.Future[None], None] = field(default_factory=dict)
    """In the order in which they came."""
    weight: int = 1
    credit: int = 0
    """Calls that may still be let in while it is its turn."""
    pace: Pace = field(default_factory=Pace)
    recorded: Pace = field(default_factory=Pace)
    unrecorded: int = 0
    told_until: float = 0.0
    """The next refused caller is told to come back no sooner."""


class _Lane:
    def __init__(
        self,
        *,
        places: int,
        max_waiting: int,
        classes: Callable[[str], ServiceClass],
        per_question: int,
        max_idle_tenants: int,
        may_be_abandoned: Callable[[], contextlib.AbstractContextManager[None]],
        clock: Callable[[], float],
    ) -> None:
        self._free = places
        """Nobody waits while there are any."""
        self._max_waiting = max_waiting
        self._classes = classes
        self._per_question = per_question
        self._max_idle_tenants = max_idle_tenants
        self._may_be_abandoned = may_be_abandoned
        self._clock = clock
        self._busy: dict[str, _Tenant] = {}
        self._idle: OrderedDict[str, _Tenant] = OrderedDict()
        """The one that was seen last is last."""
        self._turns: OrderedDict[str, _Tenant] = OrderedDict()
        """Who waits; the first one's turn it is."""
        self.waiting = 0
        self.under_way = 0

    async def enter(self, name: str) -> _Tenant:
        """A place, when it is the tenant's turn. Raises AdmissionError."""
        tenant = self._busy.get(name) or self._idle.pop(name, None) or _Tenant(name)
        self._busy[name] = tenant
        try:
            self._admit(tenant, self._classes(name))
            if self._free:
                self._free -= 1
            else:
                await self._turn_of(tenant)
        except BaseException:
            self._retire_if_idle(tenant)
            raise
        self.under_way += 1
        return tenant

    def leave(self, tenant: _Tenant) -> None:
        """Give the place to whose turn it is."""
        self.under_way -= 1
        tenant.calls -= 1
        self._pass_on()
        self._retire_if_idle(tenant)

    def _admit(self, tenant: _Tenant, service: ServiceClass) -> None:
        """Count the call in. Raises AdmissionError."""
        now = self._clock()
        tenant.weight = service.priority.weight
        per_second = service.calls_per_second * self._per_question
        wait = tenant.pace.wait_seconds(
            now, per_second=per_second, burst=service.burst * self._per_question
        )
        if wait > 0:
            raise self._refused(tenant, Refusal.RATE, now, wait, 1 / per_second)
        if tenant.calls >= service.max_concurrent_calls:
            raise self._refused(tenant, Refusal.CONCURRENCY, now, BUSY_SECONDS, 1 / per_second)
        if not self._free and self.waiting >= self._max_waiting and not self._make_room(tenant):
            raise self._refused(tenant, Refusal.FULL, now, BUSY_SECONDS, 1 / per_second)
        tenant.pace.take(now, per_second=per_second)
        tenant.calls += 1

    async def _turn_of(self, tenant: _Tenant) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        tenant.waiting[turn] = None
        self._turns.setdefault(tenant.name, tenant)
        self.waiting += 1
        try:
            with self._may_be_abandoned():
                await turn
        except BaseException:
            tenant.calls -= 1
            if turn in tenant.waiting:
                self._forget(tenant, turn)
            elif not turn.cancelled() and turn.exception() is None:
                # It was given its place, and is cancelled in the same instant.
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """A place is free: it goes to whose turn it is."""
        while self._turns:
            tenant = next(iter(self._turns.values()))
            turn = next(iter(tenant.waiting))
            if turn.cancelled():  # its task has not run since
                self._forget(tenant, turn)
                continue
            tenant.credit = (tenant.credit or tenant.weight) - 1
            self._forget(tenant, turn)
            if tenant.credit == 0 and tenant.waiting:
                self._turns.move_to_end(tenant.name)
            turn.set_result(None)
            return
        self._free += 1

    def _make_room(self, newcomer: _Tenant) -> bool:
        """Send away the last one of those who wait with most calls for their weight,
        unless that would be the newcomer.
        """
        most = max(
            self._turns.values(),
            key=lambda tenant: len(tenant.waiting) / tenant.weight,
            default=newcomer,
        )
        if len(most.waiting) * newcomer.weight <= (len(newcomer.waiting) + 1) * most.weight:
            return False
        turn = next(reversed(most.waiting))
        self._forget(most, turn)
        if not turn.cancelled():
            spacing = 1 / (self._classes(most.name).calls_per_second * self._per_question)
            turn.set_exception(
                self._refused(most, Refusal.FULL, self._clock(), BUSY_SECONDS, spacing)
            )
        return True

    def _forget(self, tenant: _Tenant, turn: asyncio.Future[None]) -> None:
        """It waits no longer."""
        del tenant.waiting[turn]
        self.waiting -= 1
        if not tenant.waiting:
            del self._turns[tenant.name]
            tenant.credit = 0

    def _refused(
        self, tenant: _Tenant, kind: Refusal, now: float, wait: float, spacing: float
    ) -> AdmissionError:
        retry_at = max(now + wait, min(tenant.told_until, now + MAX_RETRY_AFTER_SECONDS))
        tenant.told_until = retry_at + spacing
        unrecorded = None
        if tenant.recorded.wait_seconds(now, per_second=RECORDED_PER_SECOND, burst=RECORDED_BURST):
            tenant.unrecorded += 1
        else:
            tenant.recorded.take(now, per_second=RECORDED_PER_SECOND)
            unrecorded, tenant.unrecorded = tenant.unrecorded, 0
        return AdmissionError(kind, retry_after_seconds=retry_at - now, unrecorded=unrecorded)

    def _retire_if_idle(self, tenant: _Tenant) -> None:
        if tenant.calls or self._busy.pop(tenant.name, None) is None:
            return
        self._idle[tenant.name] = tenant
        if len(self._idle) > self._max_idle_tenants:
            self._idle.popitem(last=False)
