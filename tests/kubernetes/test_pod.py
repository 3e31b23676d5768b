"""A pod with the sidecar, as the API server admits it and a kubelet runs it: out of the
image, as users who are not root, with a read-only root.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.conftest import Make, bundle, until
from tests.kubernetes.pod import Pod

pytestmark = pytest.mark.kubernetes


def said(pod: Pod) -> list[str]:
    return pod.log("agent").splitlines()


def records(pod: Pod) -> list[dict[str, Any]]:
    """The audit log, which is verified on the way."""
    audit = pod.volume("pdp-state") / "state" / "audit"
    verified = subprocess.run(
        [sys.executable, "-m", "pdp", "audit", "verify", str(audit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    return [
        json.loads(line)
        for segment in sorted(audit.glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]


def requests(pod: Pod, outcome: str) -> list[str]:
    """Of the calls that came to it; an outcome that was reported twice counts once."""
    return [
        each["request_id"]
        for each in records(pod)
        if each["outcome"] == outcome and "request_id" in each and "replayed" not in each
    ]


def ran(pod: Pod) -> int:
    return sum(line.startswith("ran ") for line in said(pod))


def test_the_agent_starts_when_the_sidecar_is_ready_and_stops_before_it(make: Make) -> None:
    pod = make()
    pod.start()
    until(lambda: ran(pod) > 20)
    codes = pod.delete()
    assert codes == {"agent": 0, "pdp": 0}
    assert pod.events == [
        "pdp started",
        "pdp startupProbe",
        "agent started",
        "agent SIGTERM",
        "agent ended 0",
        "pdp SIGTERM",
        "pdp ended 0",
    ]
    assert not [line for line in said(pod) if line.startswith("blocked")]
    assert len(requests(pod, "executed")) == ran(pod), "shutdown loses no audit record"


def test_containers_run_as_nobody_in_particular_and_write_nowhere_else(make: Make) -> None:
    pod = make()
    pod.start()
    until(lambda: ran(pod) > 0)
    for name, user in (("pdp", 65532), ("agent", 1000)):
        process = Path("/proc", str(pod.processes[name].pid))
        status = dict(
            line.split(":", 1) for line in (process / "status").read_text("utf-8").splitlines()
        )
        assert status["Uid"].split() == [str(user)] * 4
        assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 0
        assert status["NoNewPrivs"].split() == ["1"]
        mounts = [line.split() for line in (process / "mounts").read_text("utf-8").splitlines()]
        (root,) = (options for _, place, kind, options, *_ in mounts if kind == "overlay")
        assert "ro" in root.split(",")
    secrets_of_sidecar = {"pdp-state", "pdp-config", "pdp-policy"}
    seen = {each["name"] for each in pod.containers["agent"]["volumeMounts"]}
    assert not seen & secrets_of_sidecar
    assert pod.delete() == {"agent": 0, "pdp": 0}


def test_while_the_sidecar_is_away_tools_are_blocked_and_then_work_again(make: Make) -> None:
    pod = make()
    pod.start()
    until(lambda: ran(pod) > 20)
    pod.processes["pdp"].kill()
    until(lambda: any(line.startswith("blocked") for line in said(pod)))
    before = ran(pod)
    assert pod.processes["agent"].poll() is None, "the agent lives on"
    pod.restart("pdp")
    until(lambda: ran(pod) > before + 20)
    assert pod.delete() == {"agent": 0, "pdp": 0}
    allowed, executed = set(requests(pod, "allowed")), set(requests(pod, "executed"))
    assert executed <= allowed
    # What ran and could not be reported, since the sidecar was gone, is allowed all the same.
    assert len(executed) <= ran(pod) <= len(allowed)


def test_a_job_that_is_done_ends_its_sidecar(make: Make) -> None:
    pod = make(calls=25)
    pod.start()
    assert pod.wait_for_job() == 0
    assert pod.processes["pdp"].returncode == 0
    assert said(pod)[-1] == "done 25"
    assert len(requests(pod, "executed")) == 25


def test_a_config_map_that_is_swapped_comes_in_force_while_the_agent_runs(
    make: Make, tmp_path: Path
) -> None:
    pod = make()
    pod.start()
    until(lambda: ran(pod) > 20)
    pod.update("pdp-policy", {"bundle.tar.gz": bundle(tmp_path, reads_allowed=False)})
    until(lambda: any("blocked policy_" in line for line in said(pod)))
    assert pod.delete() == {"agent": 0, "pdp": 0}
    revisions = {each["policy_revision"] for each in records(pod) if "policy_revision" in each}
    assert len(revisions) == 2


def test_an_agent_that_is_slow_to_stop_is_waited_for(make: Make) -> None:
    pod = make()
    pod.start()
    until(lambda: ran(pod) > 0)
    pod.processes["agent"].send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    pod.spec["terminationGracePeriodSeconds"] = 2
    codes = pod.delete()
    assert codes["agent"] == -signal.SIGKILL
    assert time.monotonic() - stopped_at < 10
    assert pod.events.index("pdp SIGTERM") > pod.events.index("agent ended -9")
    assert records(pod), "the log is whole"
