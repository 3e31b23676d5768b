"""The webhook at a real API server, held against the policy that does the same."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.kubernetes.cluster import Cluster, Object
from tests.kubernetes.conftest import CHART, free_port, render, until

pytestmark = pytest.mark.kubernetes

PLAIN: Final = {"name": "agent", "image": "registry.example/agent"}
PODS: Final[dict[str, Object]] = {
    "one container": {"containers": [PLAIN]},
    "several": {
        "initContainers": [{**PLAIN, "name": "migrate"}],
        "containers": [PLAIN, {**PLAIN, "name": "second"}],
    },
    "with what it needs itself": {
        "containers": [
            {
                **PLAIN,
                "env": [{"name": "A", "value": "1"}],
                "volumeMounts": [{"name": "mine", "mountPath": "/mine"}],
            }
        ],
        "volumes": [{"name": "mine", "emptyDir": {}}],
        "securityContext": {"fsGroup": 2000, "runAsNonRoot": True},
        "imagePullSecrets": [{"name": "mine"}, {"name": "sidecar"}],
    },
    "with a way to change its volumes' group": {
        "containers": [PLAIN],
        "securityContext": {"fsGroup": 2000, "fsGroupChangePolicy": "Always"},
    },
}


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate of its own for loopback, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "webhook")])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    certificate, private = directory / "tls.crt", directory / "tls.key"
    certificate.write_bytes(signed.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, private


@pytest.fixture(scope="module", params=("true", "false"), ids=("native", "plain"))
def injected(
    request: pytest.FixtureRequest, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Two namespaces: of one the policy makes pods with the sidecar, of one the webhook."""
    kind = "native" if request.param == "true" else "plain"
    directory = tmp_path_factory.mktemp("webhook")
    namespaces = {way: cluster.make_namespace(f"{way}-{kind}") for way in ("policy", "webhook")}
    where = "injection.namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name"

    def manifests(way: str, *settings: str) -> list[Object]:
        rendered = render(
            CHART,
            f"--values={CHART / 'values-injection.yaml'}",
            f"--set=nativeSidecar={request.param}",
            "--set=image.pullSecrets={sidecar,spare}",
            f"--set={where}={namespaces[way]}",
            *settings,
            release=f"{way}-{kind}",
            namespace=namespaces[way],
        )
        return [each for each in yaml.safe_load_all(rendered) if each is not None]

    certificate, key = write_certificate(directory)
    port = free_port()
    webhook = manifests(
        "webhook",
        "--set=injection.enabled=false",
        "--set=injection.webhook.enabled=true",
        "--set=injection.webhook.certificateSecret=tls",
        f"--set=injection.webhook.caBundle={base64.b64encode(certificate.read_bytes()).decode()}",
    )
    file = directory / "injection.json"
    for each in webhook:
        if each["kind"] == "ConfigMap" and "injection.json" in each["data"]:
            file.write_text(each["data"]["injection.json"], encoding="utf-8")
        if each["kind"] == "MutatingWebhookConfiguration":
            # There is no network of the cluster here.
            client = each["webhooks"][0]["clientConfig"]
            del client["service"]
            client["url"] = f"https://127.0.0.1:{port}/inject"
    command = [
        *(sys.executable, "-m", "pdp", "injection-webhook", f"--injection={file}"),
        *(f"--certificate={certificate}", f"--key={key}", "--host=127.0.0.1", f"--port={port}"),
    ]
    applied = yaml.safe_dump_all([*manifests("policy"), *webhook])
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(lambda: "serving on" in (directory / "log").read_text(encoding="utf-8"))
        cluster.apply(applied)
        for namespace in namespaces.values():
            until(lambda namespace=namespace: has_it(cluster, namespace))  # type: ignore[misc]
        yield namespaces
    finally:
        cluster.kubectl("delete", "--filename=-", "--ignore-not-found", stdin=applied)
        process.terminate()
        assert process.wait(20) == 0


def made(cluster: Cluster, namespace: str, spec: Object) -> Object:
    labels = {"agent-pdp/inject": "enabled"}
    metadata = {"generateName": "agent-", "namespace": namespace, "labels": labels}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
    created: Object = cluster.create(pod, dry_run=True)["spec"]
    return created


def has_it(cluster: Cluster, namespace: str) -> bool:
    spec = made(cluster, namespace, PODS["one container"])
    return any(
        each["name"] == "pdp" for each in (*spec.get("initContainers", ()), *spec["containers"])
    )


def comparable(value: Any) -> Any:
    """Without the order of what has names, and the random one of the API server's own."""
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    if isinstance(value, list):
        found = [comparable(each) for each in value if not _is_of_server(each)]
        by_name = all(isinstance(each, dict) and "name" in each for each in found)
        return sorted(found, key=lambda each: str(each["name"])) if by_name else found
    return value


def _is_of_server(value: Any) -> bool:
    return isinstance(value, dict) and str(value.get("name", "")).startswith("kube-api-access-")


@pytest.mark.parametrize("case", PODS)
def test_webhook_and_policy_make_the_same_pod(
    cluster: Cluster, injected: dict[str, str], case: str
) -> None:
    by_policy = made(cluster, injected["policy"], PODS[case])
    by_webhook = made(cluster, injected["webhook"], PODS[case])
    for kind in ("initContainers", "containers"):
        names = [[each["name"] for each in spec.get(kind, [])] for spec in (by_policy, by_webhook)]
        assert names[0] == names[1]
    assert comparable(by_policy) == comparable(by_webhook)


def test_a_pod_that_asks_while_the_webhook_is_away_is_not_made(cluster: Cluster) -> None:
    namespace = cluster.make_namespace("no-webhook")
    manifests = render(
        CHART,
        f"--values={CHART / 'values-webhook.yaml'}",
        "--set=injection.namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name=no-webhook",
        "--set=configNamespaces={no-webhook}",
        release="away",
        namespace=namespace,
    )
    cluster.apply(manifests)
    try:
        until(lambda: _is_refused(cluster, namespace))
    finally:
        cluster.kubectl("delete", "--filename=-", stdin=manifests)


def _is_refused(cluster: Cluster, namespace: str) -> bool:
    try:
        made(cluster, namespace, PODS["one container"])
    except RuntimeError as error:
        return "failed calling webhook" in str(error)
    return False
