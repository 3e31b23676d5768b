"""Permits that are redeemed straight at the store which sidecars share."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pdp.api.v1 import execution_pb2
from pdp.canonical import JsonObject, sha256_hex
from pdp.config import RedisSettings
from pdp.permit import PermitError, PermitRedeemer, PermitVerifier
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from pdp.tool import PermitDoor
from pdp.tool.store import StoreRedeemer
from tests.budget.redis_server import RedisServer
from tests.e2e.operating import command

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
ARGUMENTS: JsonObject = {"order_id": "918"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis")).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def sidecar(
    tmp_path_factory: pytest.TempPathFactory, server: RedisServer
) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("sidecar")
    bundle = build_bundle(
        ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    config = {"budget": {"store": {"unix": str(server.socket), "timeout_ms": 5000}}}
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config) as process:
        yield process


@pytest.fixture
def store(server: RedisServer) -> Iterator[StoreRedeemer]:
    settings = RedisSettings(unix=server.socket, tls=False)
    with StoreRedeemer(settings, timeout_seconds=20) as redeemer:
        yield redeemer


@pytest.fixture
def door(sidecar: SidecarProcess, store: StoreRedeemer) -> PermitDoor:
    with PermitRedeemer(sidecar.target) as published:
        keys = published.keys()
    return PermitDoor(PermitVerifier(keys, issuer="agent-pdp", audience="tools"), store)


def permitted(sidecar: SidecarProcess, actor: str = "user-7", tool: str = "orders.read") -> str:
    with Caller(sidecar.target, token=ISSUER.token("tenant_acme", actor, roles=["agent"])) as asks:
        return asks.authorize(tool, ARGUMENTS).permit


def outcomes(door: PermitDoor, permit: str, *, times: int, tool: str) -> Counter[str]:
    """What became of so many tries at once."""
    codes: list[str] = []

    def attempt() -> None:
        try:
            door.admit(permit, tool=tool, arguments=ARGUMENTS)
        except PermitError as error:
            codes.append(error.reason_code)
        else:
            codes.append("ok")

    threads = [threading.Thread(target=attempt) for _ in range(times)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Counter(codes)


def test_a_permit_is_redeemed_once_at_store_and_sidecars_together(
    sidecar: SidecarProcess, door: PermitDoor
) -> None:
    permit = permitted(sidecar)
    assert outcomes(door, permit, times=20, tool="orders.read") == {"ok": 1, "permit_used": 19}
    with Caller(sidecar.target) as tool_server:
        request = execution_pb2.RedeemPermitRequest(
            permit=permit,
            idempotency_key="k",
            tool="orders.read",
            arguments_sha256=sha256_hex(ARGUMENTS),
            audience="tools",
        )
        assert refusal_of(tool_server.execution.RedeemPermit, request).reason_code == "permit_used"


def test_a_permit_for_several_calls_is_redeemed_as_often_as_it_says(
    sidecar: SidecarProcess, door: PermitDoor
) -> None:
    permit = permitted(sidecar, tool="orders.search")
    found = outcomes(door, permit, times=12, tool="orders.search")
    assert found == {"ok": 5, "permit_used": 7}


def test_a_permit_whose_outcome_is_reported_is_used(
    sidecar: SidecarProcess, door: PermitDoor
) -> None:
    permit = permitted(sidecar)
    with Caller(sidecar.target) as runtime:
        runtime.execution.ReportOutcome(
            execution_pb2.ReportOutcomeRequest(
                permit=permit, outcome=execution_pb2.OUTCOME_EXECUTED
            )
        )
    assert outcomes(door, permit, times=1, tool="orders.read") == {"permit_used": 1}


def test_a_revoked_actor_s_permit_is_refused_within_a_second(
    sidecar: SidecarProcess, door: PermitDoor
) -> None:
    door.admit(permitted(sidecar), tool="orders.read", arguments=ARGUMENTS)  # it is open
    permits = [permitted(sidecar, actor="mallory") for _ in range(60)]
    command(sidecar, "revoke", "actor", "tenant_acme", "mallory", "--reason", "left")
    codes: list[str] = []
    for permit in permits:
        found = outcomes(door, permit, times=1, tool="orders.read")
        codes += found.elements()
        if codes[-1] == "permit_revoked":
            break
        threading.Event().wait(0.05)
    assert codes[-1] == "permit_revoked"


def test_a_permit_of_another_store_is_refused(
    store: StoreRedeemer, sidecar: SidecarProcess
) -> None:
    with PermitRedeemer(sidecar.target) as published:
        verifier = PermitVerifier(published.keys(), issuer="agent-pdp", audience="tools")
    own = verifier.verify(permitted(sidecar), tool="orders.read", arguments=ARGUMENTS)
    foreign = replace(own, ledger="another")
    with pytest.raises(PermitError) as caught:
        store.redeem(foreign)
    assert caught.value.reason_code == "permit_mismatch"
    store.redeem(own)


def test_without_the_store_nothing_is_redeemed(
    tmp_path: Path, sidecar: SidecarProcess, door: PermitDoor
) -> None:
    away = StoreRedeemer(RedisSettings(unix=tmp_path / "nothing.sock", tls=False))
    verified = door.admit(permitted(sidecar), tool="orders.read", arguments=ARGUMENTS)
    for _ in range(2):
        with pytest.raises(PermitError) as caught:
            away.redeem(verified)
        assert caught.value.reason_code == "permit_unavailable"
    away.close()


def test_after_a_fork_the_child_opens_its_own(sidecar: SidecarProcess, door: PermitDoor) -> None:
    door.admit(permitted(sidecar), tool="orders.read", arguments=ARGUMENTS)
    permit = permitted(sidecar)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            door.admit(permit, tool="orders.read", arguments=ARGUMENTS)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert outcomes(door, permit, times=1, tool="orders.read") == {"permit_used": 1}
