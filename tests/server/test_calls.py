"""Every method of the contract, through gRPC, against a sidecar process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.canonical import sha256_hex
from pdp.permit import Permit, PermitKeySet, PermitVerifier
from pdp.permit.issuer import PermitIssuer
from pdp.permit.ring import KeyRing
from pdp.server.sidecar import ledger_id
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
ARGUMENTS = {"order_id": "918", "status": "shipped"}
EXECUTED = execution_pb2.OUTCOME_EXECUTED
FAILED = execution_pb2.OUTCOME_FAILED


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("calls")
    bundle = build_bundle(
        ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle) as process:
        yield process


@pytest.fixture
def tenant() -> str:
    """One that no other test has."""
    return f"tenant_{uuid.uuid4().hex[:12]}"


@pytest.fixture
def caller(sidecar: SidecarProcess, tenant: str) -> Iterator[Caller]:
    with acting(sidecar, tenant) as opened:
        yield opened


def acting(sidecar: SidecarProcess, tenant: str, actor: str = "user-7") -> Caller:
    return Caller(sidecar.target, token=ISSUER.token(tenant, actor, roles=["agent"]))


def records(sidecar: SidecarProcess, tenant: str) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line["tenant_id"] == tenant]


def summary(record: dict[str, Any]) -> tuple[str, ...]:
    names = ("tenant_id", "actor_id", "action", "reason_code", "outcome")
    return tuple(record[name] for name in names)


def amounts(caller: Caller, limit_id: str) -> tuple[int, int]:
    """(spent, held)."""
    limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
    (found,) = (limit for limit in limits if limit.limit_id == limit_id)
    return found.spent, found.held


def charges(budget: str, unit: str, amount: int) -> list[common_pb2.Charge]:
    return [common_pb2.Charge(budget=budget, unit=unit, amount=amount)]


def spend(amount: int, *, key: str = "", budget: str = "llm") -> budget_pb2.ChargeBudgetRequest:
    unit = "tokens_out" if budget == "llm" else "calls"
    return budget_pb2.ChargeBudgetRequest(
        idempotency_key=key or str(uuid.uuid4()), charges=charges(budget, unit, amount)
    )


def hold(
    amount: int, *, key: str = "", ttl_seconds: int = 0, budget: str = "llm"
) -> budget_pb2.ReserveBudgetRequest:
    unit = "tokens_out" if budget == "llm" else "calls"
    return budget_pb2.ReserveBudgetRequest(
        idempotency_key=key or str(uuid.uuid4()),
        charges=charges(budget, unit, amount),
        ttl_seconds=ttl_seconds,
    )


def settlement(
    hold_id: str, amount: int | None, *, key: str = ""
) -> budget_pb2.SettleBudgetRequest:
    return budget_pb2.SettleBudgetRequest(
        idempotency_key=key or str(uuid.uuid4()),
        hold_id=hold_id,
        charges=[] if amount is None else charges("llm", "tokens_out", amount),
    )


def freeing(hold_id: str, *, key: str = "") -> budget_pb2.ReleaseBudgetRequest:
    return budget_pb2.ReleaseBudgetRequest(
        idempotency_key=key or str(uuid.uuid4()), hold_id=hold_id
    )


def redemption(permit: str, **changes: str) -> execution_pb2.RedeemPermitRequest:
    fields = {
        "permit": permit,
        "idempotency_key": str(uuid.uuid4()),
        "tool": "orders.update",
        "arguments_sha256": sha256_hex(dict(ARGUMENTS)),
        "audience": "tools",
        **changes,
    }
    return execution_pb2.RedeemPermitRequest(**fields)


def report(
    permit: str, outcome: execution_pb2.Outcome.ValueType = EXECUTED, **fields: Any
) -> execution_pb2.ReportOutcomeRequest:
    return execution_pb2.ReportOutcomeRequest(permit=permit, outcome=outcome, **fields)


# Authorize


def test_an_allowed_call_gets_a_permit_for_exactly_that_call(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    answer = caller.authorize("orders.update", ARGUMENTS, request_id="request-1", audience="orders")

    assert (answer.decision, answer.reason_code) == (True, "ok")
    assert (answer.tenant_id, answer.actor_id) == (tenant, "user-7")
    assert answer.namespace == f"tenant/{tenant}/"
    assert list(answer.scopes) == ["orders:write"]
    assert [step.step for step in answer.steps] == [
        "identify", "isolate", "authorize", "execute", "audit",
    ]  # fmt: skip
    keys = caller.execution.GetPermitKeys(execution_pb2.GetPermitKeysRequest()).jwks_json
    verifier = PermitVerifier(PermitKeySet.from_jwks(keys), issuer="agent-pdp", audience="orders")
    permit = verifier.verify(answer.permit, tool="orders.update", arguments=dict(ARGUMENTS))
    assert (permit.tenant, permit.actor, permit.transaction) == (tenant, "user-7", "request-1")
    assert permit.expires_at == answer.permit_expires_at.seconds
    assert permit.expires_at - permit.issued_at == 30
    assert permit.hold_id == answer.hold.hold_id
    (record,) = records(sidecar, tenant)
    assert summary(record) == (tenant, "user-7", "orders.update", "ok", "allowed")
    assert (record["seq"], record["hash"]) == (answer.audit.sequence, answer.audit.hash)
    assert record["permit_id"] == permit.id
    assert record["charges"] == [{"budget": "tools", "unit": "calls", "amount": 2}]


@pytest.mark.parametrize(
    ("tool", "reason_code"),
    (
        ("tools.closed", "closed_on_sundays"),
        ("tools.approved", "approval_required"),
        ("tools.unlimited", "budget_unlimited"),
        ("tools.nonboolean", "policy_invalid"),
        ("tools.verbose", "policy_invalid"),
        ("tools.conflict", "policy_error"),
        ("tools.runaway", "policy_timeout"),
        ("tools.not-in-the-policy", "policy_undefined"),
    ),
)
def test_whatever_the_policy_does_but_say_yes_is_a_denial_on_record(
    sidecar: SidecarProcess, caller: Caller, tenant: str, tool: str, reason_code: str
) -> None:
    answer = caller.authorize(tool)

    assert (answer.decision, answer.reason_code) == (False, reason_code)
    assert answer.permit == ""
    assert not answer.HasField("hold")
    assert not answer.HasField("permit_expires_at")
    (record,) = records(sidecar, tenant)
    assert summary(record) == (tenant, "user-7", tool, reason_code, "denied")
    assert "permit_id" not in record
    assert amounts(caller, "tools-per-day") == (0, 0)


def test_a_limit_that_refuses_is_named_with_the_time_to_wait(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    assert caller.authorize("tools.costly").decision

    refused = caller.authorize("tools.costly")

    assert (refused.decision, refused.reason_code) == (False, "tenant_budget_exceeded")
    assert refused.refused_by.limit_id == "ten-a-day"
    assert (refused.refused_by.held, refused.refused_by.remaining) == (6, 4)
    assert 0 < refused.retry_after.seconds <= 121
    assert records(sidecar, tenant)[-1]["limit_id"] == "ten-a-day"


def test_the_same_question_again_gets_the_first_answer_to_the_letter(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    first = caller.authorize("orders.update", ARGUMENTS, request_id="again")

    second = caller.authorize("orders.update", ARGUMENTS, request_id="again")

    assert not first.replayed
    assert second.replayed
    assert second.permit == first.permit
    assert second.decision_id == first.decision_id
    assert second.hold == first.hold
    assert amounts(caller, "tools-per-day") == (0, 2)
    assert [record.get("replayed") for record in records(sidecar, tenant)] == [None, True]


@pytest.mark.parametrize(
    "changed",
    (
        {"arguments": {"order_id": "919", "status": "shipped"}},
        {"tool": "orders.read"},
        {"audience": "elsewhere"},
        {"context_json": b'{"a":1}'},
    ),
    ids=str,
)
def test_a_request_id_with_other_content_is_refused(
    caller: Caller, changed: dict[str, Any]
) -> None:
    caller.authorize("orders.update", ARGUMENTS, request_id="once")
    asked = {"tool": "orders.update", "arguments": ARGUMENTS, "request_id": "once", **changed}

    refusal = refusal_of(caller.authorize, **asked)

    assert refusal.status is grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason_code == "idempotency_key_reused"


def test_request_ids_of_other_tenants_and_actors_do_not_meet(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    mine = caller.authorize("orders.update", ARGUMENTS, request_id="shared")
    with (
        acting(sidecar, tenant + ".eu") as other_tenant,
        acting(sidecar, tenant, "user-8") as other_actor,
    ):
        for other in (other_tenant, other_actor):
            answer = other.authorize("orders.update", ARGUMENTS, request_id="shared")
            assert not answer.replayed
            assert answer.permit != mine.permit
            assert answer.hold.hold_id != mine.hold.hold_id


# BudgetService


def test_a_charge_is_made_once_however_often_it_is_tried(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    first = caller.budget.ChargeBudget(spend(70, key="key-1"))
    again = caller.budget.ChargeBudget(spend(70, key="key-1"))

    assert (first.replayed, again.replayed) == (False, True)
    assert (again.charge_id, again.decision_id) == (first.charge_id, first.decision_id)
    assert [(limit.limit_id, limit.spent) for limit in first.limits] == [("tokens", 70)]
    assert amounts(caller, "tokens") == (70, 0)
    refusal = refusal_of(caller.budget.ChargeBudget, spend(71, key="key-1"))
    assert refusal.status is grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason_code == "idempotency_key_reused"
    assert [summary(record)[2:] for record in records(sidecar, tenant)] == [
        ("budget.charge", "ok", "charged"),
        ("budget.charge", "ok", "charged"),
        ("budget.charge", "idempotency_key_reused", "denied"),
    ]


def test_a_charge_above_the_limit_says_which_limit_and_when_to_come_back(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    refusal = refusal_of(caller.budget.ChargeBudget, spend(11, budget="ten"))
    assert refusal.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refusal.reason_code == "tenant_budget_exceeded"
    assert refusal.limits == ("limit:ten-a-day",)
    assert refusal.retry_after_seconds is None, "no waiting makes a limit of 10 fit 11"

    caller.budget.ChargeBudget(spend(9, budget="ten"))
    refusal = refusal_of(caller.budget.ChargeBudget, spend(2, budget="ten"))
    assert refusal.retry_after_seconds is not None
    assert 0 < refusal.retry_after_seconds <= 86_400
    denied = records(sidecar, tenant)[-1]
    assert summary(denied)[2:] == ("budget.charge", "tenant_budget_exceeded", "denied")
    assert denied["limit_id"] == "ten-a-day"


def test_all_charges_are_made_or_none(caller: Caller) -> None:
    request = budget_pb2.ChargeBudgetRequest(
        idempotency_key="both",
        charges=[*charges("llm", "tokens_out", 5), *charges("ten", "calls", 11)],
    )
    assert refusal_of(caller.budget.ChargeBudget, request).limits == ("limit:ten-a-day",)
    assert amounts(caller, "tokens") == (0, 0)


@pytest.mark.parametrize(
    ("budget", "status", "reason_code"),
    (
        ("nowhere", grpc.StatusCode.PERMISSION_DENIED, "budget_unlimited"),
        ("undefined", grpc.StatusCode.PERMISSION_DENIED, "policy_undefined"),
        ("nonboolean", grpc.StatusCode.PERMISSION_DENIED, "policy_invalid"),
        # The policy's word is a denial, whatever code it borrows.
        ("impostor", grpc.StatusCode.PERMISSION_DENIED, "internal"),
    ),
)
def test_a_charge_that_the_policy_does_not_allow_is_refused_on_record(
    sidecar: SidecarProcess,
    caller: Caller,
    tenant: str,
    budget: str,
    status: grpc.StatusCode,
    reason_code: str,
) -> None:
    for refusal in (
        refusal_of(caller.budget.ChargeBudget, spend(1, budget=budget)),
        refusal_of(caller.budget.ReserveBudget, hold(1, budget=budget)),
    ):
        assert (refusal.status, refusal.reason_code) == (status, reason_code)
    assert [summary(record)[2:] for record in records(sidecar, tenant)] == [
        ("budget.charge", reason_code, "denied"),
        ("budget.reserve", reason_code, "denied"),
    ]


def test_an_actor_without_the_role_may_not_charge(sidecar: SidecarProcess, tenant: str) -> None:
    with Caller(sidecar.target, token=ISSUER.token(tenant, "user-7")) as roleless:
        refusal = refusal_of(roleless.budget.ChargeBudget, spend(1))
    assert refusal.status is grpc.StatusCode.PERMISSION_DENIED
    assert refusal.reason_code == "budget_not_allowed"


def test_a_hold_is_settled_with_what_was_spent_and_the_rest_returns(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    reserved = caller.budget.ReserveBudget(hold(100, key="hold"))
    assert amounts(caller, "tokens") == (0, 100)
    assert caller.budget.ReserveBudget(hold(100, key="hold")).hold_id == reserved.hold_id

    settled = caller.budget.SettleBudget(settlement(reserved.hold_id, 40, key="end"))

    assert (settled.over_hold, settled.late, settled.replayed) == (False, False, False)
    assert amounts(caller, "tokens") == (40, 0)
    assert caller.budget.SettleBudget(settlement(reserved.hold_id, 40, key="end")).replayed
    assert amounts(caller, "tokens") == (40, 0)
    for refusal in (
        refusal_of(caller.budget.SettleBudget, settlement(reserved.hold_id, 40)),
        refusal_of(caller.budget.ReleaseBudget, freeing(reserved.hold_id)),
    ):
        assert refusal.status is grpc.StatusCode.FAILED_PRECONDITION
        assert refusal.reason_code == "hold_already_settled"
    assert [summary(record)[2:] for record in records(sidecar, tenant)] == [
        ("budget.reserve", "ok", "reserved"),
        ("budget.reserve", "ok", "reserved"),
        ("budget.settle", "ok", "settled"),
        ("budget.settle", "ok", "settled"),
        ("budget.settle", "hold_already_settled", "denied"),
        ("budget.release", "hold_already_settled", "denied"),
    ]


def test_more_than_was_held_is_recorded_in_full(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    reserved = caller.budget.ReserveBudget(hold(10))
    assert caller.budget.SettleBudget(settlement(reserved.hold_id, 25)).over_hold
    assert amounts(caller, "tokens") == (25, 0)
    assert records(sidecar, tenant)[-1]["detail"] == {"over_hold": True}


def test_a_hold_settled_without_charges_spent_nothing(caller: Caller) -> None:
    reserved = caller.budget.ReserveBudget(hold(10))
    caller.budget.SettleBudget(settlement(reserved.hold_id, None))
    assert amounts(caller, "tokens") == (0, 0)


def test_a_settlement_names_only_what_is_held(caller: Caller) -> None:
    reserved = caller.budget.ReserveBudget(hold(2, budget="ten"))
    refusal = refusal_of(caller.budget.SettleBudget, settlement(reserved.hold_id, 1))
    assert refusal.status is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason_code == "charge_not_held"
    assert amounts(caller, "ten-a-day") == (0, 2)


def test_a_released_hold_spent_nothing(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    reserved = caller.budget.ReserveBudget(hold(100))
    caller.budget.ReleaseBudget(freeing(reserved.hold_id, key="free"))
    assert caller.budget.ReleaseBudget(freeing(reserved.hold_id, key="free")).replayed
    assert amounts(caller, "tokens") == (0, 0)
    refusal = refusal_of(caller.budget.SettleBudget, settlement(reserved.hold_id, 1))
    assert refusal.reason_code == "hold_already_released"
    assert summary(records(sidecar, tenant)[1])[2:] == ("budget.release", "ok", "released")


def test_an_expired_hold_returns_its_amounts_and_is_settled_late(caller: Caller) -> None:
    reserved = caller.budget.ReserveBudget(hold(100, ttl_seconds=1))
    _wait_for(lambda: amounts(caller, "tokens") == (0, 0))
    refusal = refusal_of(caller.budget.ReleaseBudget, freeing(reserved.hold_id))
    assert refusal.status is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason_code == "hold_expired"

    assert caller.budget.SettleBudget(settlement(reserved.hold_id, 30)).late

    assert amounts(caller, "tokens") == (30, 0)


def test_a_hold_can_be_ended_by_nobody_but_its_actor(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    reserved = caller.budget.ReserveBudget(hold(100))
    with (
        acting(sidecar, tenant + ".eu") as other_tenant,
        acting(sidecar, tenant, "user-8") as other_actor,
    ):
        for other in (other_tenant, other_actor):
            for refusal in (
                refusal_of(other.budget.SettleBudget, settlement(reserved.hold_id, 1)),
                refusal_of(other.budget.ReleaseBudget, freeing(reserved.hold_id)),
            ):
                assert refusal.status is grpc.StatusCode.FAILED_PRECONDITION
                assert refusal.reason_code == "hold_not_found"
    assert amounts(caller, "tokens") == (0, 100)


def test_a_budget_shows_every_limit_as_it_stands(caller: Caller) -> None:
    caller.budget.ChargeBudget(spend(3, budget="ten"))
    answer = caller.budget.GetBudget(budget_pb2.GetBudgetRequest(tool="orders.update"))
    limits = {limit.limit_id: limit for limit in answer.limits}
    assert list(limits) == ["fifty", "ten-a-day", "tokens", "tools-per-day"]
    ten = limits["ten-a-day"]
    assert (ten.budget, ten.unit, ten.window, ten.scope) == ("ten", "calls", "day", "tenant")
    assert (ten.limit, ten.spent, ten.held, ten.remaining) == (10, 3, 0, 7)
    assert ten.resets_at.seconds % 86_400 == 0
    assert not limits["fifty"].HasField("resets_at")
    assert answer.policy_revision.startswith("sha256:")


# ExecutionService


def test_a_permit_is_redeemed_once(sidecar: SidecarProcess, caller: Caller, tenant: str) -> None:
    permit = caller.authorize("orders.update", ARGUMENTS).permit
    with Caller(sidecar.target) as tool_server:
        first = tool_server.execution.RedeemPermit(redemption(permit, idempotency_key="use"))
        again = tool_server.execution.RedeemPermit(redemption(permit, idempotency_key="use"))
        other = refusal_of(tool_server.execution.RedeemPermit, redemption(permit))

    assert (first.tenant_id, first.actor_id, first.uses_left) == (tenant, "user-7", 0)
    assert (first.replayed, again.replayed) == (False, True)
    assert other.status is grpc.StatusCode.FAILED_PRECONDITION
    assert other.reason_code == "permit_used"
    assert [summary(record) for record in records(sidecar, tenant)[1:]] == [
        (tenant, "user-7", "orders.update", "ok", "redeemed"),
        (tenant, "user-7", "orders.update", "ok", "redeemed"),
        (tenant, "user-7", "orders.update", "permit_used", "denied"),
    ]


@pytest.mark.parametrize(
    "changed",
    ({"tool": "orders.read"}, {"arguments_sha256": "0" * 64}, {"audience": "elsewhere"}),
    ids=str,
)
def test_a_permit_is_not_redeemed_for_anything_else(
    sidecar: SidecarProcess, caller: Caller, tenant: str, changed: dict[str, str]
) -> None:
    permit = caller.authorize("orders.update", ARGUMENTS).permit
    refusal = refusal_of(caller.execution.RedeemPermit, redemption(permit, **changed))
    assert refusal.status is grpc.StatusCode.PERMISSION_DENIED
    assert refusal.reason_code == "permit_mismatch"
    assert summary(records(sidecar, tenant)[-1])[3:] == ("permit_mismatch", "denied")
    caller.execution.RedeemPermit(redemption(permit))


@pytest.mark.parametrize(
    "spoilt",
    (lambda permit: "", lambda permit: "x", lambda permit: permit[:-4] + "AAAA"),
    ids=["none", "garbage", "forged"],
)
def test_what_is_no_permit_is_not_redeemed_nor_reported(
    caller: Caller, spoilt: Callable[[str], str]
) -> None:
    permit = spoilt(caller.authorize("orders.update", ARGUMENTS).permit)
    for refusal in (
        refusal_of(caller.execution.RedeemPermit, redemption(permit)),
        refusal_of(caller.execution.ReportOutcome, report(permit)),
    ):
        assert refusal.status is grpc.StatusCode.UNAUTHENTICATED
        assert refusal.reason_code == ("permit_invalid" if permit else "permit_missing")


def test_a_call_that_was_executed_settles_its_hold(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    answer = caller.authorize("orders.update", ARGUMENTS)
    caller.execution.RedeemPermit(redemption(answer.permit))

    first = caller.execution.ReportOutcome(report(answer.permit))

    assert [(charge.budget, charge.amount) for charge in first.settled] == [("tools", 2)]
    assert amounts(caller, "tools-per-day") == (2, 0)
    again = caller.execution.ReportOutcome(report(answer.permit))
    assert again.replayed
    assert again.settled == first.settled
    refusal = refusal_of(caller.execution.ReportOutcome, report(answer.permit, FAILED))
    assert refusal.status is grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason_code == "outcome_already_reported"
    assert amounts(caller, "tools-per-day") == (2, 0)
    assert [summary(record)[3:] for record in records(sidecar, tenant)[2:]] == [
        ("ok", "executed"), ("ok", "executed"), ("outcome_already_reported", "denied"),
    ]  # fmt: skip


def test_a_call_that_failed_releases_its_hold(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    answer = caller.authorize("orders.update", ARGUMENTS)
    reported = caller.execution.ReportOutcome(report(answer.permit, FAILED, error_type="OSError"))
    assert amounts(caller, "tools-per-day") == (0, 0)
    # What was let go is not what was settled.
    assert list(reported.settled) == []
    record = records(sidecar, tenant)[-1]
    assert summary(record)[3:] == ("tool_failed", "failed")
    assert record["detail"] == {"error_type": "OSError"}


def test_a_call_that_failed_at_a_cost_settles_the_cost(caller: Caller) -> None:
    answer = caller.authorize("orders.update", ARGUMENTS)
    cost = charges("tools", "calls", 1)
    reported = caller.execution.ReportOutcome(report(answer.permit, FAILED, charges=cost))
    assert list(reported.settled) == cost
    assert amounts(caller, "tools-per-day") == (1, 0)


def test_a_reported_permit_can_not_be_redeemed(caller: Caller) -> None:
    answer = caller.authorize("orders.update", ARGUMENTS)
    caller.execution.ReportOutcome(report(answer.permit))
    refusal = refusal_of(caller.execution.RedeemPermit, redemption(answer.permit))
    assert refusal.reason_code == "permit_used"


def test_a_report_with_charges_that_are_not_held_is_refused_and_can_be_put_right(
    caller: Caller,
) -> None:
    answer = caller.authorize("orders.update", ARGUMENTS)
    wrong = charges("llm", "tokens_out", 1)
    refusal = refusal_of(caller.execution.ReportOutcome, report(answer.permit, charges=wrong))
    assert refusal.status is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason_code == "charge_not_held"
    caller.execution.ReportOutcome(report(answer.permit))
    assert amounts(caller, "tools-per-day") == (2, 0)


def test_a_call_without_a_hold_is_reported_once(caller: Caller) -> None:
    answer = caller.authorize("orders.read")
    assert not answer.HasField("hold")
    assert list(caller.execution.ReportOutcome(report(answer.permit)).settled) == []
    assert caller.execution.ReportOutcome(report(answer.permit)).replayed
    refusal = refusal_of(caller.execution.ReportOutcome, report(answer.permit, FAILED))
    assert refusal.reason_code == "outcome_already_reported"


def test_a_late_report_still_settles(tmp_path: Path) -> None:
    quick = {"permit": {"ttl_seconds": 1}, "budget": {"hold_ttl_seconds": 1}}
    bundle = build_bundle(
        ROOT / "tests/server/policy", tmp_path / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=quick) as sidecar,
        acting(sidecar, "tenant_late") as caller,
    ):
        answer = caller.authorize("orders.update", ARGUMENTS)
        _wait_for(lambda: amounts(caller, "tools-per-day") == (0, 0))

        caller.execution.ReportOutcome(report(answer.permit))

        assert amounts(caller, "tools-per-day") == (2, 0)
        assert records(sidecar, "tenant_late")[-1]["detail"] == {"late": True}


def test_an_expired_permit_is_not_redeemed(
    sidecar: SidecarProcess, caller: Caller, tenant: str
) -> None:
    key = KeyRing.from_file(sidecar.state / "permit-key.pem").signing
    now = int(time.time())
    expired = PermitIssuer(key, issuer="agent-pdp").sign(
        Permit(
            id=str(uuid.uuid4()),
            issuer="agent-pdp",
            audience="tools",
            tenant=tenant,
            actor="user-7",
            tool="orders.update",
            arguments_sha256=sha256_hex(dict(ARGUMENTS)),
            scopes=(),
            transaction="request-1",
            decision_id=str(uuid.uuid4()),
            policy_revision="1",
            ledger=ledger_id((sidecar.state / "audit-digest.key").read_bytes()),
            issued_at=now - 60,
            expires_at=now - 30,
        )
    )
    refusal = refusal_of(caller.execution.RedeemPermit, redemption(expired.token))
    assert refusal.status is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason_code == "permit_expired"
    assert summary(records(sidecar, tenant)[-1])[3:] == ("permit_expired", "denied")


def test_the_longest_permit_can_still_be_redeemed_and_reported(
    sidecar: SidecarProcess, tenant: str
) -> None:
    longest = {"tool": "tools." + "x" * 122, "audience": "a" * 255}
    with Caller(
        sidecar.target, token=ISSUER.token(tenant.ljust(128, "x"), "\U0001d4d0" * 255)
    ) as caller:
        answer = caller.authorize(
            longest["tool"],
            request_id="r" * 255,
            audience=longest["audience"],
            resource=authorization_pb2.Resource(type="t" * 128, id="\U0001d4d0" * 255),
        )
        assert answer.decision
        caller.execution.RedeemPermit(
            redemption(answer.permit, arguments_sha256=sha256_hex({}), **longest)
        )
        caller.execution.ReportOutcome(report(answer.permit))


def test_first_answers_outlive_a_restart(tmp_path: Path) -> None:
    bundle = build_bundle(
        ROOT / "tests/server/policy", tmp_path / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    sidecar = SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle)
    with sidecar, acting(sidecar, "tenant_again") as caller:
        first = caller.authorize("orders.update", ARGUMENTS, request_id="again")
        charged = caller.budget.ChargeBudget(spend(7, key="charge"))
        used = caller.authorize("orders.read")
        use = redemption(used.permit, tool="orders.read", arguments_sha256=sha256_hex({}))
        caller.execution.RedeemPermit(use)
        sidecar.kill()
        sidecar.start()
        again = caller.authorize("orders.update", ARGUMENTS, request_id="again")
        assert (again.replayed, again.permit) == (True, first.permit)
        assert (again.hold, again.decision_id) == (first.hold, first.decision_id)
        assert caller.budget.ChargeBudget(spend(7, key="charge")).charge_id == charged.charge_id
        assert amounts(caller, "tokens") == (7, 0)
        assert caller.execution.RedeemPermit(use).replayed
        use.idempotency_key = "another"
        assert refusal_of(caller.execution.RedeemPermit, use).reason_code == "permit_used"


def test_the_trace_of_a_call_is_on_record(sidecar: SidecarProcess, tenant: str) -> None:
    trace_id = uuid.uuid4().hex
    with Caller(
        sidecar.target,
        token=ISSUER.token(tenant, "user-7"),
        metadata=[("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01")],
    ) as caller:
        caller.authorize("orders.read")
    assert records(sidecar, tenant)[0]["trace_id"] == trace_id


def test_the_chain_of_all_this_verifies(sidecar: SidecarProcess) -> None:
    verified = subprocess.run(
        [sys.executable, "-m", "pdp", "audit", "verify", str(sidecar.state / "audit")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout


def _wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
