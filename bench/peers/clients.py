"""The clients that ask, each in a process of its own, told what to do by lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.servers import ROOT, resident_bytes


@dataclass(frozen=True, slots=True)
class Slice:
    """What one client saw of some calls."""

    ns: Sequence[int]
    """What each call took."""
    seconds: float
    """What all took together."""
    cpu_seconds: float
    """Of the client's process."""


class Client:
    def __init__(self, python: Path, asker: str, options: Mapping[str, Any], log: Path) -> None:
        """``asker`` is the MODULE:CLASS of :mod:`bench.peers.seat`."""
        self._asker = asker
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [str(python), "-W", "ignore", "-m", "bench.peers.seat", asker],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it looks for prices outside
                    "TMPDIR": str(log.parent),
                },
            )
        self._tell(options)
        self._asked = 0

    def cases(self) -> list[bool]:
        """Its answers to the cases that have a right one."""
        self._tell({"cases": True})
        found: list[bool] = self._hear()
        return found

    def ask(self, *, callers: int, calls: int) -> Slice:
        """Of so many callers at the same time, with arguments other than in any call before."""
        first, self._asked = self._asked, self._asked + calls
        self._tell({"callers": callers, "first": first, "calls": calls})
        found = self._hear()
        return Slice(found["ns"], found["seconds"], found["cpu_seconds"])

    def resident_bytes(self) -> int:
        return resident_bytes(self._process.pid)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _tell(self, what: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _hear(self) -> Any:  # noqa: ANN401 - what was asked for
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("\x1e"):
                return json.loads(line[1:])
        self._fail()
        return None

    def _fail(self) -> None:
        code = self._process.wait(20)
        said = self._log.read_text(encoding="utf-8", errors="replace")[-2_000:]
        raise RuntimeError(f"{self._asker} ended with {code}:\n{said}")
