"""What the overlays make, as a real API server takes it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest
import yaml

from pdp.config import load_config
from tests.kubernetes.cluster import TOOLS, Cluster, Object
from tests.kubernetes.conftest import ROOT, render

pytestmark = pytest.mark.kubernetes

OVERLAYS: Final = ROOT / "deploy" / "kustomize" / "overlays"
CASES: Final = sorted(path.name for path in OVERLAYS.iterdir())


def build(case: str) -> str:
    return subprocess.run(
        [TOOLS / "kubectl", "kustomize", OVERLAYS / case],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


def only(kind: str, manifests: str) -> Object:
    (found,) = (each for each in yaml.safe_load_all(manifests) if each["kind"] == kind)
    return dict(found)


@pytest.mark.parametrize("case", CASES)
def test_an_api_server_takes_every_manifest_and_the_pod(
    cluster: Cluster, agents: str, case: str
) -> None:
    manifests = build(case)
    for dry_run in (True, False):
        cluster.apply(manifests, dry_run=dry_run)
    spec = only("Deployment", manifests)["spec"]["template"]["spec"]
    metadata = {"name": f"agent-{case}", "namespace": agents}
    cluster.create(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}, dry_run=True
    )
    cluster.kubectl("delete", "--filename=-", stdin=manifests)


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_one_that_the_sidecar_takes(case: str, tmp_path: Path) -> None:
    file = tmp_path / "pdp.yaml"
    file.write_text(only("ConfigMap", build(case))["data"]["pdp.yaml"], encoding="utf-8")
    assert load_config(file, {"PDP_INSTANCE": "agent-7d4b9"}).listen.metrics


def test_the_sidecar_is_the_one_of_the_chart(example_chart: Path) -> None:
    overlay = only("Deployment", build("single"))["spec"]["template"]["spec"]
    (sidecar,) = overlay["initContainers"]
    name, _, digest = sidecar["image"].partition("@")
    chart = render(
        example_chart,
        *(f"--set=pdp.image.repository={name}", f"--set=pdp.image.digest={digest}"),
        namespace="agents",
    )
    rendered = only("Deployment", chart)["spec"]["template"]["spec"]
    for spec in (overlay, rendered):
        spec["initContainers"][0]["volumeMounts"].sort(key=lambda mount: mount["name"])
        spec["volumes"].sort(key=lambda volume: volume["name"])
        for volume in spec["volumes"]:
            if volume["name"] == "pdp-config":  # with a digest of its content, or a release
                volume["configMap"]["name"] = "pdp-config"
    assert overlay == rendered
