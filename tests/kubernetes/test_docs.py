"""Every manifest of docs/kubernetes.md is one that an API server takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
import yaml

from pdp.config import load_config
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.conftest import CHART, ROOT, render

pytestmark = pytest.mark.kubernetes

PAGE: Final = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
BLOCKS: Final = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
VALUES: Final = [block for block in BLOCKS if block.startswith("# values\n")]
MANIFESTS: Final = [block for block in BLOCKS if not block.startswith("# values\n")]


def test_there_is_something_to_look_at() -> None:
    assert len(VALUES) == 3
    assert len(MANIFESTS) == 1


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_values_make_what_the_api_server_and_the_sidecar_take(
    cluster: Cluster, tmp_path: Path, number: int
) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(VALUES[number], encoding="utf-8")
    namespace = cluster.make_namespace(f"docs-{number}")
    rendered = render(
        CHART,
        f"--values={values}",
        f"--set=configNamespaces={{{namespace}}}",
        release=f"docs-{number}",
        namespace=namespace,
    )
    try:
        applied = cluster.apply(rendered)
    finally:
        cluster.kubectl("delete", "--filename=-", stdin=rendered)
    (config,) = (each for each in applied if each["kind"] == "ConfigMap")
    file = tmp_path / "pdp.yaml"
    file.write_text(config["data"]["pdp.yaml"], encoding="utf-8")
    assert load_config(file, {"PDP_INSTANCE": "agent-7d4b9"}).listen.metrics


@pytest.mark.parametrize("number", range(len(MANIFESTS)))
def test_manifests_are_taken_with_the_pod_in_them(
    cluster: Cluster, agents: str, number: int
) -> None:
    (applied,) = cluster.apply(MANIFESTS[number], dry_run=True)
    pod = applied["spec"]["template"]["spec"]
    metadata = {"name": f"docs-{number}", "namespace": agents}
    cluster.create(
        {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}, dry_run=True
    )


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
    assert yaml.safe_load(BLOCKS[0])
