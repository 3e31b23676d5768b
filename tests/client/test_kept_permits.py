"""Permits for several calls, spent by a guard, with a sidecar that does as it is told."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.api.v1 import authorization_pb2, execution_pb2
from pdp.client import AsyncGuard, Decision, Guard, PermitDenied, current_permit
from pdp.client import keeper as keeper_module
from tests.client.faces import Face
from tests.client.stand_in import Event, StandIn, refuse

TOKEN = "the.secret.token"
OTHER = "another.secret.token"


def soon(condition: Callable[[], object], *, within_seconds: float = 10.0) -> bool:
    """Whether it comes true."""
    deadline = time.monotonic() + within_seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


async def soon_awaited(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - of whatever kind it is
        await asyncio.sleep(0.002)


async def begin_awaited(
    guard: AsyncGuard, several: StandIn
) -> tuple[Callable[[], Coroutine[Any, Any, str]], list[str]]:
    """A tool, and the permits of its calls up to now, the last of which is kept."""
    permits: list[str] = []

    @guard.tool("orders.search")
    async def search() -> str:
        await asyncio.sleep(0)
        permits.append(current_permit().id)
        return permits[-1]

    while len(several.asked) == len(permits):
        await search()
        await asyncio.sleep(0.002)
    return search, permits


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "_PAUSE_SECONDS", 0.01)


@pytest.fixture
def several(stand_in: StandIn) -> StandIn:
    """Allows ten calls at a time."""
    stand_in.answer = lambda request, _: stand_in.allow_several(request, 10)
    return stand_in


@pytest.fixture
def face(several: StandIn, face_of: Callable[..., Face]) -> Face:
    return face_of(several.target)


def search_of(face: Face) -> Callable[..., str]:
    @face.tool("orders.search")
    def search(text: str = "") -> str:
        return current_permit().id

    return search


def begin(
    face: Face | Guard, stand_in: StandIn, search: Callable[..., str], token: str = TOKEN
) -> str:
    """Make calls until one permit is kept, and a use of it made; the id of the permit."""
    with face.acting_for(token):
        search("first")
        assert soon(lambda: stand_in.watched)
        asked = len(stand_in.asked)
        while True:
            permit = search("next")
            if len(stand_in.asked) == asked:
                return permit
            asked = len(stand_in.asked)


def uses(stand_in: StandIn) -> list[int]:
    return [report.uses for report in stand_in.reports]


def test_calls_under_one_permit_are_not_asked_for(face: Face, several: StandIn) -> None:
    search = search_of(face)
    permit = begin(face, several, search)
    asked = len(several.asked)
    with face.acting_for(TOKEN):
        assert [search(str(number)) for number in range(8)] == [permit] * 8
        assert len(several.asked) == asked
        assert uses(several)[-1] == 10
        assert search() != permit
    assert len(several.asked) == asked + 1


def test_the_first_call_opens_the_watch_as_its_caller_and_its_permit_is_for_it_alone(
    face: Face, several: StandIn
) -> None:
    """What was revoked before the Watch was open would not be heard of."""
    search = search_of(face)
    with face.acting_for(TOKEN, traceparent=f"00-{'a' * 32}-{'b' * 16}-01"):
        assert several.watch_tokens == []
        search()
    assert uses(several) == [1]
    assert soon(lambda: several.watch_tokens == [f"Bearer {TOKEN}"])


@pytest.mark.parametrize(
    "event",
    (
        Event(revoked=authorization_pb2.Revoked()),
        Event(policy=authorization_pb2.PolicyInForce(revision="r-2")),
        Event(policy=authorization_pb2.PolicyInForce(revision="r-1")),
        Event(draining=authorization_pb2.Draining()),
        Event(),  # of a kind that is not known yet
        None,
    ),
    ids=("revoked", "revision", "same_revision", "draining", "unknown", "ended"),
)
def test_whatever_the_watch_tells_ends_the_permit(
    face: Face, several: StandIn, event: Event | None
) -> None:
    search = search_of(face)
    permit = begin(face, several, search)
    reports = len(several.reports)
    several.tell(event)
    assert soon(lambda: len(several.reports) > reports)  # by itself, with no call to come
    report = several.reports[-1]
    assert (report.uses, report.outcome) == (2, execution_pb2.OUTCOME_EXECUTED)
    with face.acting_for(TOKEN):
        assert search() != permit


def test_after_a_revocation_the_next_permit_is_kept_again(face: Face, several: StandIn) -> None:
    search = search_of(face)
    begin(face, several, search)
    several.tell(Event(revoked=authorization_pb2.Revoked()))
    assert soon(lambda: len(several.reports) >= 2)
    begin(face, several, search)
    assert several.watch_tokens == [f"Bearer {TOKEN}"]


def test_a_watch_that_ended_is_opened_again_as_the_caller_of_then(
    face: Face, several: StandIn
) -> None:
    search = search_of(face)
    begin(face, several, search)
    several.tell(None)
    assert soon(lambda: not several.watched)
    time.sleep(0.02)
    begin(face, several, search, OTHER)
    assert several.watch_tokens == [f"Bearer {TOKEN}", f"Bearer {OTHER}"]


def test_a_permit_of_another_revision_than_the_watch_tells_is_for_one_call(
    face: Face, several: StandIn
) -> None:
    several.revision = "r-2"
    search = search_of(face)
    with face.acting_for(TOKEN):
        search()
        assert soon(lambda: several.watched)
        permits = {search() for _ in range(5)}
    assert len(permits) == 5
    assert uses(several) == [1] * 6


def test_a_sidecar_that_refuses_the_watch_has_each_call_asked_for(
    several: StandIn, face_of: Callable[..., Face]
) -> None:
    several.refuses_watch = True
    face = face_of(several.target)
    search = search_of(face)
    with face.acting_for(TOKEN):
        assert len({search() for _ in range(5)}) == 5
    assert uses(several) == [1] * 5


def test_a_guard_that_keeps_none_asks_each_time_and_watches_nothing(
    several: StandIn, face_of: Callable[..., Face]
) -> None:
    face = face_of(several.target, keep_permits=False)
    search = search_of(face)
    with face.acting_for(TOKEN):
        assert len({search() for _ in range(5)}) == 5
    assert uses(several) == [1] * 5
    assert several.watch_tokens == []


def test_a_permit_ends_before_it_expires(face: Face, several: StandIn) -> None:
    def shortly(request: authorization_pb2.AuthorizeRequest, _: object) -> Any:
        now = int(time.time())
        return several.allow_several(request, 10, issued_at=now, expires_at=now + 3)

    several.answer = shortly
    search = search_of(face)
    permit = begin(face, several, search)
    reports = len(several.reports)
    assert soon(lambda: len(several.reports) > reports)  # by itself, when its time comes
    with face.acting_for(TOKEN):
        assert search() != permit


def test_another_token_context_tool_or_audience_is_asked_for(face: Face, several: StandIn) -> None:
    search = search_of(face)
    face.tool("orders.read")(lambda: current_permit().id)
    elsewhere = face.tool("orders.search", audience="mail")(lambda: current_permit().id)
    read = face.tool("orders.read")(lambda: current_permit().id)
    permit = begin(face, several, search)
    with face.acting_for(OTHER):
        found = [search()]
    with face.acting_for(TOKEN, context={"channel": "chat"}):
        found.append(search())
    with face.acting_for(TOKEN, traceparent=f"00-{'a' * 32}-{'b' * 16}-01"):
        found += [read(), elsewhere()]
        assert search() == permit  # only the trace differs
    assert len({permit, *found}) == 5


def test_no_call_is_made_without_an_identity_in_force(face: Face, several: StandIn) -> None:
    search = search_of(face)
    begin(face, several, search)

    def refusal() -> str:
        with pytest.raises(PermitDenied) as denied:
            search()
        return denied.value.reason_code

    assert refusal() == "identity_missing"
    with face.acting_for(""):
        assert refusal() == "identity_missing"
    with face.acting_for("no token\n"):
        assert refusal() == "token_invalid"

    def stream() -> Generator[str, None, None]:
        with face.acting_for(TOKEN):
            yield search()
            yield search()

    suspended = stream()
    next(suspended)
    assert refusal() == "identity_missing"
    next(suspended)
    suspended.close()


def test_a_task_that_outlives_its_scope_spends_nothing(several: StandIn) -> None:
    async def run() -> str:
        async with AsyncGuard(several.target) as guard:

            async def later() -> str:
                await ended.wait()
                return await search()

            ended = asyncio.Event()
            with guard.acting_for(TOKEN):
                search, _ = await begin_awaited(guard, several)
                task = asyncio.create_task(later())
                await asyncio.sleep(0)
            ended.set()
            with pytest.raises(PermitDenied) as denied:
                await task
            return denied.value.reason_code

    assert asyncio.run(run()) == "identity_ended"


def test_a_result_that_is_still_to_run_is_refused_and_counts_as_a_failed_use(
    face: Face, several: StandIn
) -> None:
    late = face.tool("orders.search")(lambda: (each for each in "abc"))
    search = search_of(face)
    begin(face, several, search)
    with face.acting_for(TOKEN), pytest.raises(TypeError, match="still to run"):
        late()
    face.close()
    assert several.reports[-1].uses == 3


@pytest.mark.parametrize("error", (KeyError("secret"), KeyboardInterrupt(), SystemExit(3)))
def test_what_a_tool_raises_passes_through_and_its_use_counts_as_failed(
    face: Face, several: StandIn, error: BaseException
) -> None:
    several.answer = lambda request, _: several.allow_several(request, 10, ("tools", "calls", 1))
    search = search_of(face)

    @face.tool("orders.search")
    def fails() -> None:
        raise error

    begin(face, several, search)
    with face.acting_for(TOKEN):
        try:
            fails()
        except BaseException as raised:  # noqa: BLE001 - whatever it is
            assert raised is error  # noqa: PT017
        search()
    face.close()
    report = several.reports[-1]
    assert report.uses == 4
    assert [charge.amount for charge in report.charges] == [3]
    with pytest.raises(LookupError):
        current_permit()


def test_arguments_that_the_function_does_not_take_raise_its_own_error(
    face: Face, several: StandIn
) -> None:
    search = search_of(face)
    begin(face, several, search)
    with face.acting_for(TOKEN), pytest.raises(TypeError):
        search(nothing="such")


def test_the_arguments_are_the_callers_own_and_are_not_looked_at(
    face: Face, several: StandIn
) -> None:
    same = face.tool("orders.search")(lambda argument=None: argument)
    search = search_of(face)
    begin(face, several, search)
    argument = object()  # no JSON
    with face.acting_for(TOKEN):
        assert same(argument) is argument


def test_costs_are_summed_over_the_uses_of_a_permit(face: Face, several: StandIn) -> None:
    several.answer = lambda request, _: several.allow_several(
        request, 4, ("llm", "usd_micros", 100)
    )

    @face.tool("orders.search", cost=lambda cost: [("llm", "usd_micros", cost)])
    def search(cost: int) -> int:
        return cost

    with face.acting_for(TOKEN):
        search(1)
        assert soon(lambda: several.watched)
        while len(several.reports) < 2 or several.reports[-1].uses != 4:
            search(30)
    [charge] = several.reports[-1].charges
    assert charge.amount == 120


def test_a_tool_that_estimates_is_asked_for_each_time(face: Face, several: StandIn) -> None:
    """What it estimates is shown to the policy, which sets what is held by it."""
    tool = face.tool("orders.search", estimate=lambda: [("llm", "usd_micros", 1)])
    estimating = tool(lambda: current_permit().id)
    search = search_of(face)
    permit = begin(face, several, search)
    with face.acting_for(TOKEN):
        assert permit not in {estimating(), estimating()}


def test_a_resource_is_no_bar_to_a_permit_for_any(face: Face, several: StandIn) -> None:
    @face.tool("orders.search", resource=lambda order: ("order", order))
    def search(order: str) -> str:
        return current_permit().id

    permit = begin(face, several, search)
    with face.acting_for(TOKEN):
        assert search("another") == permit


@pytest.mark.parametrize(
    ("said", "changes"),
    (
        (0, {}),
        (1, {}),
        (9, {}),
        (11, {}),
        (10, {"max_uses": 1}),
        (10, {"tool": "orders.delete"}),
        (10, {"tenant": "tenant_globex"}),
        (10, {"transaction": "another"}),
        (10, {"expires_at": 1}),
    ),
)
def test_a_permit_for_several_must_be_the_one_that_the_answer_speaks_of(
    face: Face, several: StandIn, said: int, changes: dict[str, Any]
) -> None:
    def answer(request: authorization_pb2.AuthorizeRequest, _: object) -> Any:
        response = several.allow_several(request, **{"max_uses": 10, **changes})
        response.max_uses = said
        return response

    several.answer = answer
    search = search_of(face)
    with face.acting_for(TOKEN), pytest.raises(PermitDenied) as denied:
        search()
    assert denied.value.reason_code in {"permit_mismatch", "permit_expired"}


def test_a_permit_for_other_arguments_is_refused_whatever_the_answer_says(
    face: Face, several: StandIn
) -> None:
    def answer(request: authorization_pb2.AuthorizeRequest, _: object) -> Any:
        response = several.allow(request, arguments_sha256="0" * 64)
        response.max_uses = 10
        return response

    several.answer = answer
    search = search_of(face)
    with face.acting_for(TOKEN), pytest.raises(PermitDenied) as denied:
        search()
    assert denied.value.reason_code == "permit_mismatch"


def test_an_observer_sees_decisions_and_not_uses(
    several: StandIn, face_of: Callable[..., Face]
) -> None:
    decisions: list[Decision] = []
    face = face_of(several.target, observe=decisions.append)
    search = search_of(face)
    begin(face, several, search)
    with face.acting_for(TOKEN):
        search()
    assert len(decisions) == len(several.asked)
    assert {decision.max_uses for decision in decisions} == {10}


def test_closing_reports_on_what_is_kept_and_a_call_begins_anew(
    face: Face, several: StandIn
) -> None:
    search = search_of(face)
    for _ in range(3):
        permit = begin(face, several, search)
        face.close()
        assert several.reports[-1].uses == 2
        assert soon(lambda: not several.watched)
        with face.acting_for(TOKEN):
            assert search() != permit


def test_a_use_that_is_under_way_when_the_guard_closes_is_reported_when_it_ends(
    several: StandIn,
) -> None:
    running, finish = threading.Event(), threading.Event()
    guard = Guard(several.target)

    @guard.tool("orders.search")
    def search(text: str) -> str:
        if text == "wait":
            running.set()
            finish.wait(10)
        return current_permit().id

    def spend() -> str:
        with guard.acting_for(TOKEN):
            return search("wait")

    begin(guard, several, search)
    with ThreadPoolExecutor(1) as pool:
        spent = pool.submit(spend)
        assert running.wait(10)
        guard.close()
        assert all(report.uses == 1 for report in several.reports)
        finish.set()
        spent.result()
    assert several.reports[-1].uses == 3
    guard.close()


def test_a_report_that_fails_is_made_again_and_loses_no_result(
    face: Face, several: StandIn
) -> None:
    search = search_of(face)
    permit = begin(face, several, search)
    failures = iter(range(2))

    def take(report: execution_pb2.ReportOutcomeRequest, context: grpc.ServicerContext) -> Any:
        if next(failures, None) is not None:
            refuse(context, "audit_unavailable")
        return execution_pb2.ReportOutcomeResponse()

    reports = len(several.reports)
    several.take_report = take
    with face.acting_for(TOKEN):
        assert [search() for _ in range(8)] == [permit] * 8
    assert soon(lambda: len(several.reports) == reports + 3)
    first, *again = several.reports[reports:]
    assert first.uses == 10
    assert again == [first, first]


def test_threads_share_one_permit_and_one_of_them_asks_for_the_next(several: StandIn) -> None:
    several.answer = lambda request, _: several.allow_several(request, 100)
    permits: list[str] = []
    with Guard(several.target, timeout_seconds=30) as guard:

        @guard.tool("orders.search")
        def search(text: str = "") -> str:
            permits.append(current_permit().id)
            return permits[-1]

        begin(guard, several, search)
        asked = len(several.asked)
        gate = threading.Barrier(32)

        def spend() -> None:
            gate.wait()
            with guard.acting_for(TOKEN):
                for _ in range(100):
                    search()

        with ThreadPoolExecutor(32) as pool:
            for spent in [pool.submit(spend) for _ in range(32)]:
                spent.result()
    assert max(Counter(permits).values()) <= 100
    assert sum(uses(several)) == len(permits)
    # Thirty-two are needed; now and then one more is asked for while one is put away.
    assert len(several.asked) - asked < 64


def test_a_thousand_tasks_share_permits_without_a_stampede(several: StandIn) -> None:
    several.answer = lambda request, _: several.allow_several(request, 50)

    async def run() -> tuple[list[str], int]:
        async with AsyncGuard(several.target, timeout_seconds=30) as guard:
            with guard.acting_for(TOKEN):
                search, permits = await begin_awaited(guard, several)
                asked = len(several.asked)
                await asyncio.gather(*(search() for _ in range(1_000)))
                return permits, len(several.asked) - asked

    permits, asked = asyncio.run(run())
    assert max(Counter(permits).values()) <= 50
    assert sum(uses(several)) == len(permits)
    assert asked == 20  # forty-nine were left of the one before


def test_whoever_waits_for_a_question_that_is_refused_asks_for_itself(several: StandIn) -> None:
    async def run() -> list[Any]:
        async with AsyncGuard(several.target) as guard:
            with guard.acting_for(TOKEN):
                search, _ = await begin_awaited(guard, several)
                reports = len(several.reports)
                several.tell(Event(revoked=authorization_pb2.Revoked()))
                await soon_awaited(lambda: len(several.reports) > reports)
                several.answer = lambda _request, context: refuse(context, "rate_limited")
                calls = (search() for _ in range(5))
                found: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
                return found

    found = asyncio.run(run())
    assert [each.reason_code for each in found if isinstance(each, PermitDenied)] == [
        "rate_limited"
    ] * 5


def test_a_caller_that_is_cancelled_while_it_asks_leaves_the_others_their_turn(
    several: StandIn,
) -> None:
    slow = threading.Event()

    async def run() -> list[Any]:
        async with AsyncGuard(several.target, timeout_seconds=10) as guard:
            with guard.acting_for(TOKEN):
                search, _ = await begin_awaited(guard, several)
                reports = len(several.reports)
                several.tell(Event(revoked=authorization_pb2.Revoked()))
                await soon_awaited(lambda: len(several.reports) > reports)

                def answer(request: Any, _: object) -> Any:
                    slow.wait(10)
                    return several.allow_several(request, 10)

                several.answer = answer
                asked = len(several.asked)
                tasks = [asyncio.create_task(search()) for _ in range(5)]
                await soon_awaited(lambda: len(several.asked) > asked)
                tasks[0].cancel()
                slow.set()
                return await asyncio.gather(*tasks, return_exceptions=True)

    cancelled, *permits = asyncio.run(run())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert all(isinstance(permit, str) for permit in permits)


def test_a_revocation_is_heard_while_the_event_loop_is_busy(several: StandIn) -> None:
    async def run() -> tuple[str, str]:
        async with AsyncGuard(several.target) as guard:
            with guard.acting_for(TOKEN):
                search, permits = await begin_awaited(guard, several)
                reports = len(several.reports)
                several.tell(Event(revoked=authorization_pb2.Revoked()))
                assert soon(lambda: len(several.reports) > reports)  # and no await
                return permits[-1], await search()

    before, after = asyncio.run(run())
    assert before != after


def test_a_child_of_a_fork_keeps_none_of_its_parents_permits(several: StandIn) -> None:
    """As the stand-in's own process must not fork, the guard lives in another."""
    program = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pdp.client import Guard, current_permit
guard = Guard({several.target!r})

@guard.tool("orders.search")
def search() -> str:
    return current_permit().id

@guard.tool("orders.search")
def forks() -> str:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return str(child)

def kept() -> str:
    before = ""
    while (permit := search()) != before:
        before = permit
        time.sleep(0.02)
    return permit

with guard.acting_for({TOKEN!r}):
    permit = kept()
    child = os.fork()
    if child == 0:
        own = kept()
        assert own != permit
        print("child", own, flush=True)
        guard.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert search() == permit
    if forks() == "0":
        os._exit(0)
    assert search() == permit
guard.close()
print("parent", permit, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    kept = [report.uses for report in several.reports if report.uses > 1]
    assert sorted(kept) == [2, 5]


def test_a_process_that_ends_without_closing_reports_as_well_as_it_can(
    several: StandIn,
) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pdp.client import Guard, current_permit
guard = Guard({several.target!r})

@guard.tool("orders.search")
def search() -> str:
    return current_permit().id

with guard.acting_for({TOKEN!r}):
    before = ""
    while (permit := search()) != before:
        before = permit
        time.sleep(0.02)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert several.reports[-1].uses == 2


def test_nothing_that_a_debugger_shows_holds_token_or_permit(face: Face, several: StandIn) -> None:
    search = search_of(face)
    begin(face, several, search)
    from pdp.client.pool import Kept  # noqa: PLC0415

    shown = [repr(each) for each in gc.get_objects() if isinstance(each, Kept)]
    assert shown
    assert TOKEN not in "".join(shown)
    assert "eyJ" not in "".join(shown)
