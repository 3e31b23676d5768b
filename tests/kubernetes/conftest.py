"""One API server for all, the chart as Helm renders it, and pods of it that run."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdp.testing import TokenIssuer, build_bundle
from tests.kubernetes.cluster import TOOLS, Cluster, Object
from tests.kubernetes.pod import Pod

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "pdp"
IMAGE = ROOT / "dist" / "image" / "root"
AGENT = Path(__file__).with_name("agent.py")
ISSUER = TokenIssuer("https://id.example", audience="agent-service")
Make = Callable[..., Pod]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        started.apply((TOOLS / "podmonitors.yaml").read_text(encoding="utf-8"))
        started.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
        yield started


@pytest.fixture(scope="session")
def agents(cluster: Cluster) -> str:
    """The namespace that overlays and pages name."""
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    return cluster.make_namespace("agents", **restricted)


@pytest.fixture(scope="session")
def example_chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example of a chart of one's own, with this one as its dependency."""
    root = tmp_path_factory.mktemp("example")
    example = root / "examples" / "kubernetes" / "agent"
    shutil.copytree(ROOT / "examples" / "kubernetes" / "agent", example)
    shutil.copytree(CHART, root / "deploy" / "helm" / "pdp")
    subprocess.run([TOOLS / "helm", "dependency", "build", example], check=True)
    return example


def render(chart: Path, *arguments: str, release: str = "pdp", namespace: str) -> str:
    """The manifests of a release. Raises RuntimeError with what Helm says instead."""
    done = subprocess.run(
        [TOOLS / "helm", "template", release, chart, "--namespace", namespace, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return done.stdout


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def manifests(cluster: Cluster) -> dict[str, Object]:
    """What is injected, by kind, with a port for metrics that is free here."""
    namespace = cluster.make_namespace(
        "pods", **{"pod-security.kubernetes.io/enforce": "restricted"}
    )
    injection = render(
        CHART,
        f"--values={CHART / 'values-injection.yaml'}",
        f"--set=metricsPort={free_port()}",
        "--set=injection.namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name=pods",
        release="pods",
        namespace=namespace,
    )
    return {each["kind"]: each for each in cluster.apply(injection)}


@pytest.fixture
def make(cluster: Cluster, manifests: dict[str, Object], tmp_path: Path) -> Iterator[Make]:
    """Makes a pod whose agent runs ``calls`` calls, as the injected manifest says."""
    assert os.geteuid() == 0, "containers are started by root: run these tests as root"
    pods = []

    def pod(*, calls: int = 0) -> Pod:
        wanted = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "generateName": "agent-",
                "namespace": "pods",
                "labels": {"agent-pdp/inject": "enabled"},
            },
            "spec": agent(calls),
        }
        made = Pod(
            admitted(cluster, wanted),
            tmp_path,
            images={"pdp": IMAGE, "agent": IMAGE},
            config_maps={
                "pdp-config": {
                    "pdp.yaml": manifests["ConfigMap"]["data"]["pdp.yaml"].encode("utf-8")
                },
                "pdp-policy": {"bundle.tar.gz": bundle(tmp_path)},
                "idp-jwks": {"jwks.json": ISSUER.write_jwks(tmp_path / "jwks.json").read_bytes()},
                "agent": {
                    "agent.py": AGENT.read_bytes(),
                    "token": ISSUER.token("tenant_acme", "user-7", roles=["agent"]).encode(),
                },
            },
            secrets={},
        )
        pods.append(made)
        return made

    yield pod
    for made in pods:
        made.close()


def agent(calls: int) -> Object:
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 20,
        "containers": [
            {
                "name": "agent",
                "image": "registry.example/agent",
                "command": ["/usr/bin/python3", "/agent/agent.py", "/agent/token", str(calls)],
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 1000,
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "volumeMounts": [{"name": "agent", "mountPath": "/agent"}],
            }
        ],
        "volumes": [{"name": "agent", "configMap": {"name": "agent"}}],
    }


def admitted(cluster: Cluster, wanted: Object) -> Object:
    """The pod as the API server lets it in, once injection is in force."""
    for _ in range(200):
        made = cluster.create(wanted, dry_run=True)
        if "initContainers" in made["spec"]:
            return made
    raise AssertionError("nothing was injected")


def bundle(directory: Path, *, reads_allowed: bool = True) -> bytes:
    """The policy of the server's tests, with or without its rule for orders.read."""
    sources = directory / f"policy-{reads_allowed}"
    shutil.copytree(ROOT / "tests" / "server" / "policy", sources)
    rules = sources / "authz.rego"
    if not reads_allowed:
        text = rules.read_text(encoding="utf-8")
        assert '"orders.read"' in text
        rules.write_text(text.replace('"orders.read"', '"orders.forgotten"'), encoding="utf-8")
    target = directory / f"{reads_allowed}.tar.gz"
    return build_bundle(sources, target, opa=ROOT / ".tools" / "opa").read_bytes()


def until(condition: Callable[[], bool], *, seconds: float = 20.0) -> None:
    ends_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends_at, "it did not come to it"
        time.sleep(0.01)
