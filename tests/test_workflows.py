"""What runs with the repository's rights runs only what it names by digest, and nothing that
others can write into it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT: Final = Path(__file__).resolve().parent.parent
WORKFLOWS: Final = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    used = re.findall(r"uses: (\S+)(.*)", workflow.read_text(encoding="utf-8"))
    assert used
    for action, version in used:
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", version)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_is_pasted_into_what_a_shell_runs(workflow: Path) -> None:
    for step in steps(workflow):
        assert "${{" not in step.get("run", "")


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_job_says_what_it_may_do(workflow: Path) -> None:
    found = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert found["permissions"] == {}
    assert all("permissions" in job for job in found["jobs"].values())


def test_what_runs_the_code_of_others_may_write_nothing_and_knows_no_secret() -> None:
    (release,) = (path for path in WORKFLOWS if path.stem == "release")
    jobs = yaml.safe_load(release.read_text(encoding="utf-8"))["jobs"]
    assert jobs["build"]["permissions"] == {"contents": "read"}
    assert "secrets." not in yaml.safe_dump(jobs["build"])
    # And what knows them builds none of it, and runs no image.
    run = "\n".join(step.get("run", "") for step in jobs["publish"]["steps"])
    assert not re.search(r"\bpip\b|\bmake\b|\bdocker\b", run)


def test_everything_has_the_version_that_a_tag_must_be() -> None:
    (version,) = re.findall(
        r'^__version__ = "(.+)"$', (ROOT / "pdp/__init__.py").read_text("utf-8"), re.MULTILINE
    )
    chart = yaml.safe_load((ROOT / "deploy/helm/pdp/Chart.yaml").read_text("utf-8"))
    assert chart["version"] == chart["appVersion"] == version
