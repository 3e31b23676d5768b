"""A sidecar under constant mixed load for a long time: ``python -m tests.faults.soak``.

Agents and guards come and go, bundles are reloaded, keys rotate, actors are revoked and
let act again. Once a second it is looked at what the process holds: memory, descriptors
and threads must not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pdp.client import Guard
from pdp.permit.ring import KeyRing
from pdp.policy.archive import pack, read_directory
from pdp.policy.compile import build_files
from pdp.revocation.file import RevocationFile
from pdp.revocation.revocations import Kind, Revocation, Target
from pdp.testing import SidecarProcess, TokenIssuer
from tests.faults.agents import ARGUMENTS, Agent

ROOT: Final = Path(__file__).resolve().parents[2]
AGENTS: Final = 4
GUARDS: Final = 2
PAUSE_SECONDS: Final = 0.02
"""Between two calls of an agent or a guard: the load is constant, and not all there is."""
VISIT_SECONDS: Final = 5.0
"""How long one stays before it goes, and another one comes."""
OPERATE_SECONDS: Final = 1.0
KEYS_KEPT: Final = 12
"""So that no key is retired whose permits are about."""
_CONFIG: Final = {
    "limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}},
    "permit": {"ttl_seconds": 60},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What the process holds at a moment."""

    at: float
    """Seconds since the load began."""
    resident_kib: int
    descriptors: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """How something went on after the warm-up."""

    first: float
    """Median of the first fifth, as is last."""
    last: float
    per_minute: float
    """Slope by least squares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a soak."""

    seconds: float
    warm_up_seconds: float
    calls: int
    operations: int
    """Reloads, rotations, revocations and their ends."""
    resident_kib: Trend
    descriptors: Trend
    threads: Trend
    every_minute: tuple[Sample, ...]
    """From the begin of the load on."""


def soak(folder: Path, *, seconds: float, warm_up_seconds: float, seed: int) -> Outcome:
    """Load a sidecar for so long. Raises whatever an agent, a guard or an operator raised."""
    issuer = TokenIssuer()
    releases = [_release(str(number)) for number in range(2)]
    bundle = folder / "bundle.tar.gz"
    bundle.write_bytes(releases[0])
    policy = {
        "bundles": {"all": {"path": str(bundle), "poll_seconds": 0.5}},
        "evaluation_timeout_ms": 10_000,  # this machine may be busy
    }
    with SidecarProcess(
        folder, issuer=issuer, bundle=bundle, config={**_CONFIG, "policy": policy}
    ) as sidecar:
        crowd = _Crowd(sidecar, issuer, seed)
        operator = _Operator(sidecar, bundle, releases)
        work = [crowd.be_an_agent] * AGENTS + [crowd.be_a_guard] * GUARDS + [operator.work]
        samples = _load(work, crowd, sidecar, seconds)
        assert sidecar.terminate() == 0
    warm = [sample for sample in samples if sample.at >= warm_up_seconds]
    return Outcome(
        seconds=seconds,
        warm_up_seconds=warm_up_seconds,
        calls=crowd.calls,
        operations=operator.operations,
        resident_kib=_trend(warm, lambda sample: sample.resident_kib),
        descriptors=_trend(warm, lambda sample: sample.descriptors),
        threads=_trend(warm, lambda sample: sample.threads),
        every_minute=tuple(
            after
            for before, after in itertools.pairwise(samples)
            if int(before.at // 60) != int(after.at // 60)
        ),
    )


def _load(
    work: Sequence[Callable[[threading.Event], None]],
    crowd: _Crowd,
    sidecar: SidecarProcess,
    seconds: float,
) -> list[Sample]:
    broken: list[BaseException] = []
    over = threading.Event()

    def run(part: Callable[[threading.Event], None]) -> None:
        try:
            part(over)
        except BaseException as error:  # noqa: BLE001 - raised below
            broken.append(error)
            over.set()

    threads = [threading.Thread(target=run, args=(part,)) for part in work]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    samples: list[Sample] = []
    while (at := time.monotonic() - began) < seconds and not over.wait(1.0):
        samples.append(_sample(sidecar, at))
    over.set()
    for thread in threads:
        thread.join(60)
    if broken:
        raise broken[0]
    return samples


class _Crowd:
    """Whoever calls."""

    def __init__(self, sidecar: SidecarProcess, issuer: TokenIssuer, seed: int) -> None:
        self._sidecar = sidecar
        self._issuer = issuer
        self._seed = seed
        self._lock = threading.Lock()
        self._visits = 0
        self.calls = 0

    def be_an_agent(self, over: threading.Event) -> None:
        """One after the other, each with a channel and a session of its own."""
        while not over.is_set():
            visit = self._begin_visit()
            dice = random.Random(f"{self._seed}-{visit}")  # noqa: S311 - to be done again alike
            agent = Agent(f"agent-{visit % 500}", f"tenant-{visit % 50}", self._issuer, dice)
            agent.meet(self._sidecar.target, str(uuid.uuid4()))
            self._visit(agent.act, over)
            agent.leave()

    def be_a_guard(self, over: threading.Event) -> None:
        """One after the other, each with a stream of questions and a watch."""
        while not over.is_set():
            visit = self._begin_visit()
            token = self._issuer.token(f"tenant-{visit % 50}", "user-7", roles=["agent"])
            with Guard(self._sidecar.target) as guard, guard.acting_for(token):

                def call(guard: Guard = guard) -> bool:
                    guard.executed(guard.authorize("orders.update", ARGUMENTS))
                    return True

                self._visit(call, over)

    def _begin_visit(self) -> int:
        with self._lock:
            self._visits += 1
            return self._visits

    def _visit(self, act: Callable[[], bool], over: threading.Event) -> None:
        ends_at = time.monotonic() + VISIT_SECONDS
        calls = 0
        while time.monotonic() < ends_at and not over.wait(PAUSE_SECONDS):
            assert act(), "the sidecar is gone"
            calls += 1
        with self._lock:
            self.calls += calls


class _Operator:
    """Whoever changes things."""

    def __init__(self, sidecar: SidecarProcess, bundle: Path, releases: Sequence[bytes]) -> None:
        self._bundle = bundle
        self._releases = releases
        self._keys = sidecar.state / "permit-key.pem"
        self._revocations = RevocationFile(sidecar.state / "revocations.json")
        self.operations = 0

    def work(self, over: threading.Event) -> None:
        """One thing after the other."""
        while not over.wait(OPERATE_SECONDS):
            (self._reload, self._rotate, self._revoke)[self.operations % 3]()
            self.operations += 1

    def _reload(self) -> None:
        draft = self._bundle.with_suffix(".draft")
        draft.write_bytes(self._releases[self.operations // 3 % 2])
        draft.replace(self._bundle)

    def _rotate(self) -> None:
        ring = KeyRing.from_file(self._keys).with_next()
        ring.signing_with(ring.keys[-1].kid).write(self._keys)
        ring = KeyRing.from_file(self._keys)
        if len(ring.keys) > KEYS_KEPT:
            ring.without(ring.keys[-1].kid).write(self._keys)

    def _revoke(self) -> None:
        target = Target(kind=Kind.ACTOR, tenant="tenant-0", name="nobody")
        revocation = Revocation(target=target, by="soak", reason="soak", at=int(time.time()))
        if self.operations // 3 % 2:
            asyncio.run(self._revocations.lift(target))
        else:
            asyncio.run(self._revocations.add(revocation))


def _sample(sidecar: SidecarProcess, at: float) -> Sample:
    assert sidecar.process is not None
    place = Path(f"/proc/{sidecar.process.pid}")
    status = dict(
        line.split(":", 1) for line in (place / "status").read_text(encoding="utf-8").splitlines()
    )
    return Sample(
        at=at,
        resident_kib=int(status["VmRSS"].split()[0]),
        descriptors=len(list((place / "fd").iterdir())),
        threads=int(status["Threads"]),
    )


def _trend(samples: Sequence[Sample], of: Callable[[Sample], float]) -> Trend:
    values = [of(sample) for sample in samples]
    fifth = max(1, len(values) // 5)
    slope = statistics.linear_regression([sample.at for sample in samples], values).slope
    return Trend(
        first=statistics.median(values[:fifth]),
        last=statistics.median(values[-fifth:]),
        per_minute=slope * 60,
    )


def _release(revision: str) -> bytes:
    sources = read_directory(ROOT / "tests/faults/policy")
    files = build_files(sources, opa=ROOT / ".tools/opa", revision=revision, sequence=None)
    return pack(files)


def main() -> int:
    """Soak for as long as is said, and print the outcome as JSON."""
    parser = argparse.ArgumentParser(description="Load a sidecar for a long time.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the outcome here too")
    arguments = parser.parse_args()
    seconds = arguments.minutes * 60
    with tempfile.TemporaryDirectory(prefix="pdp-soak-") as folder:
        outcome = soak(
            Path(folder), seconds=seconds, warm_up_seconds=seconds / 5, seed=arguments.seed
        )
    text = json.dumps(asdict(outcome), indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
