"""Budgets that were passed, starved or never asked, in the products of others."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc
import pytest

from pdp.api.v1 import budget_pb2
from pdp.client import AsyncGuard, BudgetRefused, Guard, PermitDenied, Usage
from pdp.testing import Caller, SidecarProcess, refusal_of
from tests.e2e.operating import records, soon
from tests.field.world import MANY, of, reason, spent_and_held, token, usd_micros

ASK_AGAIN: Final = {"deadline_exceeded", "policy_timeout", "policy_unavailable", "rate_limited"}
"""What a machine that is too slow for a thousand at once answers: no yes and no no."""
TRIES: Final = 50


async def burst(sidecar: SidecarProcess, bearer: str, calls: int) -> tuple[Counter[str], list[str]]:
    """This many calls of one guarded tool at the same time: how they ended, and which ran."""
    ran: list[str] = []
    async with AsyncGuard(sidecar.target, timeout_seconds=60) as guard:

        @guard.tool("orders.update")
        async def update(order_id: str, status: str) -> None:
            ran.append(order_id)

        async def attempt(number: int) -> str:
            for _ in range(TRIES):
                try:
                    await update(str(number), status="shipped")
                except PermitDenied as denied:
                    if denied.reason_code not in ASK_AGAIN:
                        return denied.reason_code
                else:
                    return "ok"
            return "never answered"

        with guard.acting_for(bearer):
            ended = Counter(await asyncio.gather(*(attempt(number) for number in range(calls))))
    return ended, ran


def test_litellm_26672_budget_holds_under_concurrency(sidecar: SidecarProcess) -> None:
    """BerriAI/litellm#26672: spend was compared with the budget before it was recorded, so a
    burst passed together; here 1,000 calls at once on a limit for 50 run exactly 50 tools.
    """
    bearer = token("tenant_burst")
    ended, ran = asyncio.run(burst(sidecar, bearer, MANY))
    assert ended == {"ok": 50, "tenant_budget_exceeded": MANY - 50}
    assert len(set(ran)) == len(ran) == 50
    assert spent_and_held(sidecar, bearer, "calls") == (50, 0)


def test_litellm_34732_the_first_calls_of_somebody_new_are_limited(
    sidecar: SidecarProcess,
) -> None:
    """BerriAI/litellm#34732: whoever had no row yet was let through without a check; here the
    first burst of somebody never seen before is counted like any other.
    """
    ended, ran = asyncio.run(burst(sidecar, token("tenant_actors"), 10))
    assert ended == {"ok": 3, "tenant_budget_exceeded": 7}
    assert len(ran) == 3


def test_litellm_23714_nothing_runs_once_the_budget_is_passed(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """BerriAI/litellm#23714: a key that had passed its budget could go on; here what passed it
    is recorded in full, and neither its user nor another of the tenant spends any more.
    """
    first = token("tenant_tokens")
    with guard.acting_for(first), guard.reserve([("llm", "tokens_out", 60)]) as hold:
        hold.spent([("llm", "tokens_out", 120)])
    assert spent_and_held(sidecar, first, "tokens") == (120, 0)
    for bearer in (first, token("tenant_tokens")):
        for amount in (100, 1):
            with (
                guard.acting_for(bearer),
                pytest.raises(BudgetRefused) as caught,
                guard.reserve([("llm", "tokens_out", amount)]),
            ):
                pytest.fail("it has run")
            assert caught.value.reason_code == "tenant_budget_exceeded"
            assert caught.value.refused_by == "tokens"


def test_litellm_35524_what_has_no_price_does_not_run(guard: Guard) -> None:
    """BerriAI/litellm#35524: where the cost could not be told nothing was held, and the call
    ran for free; here what the policy has no price for is refused.
    """
    with (
        guard.acting_for(token()),
        pytest.raises(BudgetRefused) as caught,
        guard.reserve(Usage("model-that-nobody-has-priced", tokens_in=10)),
    ):
        pytest.fail("it has run")
    assert caught.value.reason_code == "model_unknown"


def test_litellm_35524_what_no_limit_bounds_does_not_run(guard: Guard) -> None:
    """The same hole from the other side: a charge that no limit applies to is refused."""
    ran = []

    @guard.tool("orders.update")
    def update(order_id: str, status: str) -> None:
        ran.append(order_id)

    with guard.acting_for(token("tenant_unlimited")):
        assert reason(update, "918", status="shipped") == "budget_unlimited"
    assert not ran


RUNTIME: Final = """
import sys
from pdp.client import Guard
target, bearer = sys.argv[1:]
with Guard(target) as guard, guard.acting_for(bearer):
    with guard.reserve([("llm", "usd_micros", 25_000_000)], ttl_seconds=1):
        print("held", flush=True)
        sys.stdin.read()
"""


def test_litellm_27735_a_hold_of_a_runtime_that_died_is_no_spend_and_ends(
    sidecar: SidecarProcess,
) -> None:
    """BerriAI/litellm#27735: holds that nobody ended stood on the spend counter, and users were
    "over budget" until somebody reset it; here a hold stands apart and ends by itself.
    """
    bearer = token("tenant_died")
    command = [sys.executable, "-c", RUNTIME, sidecar.target, bearer]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as runtime:
        assert runtime.stdout is not None
        assert runtime.stdout.readline() == "held\n"
        runtime.kill()
    with Caller(sidecar.target, token=bearer) as caller:
        assert of(caller, "money").spent == 0
        assert soon(lambda: of(caller, "money").held == 0)
        reserve(caller, 25_000_000, ttl_seconds=1)


def test_litellm_27735_a_hold_that_expired_is_settled_late_and_once(
    sidecar: SidecarProcess,
) -> None:
    """Its other half: the settlement that comes after all is counted, and never twice."""
    with Caller(sidecar.target, token=token("tenant_late")) as caller:
        before = of(caller, "money").spent
        hold = reserve(caller, 300_000, ttl_seconds=1)
        assert soon(lambda: of(caller, "money").held == 0)
        end = budget_pb2.SettleBudgetRequest(
            idempotency_key=str(uuid.uuid4()), hold_id=hold, charges=usd_micros(200_000)
        )
        assert caller.budget.SettleBudget(end).late
        assert caller.budget.SettleBudget(end).replayed
        end.idempotency_key = str(uuid.uuid4())
        assert refusal_of(caller.budget.SettleBudget, end).reason_code == "hold_already_settled"
        assert of(caller, "money").spent - before == 200_000


def reserve(caller: Caller, amount: int, ttl_seconds: int = 60) -> str:
    return caller.budget.ReserveBudget(
        budget_pb2.ReserveBudgetRequest(
            idempotency_key=str(uuid.uuid4()), charges=usd_micros(amount), ttl_seconds=ttl_seconds
        )
    ).hold_id


@pytest.mark.parametrize("pull_request", (27509, 38647))
def test_litellm_27509_and_38647_worst_case_holds_return_what_was_not_spent(
    sidecar: SidecarProcess, guard: Guard, pull_request: int
) -> None:
    """BerriAI/litellm#27509, #38647: holds for the worst case filled budgets of which next to
    nothing was spent; here the unspent part is free again when the call ends.
    """
    bearer = token("tenant_worst")
    with Caller(sidecar.target, token=bearer) as caller:
        before = of(caller, "money").spent
        assert soon(lambda: of(caller, "money").held == 0)
        worst = of(caller, "money").remaining
        with guard.acting_for(bearer):
            for _ in range(5):
                with guard.reserve([("llm", "usd_micros", worst - pull_request)]) as hold:
                    assert of(caller, "money").held == worst - pull_request
                    hold.spent([("llm", "usd_micros", 144)])
        assert of(caller, "money").held == 0
        assert of(caller, "money").spent - before == 5 * 144


def test_buttercup_550_no_key_is_above_the_budget(sidecar: SidecarProcess) -> None:
    """trailofbits/buttercup#550: a run was made with the gateway's master key, to which no
    budget applied, and spent $4.77 on a cap of $1; here no role, scope or claim lifts a limit.
    """
    masters: list[dict[str, Any]] = [
        {"roles": ("agent", "admin", "proxy_admin")},
        {"scope": "* admin master"},
        {"admin": True, "master_key": True, "max_budget": 100},
        {"sub": "root"},
        {"sub": "default_user_id", "budget": "unlimited"},
    ]
    answers = []
    for claims in masters:
        with Caller(sidecar.target, token=token("tenant_master", **claims)) as caller:
            charge = budget_pb2.ChargeBudgetRequest(
                idempotency_key=str(uuid.uuid4()), charges=usd_micros(300_000)
            )
            try:
                caller.budget.ChargeBudget(charge)
            except grpc.RpcError as error:
                answers.append(error.code().name)
            else:
                answers.append("OK")
    assert answers == ["OK"] * 3 + ["RESOURCE_EXHAUSTED"] * 2


def test_openai_agents_3353_a_run_has_a_hard_cap_of_its_own(guard: Guard) -> None:
    """openai/openai-agents-python#3353: usage was told after the run, and a loop had made
    thousands of calls by then; here a run acts within its slice, and the next call is refused.
    """
    ran = []

    @guard.tool("orders.update")
    def update(order_id: str, status: str) -> None:
        ran.append(order_id)

    with guard.acting_for(token()):
        run = guard.delegate("run-1", tools=["orders.update"], budget=[("tools", "calls", 2)])
    with guard.accept(run.metadata()):
        ended = [reason(update, str(number), status="shipped") for number in range(10)]
    assert ended == ["ok"] * 2 + ["tenant_budget_exceeded"] * 8
    assert ran == ["0", "1"]


def test_deepagents_6209_a_tenant_has_a_hard_cap_over_all_its_runs(guard: Guard) -> None:
    """langchain-ai/deepagents#6209: callers asked for a limit that stops a run, for each of
    their customers; here all runs of a tenant share it, and another tenant's go on.
    """

    @guard.tool("orders.update")
    def update(order_id: str, status: str) -> str:
        return order_id

    ended = []
    for number in range(4):
        with guard.acting_for(token("tenant_capped")):
            ended.append(reason(update, str(number), status="shipped"))
    assert ended == ["ok", "ok", "tenant_budget_exceeded", "tenant_budget_exceeded"]
    with guard.acting_for(token("tenant_globex")):
        assert update("918", status="shipped") == "918"


@pytest.mark.parametrize("amount", (float("nan"), float("inf"), -1, 0, 0.5, "1", 2**63))
def test_agt_272_no_odd_amount_gets_around_a_budget(guard: Guard, amount: Any) -> None:
    """microsoft/agent-governance-toolkit, entry #272 of its changelog: costs of NaN, infinity
    and less than nothing went past the kill switch; here none of them is an amount.
    """
    with (
        guard.acting_for(token()),
        pytest.raises((BudgetRefused, TypeError, ValueError)),
        guard.reserve([("llm", "usd_micros", amount)]),
    ):
        pytest.fail("it has run")


@pytest.mark.parametrize("amount", (-1, 0, 2**53, 2**63 - 1))
def test_agt_272_nor_does_one_that_the_stub_did_not_see(
    sidecar: SidecarProcess, amount: int
) -> None:
    """The same, of a caller that writes its messages itself."""
    bearer = token()
    with Caller(sidecar.target, token=bearer) as caller:
        request = budget_pb2.ReserveBudgetRequest(
            idempotency_key=str(uuid.uuid4()), charges=usd_micros(amount)
        )
        refused = refusal_of(caller.budget.ReserveBudget, request)
    assert refused.status is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.fields == ("charges[0].amount",)


def test_agt_609_a_budget_is_a_rule_of_the_policy_and_decides_beforehand(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """microsoft/agent-governance-toolkit#609: budgets were no policy rule, and looked at after
    the action; here the bundle says what is charged and bounded, and the refusal names it.
    """
    ran = []

    @guard.tool("orders.update")
    def update(order_id: str, status: str) -> None:
        ran.append(order_id)

    with guard.acting_for(token("tenant_ruled")):
        update("917", status="shipped")
        with pytest.raises(PermitDenied) as caught:
            update("918", status="shipped")
    assert ran == ["917"]
    denied = caught.value
    assert (denied.reason_code, denied.refused_by) == ("tenant_budget_exceeded", "calls")
    (record,) = (each for each in records(sidecar) if each.get("decision_id") == denied.decision_id)
    assert (record["outcome"], record["tenant_id"]) == ("denied", "tenant_ruled")


def test_litellm_26672_retries_of_one_call_are_charged_once(sidecar: SidecarProcess) -> None:
    """What a lock alone does not give: fifty tries of one call, at the same time and under the
    key that its caller made before the first, are one call.
    """
    bearer, key = token("tenant_keyed"), str(uuid.uuid4())
    arguments = {"order_id": "918", "status": "shipped"}
    with Guard(sidecar.target, timeout_seconds=20) as guard, ThreadPoolExecutor(16) as threads:

        def attempt(_number: int) -> str:
            with guard.acting_for(bearer):
                return guard.authorize("orders.update", arguments, request_id=key).id

        assert len(set(threads.map(attempt, range(50)))) == 1
    assert spent_and_held(sidecar, bearer, "calls") == (0, 1)
