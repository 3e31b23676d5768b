"""What the chart makes, as a real API server takes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from pdp.config import load_config
from tests.kubernetes.cluster import Cluster, Object
from tests.kubernetes.conftest import CHART, ROOT, render

pytestmark = pytest.mark.kubernetes

CASES: Final = sorted(path.stem.removeprefix("values-") for path in CHART.glob("values-*.yaml"))
GOLDEN: Final = Path(__file__).parent / "golden"
RESTRICTED: Final = {"pod-security.kubernetes.io/enforce": "restricted"}
SECURITY: Final = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def rendered(case: str, namespace: str = "agents", *, release: str = "pdp", **settings: str) -> str:
    options = [f"--set={key}={value}" for key, value in settings.items()]
    values = CHART / f"values-{case}.yaml"
    return render(CHART, f"--values={values}", *options, release=release, namespace=namespace)


def objects(manifests: str) -> list[Object]:
    return [each for each in yaml.safe_load_all(manifests) if each is not None]


@pytest.mark.parametrize("case", CASES)
def test_what_is_rendered_is_what_was_reviewed(case: str) -> None:
    """To accept a change, write it: helm template pdp deploy/helm/pdp -n agents -f
    deploy/helm/pdp/values-CASE.yaml > tests/kubernetes/golden/CASE.yaml
    """
    assert rendered(case) == (GOLDEN / f"{case}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_an_api_server_takes_every_manifest(cluster: Cluster, agents: str, case: str) -> None:
    namespaces = [f"agents-{case}"]
    manifests = rendered(case, namespaces[0], release=case)
    named = {each["metadata"].get("namespace") for each in objects(manifests)}
    for namespace in named - {None, agents}:
        cluster.make_namespace(namespace)
    for dry_run in (True, False):
        applied = cluster.apply(manifests, dry_run=dry_run)
        assert len(applied) == len(objects(manifests))
    cluster.kubectl("delete", "--filename=-", stdin=manifests)


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_one_that_the_sidecar_takes(case: str, tmp_path: Path) -> None:
    for each in objects(rendered(case)):
        if each["kind"] == "ConfigMap" and "pdp.yaml" in each["data"]:
            file = tmp_path / "pdp.yaml"
            file.write_text(each["data"]["pdp.yaml"], encoding="utf-8")
            assert load_config(file, {"PDP_INSTANCE": "agent-7d4b9"}).listen.metrics


def pod(namespace: str, *, inject: bool, **spec: Any) -> Object:
    labels = {"agent-pdp/inject": "enabled"} if inject else {}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": "agent-", "namespace": namespace, "labels": labels},
        "spec": {
            "containers": [
                {"name": "agent", "image": "registry.example/agent", "securityContext": SECURITY}
            ],
            **spec,
        },
    }


def named(containers: list[Object]) -> list[str]:
    return [container["name"] for container in containers]


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> str:
    """With injection in force."""
    name = cluster.make_namespace("injected", **RESTRICTED)
    only_here = {r"injection.namespaceSelector.matchLabels.kubernetes\.io/metadata\.name": name}
    settings = {"workloadToken.enabled": "true", **only_here}
    cluster.apply(rendered("injection", name, release="injected", **settings))
    # The API server takes a policy up a moment after it is made.
    for _ in range(200):
        made = cluster.create(pod(name, inject=True), dry_run=True)
        if "initContainers" in made["spec"]:
            return name
    raise AssertionError("nothing was injected")


def test_a_pod_that_asks_for_it_gets_the_sidecar_first_and_hardened(
    cluster: Cluster, namespace: str
) -> None:
    migrate = {
        "name": "migrate",
        "image": "registry.example/agent",
        "securityContext": SECURITY,
    }
    made = cluster.create(pod(namespace, inject=True, initContainers=[migrate]))
    spec = made["spec"]

    assert named(spec["initContainers"]) == ["pdp", "migrate"]
    sidecar = spec["initContainers"][0]
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True
    assert sidecar["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["securityContext"]["fsGroup"] == 65532
    for container in (spec["initContainers"][1], spec["containers"][0]):
        assert {"name": "PDP_TARGET", "value": "unix:///run/pdp/pdp.sock"} in container["env"]
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert mounts["pdp-socket"] == "/run/pdp"
        assert mounts["pdp-workload-token"] == "/var/run/secrets/agent-pdp"
        assert "pdp-state" not in mounts, "the agent sees no ledger, key or audit log"
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert volumes["pdp-socket"]["emptyDir"]["medium"] == "Memory"


def test_the_sidecar_has_no_service_account_token(cluster: Cluster, namespace: str) -> None:
    spec = cluster.create(pod(namespace, inject=True), dry_run=True)["spec"]
    where = "/var/run/secrets/kubernetes.io/serviceaccount"
    mounts = {
        container["name"]: [
            mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == where
        ]
        for container in (*spec["initContainers"], *spec["containers"])
    }
    assert mounts["pdp"] == ["pdp-no-token"]
    (of_agent,) = mounts["agent"]
    assert of_agent.startswith("kube-api-access-")


def test_a_pod_that_does_not_ask_stays_as_it_is(cluster: Cluster, namespace: str) -> None:
    spec = cluster.create(pod(namespace, inject=False), dry_run=True)["spec"]
    assert "initContainers" not in spec
    assert named(spec["containers"]) == ["agent"]
    assert not [each for each in spec["volumes"] if each["name"].startswith("pdp-")]


def test_a_pod_that_has_the_sidecar_gets_no_second_one(cluster: Cluster, namespace: str) -> None:
    first = cluster.create(pod(namespace, inject=True), dry_run=True)
    again = pod(namespace, inject=True)
    again["spec"] = {key: first["spec"][key] for key in ("initContainers", "containers", "volumes")}
    spec = cluster.create(again, dry_run=True)["spec"]
    assert named(spec["initContainers"]) == ["pdp"]


def test_a_group_that_the_pod_has_chosen_stays(cluster: Cluster, namespace: str) -> None:
    chosen = pod(namespace, inject=True, securityContext={"fsGroup": 2000})
    assert cluster.create(chosen, dry_run=True)["spec"]["securityContext"]["fsGroup"] == 2000


@pytest.mark.parametrize(
    ("setting", "told"),
    (
        ("resorces.x=1", "resorces"),
        ("image.repository=", "image.repository is required"),
        ("image.digest=sha256:12", "/image/digest"),
        ("config.listen.unix=/tmp/x", "config.listen is set by the chart"),
        ("config.identity=null", "config.identity is required"),
        ("injection.enabled=perhaps", "/injection/enabled"),
        ("userId=0", "/userId"),
    ),
)
def test_a_wrong_value_is_refused_by_its_name(setting: str, told: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        render(
            CHART,
            f"--values={CHART / 'values-injection.yaml'}",
            f"--set={setting}",
            namespace="agents",
        )
    assert told in str(caught.value).replace("'", "")


def test_a_policy_of_the_network_guards_the_metrics_and_leaves_the_agent_its_ports() -> None:
    policies = [each for each in objects(rendered("shared")) if each["kind"] == "NetworkPolicy"]
    namespaces = {each["metadata"]["namespace"] for each in policies}
    assert namespaces == {"agents", "agents-blue", "agents-green"}, "policies count where pods are"
    for policy in policies:
        of_agent, metrics = policy["spec"]["ingress"]
        assert "from" not in of_agent, "whoever could reach the agent still can"
        open_ports = {
            port
            for each in of_agent["ports"]
            if each["protocol"] == "TCP"
            for port in range(each["port"], each["endPort"] + 1)
        }
        assert open_ports == set(range(1, 65536)) - {9464}
        assert metrics["ports"] == [{"port": 9464, "protocol": "TCP"}]
        assert metrics["from"]


def test_without_scrapers_nobody_in_the_network_reaches_the_metrics() -> None:
    manifests = rendered("shared", **{"networkPolicy.metricsFrom": "null"})
    (policy, *_) = (each for each in objects(manifests) if each["kind"] == "NetworkPolicy")
    assert len(policy["spec"]["ingress"]) == 1


def test_a_cluster_without_native_sidecars_takes_the_plain_container() -> None:
    options = (f"--values={CHART / 'values-plain-container.yaml'}", "--kube-version=1.27.0")
    assert render(CHART, *options, "--set=injection.enabled=true", namespace="agents")
    native = ("--set=injection.enabled=true", "--set=nativeSidecar=true")
    with pytest.raises(RuntimeError, match="this cluster has none"):
        render(CHART, *options, *native, namespace="agents")


def test_agents_of_two_charts_in_one_namespace_have_a_configuration_each(
    example_chart: Path,
) -> None:
    names = set()
    for release in ("blue", "green"):
        manifests = objects(render(example_chart, release=release, namespace="agents"))
        by_kind = {each["kind"]: each for each in manifests}
        name = by_kind["ConfigMap"]["metadata"]["name"]
        template = by_kind["Deployment"]["spec"]["template"]
        assert {"name": "pdp-config", "configMap": {"name": name}} in template["spec"]["volumes"]
        assert template["metadata"]["labels"]["agent-pdp/inject"] == "enabled"
        names.add(name)
    assert len(names) == 2


def test_the_schema_is_made_of_the_comments() -> None:
    script = ROOT / "scripts" / "generate_chart_schema.py"
    subprocess.run([sys.executable, script, "--check"], check=True)


def test_ones_own_chart_puts_the_sidecar_into_its_pods(
    cluster: Cluster, namespace: str, example_chart: Path
) -> None:
    for native in ("true", "false"):
        manifests = render(
            example_chart,
            f"--set=pdp.nativeSidecar={native}",
            release="agent",
            namespace=namespace,
        )
        (deployment,) = (
            each for each in cluster.apply(manifests, dry_run=True) if each["kind"] == "Deployment"
        )
        spec = deployment["spec"]["template"]["spec"]
        in_its_place = spec["initContainers" if native == "true" else "containers"]
        assert "pdp" in named(in_its_place)
        # What a Deployment's pods must be, nobody checks before there is one.
        cluster.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"agent-{native}", "namespace": namespace},
                "spec": spec,
            },
            dry_run=True,
        )
