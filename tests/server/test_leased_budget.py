"""Sidecars that lease from a shared Redis, as whole processes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdp.api.v1 import budget_pb2, common_pb2, execution_pb2
from pdp.budget.local_ledger import is_local
from pdp.canonical import JsonObject
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from tests.budget.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
ARGUMENTS: JsonObject = {"order_id": "A-1", "quantity": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("leased") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/server/policy", target, opa=ROOT / ".tools/opa")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


def leasing(folder: Path, bundle: Path, server: RedisServer) -> SidecarProcess:
    folder.mkdir()
    return SidecarProcess(
        folder,
        issuer=ISSUER,
        bundle=bundle,
        config={
            "permit": {"default_audience": "tools"},
            "budget": {
                "store": {"unix": str(server.socket), "timeout_ms": 5000},
                "lease": {"seconds": 60},
            },
        },
    )


class Actor:
    """Somebody of a new tenant, at one sidecar after the other."""

    def __init__(self) -> None:
        self.tenant = f"tenant_{uuid.uuid4().hex[:8]}"

    def at(self, sidecar: SidecarProcess) -> Caller:
        return Caller(sidecar.target, token=ISSUER.token(self.tenant, "user-7", roles=["agent"]))


def reserve(caller: Caller, amount: int = 1, key: str = "") -> budget_pb2.ReserveBudgetResponse:
    return caller.budget.ReserveBudget(
        budget_pb2.ReserveBudgetRequest(
            idempotency_key=key or str(uuid.uuid4()),
            charges=[common_pb2.Charge(budget="llm", unit="tokens_out", amount=amount)],
            ttl_seconds=60,
        )
    )


def settle(caller: Caller, hold_id: str, amount: int) -> None:
    caller.budget.SettleBudget(
        budget_pb2.SettleBudgetRequest(
            idempotency_key=str(uuid.uuid4()),
            hold_id=hold_id,
            charges=[common_pb2.Charge(budget="llm", unit="tokens_out", amount=amount)],
        )
    )


def reserve_under_a_lease(caller: Caller) -> tuple[budget_pb2.ReserveBudgetResponse, int]:
    """A hold under a lease, and what was spent before."""
    for before in range(50):
        held = reserve(caller)
        if is_local(held.hold_id):
            return held, before
        settle(caller, held.hold_id, 1)
    raise AssertionError("nothing was leased")


def tokens(caller: Caller) -> tuple[int, int]:
    """(spent, held) of the tenant's tokens in the shared store."""
    response = caller.budget.GetBudget(budget_pb2.GetBudgetRequest())
    [state] = [each for each in response.limits if each.limit_id == "tokens"]
    return state.spent, state.held


def test_a_sidecar_that_is_stopped_gives_back_what_it_has_leased(
    tmp_path: Path, bundle: Path, server: RedisServer
) -> None:
    actor = Actor()
    with leasing(tmp_path / "one", bundle, server) as one, actor.at(one) as caller:
        held, before = reserve_under_a_lease(caller)
        settle(caller, held.hold_id, 7)
        assert tokens(caller)[1] > 0
        one.terminate()
        with leasing(tmp_path / "two", bundle, server) as two, actor.at(two) as other:
            assert tokens(other) == (before + 7, 0)


def test_a_sidecar_that_was_killed_knows_its_holds_and_answers_and_reports(
    tmp_path: Path, bundle: Path, server: RedisServer
) -> None:
    actor = Actor()
    with leasing(tmp_path / "one", bundle, server) as one:
        with actor.at(one) as caller:
            _, before = reserve_under_a_lease(caller)
            first = reserve(caller, 5, key="the-key")
            assert is_local(first.hold_id)
        one.kill()
        one.start()
        with actor.at(one) as caller:
            again = reserve(caller, 5, key="the-key")
            assert (again.hold_id, again.replayed) == (first.hold_id, True)
            settle(caller, first.hold_id, 3)
        one.terminate()
        with leasing(tmp_path / "two", bundle, server) as two, actor.at(two) as other:
            # One hold is still open: what it holds is held.
            assert tokens(other) == (before + 3, 1)


def test_a_permit_that_a_lease_pays_for_is_for_its_own_sidecar(
    tmp_path: Path, bundle: Path, server: RedisServer
) -> None:
    actor = Actor()
    with (
        leasing(tmp_path / "one", bundle, server) as one,
        leasing(tmp_path / "two", bundle, server) as two,
        actor.at(one) as here,
        actor.at(two) as there,
    ):
        for _ in range(5):
            permit = here.authorize("orders.update", ARGUMENTS).permit
        outcome = execution_pb2.ReportOutcomeRequest(
            permit=permit, outcome=execution_pb2.OUTCOME_EXECUTED
        )
        assert refusal_of(there.execution.ReportOutcome, outcome).reason_code in {
            "permit_mismatch",
            "permit_invalid",
        }
        assert [each.amount for each in here.execution.ReportOutcome(outcome).settled] == [2]
        assert here.execution.ReportOutcome(outcome).replayed
