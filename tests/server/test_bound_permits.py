"""Permits that are bound to client certificates, over mTLS: what a thief gets out of one."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp import base64url
from pdp.api.v1 import authorization_pb2, authorization_pb2_grpc, budget_pb2, execution_pb2
from pdp.canonical import sha256_hex
from pdp.certificates import thumbprint
from pdp.permit import PermitError, PermitKeySet, PermitVerifier
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from tests.tool.certificates import Certificate, certificate

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
ARGUMENTS = {"order_id": "918"}


@dataclass
class Scene:
    """A sidecar that binds permits, the runtime that asks it, and a thief next door, whom
    the sidecar's authority has given a certificate too.
    """

    sidecar: SidecarProcess
    target: str
    server: Certificate
    mine: Certificate
    thief: Certificate

    def acting(self, who: Certificate, tenant: str) -> Caller:
        return Caller(
            self.target,
            token=ISSUER.token(tenant, "user-7", roles=["agent"]),
            credentials=who.to_client(self.server),
        )

    def records(self, tenant: str) -> list[dict[str, Any]]:
        lines = [
            json.loads(line)
            for segment in sorted((self.sidecar.state / "audit").glob("*.jsonl"))
            for line in segment.read_text(encoding="utf-8").splitlines()
        ]
        return [line for line in lines if line["tenant_id"] == tenant]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("bound")
    bundle = build_bundle(
        ROOT / "tests/server/policy", folder / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    server, mine, thief = (certificate(name) for name in ("localhost", "mine", "thief"))
    (folder / "server.pem").write_bytes(server.pem)
    (folder / "server.key").write_bytes(server.key)
    (folder / "clients.pem").write_bytes(mine.pem + thief.pem)
    tls = {
        "certificate_file": str(folder / "server.pem"),
        "key_file": str(folder / "server.key"),
        "client_ca_file": str(folder / "clients.pem"),
    }
    config = {
        "listen": {"tcp": {"address": "127.0.0.1:0", "tls": tls}},
        "permit": {"bind_to_certificate": True},
    }
    with SidecarProcess(folder, issuer=ISSUER, bundle=bundle, config=config) as sidecar:
        port = re.search(r"127\.0\.0\.1:(\d+)", sidecar.log.read_text(encoding="utf-8"))
        assert port
        yield Scene(sidecar, f"localhost:{port[1]}", server, mine, thief)


@pytest.fixture
def tenant() -> str:
    return f"tenant_{uuid.uuid4().hex[:12]}"


def report(permit: str) -> execution_pb2.ReportOutcomeRequest:
    return execution_pb2.ReportOutcomeRequest(permit=permit, outcome=execution_pb2.OUTCOME_EXECUTED)


def held(caller: Caller) -> int:
    limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
    return next(limit.held for limit in limits if limit.limit_id == "tools-per-day")


def test_a_permit_is_for_whoever_asked_and_nobody_else_is_let_in_with_it(
    scene: Scene, tenant: str
) -> None:
    with scene.acting(scene.mine, tenant) as mine:
        permit = mine.authorize("orders.update", ARGUMENTS).permit
        keys = mine.execution.GetPermitKeys(execution_pb2.GetPermitKeysRequest()).jwks_json
    verifier = PermitVerifier(PermitKeySet.from_jwks(keys), issuer="agent-pdp", audience="tools")

    def shown_by(certificate_sha256: str) -> str:
        found = verifier.verify(
            permit,
            tool="orders.update",
            arguments=dict(ARGUMENTS),
            certificate_sha256=certificate_sha256,
        )
        return found.certificate_sha256

    assert shown_by(thumbprint(scene.mine.pem)) == thumbprint(scene.mine.pem)
    for other in ("", thumbprint(scene.thief.pem)):
        with pytest.raises(PermitError) as refused:
            shown_by(other)
        assert refused.value.reason_code == "permit_mismatch"


def test_a_thief_can_not_report_on_a_permit_and_take_away_what_pays_for_it(
    scene: Scene, tenant: str
) -> None:
    with scene.acting(scene.mine, tenant) as mine, scene.acting(scene.thief, tenant) as thief:
        permit = mine.authorize("orders.update", ARGUMENTS).permit
        with Caller(scene.sidecar.target) as nobody:
            for caller in (thief, nobody):
                refusal = refusal_of(caller.execution.ReportOutcome, report(permit))
                assert refusal.status is grpc.StatusCode.PERMISSION_DENIED
                assert refusal.reason_code == "permit_mismatch"
        assert held(mine) == 2
        denied = [each for each in scene.records(tenant) if each["type"] == "outcome"]
        assert [each["outcome"] for each in denied] == ["denied"] * 2
        assert mine.execution.ReportOutcome(report(permit)).settled
        assert held(mine) == 0


def test_a_thief_of_the_token_gets_only_the_permit_of_whoever_asked_first(
    scene: Scene, tenant: str
) -> None:
    with scene.acting(scene.mine, tenant) as mine, scene.acting(scene.thief, tenant) as thief:
        first = mine.authorize("orders.update", ARGUMENTS, request_id="first")
        again = thief.authorize("orders.update", ARGUMENTS, request_id="first")
        assert again.permit == first.permit
        assert thumbprint(scene.thief.pem) not in _claims(again.permit)


def test_a_question_on_a_stream_is_bound_to_the_certificate_of_the_stream(
    scene: Scene, tenant: str
) -> None:
    token = ISSUER.token(tenant, "user-7", roles=["agent"])
    message = authorization_pb2.AuthorizeStreamRequest(
        id=1,
        bearer=token,
        question=authorization_pb2.AuthorizeRequest(
            request_id="on-a-stream",
            action=authorization_pb2.Action(name="orders.update"),
            arguments_json=json.dumps(ARGUMENTS).encode(),
        ),
    )
    with grpc.secure_channel(scene.target, scene.mine.to_client(scene.server)) as channel:
        stub = authorization_pb2_grpc.AuthorizationServiceStub(channel)
        (answer,) = stub.AuthorizeStream(iter([message]), timeout=20)
    assert thumbprint(scene.mine.pem) in _claims(answer.answer.permit)


def test_who_shows_no_certificate_gets_no_permit(scene: Scene, tenant: str) -> None:
    token = ISSUER.token(tenant, "user-7", roles=["agent"])
    with Caller(scene.sidecar.target, token=token) as local:
        answer = local.authorize("orders.update", ARGUMENTS)
        assert (answer.decision, answer.reason_code) == (False, "sender_unknown")
        assert held(local) == 0
    (record,) = scene.records(tenant)
    assert (record["outcome"], record["reason_code"]) == ("denied", "sender_unknown")


def test_a_certificate_that_is_only_named_in_metadata_is_none(scene: Scene, tenant: str) -> None:
    forged = [
        (name, scene.mine.pem.decode().replace("\n", ""))
        for name in ("x509_pem_cert", "x-forwarded-client-cert", "x-client-certificate")
    ]
    token = ISSUER.token(tenant, "user-7", roles=["agent"])
    with Caller(scene.sidecar.target, token=token, metadata=forged) as local:
        assert local.authorize("orders.update", ARGUMENTS).reason_code == "sender_unknown"


def test_a_tool_server_redeems_with_a_certificate_of_its_own(scene: Scene, tenant: str) -> None:
    """It has checked who has shown the permit; the sidecar has not, and can not."""
    with scene.acting(scene.mine, tenant) as mine:
        permit = mine.authorize("orders.update", ARGUMENTS).permit
    use = execution_pb2.RedeemPermitRequest(
        permit=permit,
        idempotency_key="use",
        tool="orders.update",
        arguments_sha256=sha256_hex(dict(ARGUMENTS)),
        audience="tools",
    )
    with Caller(scene.sidecar.target) as tool:
        assert not tool.execution.RedeemPermit(use).replayed


def _claims(permit: str) -> str:
    return base64url.decode(permit.split(".")[1]).decode()
