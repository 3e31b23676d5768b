"""Refunds, teams, warnings and shadow limits, as callers of a real sidecar meet them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdp.api.v1 import budget_pb2, common_pb2
from pdp.testing import Caller, SidecarProcess, TokenIssuer, refusal_of

BUNDLE = Path(__file__).parents[2] / "policies" / "bundle.tar.gz"
IDP = TokenIssuer()


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("spending")
    with SidecarProcess(directory, issuer=IDP, bundle=BUNDLE) as sidecar:
        yield sidecar


def acting(sidecar: SidecarProcess, actor: str, role: str, **claims: Any) -> Caller:
    return Caller(sidecar.target, token=IDP.token("tenant_acme", actor, roles=[role], **claims))


def money(amount: int) -> list[common_pb2.Charge]:
    return [common_pb2.Charge(budget="llm", unit="usd_micros", amount=amount)]


def charge(caller: Caller, amount: int) -> budget_pb2.ChargeBudgetResponse:
    request = budget_pb2.ChargeBudgetRequest(
        idempotency_key=str(uuid.uuid4()), charges=money(amount)
    )
    return caller.budget.ChargeBudget(request)


def refund(hold_id: str, *charges: common_pb2.Charge) -> budget_pb2.RefundBudgetRequest:
    return budget_pb2.RefundBudgetRequest(
        idempotency_key=str(uuid.uuid4()), hold_id=hold_id, charges=charges
    )


def spent(caller: Caller, limit_id: str) -> int:
    limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
    return next(limit.spent for limit in limits if limit.limit_id == limit_id)


def last_record(sidecar: SidecarProcess) -> dict[str, Any]:
    lines = [
        line
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def test_an_agent_can_not_take_back_what_it_spent_and_billing_can(
    sidecar: SidecarProcess,
) -> None:
    with acting(sidecar, "planner", "agent") as agent, acting(sidecar, "ann", "billing") as billing:
        before = spent(agent, "llm-spend-per-day")
        charged = charge(agent, 100).charge_id
        refusal = refusal_of(agent.budget.RefundBudget, refund(charged))
        assert refusal.reason_code == "budget_not_allowed"
        assert spent(agent, "llm-spend-per-day") == before + 100

        request = refund(charged, *money(30))
        first = billing.budget.RefundBudget(request)
        assert list(first.refunded) == money(30)
        assert billing.budget.RefundBudget(request).replayed
        assert spent(agent, "llm-spend-per-day") == before + 70
        record = last_record(sidecar)
        assert (record["action"], record["outcome"]) == ("budget.refund", "refunded")
        assert (record["actor_id"], record["hold_id"]) == ("ann", charged)
        refusal = refusal_of(billing.budget.RefundBudget, refund(charged, *money(71)))
        assert refusal.reason_code == "refund_exceeds_spend"


def test_a_team_counts_by_itself_and_only_as_the_token_says(sidecar: SidecarProcess) -> None:
    limit_id = "llm-spend-per-team-day"
    with (
        acting(sidecar, "one", "agent", team="sales") as sales,
        acting(sidecar, "two", "agent", team="sales") as also_sales,
        acting(sidecar, "three", "agent", team="support") as support,
    ):
        before = spent(support, limit_id)
        charge(sales, 1_000)
        assert spent(also_sales, limit_id) == spent(sales, limit_id) >= 1_000
        assert spent(support, limit_id) == before


def test_warnings_and_shadow_refusals_are_told_and_on_record(tmp_path: Path) -> None:
    with (
        SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE) as sidecar,
        acting(sidecar, "planner", "agent", team="sales") as agent,
    ):
        answer = charge(agent, 1_700_000)
        assert [(each.limit_id, each.percent) for each in answer.warnings] == [
            ("llm-spend-per-hour", 50),
            ("llm-spend-per-hour", 80),
            ("llm-spend-per-hour", 95),
            ("llm-spend-per-team-day", 80),
        ]
        assert [each.limit_id for each in answer.shadow_refusals] == ["llm-spend-per-hour"]
        assert answer.shadow_refusals[0].shadow
        detail = last_record(sidecar)["detail"]
        assert detail["shadow_refusals"] == ["llm-spend-per-hour"]
        assert {"limit_id": "llm-spend-per-team-day", "percent": 80} in detail["warnings"]
        assert not charge(agent, 1).warnings
