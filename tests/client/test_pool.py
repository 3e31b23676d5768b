"""What a kept permit may be spent for, by a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from pdp.api.v1 import execution_pb2
from pdp.channel import CallError
from pdp.client.acting import Acting
from pdp.client.desk import Ask, Grant, Steps, Walk
from pdp.client.pool import (
    MAX_KEPT,
    MAX_KEPT_PER_TENANT,
    REPORT_AGAIN_SECONDS,
    InForce,
    Kept,
    PermitPool,
)
from pdp.client.spend import Charge
from pdp.permit.claims import Permit

KEY = ("token", b"", "orders.search", "tools")
HELD = (("tools", "calls", 10), ("llm", "usd_micros", 500))
LIFETIME_SECONDS = 60


def no_cost() -> Sequence[Charge]:
    return ()


class World:
    """A pool, its two clocks, and a Watch that has told of a revision."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.now = 1_000_000.0
        self.monotonic = 50.0
        self.changes = 0
        self.pool = PermitPool(
            keeps=keeps,
            on_change=self.changed,
            clock=lambda: self.now,
            monotonic=lambda: self.monotonic,
        )
        self.pool.told(InForce("r-1"))

    def changed(self) -> None:
        self.changes += 1

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.monotonic += seconds

    def grant(
        self,
        max_uses: int = 10,
        *,
        tenant: str = "tenant_acme",
        lifetime_seconds: int = LIFETIME_SECONDS,
    ) -> Grant:
        permit = Permit(
            id="p-1",
            issuer="agent-pdp",
            audience="tools",
            tenant=tenant,
            actor="alice",
            tool="orders.search",
            arguments_sha256="",
            scopes=(),
            transaction="t-1",
            decision_id="d-1",
            policy_revision="r-1",
            ledger="l-1",
            issued_at=int(self.now),
            expires_at=int(self.now) + lifetime_seconds,
            max_uses=max_uses,
            token="the.permit.itself",
        )
        return Grant(permit, HELD, Acting("token", b"", ""))

    def put(self, grant: Grant | None = None, key: tuple[str, bytes, str, str] = KEY) -> Kept:
        """A permit that has just been asked for; its first use is under way."""
        return self.pool.put(grant or self.grant(), key, asked=self.pool.moment())

    def take(self) -> Kept | None:
        return self.pool.take(KEY)

    def due(self) -> list[Kept]:
        found = []
        while (kept := self.pool.next_due()) is not None:
            found.append(kept)
        return found


@pytest.fixture
def world() -> World:
    return World()


def reported(steps: Steps[None] | None) -> execution_pb2.ReportOutcomeRequest:
    """What is reported, by steps that are to report just once."""
    assert steps is not None
    walk = Walk(steps)
    assert isinstance(walk.ask, Ask)
    request = walk.ask.request
    assert isinstance(request, execution_pb2.ReportOutcomeRequest)
    walk.answer(execution_pb2.ReportOutcomeResponse())
    walk.result()
    return request


def charges(request: execution_pb2.ReportOutcomeRequest) -> list[Charge]:
    return [(each.budget, each.unit, each.amount) for each in request.charges]


def test_a_permit_is_spent_as_often_as_it_says_and_then_reported_on_once(world: World) -> None:
    uses = [world.put(world.grant(max_uses=3)), world.take(), world.take()]
    assert world.take() is None
    assert [use.executed(no_cost) for use in uses[:2] if use] == [None, None]
    last = uses[2]
    assert last is not None
    report = reported(last.executed(no_cost))
    assert (report.uses, report.outcome) == (3, execution_pb2.OUTCOME_EXECUTED)
    assert charges(report) == []  # the sidecar settles three shares of what is held
    assert world.due() == []


def test_uses_under_way_hold_back_the_report_until_the_last_has_ended(world: World) -> None:
    first, second = world.put(), world.take()
    assert second is not None
    world.pool.told(None)
    assert world.due() == []
    assert first.executed(no_cost) is None
    assert reported(second.executed(no_cost)).uses == 2
    assert world.due() == []


def test_what_is_dropped_while_nothing_is_under_way_is_due(world: World) -> None:
    first = world.put()
    assert first.executed(no_cost) is None
    changes = world.changes
    world.pool.told(InForce("r-1"))
    assert world.changes == changes + 1
    assert world.due() == [first]
    assert reported(first.report()).uses == 1


@pytest.mark.parametrize("in_force", (None, InForce("r-1"), InForce("r-2")))
def test_whatever_the_watch_tells_ends_what_was_permitted_before(
    world: World, in_force: InForce | None
) -> None:
    world.put()
    world.pool.told(in_force)
    assert world.take() is None


@pytest.mark.parametrize("told", (None, InForce("r-1"), InForce("r-2")))
def test_what_was_asked_for_before_the_watch_told_anything_is_not_kept(
    world: World, told: InForce | None
) -> None:
    """It may have been permitted before, and answered after."""
    asked = world.pool.moment()
    world.pool.told(told)
    kept = world.pool.put(world.grant(), KEY, asked=asked)
    assert world.take() is None
    assert reported(kept.executed(no_cost)).uses == 1


def test_without_a_watch_nothing_is_kept(world: World) -> None:
    world.pool.told(None)
    world.put()
    assert world.take() is None


def test_a_permit_of_another_revision_than_the_one_in_force_is_not_kept(world: World) -> None:
    world.pool.told(InForce("r-2"))
    world.put()
    assert world.take() is None


def test_a_permit_ends_a_margin_before_it_expires(world: World) -> None:
    kept = world.put()
    world.passes(LIFETIME_SECONDS - 1.01)
    assert world.take() is kept
    world.passes(0.01)
    assert world.take() is None


def test_a_clock_that_is_set_back_lengthens_no_permit(world: World) -> None:
    world.put()
    world.passes(LIFETIME_SECONDS - 1)
    world.now -= 3_600
    assert world.take() is None


def test_a_machine_that_slept_finds_its_permits_ended(world: World) -> None:
    world.put()
    world.now += LIFETIME_SECONDS  # while the monotonic clock stood still
    assert world.take() is None


def test_a_sidecar_whose_clock_is_ahead_lengthens_no_permit(world: World) -> None:
    world.now += 30  # the sidecar's
    grant = world.grant()
    world.now -= 30
    world.put(grant)
    world.passes(LIFETIME_SECONDS - 1)
    assert world.take() is None


def test_an_ended_permit_is_due_when_its_time_comes_and_makes_room_for_the_next(
    world: World,
) -> None:
    first = world.put()
    first.executed(no_cost)
    assert world.pool.seconds_to_next_end() == LIFETIME_SECONDS - 1
    world.passes(LIFETIME_SECONDS - 1)
    second = world.put()
    assert world.take() is second
    assert world.pool.seconds_to_next_end() == LIFETIME_SECONDS - 1
    assert world.due() == [first]


def test_a_permit_too_short_to_be_kept_is_for_its_one_call(world: World) -> None:
    grant, asked = world.grant(), world.pool.moment()
    world.passes(LIFETIME_SECONDS - 1)
    kept = world.pool.put(grant, KEY, asked=asked)
    assert reported(kept.executed(no_cost)).uses == 1


def test_a_second_permit_for_the_same_is_for_its_one_call(world: World) -> None:
    first, second = world.put(), world.put()
    assert reported(second.executed(no_cost)).uses == 1
    assert world.take() is first


def test_calls_that_differ_in_anything_share_no_permit(world: World) -> None:
    world.put()
    for place, other in enumerate(("token2", b"{}", "orders.read", "mail")):
        key = (*KEY[:place], other, *KEY[place + 1 :])
        assert world.pool.take(key) is None  # type: ignore[arg-type]


def test_no_tenant_takes_the_room_of_all(world: World) -> None:
    for number in range(MAX_KEPT_PER_TENANT):
        world.put(key=(f"token-{number}", *KEY[1:]))
    beyond = world.put()
    assert world.take() is None
    assert reported(beyond.executed(no_cost)).uses == 1
    globex = world.put(world.grant(tenant="tenant_globex"))
    assert world.take() is globex
    world.pool.told(InForce("r-1"))
    acme = world.put()
    assert world.take() is acme


def test_no_more_permits_are_kept_than_there_is_room_for(world: World) -> None:
    for number in range(MAX_KEPT):
        world.put(world.grant(tenant=f"tenant-{number}"), key=(f"token-{number}", *KEY[1:]))
    beyond = world.put()
    assert world.take() is None
    assert reported(beyond.executed(no_cost)).uses == 1


def test_a_permit_that_is_spent_makes_room(world: World) -> None:
    for number in range(2 * MAX_KEPT_PER_TENANT):
        key = (f"token-{number}", *KEY[1:])
        first = world.put(world.grant(max_uses=2), key=key)
        assert world.pool.take(key) is first


def test_only_a_permit_that_ends_before_all_others_is_cause_to_look(world: World) -> None:
    world.pool.seconds_to_next_end()
    world.put()
    assert world.changes == 1
    world.pool.seconds_to_next_end()
    world.passes(1)
    world.put(key=("another", *KEY[1:]))
    assert world.changes == 1
    world.put(world.grant(lifetime_seconds=30), key=("a third", *KEY[1:]))
    assert world.changes == 2


def test_a_pool_that_keeps_none_gives_each_call_its_own(world: World) -> None:
    world = World(keeps=False)
    kept = world.put()
    assert world.take() is None
    assert reported(kept.executed(no_cost)).uses == 1


def test_after_a_fork_the_child_has_none_and_reports_on_none(world: World) -> None:
    first, second = world.put(world.grant(max_uses=2)), world.take()
    assert second is not None
    world.pool.forget()
    assert world.take() is None
    assert first.executed(no_cost) is second.failed(KeyError(), no_cost) is None
    assert world.due() == []


def test_a_fork_while_the_lock_is_held_does_not_stop_the_child(world: World) -> None:
    world.put()
    with world.pool.lock:
        world.pool.forget()
        assert world.take() is None


def test_a_failed_use_costs_nothing_and_an_executed_one_its_share(world: World) -> None:
    uses = [world.put(world.grant(max_uses=4)), world.take(), world.take(), world.take()]
    found = [
        use.failed(KeyError("secret"), no_cost) if place in {0, 3} else use.executed(no_cost)
        for place, use in enumerate(uses)
        if use
    ]
    assert found[:3] == [None] * 3
    report = reported(found[3])
    assert (report.uses, report.outcome) == (4, execution_pb2.OUTCOME_EXECUTED)
    # Ten are held for four, so that a share of it is not whole: it is rounded up.
    assert charges(report) == [("tools", "calls", 6), ("llm", "usd_micros", 250)]
    assert not report.error_type


def test_a_permit_under_which_all_failed_is_reported_failed_and_costs_nothing(
    world: World,
) -> None:
    use = world.put(world.grant(max_uses=10))
    world.pool.told(None)
    report = reported(use.failed(ValueError("secret"), no_cost))
    assert (report.uses, report.outcome) == (1, execution_pb2.OUTCOME_FAILED)
    assert report.error_type == "ValueError"
    assert charges(report) == [("tools", "calls", 0), ("llm", "usd_micros", 0)]


def test_what_tools_say_that_they_cost_is_summed(world: World) -> None:
    def said(amount: int) -> Callable[[], Sequence[Charge]]:
        return lambda: [("llm", "usd_micros", amount)]

    uses = [world.put(world.grant(max_uses=3)), world.take(), world.take()]
    found = [
        use.executed(said(amount)) for use, amount in zip(uses, (7, 0, 11), strict=True) if use
    ]
    assert charges(reported(found[2])) == [("llm", "usd_micros", 18)]


def test_a_cost_function_that_fails_costs_one_share_and_not_all(world: World) -> None:
    def fails() -> Sequence[Charge]:
        raise RuntimeError("secret")

    first, second = world.put(world.grant(max_uses=2)), world.take()
    assert second is not None
    first.executed(lambda: [("tools", "calls", 1), ("llm", "usd_micros", 1)])
    report = reported(second.executed(fails))
    assert charges(report) == [("tools", "calls", 6), ("llm", "usd_micros", 251)]


def test_charges_that_are_refused_become_the_share_of_what_is_held(world: World) -> None:
    use = world.put(world.grant(max_uses=1))
    steps = use.executed(lambda: [("none", "such", 1)])
    assert steps is not None
    walk = Walk(steps)
    walk.fail(CallError("charge_not_held", "no"))
    assert isinstance(walk.ask, Ask)
    request = walk.ask.request
    assert isinstance(request, execution_pb2.ReportOutcomeRequest)
    assert charges(request) == []
    assert request.uses == 1


def test_a_report_that_may_yet_be_heard_is_made_later_for_a_while(world: World) -> None:
    use = world.put(world.grant(max_uses=1))
    for _ in range(3):
        steps = use.reported()
        walk = Walk(steps)
        walk.fail(CallError("pdp_unavailable", "gone"))
        assert world.due() == [use]
        world.passes(REPORT_AGAIN_SECONDS / 2 + 1)
        if world.monotonic > 50 + REPORT_AGAIN_SECONDS:
            break
    Walk(use.reported()).fail(CallError("pdp_unavailable", "gone"))
    assert world.due() == []


def test_a_report_that_is_refused_is_not_made_again(world: World) -> None:
    use = world.put(world.grant(max_uses=1))
    Walk(use.reported()).fail(CallError("outcome_already_reported", "no"))
    assert world.due() == []


def test_threads_never_overspend_a_permit(world: World) -> None:
    first = world.put(world.grant(max_uses=1_000))
    begin = threading.Barrier(32)

    def spend() -> list[Steps[None] | None]:
        begin.wait()
        found = []
        while (use := world.take()) is not None:
            found.append(use.executed(no_cost))
        return found

    with ThreadPoolExecutor(32) as threads:
        spent = [threads.submit(spend) for _ in range(32)]
        ends = [end for each in spent for end in each.result()]
    assert len(ends) == 999
    assert ends == [None] * 999
    assert reported(first.executed(no_cost)).uses == 1_000


def test_a_permit_that_is_dropped_while_a_use_of_it_is_being_taken_is_not_used(
    world: World,
) -> None:
    world.put()
    lock = world.pool.lock

    class TakenByTheWatchFirst:
        def __enter__(self) -> None:
            world.pool.lock = lock
            world.pool.told(None)
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    world.pool.lock = TakenByTheWatchFirst()  # type: ignore[assignment]
    assert world.take() is None


def test_threads_that_spend_while_the_watch_tells_account_for_every_use(world: World) -> None:
    over = threading.Event()
    counts: list[int] = []
    reports: list[execution_pb2.ReportOutcomeRequest] = []

    def spend() -> None:
        calls = 0
        while not over.is_set():
            use = world.take() or world.put(world.grant(max_uses=5))
            calls += 1
            report = use.executed(no_cost)
            if report is not None:
                reports.append(reported(report))
        counts.append(calls)

    def report_due() -> None:
        reports.extend(reported(kept.report()) for kept in world.due())

    with ThreadPoolExecutor(8) as threads:
        spending = [threads.submit(spend) for _ in range(8)]
        for _ in range(200):
            world.pool.told(InForce("r-1"))
            report_due()
        over.set()
        for each in spending:
            each.result()
    world.pool.told(None)
    report_due()
    assert sum(report.uses for report in reports) == sum(counts)
    assert max(report.uses for report in reports) <= 5
