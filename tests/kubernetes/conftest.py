"""One API server for all, and the chart as Helm renders it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.cluster import TOOLS, Cluster

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "pdp"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as started:
        started.apply((TOOLS / "podmonitors.yaml").read_text(encoding="utf-8"))
        started.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd", "--all")
        yield started


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
