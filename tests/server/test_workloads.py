"""Listeners, certificates and tokens of workloads, at a real sidecar."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from pdp import base64url
from pdp.api.v1 import authorization_pb2, authorization_pb2_grpc, execution_pb2
from pdp.canonical import sha256_hex
from pdp.client import Guard, PermitDenied
from pdp.testing import Caller, Refusal, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from tests.server.authority import Authority

_T = TypeVar("_T")

ROOT = Path(__file__).parents[2]
USERS = TokenIssuer()
ROUTED = TokenIssuer("https://routed.example", kid="routed")
CLUSTER = TokenIssuer("https://kubernetes.default.svc", audience="pdp", kid="cluster")
ACME, GLOBEX = "tenant_acme", "tenant_globex"
AGENT_OF_ACME = "spiffe://example.org/tenant/tenant_acme/agent"
ACCOUNT = "system:serviceaccount:acme:agent"


@dataclass
class Scene:
    """A sidecar with a listener for each of two tenants, and one that asks for certificates."""

    sidecar: SidecarProcess
    authority: Authority
    sockets: Path
    tls_target: str

    def acting(
        self,
        tenant: str | None,
        *,
        listener: str = "",
        certificate: grpc.ChannelCredentials | None = None,
        workload_token: str = "",
        token: str | None = None,
    ) -> Caller:
        """Whoever has a token of the tenant, or of none; by the usual way unless said."""
        target = self.sidecar.target
        if listener:
            target = f"unix://{self.sockets / listener}.sock"
        if certificate is not None:
            target = self.tls_target
        metadata = [("workload-authorization", f"Bearer {workload_token}")]
        return Caller(
            target,
            token=token or (USERS.token(tenant, "user-7") if tenant else None),
            credentials=certificate,
            metadata=metadata if workload_token else (),
        )

    def refusal(self, tenant: str | None, **way: Any) -> Refusal:
        with self.acting(tenant, **way) as caller:
            return refusal_of(caller.authorize, "orders.read")

    def last_record(self) -> dict[str, Any]:
        lines = [
            line
            for segment in sorted((self.sidecar.state / "audit").glob("*.jsonl"))
            for line in segment.read_text(encoding="utf-8").splitlines()
        ]
        record: dict[str, Any] = json.loads(lines[-1])
        return record


@pytest.fixture(scope="module")
def sockets() -> Iterator[Path]:
    """A directory with a short name, as the paths of sockets must be short."""
    with tempfile.TemporaryDirectory(prefix="pdp-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def scene(sockets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("workloads")
    bundle = build_bundle(
        ROOT / "tests/server/policy", folder / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    authority = Authority()
    keys = {
        issuer.kid: str(issuer.write_jwks(folder / f"{issuer.kid}.json"))
        for issuer in (USERS, ROUTED, CLUSTER)
    }
    config = {
        "listen": {
            "tcp": {"address": "127.0.0.1:0", "tls": authority.tls_section(folder)},
            "named": {name: {"unix": f"{sockets / name}.sock"} for name in ("acme", "globex")},
        },
        "identity": {
            "mode": "jwt",
            "issuers": [
                {
                    "issuer": USERS.issuer,
                    "audiences": [USERS.audience],
                    "jwks_file": keys[USERS.kid],
                    "shared_actors": True,
                },
                {
                    "issuer": ROUTED.issuer,
                    "audiences": [ROUTED.audience],
                    "jwks_file": keys[ROUTED.kid],
                    "shared_actors": True,
                    "tenant": {"by_route": True, "tenants": [ACME]},
                },
            ],
            "routes": [
                {"listener": "acme", "tenant": ACME},
                {"server_name": "acme.pdp.example", "tenant": ACME},
                {"listener": "globex", "tenant": GLOBEX},
                {"workload": "spiffe://example.org/tenant/{tenant}/**"},
                {"workload": "agent.globex.example", "tenant": GLOBEX},
                {"workload": "system:serviceaccount:acme:*", "tenant": ACME},
            ],
            "workload": {
                "certificates": True,
                "issuers": [
                    {
                        "issuer": CLUSTER.issuer,
                        "audiences": [CLUSTER.audience],
                        "jwks_file": keys[CLUSTER.kid],
                    }
                ],
            },
        },
    }
    with SidecarProcess(folder, issuer=USERS, bundle=bundle, config=config) as sidecar:
        said = sidecar.log.read_text(encoding="utf-8")
        port = re.search(r"127\.0\.0\.1:(\d+)", said)
        assert port
        assert "acme.sock" in said
        yield Scene(sidecar, authority, sockets, f"localhost:{port[1]}")


def account_token(**changes: Any) -> str:
    """As a kubelet has one made for a pod."""
    now = int(time.time())
    claims = {
        "iss": CLUSTER.issuer,
        "aud": [CLUSTER.audience],
        "sub": ACCOUNT,
        "iat": now,
        "exp": now + 3_600,
        "kubernetes.io": {
            "namespace": "acme",
            "pod": {"name": "agent-7d9c"},
            "serviceaccount": {"name": "agent"},
        },
        **changes,
    }
    return CLUSTER.sign(json.dumps(claims).encode(), header={"typ": None})


# Listeners


def test_a_tenants_listener_answers_that_tenant_and_no_other(scene: Scene) -> None:
    for tenant, listener in ((ACME, "acme"), (GLOBEX, "globex"), (ACME, ""), (GLOBEX, "")):
        with scene.acting(tenant, listener=listener) as caller:
            assert caller.authorize("orders.read").tenant_id == tenant
    refusal = scene.refusal(GLOBEX, listener="acme")
    assert (refusal.status, refusal.reason_code) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "tenant_mismatch",
    )
    assert ACME not in refusal.message
    assert GLOBEX not in refusal.message


def test_both_sources_that_disagree_are_on_record(scene: Scene) -> None:
    scene.refusal(GLOBEX, listener="acme")
    record = scene.last_record()
    assert record["reason_code"] == "tenant_mismatch"
    assert (record["tenant_id"], record["actor_id"]) == (None, "user-7")
    assert record["detail"]["sources"] == [
        {"source": "token", "tenant": GLOBEX},
        {"source": "listener", "tenant": ACME},
    ]


def test_a_route_alone_is_nobody(scene: Scene) -> None:
    assert scene.refusal(None, listener="acme").reason_code == "token_missing"
    certificate = scene.authority.client(AGENT_OF_ACME)
    assert scene.refusal(None, certificate=certificate).reason_code == "token_missing"
    token = account_token()
    assert scene.refusal(None, workload_token=token).reason_code == "token_missing"


def test_a_route_names_the_tenant_of_tokens_that_leave_it_to_it(scene: Scene) -> None:
    token = ROUTED.token(GLOBEX, "bob")
    with scene.acting(None, token=token, listener="acme") as caller:
        answer = caller.authorize("orders.read")
    # What such a token says of a tenant is nothing.
    assert (answer.tenant_id, answer.actor_id) == (ACME, "bob")
    assert scene.refusal(None, token=token).reason_code == "tenant_missing"
    # Its issuer may not speak for this one.
    refusal = scene.refusal(None, token=token, listener="globex")
    assert refusal.reason_code == "tenant_unknown"


def test_every_message_of_a_stream_is_bound_to_its_listener(scene: Scene) -> None:
    def question(number: int, tenant: str) -> authorization_pb2.AuthorizeStreamRequest:
        return authorization_pb2.AuthorizeStreamRequest(
            id=number,
            bearer=USERS.token(tenant, "user-7"),
            question=authorization_pb2.AuthorizeRequest(
                request_id=str(uuid.uuid4()), action=authorization_pb2.Action(name="orders.read")
            ),
        )

    with scene.acting(ACME, listener="acme") as caller:
        questions = iter([question(1, ACME), question(2, GLOBEX)])
        answers = {answer.id: answer for answer in caller.authorization.AuthorizeStream(questions)}
    assert answers[1].answer.tenant_id == ACME
    assert answers[2].failure.reason_code == "tenant_mismatch"


def test_a_delegation_is_bound_to_its_tenants_listener_too(scene: Scene) -> None:
    with scene.acting(GLOBEX) as caller:
        delegated = caller.authorization.Delegate(
            authorization_pb2.DelegateRequest(
                request_id=str(uuid.uuid4()), delegate="reader", tools=["orders.read"]
            )
        )
    with scene.acting(None, token=delegated.token, listener="globex") as agent:
        assert agent.authorize("orders.read").tenant_id == GLOBEX
    refusal = scene.refusal(None, token=delegated.token, listener="acme")
    assert refusal.reason_code == "tenant_mismatch"


def test_a_permit_is_bound_to_its_tenants_listener_too(scene: Scene) -> None:
    with scene.acting(GLOBEX) as caller:
        permit = caller.authorize("orders.read").permit
    redemption = execution_pb2.RedeemPermitRequest(
        permit=permit,
        idempotency_key=str(uuid.uuid4()),
        tool="orders.read",
        arguments_sha256=sha256_hex({}),
        audience="tools",
    )
    outcome = execution_pb2.ReportOutcomeRequest(
        permit=permit, outcome=execution_pb2.OUTCOME_EXECUTED
    )
    with scene.acting(ACME, listener="acme") as thief:
        for refusal in (
            refusal_of(thief.execution.RedeemPermit, redemption),
            refusal_of(thief.execution.ReportOutcome, outcome),
        ):
            assert refusal.reason_code == "tenant_mismatch"
            assert scene.last_record()["detail"]["sources"] == [
                {"source": "permit", "tenant": GLOBEX},
                {"source": "listener", "tenant": ACME},
            ]
    with scene.acting(GLOBEX, listener="globex") as owner:
        assert owner.execution.RedeemPermit(redemption).tenant_id == GLOBEX
    with scene.acting(GLOBEX) as owner:
        assert not owner.execution.ReportOutcome(outcome).replayed


# Certificates


def test_the_workload_of_a_certificate_is_on_record_and_in_the_permit(scene: Scene) -> None:
    certificate = scene.authority.client(AGENT_OF_ACME)
    with scene.acting(ACME, certificate=certificate) as caller:
        answer = caller.authorize("orders.read")
    assert answer.decision
    record = scene.last_record()
    assert record["identity"] == {"issuer": USERS.issuer, "workload": AGENT_OF_ACME}
    claims = json.loads(base64url.decode(answer.permit.split(".")[1]))
    assert claims["req_wl"] == AGENT_OF_ACME


def test_the_workload_that_shows_a_token_which_is_refused_is_on_record(scene: Scene) -> None:
    certificate = scene.authority.client(AGENT_OF_ACME)
    for token in (USERS.token(ACME, "ann", lifetime_seconds=-3_600), USERS.token(None, "ann")):
        refusal = scene.refusal(None, token=token, certificate=certificate)
        assert refusal.reason_code in ("token_expired", "tenant_missing")
        assert scene.last_record()["identity"] == {"workload": AGENT_OF_ACME}
    refusal = scene.refusal(ACME, certificate=scene.authority.client(AGENT_OF_ACME, "spiffe://b"))
    assert refusal.reason_code == "workload_invalid"
    assert "identity" not in scene.last_record()


def test_a_certificate_and_a_token_of_different_tenants_are_refused(scene: Scene) -> None:
    for tenant, certificate in (
        (GLOBEX, scene.authority.client(AGENT_OF_ACME)),
        (ACME, scene.authority.client(dns_names=["agent.globex.example"])),
    ):
        refusal = scene.refusal(tenant, certificate=certificate)
        assert refusal.reason_code == "tenant_mismatch"
        assert [each["source"] for each in scene.last_record()["detail"]["sources"]] == [
            "token",
            "workload",
        ]


@pytest.mark.parametrize(
    "name",
    (
        "spiffe://example.org/tenant/tenant_acme/../tenant_globex/agent",
        "spiffe://example.org/tenant//agent",
        "spiffe://example.org/tenant/tenant_acme//agent",
        "spiffe://example.org/tenant/tenant_acme/agent/",
        "spiffe://example.org/tenant/tenant%5facme/agent",
        "spiffe://example.org/tenant/%2e%2e/agent",
        "spiffe://someone@example.org/tenant/tenant_acme/agent",
        "spiffe://example.org:8443/tenant/tenant_acme/agent",
        "SPIFFE://example.org/tenant/tenant_acme/agent",
        "spiffe://Example.org/tenant/tenant_acme/agent",
        "spiffe://example.org./tenant/tenant_acme/agent\x00",
    ),
)
def test_a_certificate_with_a_name_that_reads_in_two_ways_is_refused(
    scene: Scene, name: str
) -> None:
    for tenant in (ACME, GLOBEX):
        refusal = scene.refusal(tenant, certificate=scene.authority.client(name))
        assert refusal.reason_code == "workload_invalid"


def test_a_certificate_of_several_names_or_none_or_of_an_authority_is_refused(
    scene: Scene,
) -> None:
    other = "spiffe://example.org/tenant/tenant_globex/agent"
    for certificate in (
        scene.authority.client(AGENT_OF_ACME, other),
        scene.authority.client(other, AGENT_OF_ACME),
        scene.authority.client(),
        scene.authority.client(dns_names=["agent.globex.example", "agent.acme.example"]),
        scene.authority.client(dns_names=["*.globex.example"]),
        scene.authority.client(AGENT_OF_ACME, is_authority=True),
    ):
        refusal = scene.refusal(ACME, certificate=certificate)
        assert (refusal.status, refusal.reason_code) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "workload_invalid",
        )


def test_a_certificate_of_another_authority_is_not_let_in(scene: Scene) -> None:
    stranger = Authority()
    certificate, key = stranger.issue([])
    credentials = grpc.ssl_channel_credentials(scene.authority.pem, key, certificate)
    refusal = scene.refusal(ACME, certificate=credentials)
    assert refusal.status is grpc.StatusCode.UNAVAILABLE


def test_whoever_asks_for_a_tenants_server_name_must_be_of_that_tenant(scene: Scene) -> None:
    certificate = scene.authority.client(dns_names=["agent.example"])
    for tenant in (ACME, GLOBEX):
        token = USERS.token(tenant, "user-7")
        options = [("grpc.ssl_target_name_override", "acme.pdp.example")]
        with grpc.secure_channel(scene.tls_target, certificate, options=options) as channel:
            stub = authorization_pb2_grpc.AuthorizationServiceStub(channel)
            request = authorization_pb2.AuthorizeRequest(
                request_id=str(uuid.uuid4()), action=authorization_pb2.Action(name="orders.read")
            )
            metadata = (("authorization", f"Bearer {token}"),)
            if tenant == ACME:
                assert stub.Authorize(request, metadata=metadata, timeout=20).decision
                continue
            refusal = refusal_of(stub.Authorize, request, metadata=metadata, timeout=20)
            assert refusal.reason_code == "tenant_mismatch"


# Tokens of workloads


def test_a_service_accounts_token_names_the_workload_and_its_tenant(scene: Scene) -> None:
    token = account_token()
    with scene.acting(ACME, workload_token=token) as caller:
        assert caller.authorize("orders.read").decision
    assert scene.last_record()["identity"]["workload"] == ACCOUNT
    refusal = scene.refusal(GLOBEX, workload_token=token)
    assert refusal.reason_code == "tenant_mismatch"


def test_one_kind_of_token_is_not_taken_for_the_other(scene: Scene) -> None:
    users = USERS.token(ACME, "user-7")
    assert scene.refusal(ACME, workload_token=users).reason_code == "workload_invalid"
    workloads = account_token(tenant_id=ACME, aud=[USERS.audience])
    assert scene.refusal(None, token=workloads).reason_code == "token_invalid"
    with scene.acting(ACME) as caller:
        permit = caller.authorize("orders.read").permit
    assert scene.refusal(ACME, workload_token=permit).reason_code == "workload_invalid"


def test_several_tokens_of_workloads_are_none(scene: Scene) -> None:
    token = account_token()
    with Caller(
        scene.sidecar.target,
        token=USERS.token(ACME, "user-7"),
        metadata=[("workload-authorization", f"Bearer {token}")] * 2,
    ) as caller:
        refusal = refusal_of(caller.authorize, "orders.read")
    assert refusal.reason_code == "workload_invalid"


# Revocation


def revoke(scene: Scene, *arguments: str) -> None:
    command = [sys.executable, "-m", "pdp", "revoke", *arguments]
    config = str(scene.sidecar.config_file)
    subprocess.run([*command, "--config", config], check=True, capture_output=True)


def test_a_revoked_workload_asks_for_nobody_and_its_permits_are_void(scene: Scene) -> None:
    workload = "spiffe://example.org/tenant/tenant_acme/stolen"
    stolen, other = scene.authority.client(workload), scene.authority.client(AGENT_OF_ACME)
    with (
        scene.acting(ACME, certificate=stolen) as thief,
        scene.acting(ACME, certificate=other) as neighbour,
    ):
        permit = thief.authorize("orders.read").permit
        revoke(scene, "workload", workload, "--reason", "stolen")
        refusal = wait_until(lambda: refusal_or_none(thief))
        assert (refusal.status, refusal.reason_code) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "workload_revoked",
        )
        record = scene.last_record()
        assert (record["tenant_id"], record["actor_id"]) == (ACME, "user-7")
        assert record["identity"]["workload"] == workload
        redemption = execution_pb2.RedeemPermitRequest(
            permit=permit,
            tool="orders.read",
            arguments_sha256=sha256_hex({}),
            audience="tools",
            idempotency_key="redeem-1",
        )
        redeemed = refusal_of(neighbour.execution.RedeemPermit, redemption)
        assert redeemed.reason_code == "permit_revoked"
        assert neighbour.authorize("orders.read").decision
        # The same actor by another way is not affected.
        with scene.acting(ACME) as elsewhere:
            assert elsewhere.authorize("orders.read").decision
        revoke(scene, "lift", "--workload", workload)
        wait_until(lambda: refusal_or_none(thief) is None)


def wait_until(happened: Callable[[], _T | None]) -> _T:
    """What it gives, once that is something."""
    deadline = time.monotonic() + 20
    while not (found := happened()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
    return found


def refusal_or_none(caller: Caller) -> Refusal | None:
    try:
        return refusal_of(caller.authorize, "orders.read")
    except AssertionError:
        return None


# Where a workload must be shown


def test_whoever_does_not_show_which_workload_it_is_is_refused_where_it_must(
    tmp_path: Path,
) -> None:
    bundle = build_bundle(
        ROOT / "tests/server/policy", tmp_path / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    jwks = str(CLUSTER.write_jwks(tmp_path / "cluster.json"))
    issuer = {"issuer": CLUSTER.issuer, "audiences": [CLUSTER.audience], "jwks_file": jwks}
    config = {
        "identity": {
            "mode": "single_tenant",
            "workload": {"required": True, "issuers": [issuer]},
        }
    }
    with SidecarProcess(tmp_path, issuer=USERS, bundle=bundle, config=config) as sidecar:
        with Caller(sidecar.target) as caller:
            refusal = refusal_of(caller.authorize, "orders.read")
            assert (refusal.status, refusal.reason_code) == (
                grpc.StatusCode.UNAUTHENTICATED,
                "workload_missing",
            )
        metadata = [("workload-authorization", f"Bearer {account_token()}")]
        with Caller(sidecar.target, metadata=metadata) as caller:
            assert caller.authorize("orders.read").tenant_id == "default"


# The stub


def test_a_runtime_shows_its_own_token_with_every_question(scene: Scene, tmp_path: Path) -> None:
    projected = tmp_path / "token"
    asked = []

    def current() -> str:
        asked.append(1)
        return projected.read_text(encoding="utf-8")

    guard = Guard(scene.sidecar.target, workload_token=current)
    try:
        read = guard.tool("orders.read")(lambda: "read")
        with guard.acting_for(USERS.token(ACME, "user-7")):
            projected.write_text(account_token())
            assert read() == "read"
            projected.write_text(account_token(aud="elsewhere"))
            with pytest.raises(PermitDenied) as refused:
                read()
            assert refused.value.reason_code == "workload_invalid"
            projected.write_text("s3cret\r\nauthorization: Bearer x")
            with pytest.raises(PermitDenied) as refused:
                read()
            assert refused.value.reason_code == "workload_invalid"
            assert "s3cret" not in str(refused.value)
            projected.unlink()
            with pytest.raises(PermitDenied) as refused:
                read()
            assert refused.value.reason_code == "guard_failed"
        projected.write_text(account_token())
        with guard.acting_for(USERS.token(GLOBEX, "user-7")):
            with pytest.raises(PermitDenied) as refused:
                read()
            assert refused.value.reason_code == "tenant_mismatch"
    finally:
        guard.close()
    assert len(asked) >= 5
