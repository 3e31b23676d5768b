"""One tenant floods the sidecar; the others do not notice."""

from __future__ import annotations

import json
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from pdp.testing.caller import Refusal

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
AT_ONCE = 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("neighbours") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/server/policy", target, opa=ROOT / ".tools/opa")


def limits(**tenants: object) -> dict[str, Any]:
    return {"limits": {"tenants": tenants}}


def acting(sidecar: SidecarProcess, tenant: str) -> Caller:
    return Caller(sidecar.target, token=ISSUER.token(tenant, "user-7", roles=["agent"]))


@contextmanager
def flood(ask: Callable[[], object]) -> Iterator[list[grpc.RpcError]]:
    """Asked without end from many threads; what was refused."""
    refused: list[grpc.RpcError] = []
    ended, full = threading.Event(), threading.Event()

    def go_on() -> None:
        while not ended.is_set():
            try:
                ask()
            except grpc.RpcError as error:
                refused.append(error)
                full.set()

    with ThreadPoolExecutor(AT_ONCE) as threads:
        running = [threads.submit(go_on) for _ in range(AT_ONCE)]
        try:
            assert full.wait(10), "nothing was refused"
            yield refused
        finally:
            ended.set()
        for thread in running:
            thread.result()


def raised(error: grpc.RpcError) -> Refusal:
    def again() -> None:
        raise error

    return refusal_of(again)


def test_while_one_tenant_floods_another_s_calls_all_succeed(tmp_path: Path, bundle: Path) -> None:
    config = {**limits(calls_per_second=20, burst=40), "listen": {"metrics": "127.0.0.1:0"}}
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=config) as sidecar,
        acting(sidecar, "tenant_flood") as loud,
        acting(sidecar, "tenant_quiet") as quiet,
        flood(lambda: loud.authorize("orders.read")) as refused,
    ):
        for _ in range(40):
            assert quiet.authorize("orders.read").decision
        told = [raised(error) for error in list(refused)]
        for refusal in told:
            assert refusal.status is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal.reason_code == "rate_limited"
            assert refusal.retry_after_seconds is not None
            assert refusal.retry_after_seconds >= 0
            assert "tenant_" not in refusal.message
        metrics = scraped(sidecar)
        assert 'pdp_admission_refusals_total{kind="rate"}' in metrics
        assert "pdp_calls_waiting" in metrics
        assert "tenant_flood" not in metrics
    denied = [record for record in records(sidecar) if record["reason_code"] == "rate_limited"]
    assert {(record["tenant_id"], record["outcome"]) for record in denied} == {
        ("tenant_flood", "denied")
    }
    assert len(denied) < 20, "a flood does not fill the log"


def test_a_tenant_that_floods_questions_can_still_report_and_settle(
    tmp_path: Path, bundle: Path
) -> None:
    with (
        SidecarProcess(
            tmp_path, issuer=ISSUER, bundle=bundle, config=limits(calls_per_second=1, burst=4)
        ) as sidecar,
        acting(sidecar, "tenant_flood") as caller,
    ):
        permit = caller.authorize("orders.update").permit
        hold = caller.budget.ReserveBudget(
            budget_pb2.ReserveBudgetRequest(
                idempotency_key=str(uuid.uuid4()),
                charges=[common_pb2.Charge(budget="llm", unit="tokens_out", amount=1)],
            )
        )
        with flood(lambda: caller.authorize("orders.read")):
            reported = caller.execution.ReportOutcome(
                execution_pb2.ReportOutcomeRequest(
                    permit=permit, outcome=execution_pb2.OUTCOME_EXECUTED
                )
            )
            assert not reported.replayed
            caller.budget.SettleBudget(
                budget_pb2.SettleBudgetRequest(
                    idempotency_key=str(uuid.uuid4()), hold_id=hold.hold_id
                )
            )


def test_arguments_of_a_call_too_many_are_not_read(tmp_path: Path, bundle: Path) -> None:
    with (
        SidecarProcess(
            tmp_path, issuer=ISSUER, bundle=bundle, config=limits(calls_per_second=0.01, burst=1)
        ) as sidecar,
        acting(sidecar, "tenant_flood") as caller,
    ):
        assert caller.authorize("orders.read").decision
        request = authorization_pb2.AuthorizeRequest(
            request_id=str(uuid.uuid4()),
            action=authorization_pb2.Action(name="orders.read"),
            arguments_json=b"this is no JSON",
        )
        refusal = refusal_of(caller.authorization.Authorize, request)
        assert refusal.reason_code == "rate_limited"


def scraped(sidecar: SidecarProcess) -> str:
    (place,) = (
        word.rstrip(",")
        for word in sidecar.log.read_text(encoding="utf-8").split()
        if word.startswith("http://127.0.0.1:")
    )
    with urllib.request.urlopen(f"{place}/metrics", timeout=5) as response:  # noqa: S310 - loopback
        return str(response.read().decode("utf-8"))


def records(sidecar: SidecarProcess) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]
