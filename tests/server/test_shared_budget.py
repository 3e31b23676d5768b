"""Sidecars that share a Redis: one budget, and one use of each permit, for all of them."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from pdp.api.v1 import budget_pb2, common_pb2, execution_pb2
from pdp.canonical import JsonObject, sha256_hex
from pdp.permit.ring import LiveKeys
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from tests.budget.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
ARGUMENTS: JsonObject = {"order_id": "A-1", "quantity": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shared") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/server/policy", target, opa=ROOT / ".tools/opa")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


def configured(folder: Path, key: Path, bundle: Path, server: RedisServer) -> SidecarProcess:
    """A sidecar on the server; sidecars with the same key can share permits."""
    folder.mkdir()
    LiveKeys(key, make=True)
    return SidecarProcess(
        folder,
        issuer=ISSUER,
        bundle=bundle,
        config={
            "permit": {"key_file": str(key), "default_audience": "tools"},
            "budget": {"store": {"unix": str(server.socket), "timeout_ms": 5000}},
        },
    )


def open_sidecars(
    directory: Path, bundle: Path, server: RedisServer, number: int, stack: ExitStack
) -> list[SidecarProcess]:
    key = directory / "permit-key.pem"
    return [
        stack.enter_context(configured(directory / str(each), key, bundle, server))
        for each in range(number)
    ]


@pytest.fixture(scope="module")
def sidecars(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path, server: RedisServer
) -> Iterator[list[SidecarProcess]]:
    with ExitStack() as stack:
        yield open_sidecars(tmp_path_factory.mktemp("two"), bundle, server, 2, stack)


def acting(sidecar: SidecarProcess, tenant: str) -> Caller:
    return Caller(sidecar.target, token=ISSUER.token(tenant, "user-7", roles=["agent"]))


def pair(sidecars: list[SidecarProcess], stack: ExitStack) -> list[Caller]:
    """The same actor of a new tenant, at each of the sidecars."""
    tenant = f"tenant_{uuid.uuid4().hex[:8]}"
    return [stack.enter_context(acting(sidecar, tenant)) for sidecar in sidecars]


def redemption(permit: str, key: str) -> execution_pb2.RedeemPermitRequest:
    return execution_pb2.RedeemPermitRequest(
        permit=permit,
        idempotency_key=key,
        tool="orders.update",
        arguments_sha256=sha256_hex(ARGUMENTS),
        audience="tools",
    )


def hold(budget: str, amount: int) -> budget_pb2.ReserveBudgetRequest:
    return budget_pb2.ReserveBudgetRequest(
        idempotency_key=str(uuid.uuid4()),
        charges=[common_pb2.Charge(budget=budget, unit="calls", amount=amount)],
        ttl_seconds=600,
    )


def test_a_permit_of_one_sidecar_is_redeemed_once_at_any(sidecars: list[SidecarProcess]) -> None:
    with ExitStack() as stack:
        here, there = pair(sidecars, stack)
        permit = here.authorize("orders.update", ARGUMENTS).permit
        assert not there.execution.RedeemPermit(redemption(permit, "use")).replayed
        assert here.execution.RedeemPermit(redemption(permit, "use")).replayed
        for caller in (here, there):
            refusal = refusal_of(caller.execution.RedeemPermit, redemption(permit, "other"))
            assert refusal.reason_code == "permit_used"
        outcome = execution_pb2.ReportOutcomeRequest(
            permit=permit, outcome=execution_pb2.OUTCOME_EXECUTED
        )
        assert [charge.amount for charge in there.execution.ReportOutcome(outcome).settled] == [2]
        assert here.execution.ReportOutcome(outcome).replayed


def test_what_is_spent_at_one_sidecar_is_spent_at_the_other(
    sidecars: list[SidecarProcess],
) -> None:
    with ExitStack() as stack:
        here, there = pair(sidecars, stack)
        assert here.budget.ReserveBudget(hold("ten", 6)).hold_id
        refusal = refusal_of(there.budget.ReserveBudget, hold("ten", 5))
        assert refusal.reason_code == "tenant_budget_exceeded"
        assert there.budget.ReserveBudget(hold("ten", 4)).hold_id


def test_while_the_store_is_away_calls_are_denied_and_then_answered_again(
    sidecars: list[SidecarProcess], server: RedisServer
) -> None:
    with ExitStack() as stack:
        here, _ = pair(sidecars, stack)
        permit = here.authorize("orders.update", ARGUMENTS).permit
        server.kill()
        refusal = refusal_of(here.budget.ReserveBudget, hold("ten", 1))
        assert refusal.status is grpc.StatusCode.UNAVAILABLE
        assert refusal.reason_code == "budget_unavailable"
        refusal = refusal_of(here.execution.RedeemPermit, redemption(permit, "use"))
        assert refusal.reason_code == "permit_unavailable"
        server.start()
        assert here.budget.ReserveBudget(hold("ten", 1)).hold_id
        assert not here.execution.RedeemPermit(redemption(permit, "use")).replayed


def test_a_sidecar_does_not_start_on_a_server_that_forgets(tmp_path: Path, bundle: Path) -> None:
    server = RedisServer(tmp_path / "redis").start()
    server.command("CONFIG", "SET", "appendonly", "no")
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    sidecar = configured(tmp_path / "sidecar", tmp_path / "permit-key.pem", bundle, server)
    try:
        with pytest.raises(RuntimeError, match="set appendonly yes"):
            sidecar.start()
    finally:
        sidecar.close()
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_thousand_reserves_at_eight_sidecars_against_a_limit_for_fifty_admit_fifty(
    tmp_path: Path, bundle: Path, server: RedisServer
) -> None:
    with ExitStack() as stack:
        sidecars = open_sidecars(tmp_path, bundle, server, 8, stack)
        callers = pair(sidecars, stack)
        calls = [
            callers[number % 8].budget.ReserveBudget.future(hold("fifty", 1))
            for number in range(1000)
        ]
        codes = Counter(call.code() for call in calls)
        assert codes == {grpc.StatusCode.OK: 50, grpc.StatusCode.RESOURCE_EXHAUSTED: 950}
