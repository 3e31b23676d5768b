"""Spend that is no tool call: held before, told while it streams, settled after."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import grpc
import pytest

from pdp.api.v1 import budget_pb2, common_pb2
from pdp.client import AsyncGuard, BudgetRefused, Guard, Hold, Reservation, Usage
from tests.client.faces import Block, Condition, Face
from tests.client.stand_in import Context, End, StandIn, refuse

TOKEN = "the.secret.token"
USAGE = Usage("gpt-x", tokens_in=1200, tokens_out=4000)
CHARGES = [("llm", "tokens_out", 4000), ("llm", "usd_micros", 900)]
NEVER = 3600.0
SOON = 0.01

Settle = budget_pb2.SettleBudgetRequest
Settled = list[tuple[str, dict[str, int]]]


def ends(stand_in: StandIn) -> Settled:
    """How the hold was ended, step by step: part, final or release, and of what."""
    found: Settled = []
    for end in stand_in.ends:
        if isinstance(end, budget_pb2.ReleaseBudgetRequest):
            found.append(("release", {}))
        else:
            amounts = {each.unit: each.amount for each in end.quantities}
            amounts |= {each.unit: each.amount for each in end.charges}
            found.append(("part" if end.partial else "final", amounts))
    return found


def spends(*amounts: dict[str, int]) -> Block:
    def block(hold: Hold) -> Iterator[Condition]:
        for amount in amounts:
            hold.spent(**amount)
        yield from ()

    return block


@pytest.fixture
def face(face_of: Callable[..., Face], stand_in: StandIn) -> Face:
    return face_of(stand_in.target)


def spend(face: Face, what: Any, block: Block, **options: Any) -> None:
    with face.acting_for(TOKEN):
        face.spend(what, block, **{"report_every_seconds": NEVER, **options})


def test_what_was_spent_is_settled_at_the_end(face: Face, stand_in: StandIn) -> None:
    block = spends({"tokens_in": 100}, {"tokens_out": 300}, {"tokens_out": 7})
    spend(face, USAGE, block, tool="llm.chat", ttl_seconds=90)
    [reserve] = stand_in.reserves
    assert (reserve.usage.model, reserve.tool, reserve.ttl_seconds) == ("gpt-x", "llm.chat", 90)
    asked = {each.unit: each.amount for each in reserve.usage.quantities}
    assert asked == {"tokens_in": 1200, "tokens_out": 4000}
    assert ends(stand_in) == [("final", {"tokens_in": 100, "tokens_out": 307})]
    assert not stand_in.ends[0].charges  # type: ignore[union-attr]
    assert stand_in.tokens == [f"Bearer {TOKEN}"] * 2


def test_charges_are_spent_as_charges(face: Face, stand_in: StandIn) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent([("llm", "tokens_out", 10), ("llm", "usd_micros", 2)])
        hold.spent([("llm", "usd_micros", 3)])
        yield from ()

    spend(face, CHARGES, block)
    [reserve] = stand_in.reserves
    assert [(each.budget, each.unit, each.amount) for each in reserve.charges] == CHARGES
    assert ends(stand_in) == [("final", {"tokens_out": 10, "usd_micros": 5})]
    assert not stand_in.ends[0].quantities  # type: ignore[union-attr]


def test_a_stream_is_told_of_in_parts_while_it_runs(face: Face, stand_in: StandIn) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_in=10)
        hold.spent(tokens_out=20)
        yield lambda: len(stand_in.ends) == 1
        hold.spent(tokens_out=30)
        yield lambda: len(stand_in.ends) == 2
        hold.spent(tokens_out=5)

    spend(face, USAGE, block, report_every_seconds=0.05)
    *parts, (kind, rest) = ends(stand_in)
    assert kind == "final"
    assert {kind for kind, _ in parts} == {"part"}
    total: Counter[str] = Counter(rest)
    for _, amounts in parts:
        total.update(amounts)
    assert total == {"tokens_in": 10, "tokens_out": 55}
    assert len({end.idempotency_key for end in stand_in.ends}) == len(stand_in.ends)


def test_much_is_told_at_once_and_little_is_not(face: Face, stand_in: StandIn) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        for _ in range(3):
            hold.spent(tokens_out=133)
        hold.spent(tokens_out=1)  # that makes a tenth
        yield lambda: stand_in.ends
        hold.spent(tokens_out=399)

    spend(face, USAGE, block)
    assert ends(stand_in) == [("part", {"tokens_out": 400}), ("final", {"tokens_out": 399})]


def test_a_part_under_way_never_holds_up_the_stream_and_none_overtakes_it(
    face: Face, stand_in: StandIn
) -> None:
    go_on = threading.Event()

    def slow(end: End, _context: Context) -> Any:
        go_on.wait()
        return stand_in.ended(end)

    stand_in.take_end = slow

    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=1000)
        yield lambda: stand_in.ends
        for _ in range(1000):
            hold.spent(tokens_out=1)
        assert len(stand_in.ends) == 1
        go_on.set()
        yield lambda: len(stand_in.ends) == 2

    spend(face, USAGE, block)
    assert ends(stand_in) == [
        ("part", {"tokens_out": 1000}),
        ("part", {"tokens_out": 1000}),
        ("final", {}),
    ]


@pytest.mark.parametrize("kind", (ValueError, KeyboardInterrupt, GeneratorExit, StopIteration))
def test_a_stream_that_died_half_way_has_cost_what_it_has_cost(
    face: Face, stand_in: StandIn, kind: type[BaseException]
) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=1000)
        yield lambda: stand_in.ends
        hold.spent(tokens_out=11)
        raise kind

    # A generator's own StopIteration comes out of it as RuntimeError.
    with pytest.raises(RuntimeError if kind is StopIteration else kind):
        spend(face, USAGE, block)
    assert ends(stand_in) == [("part", {"tokens_out": 1000}), ("final", {"tokens_out": 11})]


def test_nothing_counted_and_an_error_has_cost_nothing(face: Face, stand_in: StandIn) -> None:
    def block(_hold: Hold) -> Iterator[Condition]:
        yield from ()
        raise ConnectionError

    with pytest.raises(ConnectionError):
        spend(face, USAGE, block)
    assert ends(stand_in) == [("release", {})]


@pytest.mark.parametrize("what", (USAGE, CHARGES), ids=("usage", "charges"))
def test_nothing_counted_and_no_error_has_cost_all(
    face: Face, stand_in: StandIn, what: Any
) -> None:
    spend(face, what, spends())
    [(kind, amounts)] = ends(stand_in)
    [reserve] = stand_in.reserves
    assert kind == "final"
    held = stand_in.held(reserve).charges
    assert list(stand_in.ends[0].charges) == list(held)  # type: ignore[union-attr]
    assert amounts


def test_a_count_of_zero_is_a_count(face: Face, stand_in: StandIn) -> None:
    spend(face, USAGE, spends({"tokens_out": 0}), report_every_seconds=SOON)
    assert ends(stand_in) == [("final", {})]


def test_more_than_was_held_is_told_in_full(face: Face, stand_in: StandIn) -> None:
    spend(face, USAGE, spends({"tokens_out": 399}, {"tokens_in": 0}))
    spend(face, Usage("gpt-x", tokens_out=1), spends({"tokens_out": 9000}))
    assert sum(amounts.get("tokens_out", 0) for _, amounts in ends(stand_in)) == 9399


@pytest.mark.parametrize(
    "miscount",
    (
        lambda hold: hold.spent(tokens_out=-1),
        lambda hold: hold.spent(tokens_out=1.5),
        lambda hold: hold.spent(tokens_out=2**53),
        lambda hold: hold.spent(tokens_cached=1),
        lambda hold: hold.spent([("llm", "tokens_out", 1)]),
        lambda hold: hold.spent("much"),
        lambda hold: hold.spent(None),
    ),
    ids=lambda miscount: "",
)
@pytest.mark.parametrize("then", ("ends", "raises"))
def test_what_can_not_be_counted_costs_all_that_is_held(
    face: Face, stand_in: StandIn, miscount: Callable[[Hold], None], then: str
) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=1000)
        yield lambda: stand_in.ends
        hold.spent(tokens_in=5)
        with pytest.raises((ValueError, TypeError)):
            miscount(hold)
        if then == "raises":
            raise ConnectionError

    with nullcontext() if then == "ends" else pytest.raises(ConnectionError):
        spend(face, USAGE, block)
    assert ends(stand_in) == [
        ("part", {"tokens_out": 1000}),
        ("part", {"tokens_in": 5}),
        ("final", {"tokens_in": 1195, "tokens_out": 3000}),
    ]


def test_after_the_end_nothing_can_be_counted(face: Face, stand_in: StandIn) -> None:
    holds: list[Hold] = []

    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=1)
        holds.append(hold)
        yield from ()

    spend(face, USAGE, block)
    with pytest.raises(RuntimeError, match="inside its with"):
        holds[0].spent(tokens_out=1)


def failing_first(stand_in: StandIn, times: int, reason_code: str) -> None:
    """Let the first settlements fail after they were taken, as when a reply is lost."""

    def fail(end: End, context: Context) -> Any:
        if len(stand_in.ends) <= times:
            refuse(context, reason_code, code=grpc.StatusCode.INTERNAL)
        return stand_in.ended(end)

    stand_in.take_end = fail


def test_a_part_without_an_answer_is_sent_again_just_as_it_was(
    face: Face, stand_in: StandIn
) -> None:
    failing_first(stand_in, 2, "budget_unavailable")

    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=7)
        yield lambda: stand_in.ends
        hold.spent(tokens_out=1)
        yield lambda: len(stand_in.ends) >= 3
        hold.spent(tokens_out=2)

    spend(face, USAGE, block, report_every_seconds=SOON)
    first, second, third = stand_in.ends[:3]
    assert first == second == third
    distinct = dict(
        zip((end.idempotency_key for end in stand_in.ends), ends(stand_in), strict=True)
    )
    assert sum(amounts["tokens_out"] for _, amounts in distinct.values()) == 10


def test_while_parts_fail_they_are_tried_by_time_alone(face: Face, stand_in: StandIn) -> None:
    failing_first(stand_in, 1, "rate_limited")

    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=1000)
        yield lambda: stand_in.ends
        for _ in range(100):
            hold.spent(tokens_out=1000)
            yield lambda: True

    spend(face, USAGE, block)
    # Between the failure and its being known a second may have begun, not more.
    assert len(stand_in.ends) <= 4


@pytest.mark.parametrize("failures", (1, 2))
def test_the_end_is_tried_again_with_the_same_key(
    face: Face, stand_in: StandIn, failures: int
) -> None:
    failing_first(stand_in, failures, "audit_unavailable")
    spend(face, USAGE, spends({"tokens_out": 7}))
    assert len(stand_in.ends) == failures + 1
    assert all(end == stand_in.ends[0] for end in stand_in.ends)


def test_an_end_that_can_not_be_told_is_logged_and_the_result_is_kept(
    face: Face, stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    failing_first(stand_in, 99, "internal")
    with caplog.at_level(logging.WARNING):
        spend(face, USAGE, spends({"tokens_out": 777}))
    assert "could not be reported (internal); it expires by itself" in caplog.text
    assert TOKEN not in caplog.text
    assert "777" not in caplog.text.replace(caplog.records[0].getMessage(), "")


@pytest.mark.parametrize("reason_code", ("charge_not_held", "model_unknown", "request_invalid"))
@pytest.mark.parametrize("refused", ("part", "final"))
def test_where_what_was_spent_is_refused_all_that_is_held_is_spent(
    face: Face,
    stand_in: StandIn,
    caplog: pytest.LogCaptureFixture,
    reason_code: str,
    refused: str,
) -> None:
    def no(end: End, context: Context) -> Any:
        kind, _ = ends(stand_in)[-1]
        if kind == refused and not (isinstance(end, Settle) and end.charges):
            refuse(context, reason_code)
        return stand_in.ended(end)

    stand_in.take_end = no

    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=1000)
        yield lambda: stand_in.ends
        hold.spent(tokens_in=5)

    with caplog.at_level(logging.WARNING):
        spend(face, USAGE, block)
    last = stand_in.ends[-1]
    assert isinstance(last, Settle)
    assert not last.partial
    settled = {each.unit: each.amount for each in last.charges}
    assert settled == {"tokens_in": 1200, "tokens_out": 4000 if refused == "part" else 3000}
    assert f"refused ({reason_code})" in caplog.text


def test_a_refusal_says_which_limit_and_when_to_ask_again(face: Face, stand_in: StandIn) -> None:
    def no(_request: object, context: Context) -> Any:
        refuse(
            context,
            "tenant_budget_exceeded",
            limit="llm-per-day",
            retry_after_seconds=30,
            code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        )

    stand_in.hold = no
    ran: list[Hold] = []

    def block(hold: Hold) -> Iterator[Condition]:
        ran.append(hold)
        yield from ()

    with pytest.raises(BudgetRefused) as caught:
        spend(face, USAGE, block)
    refused = caught.value
    assert refused.reason_code == "tenant_budget_exceeded"
    assert (refused.refused_by, refused.retry_after_seconds) == ("llm-per-day", 30)
    assert refused.__cause__ is None
    assert refused.__context__ is None
    assert TOKEN not in f"{refused} {refused!r}"
    assert not ran
    assert not stand_in.ends


def test_outside_acting_for_nothing_is_reserved(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)
    with pytest.raises(BudgetRefused) as caught:
        face.spend(USAGE, spends())
    assert caught.value.reason_code == "identity_missing"
    assert not stand_in.reserves


def test_without_a_sidecar_nothing_is_reserved(face_of: Callable[..., Face], tmp_path: Any) -> None:
    face = face_of(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(BudgetRefused) as caught:
        spend(face, USAGE, spends())
    assert caught.value.reason_code == "pdp_unavailable"


@pytest.mark.parametrize("what", ([("Spend!", "usd_micros", 1)], [("spend", "usd_micros")], 3))
def test_what_is_no_charge_is_never_asked_for(face: Face, stand_in: StandIn, what: Any) -> None:
    with pytest.raises(BudgetRefused) as caught:
        spend(face, what, spends())
    assert caught.value.reason_code == "guard_failed"
    assert not stand_in.reserves


def test_what_is_no_usage_can_not_be_made() -> None:
    for quantities in ({"tokens_out": -1}, {"tokens_out": 2**53}, {"Tokens!": 1}):
        with pytest.raises(ValueError, match=r"is [01] to"):
            Usage("gpt-x", **quantities)
    with pytest.raises(TypeError):
        Usage("gpt-x", tokens_out=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer",
    (
        budget_pb2.ReserveBudgetResponse(),
        budget_pb2.ReserveBudgetResponse(hold_id="3f2c"),
        budget_pb2.ReserveBudgetResponse(
            charges=[common_pb2.Charge(budget="llm", unit="calls", amount=1)]
        ),
    ),
    ids=("empty", "no charges", "no id"),
)
def test_an_answer_that_names_nothing_held_is_a_refusal(
    face: Face, stand_in: StandIn, answer: Any
) -> None:
    stand_in.hold = lambda _request, _context: answer
    with pytest.raises(BudgetRefused) as caught:
        spend(face, USAGE, spends())
    assert caught.value.reason_code == "internal"


def test_warnings_reach_the_observer_and_the_hold(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    def hold(request: Any, _context: Context) -> Any:
        response = stand_in.held(request)
        response.warnings.add(limit_id="llm-per-day", percent=80)
        response.shadow_refusals.add(limit_id="llm-per-hour")
        response.decision_id = "d-1"
        return response

    stand_in.hold = hold
    seen: list[Reservation] = []
    held: list[Reservation] = []

    def block(hold: Hold) -> Iterator[Condition]:
        held.append(hold.reservation)
        yield from ()

    face = face_of(stand_in.target, observe_reservation=seen.append)
    spend(face, USAGE, block, tool="llm.chat")
    assert seen == held
    [reservation] = seen
    assert reservation.warnings == (("llm-per-day", 80),)
    assert reservation.shadow_refusals == ("llm-per-hour",)
    assert (reservation.model, reservation.tool) == ("gpt-x", "llm.chat")
    assert reservation.charges == (("llm", "tokens_in", 1200), ("llm", "tokens_out", 4000))
    assert TOKEN not in repr(seen)


def test_an_observer_that_raises_lets_nothing_be_spent(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    def observe(_reservation: Reservation) -> None:
        raise RuntimeError(TOKEN)

    face = face_of(stand_in.target, observe_reservation=observe)
    with pytest.raises(BudgetRefused) as caught:
        spend(face, USAGE, spends())
    assert caught.value.reason_code == "guard_failed"
    assert TOKEN not in str(caught.value)
    assert ends(stand_in) == [("release", {})]


def test_a_hold_is_ended_for_whoever_reserved_it(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)

    def block(hold: Hold) -> Iterator[Condition]:
        with face.acting_for("another.token"):
            hold.spent(tokens_out=1000)
            yield lambda: stand_in.ends

    spend(face, USAGE, block)
    assert set(stand_in.tokens) == {f"Bearer {TOKEN}"}


def test_threads_may_spend_one_hold_together(stand_in: StandIn) -> None:
    with (
        Guard(stand_in.target) as guard,
        guard.acting_for(TOKEN),
        guard.reserve(USAGE, report_every_seconds=SOON) as hold,
    ):

        def spend_some() -> None:
            for _ in range(500):
                hold.spent(tokens_out=1)

        threads = [threading.Thread(target=spend_some) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(amounts.get("tokens_out", 0) for _, amounts in ends(stand_in)) == 2000


def test_a_stream_that_is_cancelled_is_settled(stand_in: StandIn) -> None:
    async def run() -> None:
        async with AsyncGuard(stand_in.target) as guard:
            streaming = asyncio.Event()

            async def stream() -> None:
                with guard.acting_for(TOKEN):
                    async with guard.reserve(USAGE, report_every_seconds=NEVER) as hold:
                        hold.spent(tokens_out=11)
                        streaming.set()
                        await asyncio.Event().wait()

            task = asyncio.create_task(stream())
            await streaming.wait()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    asyncio.run(run())
    assert ends(stand_in) == [("final", {"tokens_out": 11})]


def test_an_event_loop_that_ends_still_settles(stand_in: StandIn) -> None:
    async def run() -> None:
        guard = AsyncGuard(stand_in.target)
        streaming = asyncio.Event()

        async def stream() -> None:
            with guard.acting_for(TOKEN):
                async with guard.reserve(USAGE, report_every_seconds=NEVER) as hold:
                    hold.spent(tokens_out=11)
                    streaming.set()
                    await asyncio.Event().wait()

        task = asyncio.create_task(stream())
        await streaming.wait()
        assert not task.done()

    asyncio.run(run())
    assert ends(stand_in) == [("final", {"tokens_out": 11})]


def test_a_hold_that_is_left_without_its_end_is_settled(stand_in: StandIn) -> None:
    with Guard(stand_in.target) as guard, guard.acting_for(TOKEN):
        reserved = guard.reserve(USAGE, report_every_seconds=NEVER)
        hold = reserved.__enter__()
        hold.spent(tokens_out=11)
        del reserved
        assert ends(stand_in) == [("final", {"tokens_out": 11})]


def test_no_thread_is_left_behind(stand_in: StandIn) -> None:
    with Guard(stand_in.target) as guard, guard.acting_for(TOKEN):
        with guard.reserve(USAGE, report_every_seconds=NEVER) as hold:
            hold.spent(tokens_out=1)
            assert [thread for thread in threading.enumerate() if thread.name == "pdp-spend"]
        assert not [thread for thread in threading.enumerate() if thread.name == "pdp-spend"]
