"""What became of a call is reported, and one permit stands for one execution."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from pdp.api.v1 import budget_pb2, execution_pb2
from pdp.client import AsyncGuard, PermitDenied, current_permit
from pdp.testing import Caller
from tests.client.faces import Face
from tests.client.stand_in import StandIn

Audit = Callable[[], list[dict[str, Any]]]
SECRET = "the-secret-argument"


def outcomes(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(record["type"], record["outcome"]) for record in records]


def test_a_call_is_allowed_then_executed(face: Face, token: str, audit: Audit) -> None:
    @face.tool("orders.read")
    def read_order(order_id: str) -> str:
        return order_id

    with face.acting_for(token):
        assert read_order("918") == "918"
    allowed, executed = audit()
    assert outcomes([allowed, executed]) == [("decision", "allowed"), ("outcome", "executed")]
    assert allowed["permit_id"] == executed["permit_id"]


@pytest.mark.parametrize(
    "kind", (ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)
)
def test_what_a_tool_raises_is_reported_by_kind_and_raised_on(
    face: Face, token: str, audit: Audit, kind: type[BaseException]
) -> None:
    @face.tool("orders.update")
    def update_order(order_id: str, status: str) -> None:
        raise kind(SECRET)

    with face.acting_for(token), pytest.raises(kind):
        update_order("918", "shipped")
    failed = audit()[1]
    assert outcomes([failed]) == [("outcome", "failed")]
    assert failed["detail"]["error_type"] == kind.__name__
    assert SECRET not in str(audit())


def test_a_kind_of_error_with_an_odd_name_is_reported_all_the_same(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)
    odd = [type("É" * 100, (Exception,), {}), type("A b\n" * 100, (Exception,), {})]

    @face.tool("orders.read")
    def read_order(number: int) -> None:
        raise odd[number]

    with face.acting_for("token"):
        for number, kind in enumerate(odd):
            with pytest.raises(kind):
                read_order(number)
    assert [report.error_type for report in stand_in.reports] == ["", "Ab" * 32]


def spent(target: str, token: str) -> dict[str, tuple[int, int]]:
    """Spent and held, by limit."""
    with Caller(target, token=token) as caller:
        limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest(tool="mail.send")).limits
    return {limit.limit_id: (limit.spent, limit.held) for limit in limits}


def change(target: str, token: str, call: Callable[[], object]) -> dict[str, int]:
    """What a call adds to the tenant's spend on mail, by limit."""
    before = spent(target, token)
    call()
    after = spent(target, token)
    assert after["spend-per-day"][1] == before["spend-per-day"][1]  # nothing is held any more
    return {limit: after[limit][0] - before[limit][0] for limit in after}


MAIL = {"to": "a@customers.example", "subject": "Your order", "body": "It is on its way."}


def send_mail(face: Face, cost: Callable[[Any], Any] | None) -> Callable[..., str]:
    @face.tool("mail.send", cost=cost)
    def send_mail(to: str, subject: str, body: str) -> str:
        return "sent"

    sent: Callable[..., str] = send_mail
    return sent


def test_the_actual_cost_settles_the_hold(face: Face, token: str, target: str) -> None:
    tool = send_mail(face, lambda _: [("tools", "calls", 1), ("spend", "usd_micros", 120)])
    with face.acting_for(token):
        found = change(target, token, lambda: tool(**MAIL))
    assert (found["tools-per-day"], found["spend-per-day"]) == (1, 120)


def raising_cost(_result: object) -> Any:
    raise ValueError(SECRET)


@pytest.mark.parametrize(
    "cost",
    (
        None,
        raising_cost,
        lambda _: [("spend", "usd_micros", 2**70)],
        lambda _: [("spend", "usd_micros", 1.5)],
        lambda _: [("spend", "usd_micros", -1)],
        lambda _: [("Spend!", "usd_micros", 1)],
        lambda _: [("savings", "usd_micros", 1)],
        lambda _: [("spend", "usd_micros")],
        lambda _: "much",
        lambda _: None,
    ),
    ids=lambda cost: "",
)
def test_without_a_usable_cost_all_that_was_held_is_spent(
    face: Face,
    token: str,
    target: str,
    cost: Callable[[Any], Any] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tool = send_mail(face, cost)
    with face.acting_for(token):
        found = change(target, token, lambda: tool(**MAIL))
    assert (found["tools-per-day"], found["spend-per-day"]) == (1, 500)
    assert SECRET not in caplog.text
    assert ("all that was held" in caplog.text) == (cost is not None)


def test_a_failed_call_costs_nothing(face: Face, token: str, target: str) -> None:
    @face.tool("mail.send")
    def send_mail(to: str, subject: str, body: str) -> str:
        raise KeyError

    def call() -> None:
        with face.acting_for(token), pytest.raises(KeyError):
            send_mail(**MAIL)

    assert set(change(target, token, call).values()) == {0}


class BilledError(Exception):
    """A failure that the provider charges for."""

    def __init__(self, micros: int) -> None:
        super().__init__(SECRET)
        self.micros = micros


def billed(error: BaseException) -> list[tuple[str, str, int]]:
    return [("spend", "usd_micros", error.micros)] if isinstance(error, BilledError) else []


def fail_with(
    face: Face, error: BaseException, cost_of_failure: Callable[[BaseException], Any]
) -> Callable[[], None]:
    @face.tool("mail.send", cost_of_failure=cost_of_failure)
    def send_mail(to: str, subject: str, body: str) -> str:
        raise error

    def call() -> None:
        with pytest.raises(type(error)):
            send_mail(**MAIL)

    return call


@pytest.mark.parametrize(
    ("error", "micros"),
    ((BilledError(120), 120), (BilledError(0), 0), (KeyError(), 0), (SystemExit(), 0)),
)
def test_a_failure_may_have_a_cost(
    face: Face, token: str, target: str, audit: Audit, error: BaseException, micros: int
) -> None:
    call = fail_with(face, error, billed)
    with face.acting_for(token):
        found = change(target, token, call)
    assert (found["tools-per-day"], found["spend-per-day"]) == (0, micros)
    failed = audit()[1]
    assert outcomes([failed]) == [("outcome", "failed")]
    assert failed["detail"]["error_type"] == type(error).__name__


@pytest.mark.parametrize(
    "cost_of_failure",
    (
        raising_cost,
        lambda _: [("spend", "usd_micros", 1.5)],
        lambda _: [("savings", "usd_micros", 1)],
        lambda _: [("spend", "usd_micros", 1)] * 2,
        lambda _: None,
    ),
    ids=lambda cost_of_failure: "",
)
def test_without_a_usable_cost_a_failure_costs_all_that_was_held(
    face: Face,
    token: str,
    target: str,
    audit: Audit,
    cost_of_failure: Callable[[BaseException], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    call = fail_with(face, BilledError(120), cost_of_failure)
    with face.acting_for(token):
        found = change(target, token, call)
    assert (found["tools-per-day"], found["spend-per-day"]) == (1, 500)
    assert outcomes(audit()[-1:]) == [("outcome", "failed")]
    assert SECRET not in caplog.text
    assert "all that was held" in caplog.text


def test_a_failure_that_is_reported_by_hand_may_have_a_cost(
    face: Face, token: str, target: str
) -> None:
    def call() -> None:
        permit = face.authorize("mail.send", MAIL)
        face.failed(permit, KeyError(), [("spend", "usd_micros", 120)])

    with face.acting_for(token):
        found = change(target, token, call)
    assert (found["tools-per-day"], found["spend-per-day"]) == (0, 120)


@pytest.mark.parametrize("charges", ("much", [("savings", "usd_micros", 1)]))
def test_a_wrong_cost_of_a_failure_by_hand_frees_nothing(
    face: Face, token: str, target: str, charges: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with face.acting_for(token):
        permit = face.authorize("mail.send", MAIL)
        face.failed(permit, KeyError(), charges)
        held = spent(target, token)["spend-per-day"][1]
        assert held == 500
        assert "could not be reported" in caplog.text
        face.executed(permit)  # so that nothing stays held for the tests that follow


def test_an_estimate_is_shown_to_the_policy_as_the_callers_word(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)

    @face.tool("llm.chat", estimate=lambda prompt: [("llm", "tokens_in", len(prompt))])
    def chat(prompt: str) -> str:
        return prompt

    @face.tool("orders.read")
    def read_order(order_id: str) -> str:
        return order_id

    with face.acting_for("token", context={"channel": "web", "estimate": "mine"}):
        assert chat("hello") == "hello"
        read_order("918")
    chatted, read = (json.loads(asked.context_json) for asked in stand_in.asked)
    assert chatted == {
        "channel": "web",
        "estimate": [{"budget": "llm", "unit": "tokens_in", "amount": 5}],
    }
    assert read == {"channel": "web", "estimate": "mine"}


@pytest.mark.parametrize(
    "estimate",
    (
        raising_cost,
        lambda prompt: None,
        lambda prompt: [("llm", "tokens_in", -1)],
        lambda prompt: [("llm", "tokens_in", 1.5)],
        lambda prompt: [(SECRET + "!", "tokens_in", 1)],
    ),
    ids=lambda estimate: "",
)
def test_without_a_usable_estimate_the_tool_does_not_run(
    face_of: Callable[..., Face], stand_in: StandIn, estimate: Callable[[str], Any]
) -> None:
    face = face_of(stand_in.target)

    @face.tool("llm.chat", estimate=estimate)
    def chat(prompt: str) -> None:
        raise AssertionError

    with face.acting_for("token"), pytest.raises(PermitDenied) as caught:
        chat("hello")
    assert caught.value.reason_code == "guard_failed"
    assert SECRET not in str(caught.value)
    assert not stand_in.asked


def test_a_report_that_fails_does_not_lose_the_result(
    face_of: Callable[..., Face], stand_in: StandIn, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_request: object, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.INTERNAL, "no")

    stand_in.take_report = refuse
    face = face_of(stand_in.target)

    @face.tool("orders.read")
    def read_order(order_id: str) -> str:
        return order_id

    with face.acting_for("token"), caplog.at_level(logging.WARNING):
        assert read_order(SECRET) == SECRET
    assert "could not be reported" in caplog.text
    assert SECRET not in caplog.text
    assert stand_in.reports[0].permit not in caplog.text


def test_a_report_that_hangs_holds_the_result_up_only_until_the_deadline(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    def hang(_request: object, _context: object) -> execution_pb2.ReportOutcomeResponse:
        stand_in.released.wait()
        return execution_pb2.ReportOutcomeResponse()

    stand_in.take_report = hang
    face = face_of(stand_in.target, timeout_seconds=0.2)

    @face.tool("orders.read")
    def read_order(order_id: str) -> str:
        return order_id

    with face.acting_for("token"):
        assert read_order("918") == "918"


def test_each_call_asks_for_a_permit_of_its_own(face: Face, token: str, audit: Audit) -> None:
    permits: list[str] = []

    @face.tool("orders.read")
    def read_order(order_id: str) -> None:
        permits.append(current_permit().id)

    with face.acting_for(token):
        read_order("918")
        read_order("918")
    assert len(set(permits)) == 2
    assert outcomes(audit()).count(("decision", "allowed")) == 2


def test_the_same_request_id_gets_the_same_permit(face: Face, token: str) -> None:
    arguments = {"order_id": "918", "status": "shipped"}
    with face.acting_for(token):
        first = face.authorize("orders.update", arguments)
        again = face.authorize("orders.update", arguments, request_id=first.transaction)
        with pytest.raises(PermitDenied) as caught:
            face.authorize("orders.read", {"order_id": "918"}, request_id=first.transaction)
        other = face.authorize("orders.update", arguments)
    assert first.token == again.token != other.token
    assert caught.value.reason_code == "idempotency_key_reused"


def test_authorize_reports_as_tool_does(face: Face, token: str, audit: Audit) -> None:
    with face.acting_for(token):
        permit = face.authorize(
            "orders.update",
            {"order_id": "918", "status": "shipped"},
            resource=("order", "918"),
        )
        assert permit.resource == "order/918"
        face.executed(permit, [("tools", "calls", 1)])
    assert outcomes(audit()) == [("decision", "allowed"), ("outcome", "executed")]


def test_an_await_that_is_cancelled_before_or_while_asking_runs_nothing(
    stand_in: StandIn,
) -> None:
    asked = threading.Event()

    def hang(request: Any, _context: object) -> Any:
        asked.set()
        stand_in.released.wait()
        return stand_in.allow(request)

    async def run() -> list[str]:
        ran: list[str] = []
        async with AsyncGuard(stand_in.target) as guard:

            @guard.tool("orders.read")
            async def read_order(order_id: str) -> None:
                ran.append(order_id)

            with guard.acting_for("token"):
                before = asyncio.create_task(read_order("1"))
                before.cancel()
                await asyncio.wait([before])
                stand_in.answer = hang
                during = asyncio.create_task(read_order("2"))
                await asyncio.to_thread(asked.wait)
                during.cancel()
                await asyncio.wait([during])
                assert before.cancelled()
                assert during.cancelled()
        return ran

    assert asyncio.run(run()) == []
    assert len(stand_in.asked) == 1
    assert not stand_in.reports


def test_a_body_that_is_cancelled_is_reported(target: str, token: str, audit: Audit) -> None:
    async def run() -> None:
        async with AsyncGuard(target) as guard:
            running = asyncio.Event()

            @guard.tool("orders.read")
            async def read_order(order_id: str) -> None:
                running.set()
                await asyncio.Event().wait()

            with guard.acting_for(token):
                task = asyncio.create_task(read_order("918"))
                await running.wait()
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()

    asyncio.run(run())
    failed = audit()[1]
    assert (failed["outcome"], failed["detail"]["error_type"]) == ("failed", "CancelledError")


def test_a_report_outlives_a_caller_that_is_cancelled_twice(
    target: str, token: str, audit: Audit
) -> None:
    async def run() -> None:
        async with AsyncGuard(target) as guard:
            ran = asyncio.Event()

            @guard.tool("orders.read")
            async def read_order(order_id: str) -> None:
                ran.set()

            with guard.acting_for(token):
                task = asyncio.create_task(read_order("918"))
                await ran.wait()  # it is reporting now
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled()

    asyncio.run(run())
    assert outcomes(audit()) == [("decision", "allowed"), ("outcome", "executed")]


def test_an_event_loop_that_ends_still_sends_the_report(
    target: str, token: str, audit: Audit
) -> None:
    """asyncio.run cancels what is left over; its tool is reported as cancelled."""
    guard = AsyncGuard(target)

    @guard.tool("orders.read")
    async def read_order(order_id: str) -> None:
        running.set()
        await asyncio.Event().wait()

    async def run() -> None:
        with guard.acting_for(token):
            task = asyncio.create_task(read_order("918"))
            await running.wait()
            assert not task.done()

    running = asyncio.Event()
    asyncio.run(run())
    assert outcomes(audit()) == [("decision", "allowed"), ("outcome", "failed")]


def test_a_guard_works_in_one_event_loop_after_another(target: str, token: str) -> None:
    guard = AsyncGuard(target)

    @guard.tool("orders.read")
    async def read_order(order_id: str) -> str:
        return order_id

    async def run() -> str:
        with guard.acting_for(token):
            return await read_order("918")

    assert [asyncio.run(run()) for _ in range(3)] == ["918"] * 3


def test_a_closed_guard_opens_again(face: Face, token: str) -> None:
    @face.tool("orders.read")
    def read_order(order_id: str) -> str:
        return order_id

    with face.acting_for(token):
        for _ in range(2):
            assert read_order("918") == "918"
            face.close()
