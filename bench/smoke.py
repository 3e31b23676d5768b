"""Whether a decision still costs what it did: ratios against a floor that takes turns with it
in the same run, held against the recorded ones. A ratio that is more than a fifth worse in
each of three attempts fails.

Run: python -m bench.smoke [--record] [--output json]

Every slice asks the floor (:mod:`bench.floor`) and the sidecar by turns, some hundred calls
each; a ratio is the median of those of all slices, so that a slow moment of the machine hits
both sides of some slices and no more. The recorded ones are the medians of several attempts:
write them anew (``--record``, on a machine that does nothing else) when a change makes
something slower on purpose, or faster.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from bench.floor import CALL, Exchange
from bench.grown import NO_RATE, READ, ROLE, SCOPES, WRITE, tenant, write_bundle
from bench.peers.servers import Server, healthy
from pdp.channel import Connection
from pdp.client import Guard
from pdp.testing import SidecarProcess, TokenIssuer

RECORDED: Final = Path(__file__).with_name("smoke.json")
WORSE: Final = 1.2
"""Times the recorded ratio: from here on it fails."""
ATTEMPTS: Final = 3
RECORDING: Final = 7
"""Attempts of which the medians are recorded."""
BLOCK: Final = 100
"""Calls that are timed as one where a single one takes no longer than reading the clock."""
MEANING: Final = {
    "stream": "a decision over the stub's stream / an empty exchange on an open stream",
    "unary": "a decision as a call of its own / an empty call",
    "write": "a guarded call that holds, runs and reports / an empty exchange",
    "sidecar_cpu": "the sidecar's CPU for a decision / the empty server's for an exchange",
    "client_cpu": "the caller's CPU for a decision / for an empty exchange",
    "reusable": "a guarded call under a permit that it has / the bare function",
    "memory": "resident after the run, the sidecar / the empty server",
    "start": "from start to ready, the sidecar / the empty server",
}
Ratios = Mapping[str, float]

# Or what is called unary here would be asked over the stream, and nobody would know.
assert callable(Connection._message)  # noqa: SLF001


class _Unary(Connection):
    """Makes every question a call."""

    def _message(self, *_question: object) -> None:
        return None


class UnaryGuard(Guard):
    """Asks by calls alone."""

    _connect = _Unary


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much one attempt asks."""

    starts: int
    warm_up: int
    slices: int
    calls: int
    """In each turn of a slice."""
    blocks: int
    """Of the function, in each turn."""


USUAL: Final = Plan(starts=7, warm_up=300, slices=20, calls=60, blocks=20)


def cpu_seconds(pid: int) -> float:
    """Of a process so far, with every thread that it ever had; in nanoseconds' steps."""
    return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Turn:
    """What the calls of one turn took, each."""

    seconds: float
    """The median."""
    client_cpu: float
    server_cpu: float


def turn(call: Callable[[], object], calls: int, server: int) -> Turn:
    """Make so many calls, which the process ``server`` answers."""
    times = []
    before, own = cpu_seconds(server), time.process_time()
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    own, spent = time.process_time() - own, cpu_seconds(server) - before
    return Turn(statistics.median(times), own / calls, spent / calls)


def block_seconds(function: Callable[..., object], blocks: int) -> float:
    """The median of what so many blocks of calls took: a call that asks for the next permit
    is dear, and rare.
    """
    orders = [str(number) for number in range(BLOCK)]
    times = []
    for _ in range(blocks):
        began = time.perf_counter()
        for order in orders:
            function(order_id=order)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


class Calls:
    """What is called, and what it is held against."""

    def __init__(self, floor: Server, sidecar: Server, token: str) -> None:
        self.floor, self.sidecar = floor, sidecar
        self._stack = contextlib.ExitStack()
        channel = self._stack.enter_context(grpc.insecure_channel(str(floor.where["target"])))
        self.exchange = Exchange(channel)
        empty: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(CALL)
        self.empty_call = lambda: empty(b"")
        target = str(sidecar.where["target"])
        # The questions of one guard are never answered by what another has kept.
        kept = self._stack.enter_context(Guard(target, timeout_seconds=20))
        self._guard, self._unary = (
            self._stack.enter_context(kind(target, timeout_seconds=20, keep_permits=False))
            for kind in (Guard, UnaryGuard)
        )
        for guard in (kept, self._guard, self._unary):
            self._stack.enter_context(guard.acting_for(token))
        self.reads = kept.tool(READ)(read)
        self._writes = self._guard.tool(WRITE)(update)
        self._number = 0

    def order(self) -> str:
        """That no call before named."""
        self._number += 1
        return str(self._number)

    def stream(self) -> object:
        return self._guard.authorize(READ, {"order_id": self.order()})

    def unary(self) -> object:
        return self._unary.authorize(READ, {"order_id": self.order()})

    def write(self) -> object:
        return self._writes(order_id=self.order(), status="shipped")

    def warm_up(self, calls: int) -> None:
        for call in (self.exchange, self.empty_call, self.stream, self.unary, self.write):
            for _ in range(calls):
                call()
        deadline = time.monotonic() + 20
        while block_seconds(self.reads, 1) > BLOCK * 50e-6:  # until it has a permit that it keeps
            if time.monotonic() > deadline:
                raise RuntimeError("no permit is kept")
            time.sleep(0.01)

    def slice(self, plan: Plan) -> Ratios:
        floor, sidecar = self.floor.pid, self.sidecar.pid
        exchange = turn(self.exchange, plan.calls, floor)
        stream = turn(self.stream, plan.calls, sidecar)
        empty = turn(self.empty_call, plan.calls, floor)
        unary = turn(self.unary, plan.calls, sidecar)
        write = turn(self.write, plan.calls, sidecar)
        bare = block_seconds(read, plan.blocks)
        return {
            "stream": stream.seconds / exchange.seconds,
            "unary": unary.seconds / empty.seconds,
            "write": write.seconds / exchange.seconds,
            "sidecar_cpu": stream.server_cpu / exchange.server_cpu,
            "client_cpu": stream.client_cpu / exchange.client_cpu,
            "reusable": block_seconds(self.reads, plan.blocks) / bare,
        }

    def close(self) -> None:
        self._stack.close()


def read(order_id: str) -> str:
    return order_id


def update(order_id: str, status: str) -> str:
    return f"{order_id} is {status}"


def measure(plan: Plan, *, environment: Mapping[str, str] | None = None) -> Ratios:
    """The ratios of one attempt. ``environment`` is added to that of the sidecar."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smoke-")))
        issuer = TokenIssuer()
        token = issuer.token(tenant(0), "alice", roles=[ROLE], scopes=SCOPES)
        floor = _floor(folder / "floor")
        bundle = write_bundle(folder / "bundle.tar.gz", reusable_reads=True)
        sidecar = stack.enter_context(
            serving(folder / "sidecar", issuer, bundle, environment=environment)
        )
        stack.callback(floor.stop)
        start = _start_ratio(floor, sidecar, plan.starts)
        calls = Calls(floor, sidecar, token)
        stack.callback(calls.close)
        calls.warm_up(plan.warm_up)
        slices = [calls.slice(plan) for _ in range(plan.slices)]
        medians = {name: statistics.median(each[name] for each in slices) for name in slices[0]}
        memory = resident_bytes(sidecar.pid) / resident_bytes(floor.pid)
        return {**medians, "memory": memory, "start": start}


_WITH_BYTECODE: Final = {"PYTHONDONTWRITEBYTECODE": ""}
"""As in an image, where it is there, and not made anew at each start."""


def _floor(folder: Path) -> Server:
    target = f"unix:{folder / 'f.sock'}"
    return Server(
        [sys.executable, "-m", "bench.floor", target],
        ready=healthy(target),
        where={"target": target},
        folder=folder,
        environment=_WITH_BYTECODE,
    )


@contextlib.contextmanager
def serving(
    folder: Path,
    issuer: TokenIssuer,
    bundle: Path,
    *,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A sidecar that can be started and stopped, with no limits on rates. ``config`` takes the
    place of whole sections.
    """
    folder.mkdir(exist_ok=True)
    with contextlib.closing(
        SidecarProcess(
            folder, issuer=issuer, bundle=bundle, config={"limits": NO_RATE, **(config or {})}
        )
    ) as configured:
        sidecar = Server(
            [sys.executable, "-m", "pdp", "serve", "--config", configured.config_file],
            ready=healthy(configured.target),
            where={"target": configured.target},
            folder=folder,
            environment={**_WITH_BYTECODE, **(environment or {})},
        )
        try:
            yield sidecar
        finally:
            sidecar.stop()


def _start_ratio(floor: Server, sidecar: Server, starts: int) -> float:
    """Of the fastest starts, which take turns; both are left running. What a machine does
    besides makes a start slower and never faster.
    """
    seconds: dict[Server, list[float]] = {sidecar: [], floor: []}
    for number in range(starts + 1):
        for server, taken in seconds.items():
            if number:
                server.stop()
            taken.append(server.start())
    # The first one leaves bytecode and state.
    return min(seconds[sidecar][1:]) / min(seconds[floor][1:])


def best(attempts: Sequence[Ratios]) -> Ratios:
    """The least of each ratio."""
    return {name: min(each[name] for each in attempts) for name in attempts[0]}


def worse(recorded: Ratios, found: Ratios) -> list[str]:
    """Which ratios are more than a fifth above the recorded ones. One that is not on both
    sides raises KeyError: nothing falls out of the comparison unseen.
    """
    if recorded.keys() != found.keys():
        raise KeyError(*sorted(recorded.keys() ^ found.keys()))
    return [name for name in recorded if found[name] > recorded[name] * WORSE]


def judge(
    recorded: Ratios, attempt: Callable[[], Ratios], say: Callable[[str], None]
) -> tuple[Ratios, list[str]]:
    """The best ratios of as many attempts as it takes, three at most, until none is worse;
    and those that are.
    """
    attempts: list[Ratios] = []
    while True:
        attempts.append(attempt())
        found = best(attempts)
        failed = worse(recorded, found)
        if not failed or len(attempts) == ATTEMPTS:
            return found, failed
        say(f"attempt {len(attempts)}: worse in {', '.join(failed)}; once more")


def recording(attempts: Sequence[Ratios], *, load_average: float) -> dict[str, Any]:
    """What is written down: of each ratio the median, and how far attempts lay apart; and
    how busy the machine was before.
    """
    ratios = {name: [each[name] for each in attempts] for name in attempts[0]}
    return {
        "measured_on": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()},"
        f" Python {platform.python_version()}",
        "load_average": round(load_average, 2),
        "attempts": len(attempts),
        "ratios": {name: round(statistics.median(each), 3) for name, each in ratios.items()},
        "lowest": {name: round(min(each), 3) for name, each in ratios.items()},
        "highest": {name: round(max(each), 3) for name, each in ratios.items()},
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _record(file: Path) -> None:
    load_average, attempts = os.getloadavg()[0], []
    for number in range(RECORDING):
        attempts.append(measure(USUAL))
        _say(f"attempt {number + 1} of {RECORDING}")
    file.write_text(
        json.dumps(recording(attempts, load_average=load_average), indent=2) + "\n",
        encoding="utf-8",
    )
    _say(f"written to {file}")


def _show(recorded: Ratios, found: Ratios, failed: Sequence[str]) -> None:
    for name, ratio in found.items():
        verdict = "WORSE" if name in failed else "ok"
        print(
            f"{name:12} {ratio:8.2f}   recorded {recorded[name]:8.2f}"
            f"   x {ratio / recorded[name]:4.2f}  {verdict:5}  {MEANING[name]}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all as recorded, or better. 1: something is worse."""
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--record", action="store_true", help="write the recorded ratios anew")
    options.add_argument("--recorded", type=Path, default=RECORDED, help="where they are")
    options.add_argument("--output", choices=("text", "json"), default="text")
    chosen = options.parse_args(arguments)
    if chosen.record:
        _record(chosen.recorded)
        return 0
    recorded = json.loads(chosen.recorded.read_text("utf-8"))["ratios"]
    _say(f"the load average is {os.getloadavg()[0]:.1f} before: ratios are for a quiet machine")
    found, failed = judge(recorded, lambda: measure(USUAL), _say)
    if chosen.output == "json":
        print(json.dumps({"ratios": found, "recorded": recorded, "worse": failed}, indent=2))
    else:
        _show(recorded, found, failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
