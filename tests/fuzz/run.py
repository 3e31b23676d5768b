"""Fuzz the targets for a while, as many at once as there are processors.

    python -m tests.fuzz.run --seconds 60 [--shared] [--merge] [TARGET ...]

Begins with the samples, the corpus and what was found before; new inputs are kept in
.fuzz/TARGET for the next time. What breaks something is put into tests/fuzz/found/TARGET, where
the tests run it from then on. `--merge` then adds to the corpus what reaches further.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from tests.fuzz import contract

ROOT: Final = Path(__file__).parents[2]
WORK: Final = ROOT / ".fuzz"
SUMMARY: Final = WORK / "summary.json"
MAX_INPUT_BYTES: Final = 4096
HANG_SECONDS: Final = 30
"""Of the clock, after which libFuzzer takes an input for one that never ends."""
START_AND_END_SECONDS: Final = 240
"""Most that a worker may take besides, on a busy machine."""
MERGE_SECONDS: Final = 600
MAX_RESIDENT_MEGABYTES: Final = 1024
_PROGRESS: Final = re.compile(r"#(\d+)\s.*cov: (\d+) ft: (\d+) corp: (\d+)")
_DONE: Final = re.compile(r"Done (\d+) runs")


@dataclass(frozen=True, slots=True)
class Result:
    """What came of fuzzing one target."""

    target: str
    runs: int
    coverage: int
    """Points in pdp's byte code that were reached."""
    inputs: int
    """How many of them it takes to reach these."""
    finding: str
    """The file that breaks it; empty where none was found."""
    output: str
    """The end of what was printed, where something was found."""


def fuzz(target: str, seconds: int) -> Result:
    """Fuzz a target for that long."""
    own, found = WORK / target, contract.FOUND / target
    own.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        samples, artifacts = Path(directory, "samples"), Path(directory, "artifacts")
        samples.mkdir()
        artifacts.mkdir()
        for sample in contract.load(target).samples():
            _keep(samples, sample)
        inputs = [path for path in (samples, contract.CORPUS / target, found) if path.is_dir()]
        output = _worker(
            target,
            f"-max_total_time={seconds}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-timeout={HANG_SECONDS}",
            f"-rss_limit_mb={MAX_RESIDENT_MEGABYTES}",
            f"-artifact_prefix={artifacts}/",
            "-print_final_stats=0",
            str(own),
            *map(str, inputs),
            seconds=seconds + START_AND_END_SECONDS,
            temporary=directory,
        )
        broken = [path.read_bytes() for path in artifacts.iterdir()]
    kept = [_keep(found, content) for content in broken]
    progress = _PROGRESS.findall(output) or [("0", "0", "0", "0")]
    ended = _DONE.search(output)
    shown = (
        str(kept[0].relative_to(ROOT)) if kept else "" if ended else "it did not come to its end"
    )
    return Result(
        target=target,
        runs=int(ended[1] if ended else progress[-1][0]),
        coverage=int(progress[-1][1]),
        inputs=int(progress[-1][3]),
        finding=shown,
        output=output[-4_000:] if shown else "",
    )


def merge(target: str) -> None:
    """Add to the corpus whatever reaches what nothing in it does."""
    corpus = contract.CORPUS / target
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        _worker(
            target,
            "-merge=1",
            str(corpus),
            str(WORK / target),
            seconds=MERGE_SECONDS,
            temporary=directory,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--shared", action="store_true", help="share the seconds among all")
    parser.add_argument("--merge", action="store_true", help="add to the corpus what is new")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="; ".join(contract.names()))
    asked = parser.parse_args(arguments)
    targets = asked.targets or contract.names()
    at_once = os.cpu_count() or 1
    seconds = asked.seconds
    if asked.shared:
        seconds = max(1, seconds * at_once // len(targets))
    with ThreadPoolExecutor(at_once) as pool:
        results = list(pool.map(lambda target: _shown(fuzz(target, seconds)), targets))
        if asked.merge:
            list(pool.map(merge, targets))
    SUMMARY.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    broken = [result for result in results if result.finding]
    for result in broken:
        _say(f"\n{result.target}: {result.finding}\n{result.output}")
        if result.finding.startswith("tests/"):
            _say(f"Again: .venv/bin/python -m tests.fuzz.worker {result.target} {result.finding}")
    return 1 if broken else 0


def _shown(result: Result) -> Result:
    _say(
        f"{result.target:20} {result.runs:9,} runs  {result.coverage:5} points"
        f"  {result.inputs:5} inputs  {result.finding or 'nothing found'}"
    )
    return result


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _worker(target: str, *arguments: str, seconds: int, temporary: str) -> str:
    """What it prints. libFuzzer ends a process as it likes, so it gets one of its own, and a
    folder for what it would leave behind.
    """
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.worker", target, *arguments],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": temporary},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode("utf-8", "replace")
    return ended.stdout.decode("utf-8", "replace")


def _keep(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(content).hexdigest()[:16]
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    sys.exit(main())
