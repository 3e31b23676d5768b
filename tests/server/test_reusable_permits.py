"""Permits for a tool and several calls: at a sidecar of its own, at two that share a store, and
at one that leases from it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.api.v1 import budget_pb2, common_pb2, execution_pb2
from pdp.permit import Permit, PermitError, PermitKeySet, PermitRedeemer, PermitVerifier
from pdp.permit.ring import LiveKeys
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from pdp.tool import PermitDoor
from tests.budget.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
EXECUTED = execution_pb2.OUTCOME_EXECUTED
FAILED = execution_pb2.OUTCOME_FAILED
MAX_USES = 5
COST = 2
"""Of each call of orders.search."""


@dataclass
class Sidecars:
    """Two sidecars that count together, or twice the same one."""

    here: SidecarProcess
    there: SidecarProcess


@pytest.fixture(scope="module", params=("sqlite", "redis", "leased"))
def sidecars(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sidecars]:
    folder = tmp_path_factory.mktemp("reusable")
    bundle = build_bundle(
        ROOT / "tests/server/policy", folder / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    key = folder / "permit-key.pem"
    LiveKeys(key, make=True)
    config: dict[str, Any] = {"permit": {"key_file": str(key)}}
    with ExitStack() as stack:
        if request.param != "sqlite":
            server = RedisServer(folder / "redis").start()
            stack.callback(server.stop)
            config["budget"] = {
                "store": {"unix": str(server.socket), "timeout_ms": 5_000},
                **({"lease": {"seconds": 60}} if request.param == "leased" else {}),
            }

        def started(name: str) -> SidecarProcess:
            (folder / name).mkdir()
            return stack.enter_context(
                SidecarProcess(folder / name, issuer=ISSUER, bundle=bundle, config=config)
            )

        here = started("here")
        yield Sidecars(here, started("there") if request.param == "redis" else here)


@dataclass
class Both:
    """One actor of a new tenant, at both sidecars."""

    tenant: str
    here: Caller
    there: Caller

    def spent_and_held(self) -> tuple[int, int]:
        limits = self.here.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
        (found,) = (limit for limit in limits if limit.limit_id == "tools-per-day")
        return found.spent, found.held

    def report(
        self,
        permit: str,
        outcome: execution_pb2.Outcome.ValueType = EXECUTED,
        **fields: Any,
    ) -> execution_pb2.ReportOutcomeResponse:
        return self.there.execution.ReportOutcome(
            execution_pb2.ReportOutcomeRequest(permit=permit, outcome=outcome, **fields)
        )


@pytest.fixture
def both(sidecars: Sidecars) -> Iterator[Both]:
    tenant = f"tenant_{uuid.uuid4().hex[:12]}"
    token = ISSUER.token(tenant, "user-7", roles=["agent"])
    with (
        Caller(sidecars.here.target, token=token) as here,
        Caller(sidecars.there.target, token=token) as there,
    ):
        yield Both(tenant, here, there)


def redemption(permit: str, key: str = "", **changes: str) -> execution_pb2.RedeemPermitRequest:
    fields = {"tool": "orders.search", "audience": "tools", **changes}
    return execution_pb2.RedeemPermitRequest(
        permit=permit, idempotency_key=key or str(uuid.uuid4()), **fields
    )


def charges(amount: int) -> list[common_pb2.Charge]:
    return [common_pb2.Charge(budget="tools", unit="calls", amount=amount)]


def records(sidecar: SidecarProcess, tenant: str) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line["tenant_id"] == tenant]


def verified(sidecars: Sidecars, permit: str, arguments: dict[str, Any]) -> Permit:
    with PermitRedeemer(sidecars.there.target) as redeemer:
        verifier = PermitVerifier(redeemer.keys(), issuer="agent-pdp", audience="tools")
    return verifier.verify(permit, tool="orders.search", arguments=dict(arguments))


def test_a_reusable_permit_holds_for_all_its_calls_and_binds_no_arguments(
    sidecars: Sidecars, both: Both
) -> None:
    resource = {"type": "order", "id": "918"}
    answer = both.here.authorize("orders.search", {"text": "a"}, resource=resource)
    assert answer.max_uses == MAX_USES
    assert list(answer.hold.charges) == charges(MAX_USES * COST)
    assert sum(both.spent_and_held()) == MAX_USES * COST
    permit = verified(sidecars, answer.permit, {"text": "quite another"})
    assert (permit.max_uses, permit.arguments_sha256, permit.resource) == (MAX_USES, "", "")
    (record,) = records(sidecars.here, both.tenant)
    assert record["detail"]["max_uses"] == MAX_USES


def test_each_call_is_redeemed_at_whichever_sidecar_and_the_rest_returns(
    sidecars: Sidecars, both: Both
) -> None:
    permit = both.here.authorize("orders.search").permit
    uses = [redemption(permit, f"use-{number}") for number in range(MAX_USES)]
    callers = (both.here, both.there)
    for number, use in enumerate(uses[:3]):
        answer = callers[number % 2].execution.RedeemPermit(use)
        assert (answer.uses_left, answer.replayed) == (MAX_USES - 1 - number, False)
    again = both.there.execution.RedeemPermit(uses[0])
    assert (again.uses_left, again.replayed) == (MAX_USES - 3, True)
    reported = both.report(permit, uses=3)
    assert list(reported.settled) == charges(3 * COST)
    assert both.spent_and_held()[0] == 3 * COST
    refusal = refusal_of(both.here.execution.RedeemPermit, uses[3])
    assert refusal.reason_code == "permit_used"
    outcome = next(
        record for record in records(sidecars.there, both.tenant) if record["type"] == "outcome"
    )
    assert outcome["detail"]["uses"] == 3


def test_of_many_tools_at_once_no_more_may_act_than_the_permit_allows(both: Both) -> None:
    permit = both.here.authorize("orders.search").permit

    def redeem(number: int) -> str:
        caller = (both.here, both.there)[number % 2]
        try:
            caller.execution.RedeemPermit(redemption(permit, f"use-{number}"))
        except grpc.RpcError:
            return "refused"
        return "redeemed"

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(redeem, range(40))).count("redeemed") == MAX_USES


def test_a_door_lets_in_as_many_calls_as_the_permit_allows(sidecars: Sidecars, both: Both) -> None:
    permit = both.here.authorize("orders.search", {"text": "a"}).permit
    with PermitRedeemer(sidecars.there.target) as redeemer:
        door = PermitDoor(
            PermitVerifier(redeemer.keys(), issuer="agent-pdp", audience="tools"), redeemer
        )
        for number in range(MAX_USES):
            admitted = door.admit(permit, tool="orders.search", arguments={"text": str(number)})
            assert admitted.tenant == both.tenant
        with pytest.raises(PermitError) as refused:
            door.admit(permit, tool="orders.search", arguments={"text": "once more"})
        assert refused.value.reason_code == "permit_used"
        with pytest.raises(PermitError) as refused:
            door.admit(permit, tool="orders.update", arguments={"text": "a"})
        assert refused.value.reason_code == "permit_mismatch"


def test_where_only_one_call_fits_the_permit_is_for_that_one(
    sidecars: Sidecars, both: Both
) -> None:
    answer = both.here.authorize("tools.rare", {"text": "a"}, request_id="rare")
    assert answer.decision
    assert answer.max_uses == 1
    assert [charge.amount for charge in answer.hold.charges] == [6]
    again = both.there.authorize("tools.rare", {"text": "a"}, request_id="rare")
    assert (again.replayed, again.max_uses) == (True, 1)
    if sidecars.here is sidecars.there:
        assert again.permit == answer.permit
    refused = both.here.authorize("tools.rare", {"text": "a"}, request_id="second")
    assert refused.reason_code == "tenant_budget_exceeded"
    assert refused.refused_by.limit_id == "ten-a-day"


def test_what_was_never_used_is_never_charged(both: Both) -> None:
    permit = both.here.authorize("orders.search").permit
    assert list(both.report(permit, FAILED).settled) == []
    assert both.spent_and_held()[0] == 0


# Attacks


def test_fewer_calls_than_were_redeemed_are_counted_as_those(
    sidecars: Sidecars, both: Both
) -> None:
    permit = both.here.authorize("orders.search").permit
    for number in range(4):
        both.here.execution.RedeemPermit(redemption(permit, f"use-{number}"))
    assert list(both.report(permit, FAILED).settled) == charges(4 * COST)
    assert both.spent_and_held()[0] == 4 * COST
    outcome = records(sidecars.there, both.tenant)[-1]
    assert outcome["detail"] == {"uses": 4, "uses_reported": 0} | outcome["detail"]


@pytest.mark.parametrize("uses", (-1, 0, MAX_USES + 1, 1_001))
def test_a_number_of_calls_that_can_not_be_is_refused_and_closes_nothing(
    both: Both, uses: int
) -> None:
    permit = both.here.authorize("orders.search").permit
    refusal = refusal_of(both.report, permit, uses=uses)
    assert refusal.status is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == ("uses",)
    assert both.here.execution.RedeemPermit(redemption(permit)).uses_left == MAX_USES - 1


def test_a_permit_for_some_arguments_is_not_stretched_to_others(both: Both) -> None:
    permit = both.here.authorize("orders.update", {"order_id": "918"}).permit
    for digest in ("", "0" * 64):
        use = redemption(permit, tool="orders.update", arguments_sha256=digest)
        assert refusal_of(both.here.execution.RedeemPermit, use).reason_code == "permit_mismatch"
    refusal = refusal_of(both.report, permit, uses=2)
    assert refusal.fields == ("uses",)


# Questions that are asked again


@pytest.mark.parametrize("tool", ("orders.search", "orders.update", "orders.read"))
def test_after_its_outcome_a_question_that_is_asked_again_gets_no_permit(
    sidecars: Sidecars, both: Both, tool: str
) -> None:
    """A runtime that lost count of what it did must not do it once more."""
    first = both.here.authorize(tool, request_id="lost")
    again = both.here.authorize(tool, request_id="lost")
    assert (again.permit, again.replayed) == (first.permit, True)
    both.report(first.permit, uses=1)
    for caller in (both.here, both.there):
        late = caller.authorize(tool, request_id="lost")
        assert (late.decision, late.permit, late.reason_code) == (False, "", "permit_used")
        assert late.replayed
        assert late.decision_id == first.decision_id
        assert not late.HasField("hold")
    record = records(sidecars.there, both.tenant)[-1]
    assert (record["outcome"], record["reason_code"]) == ("denied", "permit_used")


def test_a_permit_key_set_is_all_that_a_stateless_tool_needs(
    sidecars: Sidecars, both: Both
) -> None:
    """What such a tool can not see is how often a permit was shown."""
    answer = both.here.authorize("orders.search")
    keys = both.here.execution.GetPermitKeys(execution_pb2.GetPermitKeysRequest()).jwks_json
    verifier = PermitVerifier(PermitKeySet.from_jwks(keys), issuer="agent-pdp", audience="tools")
    for number in range(MAX_USES + 1):
        verifier.verify(answer.permit, tool="orders.search", arguments={"n": number})
