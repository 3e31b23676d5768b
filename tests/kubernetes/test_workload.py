"""A workload shows who it is with the service-account token that a real API server has
issued to its pod.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from tests.kubernetes.cluster import SERVICE_ACCOUNT_ISSUER, Cluster
from tests.kubernetes.conftest import ROOT

pytestmark = pytest.mark.kubernetes

ISSUER: Final = TokenIssuer()
AUDIENCE: Final = "agent-pdp"


@pytest.fixture(scope="module")
def agent(cluster: Cluster) -> tuple[str, str]:
    """A pod that is there: its namespace and name."""
    namespace = cluster.make_namespace("workloads")
    container = {"name": "agent", "image": "registry.example/agent"}
    pod = cluster.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"generateName": "agent-", "namespace": namespace},
            "spec": {"containers": [container]},
        }
    )
    return namespace, pod["metadata"]["name"]


@pytest.fixture(scope="module")
def sidecar(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("workload")
    bundle = build_bundle(
        ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    keys = directory / "cluster.jwks"
    keys.write_text(cluster.service_account_keys(), encoding="utf-8")
    users = {
        "issuer": ISSUER.issuer,
        "audiences": [ISSUER.audience],
        "jwks_file": str(ISSUER.write_jwks(directory / "users.jwks")),
    }
    workloads = {
        "issuer": SERVICE_ACCOUNT_ISSUER,
        "audiences": [AUDIENCE],
        "jwks_file": str(keys),
    }
    identity = {
        "mode": "jwt",
        "issuers": [users],
        "workload": {"required": True, "issuers": [workloads]},
    }
    with SidecarProcess(
        directory, issuer=ISSUER, bundle=bundle, config={"identity": identity}
    ) as process:
        yield process


def token(cluster: Cluster, agent: tuple[str, str], *, audience: str = AUDIENCE) -> str:
    """As a kubelet gets it for a projected volume."""
    namespace, pod = agent
    return cluster.kubectl(
        *("create", "token", "default", f"--namespace={namespace}", f"--audience={audience}"),
        *("--bound-object-kind=Pod", f"--bound-object-name={pod}"),
    ).strip()


def asking(sidecar: SidecarProcess, workload: str | None) -> Caller:
    shown = [] if workload is None else [("workload-authorization", f"Bearer {workload}")]
    user = ISSUER.token("tenant_acme", "user-7", roles=["agent"])
    return Caller(sidecar.target, token=user, metadata=shown)


def last_record(sidecar: SidecarProcess) -> dict[str, Any]:
    (segment,) = Path(sidecar.state / "audit").glob("*.jsonl")
    record: dict[str, Any] = json.loads(segment.read_text("utf-8").splitlines()[-1])
    return record


def test_the_token_of_a_pod_says_which_workload_asks(
    cluster: Cluster, sidecar: SidecarProcess, agent: tuple[str, str]
) -> None:
    with asking(sidecar, token(cluster, agent)) as caller:
        assert caller.authorize("orders.read").decision
    record = last_record(sidecar)
    assert record["tenant_id"] == "tenant_acme"
    assert record["identity"]["workload"] == f"system:serviceaccount:{agent[0]}:default"


def test_a_token_for_someone_else_shows_nothing(
    cluster: Cluster, sidecar: SidecarProcess, agent: tuple[str, str]
) -> None:
    unbound = cluster.kubectl(
        "create", "token", "default", f"--namespace={agent[0]}", f"--audience={AUDIENCE}"
    ).strip()
    for shown, code in (
        (token(cluster, agent, audience="another-service"), "workload_invalid"),
        (unbound, "workload_invalid"),
        (ISSUER.token("tenant_acme", "user-7", aud=AUDIENCE), "workload_invalid"),
        (None, "workload_missing"),
    ):
        with asking(sidecar, shown) as caller:
            assert refusal_of(caller.authorize, "orders.read").reason_code == code


def test_a_workload_is_no_user(
    cluster: Cluster, sidecar: SidecarProcess, agent: tuple[str, str]
) -> None:
    shown = token(cluster, agent)
    metadata = [("workload-authorization", f"Bearer {shown}")]
    with Caller(sidecar.target, token=shown, metadata=metadata) as caller:
        assert refusal_of(caller.authorize, "orders.read").reason_code == "token_invalid"
