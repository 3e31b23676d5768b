"""Disk full, calls abandoned, the policy stuck: no permit, and back without a restart."""

from __future__ import annotations

import json
import resource
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.canonical import sha256_hex
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fail-closed") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/server/policy", target, opa=ROOT / ".tools/opa")


@pytest.fixture
def sidecar(tmp_path: Path, bundle: Path) -> Iterator[SidecarProcess]:
    # One caller asks for all of it here, as fast as it can.
    config = {"limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}}}
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=config) as process:
        yield process
        limit_files(process, resource.RLIM_INFINITY)


@pytest.fixture
def caller(sidecar: SidecarProcess) -> Iterator[Caller]:
    token = ISSUER.token("tenant_acme", "user-7", roles=["agent"])
    with Caller(sidecar.target, token=token) as opened:
        yield opened


def limit_files(sidecar: SidecarProcess, size: int) -> None:
    """No file of the sidecar may grow past ``size`` bytes: a disk that is full."""
    assert sidecar.process is not None
    resource.prlimit(sidecar.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def audit_file(sidecar: SidecarProcess) -> Path:
    return max((sidecar.state / "audit").glob("*.jsonl"))


def records(sidecar: SidecarProcess) -> list[dict[str, Any]]:
    lines = audit_file(sidecar).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def charge(amount: int, key: str = "") -> budget_pb2.ChargeBudgetRequest:
    return budget_pb2.ChargeBudgetRequest(
        idempotency_key=key or str(uuid.uuid4()),
        charges=[common_pb2.Charge(budget="llm", unit="tokens_out", amount=amount)],
    )


def state_of(caller: Caller, limit_id: str) -> tuple[int, int]:
    """(spent, held)."""
    limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
    (found,) = (limit for limit in limits if limit.limit_id == limit_id)
    return found.spent, found.held


def test_without_room_for_audit_nothing_is_allowed_and_it_recovers_by_itself(
    sidecar: SidecarProcess, caller: Caller
) -> None:
    permit = caller.authorize("orders.read").permit
    # Denials of strangers are written to the audit log alone, which makes it the largest file.
    with Caller(sidecar.target) as stranger, ThreadPoolExecutor(16) as threads:
        for _ in range(1_000):
            threads.submit(refusal_of, stranger.authorize, "orders.read")
    limit_files(sidecar, audit_file(sidecar).stat().st_size)

    for refusal in (
        refusal_of(caller.authorize, "orders.update", request_id="in-the-outage"),
        refusal_of(caller.authorize, "tools.closed"),
        refusal_of(caller.budget.ChargeBudget, charge(1, key="in-the-outage")),
        refusal_of(
            caller.execution.RedeemPermit,
            execution_pb2.RedeemPermitRequest(
                permit=permit,
                idempotency_key="in-the-outage",
                tool="orders.read",
                arguments_sha256=sha256_hex({}),
                audience="tools",
            ),
        ),
    ):
        assert refusal.status is grpc.StatusCode.UNAVAILABLE
        assert refusal.reason_code == "audit_unavailable"
    with Caller(sidecar.target) as stranger:
        assert refusal_of(stranger.authorize, "orders.read").reason_code == "audit_unavailable"

    limit_files(sidecar, resource.RLIM_INFINITY)

    # The same key again: what was held and charged in the outage counts once.
    answer = caller.authorize("orders.update", request_id="in-the-outage")
    assert answer.decision
    assert caller.budget.ChargeBudget(charge(1, key="in-the-outage")).replayed
    assert state_of(caller, "tools-per-day") == (0, 2)
    assert state_of(caller, "tokens") == (1, 0)
    assert any(record["action"] == "audit.gap" for record in records(sidecar))


def test_without_room_in_the_ledger_nothing_is_allowed_and_it_recovers_by_itself(
    sidecar: SidecarProcess, caller: Caller
) -> None:
    for amount in range(1, 20):
        caller.budget.ChargeBudget(charge(amount))
    log = sidecar.state / "ledger.db-wal"
    assert log.stat().st_size > audit_file(sidecar).stat().st_size + 10_000
    limit_files(sidecar, log.stat().st_size)

    for refusal in (
        refusal_of(caller.authorize, "orders.update", request_id="in-the-outage"),
        refusal_of(caller.authorize, "tools.closed"),
        refusal_of(caller.budget.ChargeBudget, charge(1, key="in-the-outage")),
    ):
        assert refusal.status is grpc.StatusCode.UNAVAILABLE
        assert refusal.reason_code == "budget_unavailable"
        assert str(sidecar.state) not in refusal.message
    assert [
        (record["reason_code"], record["outcome"], record["tenant_id"])
        for record in records(sidecar)[-3:]
    ] == [("budget_unavailable", "denied", "tenant_acme")] * 3

    limit_files(sidecar, resource.RLIM_INFINITY)

    assert caller.authorize("orders.update", request_id="in-the-outage").decision
    assert not caller.budget.ChargeBudget(charge(1, key="in-the-outage")).replayed


def test_a_policy_that_never_ends_holds_up_nobody_else(
    sidecar: SidecarProcess, caller: Caller
) -> None:
    with ThreadPoolExecutor(4) as threads:
        stuck = [threads.submit(caller.authorize, "tools.runaway") for _ in range(4)]
        assert caller.authorize("orders.read").decision
        assert {call.result().reason_code for call in stuck} == {"policy_timeout"}
    assert all(not call.result().permit for call in stuck)
    assert caller.authorize("orders.read").decision


def test_a_call_past_the_deadline_of_the_sidecar_is_refused(tmp_path: Path, bundle: Path) -> None:
    hasty = {"limits": {"call_timeout_seconds": 0.05}}
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=hasty) as sidecar,
        Caller(sidecar.target, token=ISSUER.token("tenant_acme", "user-7")) as caller,
    ):
        refusal = refusal_of(caller.authorize, "tools.runaway")
        assert refusal.status is grpc.StatusCode.DEADLINE_EXCEEDED
        assert refusal.reason_code == "deadline_exceeded"
        # What has begun is finished all the same, and put on record.
        _wait_for(lambda: records(sidecar)[-1]["reason_code"] == "policy_timeout")


def test_more_calls_than_the_sidecar_takes_are_refused_at_once(
    tmp_path: Path, bundle: Path
) -> None:
    narrow = {"limits": {"max_concurrent_calls": 2, "max_waiting_calls": 2}}
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=narrow) as sidecar,
        Caller(sidecar.target, token=ISSUER.token("tenant_acme", "user-7")) as caller,
        ThreadPoolExecutor(8) as threads,
    ):
        calls = [threads.submit(refusal_of, caller.authorize, "tools.runaway") for _ in range(8)]
        wait(calls)
        refusals = [call.result() for call in calls if call.exception() is None]
        assert len(refusals) >= 2
        for refusal in refusals:
            assert refusal.status is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusal.reason_code == "rate_limited"
            assert refusal.retry_after_seconds is not None
            assert refusal.retry_after_seconds > 0
        assert caller.authorize("orders.read").decision


def test_every_hold_of_an_abandoned_call_is_on_record(
    sidecar: SidecarProcess, caller: Caller
) -> None:
    asked = [str(uuid.uuid4()) for _ in range(300)]
    for number, request_id in enumerate(asked):
        call = caller.authorization.Authorize.future(
            authorization_pb2.AuthorizeRequest(
                request_id=request_id, action=authorization_pb2.Action(name="orders.update")
            ),
            timeout=0.0005 * (number % 8 + 1) if number % 2 else None,
        )
        if number % 2 == 0:
            call.cancel()

    def all_on_record() -> bool:
        held = state_of(caller, "tools-per-day")[1]
        allowed = [record for record in records(sidecar) if record["outcome"] == "allowed"]
        return held == 2 * len(allowed)

    _wait_for(all_on_record)
    # The sidecar is well, and asking again gives what was decided then.
    answers = [caller.authorize("orders.update", request_id=request_id) for request_id in asked]
    assert all(answer.decision for answer in answers)
    assert state_of(caller, "tools-per-day") == (0, 2 * len(asked))


def test_nothing_that_is_asked_blocks_the_event_loop(tmp_path: Path, bundle: Path) -> None:
    debugging = {"PYTHONASYNCIODEBUG": "1"}
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, environment=debugging) as sidecar,
        Caller(
            sidecar.target, token=ISSUER.token("tenant_acme", "user-7", roles=["agent"])
        ) as caller,
    ):
        size = len(sidecar.log.read_bytes())
        large = {"text": ["some words, \u00e9 and \U0001d4d0 "] * 20_000}
        for _ in range(3):
            caller.authorize("orders.update", large)
            caller.authorize("tools.runaway")
            caller.budget.ChargeBudget(charge(1))
        # asyncio logs each step that took more than 100 ms.
        assert b"Executing" not in sidecar.log.read_bytes()[size:]


def _wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
