"""Tenants take turns, keep to their rates, and nobody waits or is counted for ever."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdp.admission import (
    BUSY_SECONDS,
    ENDINGS_PER_QUESTION,
    MAX_HELD_BACK,
    MAX_HELD_BACK_SECONDS,
    MAX_RETRY_AFTER_SECONDS,
    RECORDED_BURST,
    Admission,
    AdmissionError,
    Lane,
    Pace,
    Priority,
    Refusal,
    ServiceClass,
)

WIDE = ServiceClass(
    priority=Priority.NORMAL, max_concurrent_calls=10_000, calls_per_second=1e6, burst=1_000_000
)


def service(
    priority: Priority = Priority.NORMAL,
    *,
    calls: int = 10_000,
    per_second: float = 1e6,
    burst: int = 1_000_000,
) -> ServiceClass:
    return ServiceClass(
        priority=priority, max_concurrent_calls=calls, calls_per_second=per_second, burst=burst
    )


@dataclass
class Door:
    """An admission whose calls end when they are told to."""

    places: int = 1
    max_waiting: int = 100
    classes: dict[str, ServiceClass] = field(default_factory=dict)
    max_idle_tenants: int = 10
    now: float = 1_000.0
    let_in: list[tuple[str, int]] = field(default_factory=list)
    """Tenant and number of each call, in the order in which they were let in."""
    refused: list[tuple[str, int, AdmissionError]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.admission = Admission(
            max_concurrent_calls=self.places,
            max_waiting_calls=self.max_waiting,
            classes=lambda tenant: self.classes.get(tenant, WIDE),
            max_idle_tenants=self.max_idle_tenants,
            clock=lambda: self.now,
        )
        self.ends: dict[tuple[str, int], asyncio.Event] = {}
        self.tasks: dict[tuple[str, int], asyncio.Task[None]] = {}
        self.numbers: Counter[str] = Counter()

    async def come(self, tenant: str, lane: Lane = Lane.QUESTIONS) -> tuple[str, int]:
        """A call of the tenant comes, and gets as far as it can."""
        call = (tenant, self.numbers[tenant])
        self.numbers[tenant] += 1
        self.ends[call] = asyncio.Event()
        self.tasks[call] = asyncio.create_task(self._call(call, lane))
        await settled()
        return call

    async def _call(self, call: tuple[str, int], lane: Lane) -> None:
        try:
            async with self.admission.admitted(call[0], lane):
                self.let_in.append(call)
                await self.ends[call].wait()
        except AdmissionError as error:
            self.refused.append((*call, error))

    async def end(self, call: tuple[str, int]) -> None:
        self.ends[call].set()
        await settled()

    async def end_all(self) -> None:
        for end in self.ends.values():
            end.set()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)

    def present(self) -> list[tuple[str, int]]:
        """Whose calls are inside, or wait."""
        return [call for call, task in self.tasks.items() if not task.done()]

    def inside(self) -> list[tuple[str, int]]:
        return [call for call in self.let_in if not self.tasks[call].done()]


async def settled() -> None:
    """Everything that can run has run."""
    for _ in range(6):
        await asyncio.sleep(0)


def acting(act: Callable[[Door], Awaitable[None]], **options: object) -> Door:
    door = Door(**options)  # type: ignore[arg-type]

    async def run() -> None:
        await act(door)
        await door.end_all()
        assert (door.admission.under_way, door.admission.waiting) == (0, 0)
        for _ in range(door.places):
            await door.come("after")
        assert len(door.inside()) == door.places, "every place was given back, once"
        await door.come("after")
        assert len(door.inside()) == door.places
        await door.end_all()

    asyncio.run(run())
    return door


# Turns


def test_who_comes_later_than_a_flood_waits_for_one_turn_not_for_the_flood() -> None:
    async def act(door: Door) -> None:
        first = await door.come("flood")
        for _ in range(50):
            await door.come("flood")
        await door.come("quiet")
        await door.end(first)
        await door.end(door.let_in[-1])
        await door.end(door.let_in[-1])
        assert ("quiet", 0) in door.let_in
        assert len(door.let_in) <= 2 + Priority.NORMAL.weight

    acting(act)


@settings(max_examples=60, deadline=None)
@given(
    priorities=st.lists(st.sampled_from(list(Priority)), min_size=2, max_size=5),
    places=st.integers(1, 4),
    rounds=st.integers(3, 8),
    seed=st.integers(0, 2**32),
)
def test_tenants_that_all_wait_are_served_by_their_weights(
    priorities: list[Priority], places: int, rounds: int, seed: int
) -> None:
    names = [f"tenant-{number}" for number in range(len(priorities))]
    weights = {name: priority.weight for name, priority in zip(names, priorities, strict=True)}
    total = sum(weights.values())
    classes = {name: service(kind) for name, kind in zip(names, priorities, strict=True)}

    async def act(door: Door) -> None:
        for _ in range(places):
            await door.come("before")
        arrivals = [name for name in names for _ in range(rounds * weights[name] + total)]
        random.Random(seed).shuffle(arrivals)  # noqa: S311 - to be repeated
        for name in arrivals:
            await door.come(name)
        begun = len(door.let_in)
        for served in range(1, rounds * total + 1):
            await door.end(door.inside()[0])
            shares = Counter(name for name, _ in door.let_in[begun:])
            assert sum(shares.values()) == served
            for name, weight in weights.items():
                assert abs(shares[name] - served * weight / total) <= weight + 1, shares

    acting(act, places=places, max_waiting=10_000, classes=classes)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bounds_hold_and_every_place_is_given_back_whatever_happens(data: st.DataObject) -> None:
    places, max_waiting = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 6))
    names = ["a", "b", "c"]
    classes = {
        name: service(
            data.draw(st.sampled_from(list(Priority))), calls=data.draw(st.integers(1, 6))
        )
        for name in names
    }

    async def act(door: Door) -> None:
        for _ in range(data.draw(st.integers(1, 60))):
            await something_happens(door, names, data)
            under_way, waiting = door.admission.under_way, door.admission.waiting
            assert under_way == len(door.inside()) <= places
            assert waiting <= max_waiting
            assert not waiting or under_way == places, "nobody waits while there are places"
            for name, count in Counter(name for name, _ in door.present()).items():
                assert count <= classes[name].max_concurrent_calls
        by_tenant: defaultdict[str, list[int]] = defaultdict(list)
        for name, number in door.let_in:
            by_tenant[name].append(number)
        assert all(numbers == sorted(numbers) for numbers in by_tenant.values()), "not in order"

    acting(act, places=places, max_waiting=max_waiting, classes=classes)


async def something_happens(door: Door, names: list[str], data: st.DataObject) -> None:
    present = door.present()
    deed = data.draw(st.sampled_from(["come", "come", "come", "end", "cancel", "end and cancel"]))
    if deed == "come" or not present:
        await door.come(data.draw(st.sampled_from(names)))
        return
    if deed != "cancel":
        door.ends[data.draw(st.sampled_from(present))].set()
    if deed != "end":
        # Where both are done, a place may become free just when its next holder goes.
        for _ in range(data.draw(st.integers(0, 3))):
            await asyncio.sleep(0)
        door.tasks[data.draw(st.sampled_from(present))].cancel()
    await settled()


def test_a_full_queue_makes_room_for_who_waits_with_fewer_calls() -> None:
    async def act(door: Door) -> None:
        first = await door.come("flood")
        for _ in range(4):
            await door.come("flood")
        await door.come("quiet")
        ((name, number, error),) = door.refused
        assert (name, number, error.kind) == ("flood", 4, Refusal.FULL), "its last one goes"
        assert error.retry_after_seconds >= BUSY_SECONDS
        await door.come("flood")
        assert len(door.refused) == 2, "and it can not take the place back"
        await door.end(first)

    acting(act, max_waiting=4)


def test_high_priority_takes_more_of_a_full_queue_and_low_keeps_some() -> None:
    classes = {"high": service(Priority.HIGH), "low": service(Priority.LOW)}

    async def act(door: Door) -> None:
        await door.come("other")
        for _ in range(10):
            await door.come("low")
        for _ in range(20):
            await door.come("high")
        waiting = Counter(
            name for (name, _), task in door.tasks.items() if name != "other" and not task.done()
        )
        assert waiting == {"high": 8, "low": 2}

    acting(act, max_waiting=10, classes=classes)


def test_a_call_that_fails_gives_its_place_back() -> None:
    async def run() -> None:
        door = Door()
        for lane in (*Lane, *Lane):
            with pytest.raises(KeyError):
                async with door.admission.admitted("a", lane):
                    raise KeyError
        assert door.admission.under_way == 0

    asyncio.run(run())


def test_an_abandoned_call_leaves_the_queue_and_not_the_work() -> None:
    async def act(door: Door) -> None:
        working, waiting = await door.come("a"), await door.come("b")
        for call in (working, waiting):
            door.admission.abandon(door.tasks[call])
        await settled()
        assert door.inside() == [working]
        assert door.tasks[waiting].cancelled()
        assert door.admission.waiting == 0

    acting(act)


# Rates and numbers


def test_past_its_rate_a_tenant_is_refused_and_no_other() -> None:
    classes = {"flood": service(per_second=10, burst=5)}

    async def act(door: Door) -> None:
        for _ in range(6):
            await door.come("flood")
        await door.come("quiet")
        ((name, number, error),) = door.refused
        assert (name, number, error.kind) == ("flood", 5, Refusal.RATE)
        assert error.reason_code == "rate_limited"
        door.now += error.retry_after_seconds
        await door.come("flood")
        assert len(door.refused) == 1, "retry_after is usable as is"

    acting(act, places=100, classes=classes)


def test_refused_callers_are_told_to_come_back_one_after_the_other() -> None:
    classes = {"flood": service(per_second=10, burst=1)}

    async def act(door: Door) -> None:
        for _ in range(200):
            await door.come("flood")
        told = [error.retry_after_seconds for *_, error in door.refused]
        assert told[:3] == pytest.approx([0.1, 0.2, 0.3])
        assert max(told) <= MAX_RETRY_AFTER_SECONDS + 0.1
        begun, refused = door.now, len(door.refused)
        for seconds in told[:20]:
            door.now = begun + seconds
            await door.come("flood")
        assert len(door.refused) == refused, "who keeps to it is let in"

    acting(act, places=1_000, classes=classes)


def test_calls_at_once_are_counted_with_those_that_wait() -> None:
    classes = {"flood": service(calls=3)}

    async def act(door: Door) -> None:
        calls = [await door.come("flood") for _ in range(4)]
        ((_, number, error),) = door.refused
        assert (number, error.kind) == (3, Refusal.CONCURRENCY)
        await door.come("quiet")
        await door.end(calls[0])
        await door.come("flood")
        assert len(door.refused) == 1

    acting(act, classes=classes)


def test_a_flood_of_questions_stops_no_ending_and_the_other_way_round() -> None:
    classes = {"flood": service(calls=2, per_second=1, burst=3)}

    async def act(door: Door) -> None:
        for _ in range(20):
            await door.come("flood")
        refused = len(door.refused)
        assert refused == 18
        for _ in range(2 * ENDINGS_PER_QUESTION):
            await door.end(await door.come("flood", Lane.ENDINGS))
        assert len(door.refused) == refused
        for _ in range(20):
            await door.come("flood", Lane.ENDINGS)
        assert door.refused[refused:], "endings have a bound of their own"
        await door.come("quiet", Lane.ENDINGS)
        await door.come("quiet")

    acting(act, places=2, classes=classes)


@settings(max_examples=100, deadline=None)
@given(
    per_second=st.floats(0.1, 1_000),
    burst=st.integers(1, 50),
    pauses=st.lists(st.floats(0, 3), min_size=1, max_size=200),
)
def test_a_pace_lets_through_burst_and_rate_and_no_more(
    per_second: float, burst: int, pauses: list[float]
) -> None:
    pace, now = Pace(), 1_000.0
    taken: list[float] = []
    for pause in pauses:
        now += pause / per_second
        if not pace.wait_seconds(now, per_second=per_second, burst=burst):
            pace.take(now, per_second=per_second)
            taken.append(now)
    for first, since in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - since) * per_second + 0.01
    assert len(taken) >= min(burst, len(pauses))


def test_a_class_that_changes_counts_at_once() -> None:
    classes = {"a": service(per_second=1, burst=100)}

    async def act(door: Door) -> None:
        for _ in range(100):
            await door.come("a")
        classes["a"] = service(per_second=10, burst=1)
        await door.come("a")
        assert door.refused[-1][-1].retry_after_seconds == pytest.approx(0.1)
        classes["a"] = WIDE
        door.now += 0.1
        await door.come("a")
        assert len(door.refused) == 1

    acting(act, places=1_000, classes=classes)


# Refusals that are held back


def refusal(retry_after_seconds: float) -> AdmissionError:
    return AdmissionError(Refusal.RATE, retry_after_seconds=retry_after_seconds)


def test_a_refusal_is_held_back_for_no_longer_than_asking_again_is_of_no_use() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def run() -> None:
        admission = Admission(
            max_concurrent_calls=1,
            max_waiting_calls=0,
            classes=lambda _: WIDE,
            sleep=sleep,
            random=lambda: 0.5,
        )
        soon, late = refusal(0.01), refusal(60)
        await admission.hold_back(soon)
        await admission.hold_back(late)
        assert slept == pytest.approx([0.0075, 0.75 * MAX_HELD_BACK_SECONDS]), "and is spread"
        assert soon.retry_after_seconds + slept[0] == pytest.approx(0.01)
        assert late.retry_after_seconds + slept[1] == pytest.approx(60), "the time told is the same"

    asyncio.run(run())


def test_refusals_that_are_held_back_are_bounded_and_leave_with_their_caller() -> None:
    async def run() -> None:
        forever = asyncio.Event()

        async def sleep(_: float) -> None:
            await forever.wait()

        admission = Admission(
            max_concurrent_calls=1, max_waiting_calls=0, classes=lambda _: WIDE, sleep=sleep
        )
        held = [asyncio.create_task(admission.hold_back(refusal(1))) for _ in range(MAX_HELD_BACK)]
        await settled()
        await admission.hold_back(refusal(1))  # is one too many, and does not wait
        admission.abandon(held[0])
        await settled()
        assert held[0].cancelled()
        again = asyncio.create_task(admission.hold_back(refusal(1)))
        await settled()
        assert not again.done(), "its place was given back"
        forever.set()
        await asyncio.gather(again, *held[1:])

    asyncio.run(run())


# Records and memory


def test_a_flood_of_refusals_is_recorded_in_part_and_counted_in_full() -> None:
    classes = {"flood": service(per_second=0.001, burst=1)}

    async def act(door: Door) -> None:
        await door.come("flood")
        for _ in range(100):
            await door.come("flood")
        recorded = [error.unrecorded for *_, error in door.refused if error.unrecorded is not None]
        assert recorded == [0] * RECORDED_BURST
        door.now += 10
        await door.come("flood")
        assert door.refused[-1][-1].unrecorded == 100 - RECORDED_BURST

    acting(act, places=100, classes=classes)


def test_tenants_without_calls_are_forgotten_beyond_a_number() -> None:
    classes = {f"tenant-{number}": service(per_second=0.001, burst=1) for number in range(100)}

    async def act(door: Door) -> None:
        busy = await door.come("tenant-0")
        for number in range(1, 100):
            await door.end(await door.come(f"tenant-{number}"))
        await door.come("tenant-0")
        assert len(door.refused) == 1, "who has a call is never forgotten"
        await door.come("tenant-99")
        assert len(door.refused) == 2
        await door.end(await door.come("tenant-50"))
        assert len(door.refused) == 2, "long idle, and forgotten"
        await door.end(busy)

    acting(act, places=2, max_idle_tenants=10, classes=classes)


def test_a_class_that_lets_nothing_in_is_an_error() -> None:
    for wrong in ({"calls": 0}, {"per_second": 0.0}, {"burst": 0}):
        with pytest.raises(ValueError, match="at least one"):
            service(**wrong)


def test_cancelling_before_the_first_step_takes_no_place() -> None:
    async def run() -> None:
        door = Door()

        async def call() -> None:
            async with door.admission.admitted("a", Lane.QUESTIONS):
                await asyncio.sleep(0)

        task = asyncio.create_task(call())
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert door.admission.under_way == 0

    asyncio.run(run())
