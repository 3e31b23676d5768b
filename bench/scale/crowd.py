"""Stubs in processes of their own, steered from here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from bench.scale.stubs import Job, Seat, Tally

ROOT = Path(__file__).parents[2]


class Crowd:
    """The stubs of a job, spread over processes. All have connected once it is made."""

    def __init__(self, job: Job, *, processes: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.scale.stubs"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(processes)
        ]
        for number, process in enumerate(self._processes):
            seats: Sequence[Seat] = job.seats[number::processes]
            self._tell(process, asdict(replace(job, seats=seats, seed=job.seed + number)))
        for process in self._processes:
            assert self._hear(process) == "connected"

    def work(self) -> Tally:
        """Have all of them do the job, and wait until it is done."""
        for process in self._processes:
            self._tell(process, "work")
        tally = Tally()
        for process in self._processes:
            tally.add(Tally.from_json(self._hear(process)))
        return tally

    def leave(self) -> None:
        """Close every stub."""
        for process in self._processes:
            process.communicate("leave\n", timeout=60)
            assert process.returncode == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def _tell(self, process: subprocess.Popen[str], what: object) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()

    def _hear(self, process: subprocess.Popen[str]) -> Any:  # noqa: ANN401 - what stubs say
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"stubs ended with {process.wait()}"
        return json.loads(line)
