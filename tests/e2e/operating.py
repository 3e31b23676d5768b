"""What tests do that act as operators of a running sidecar."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from pdp.testing import SidecarProcess


def command(sidecar: SidecarProcess, *words: str, code: int = 0) -> str:
    """What a pdp command prints that is given the sidecar's configuration."""
    ran = subprocess.run(
        [sys.executable, "-m", "pdp", *words, "--config", str(sidecar.config_file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran.stdout


def refused(*words: str) -> str:
    """What a pdp command says that can not do what it is asked."""
    ran = subprocess.run(
        [sys.executable, "-m", "pdp", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    return ran.stderr


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it holds within ten seconds."""
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def records(sidecar: SidecarProcess) -> list[dict[str, Any]]:
    """The audit log."""
    return [
        json.loads(line)
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]
