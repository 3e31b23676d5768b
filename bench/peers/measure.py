"""Ask every system the same, turn by turn, so that a slow moment of the machine hits all."""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.peers.clients import Client
from bench.peers.question import CASES
from bench.peers.servers import PEERS_PYTHON, Server
from bench.peers.systems import System

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Level:
    """So many callers at the same time, in so many slices of so many calls."""

    callers: int
    slices: int
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is asked."""

    levels: Sequence[Level]
    warm_up: int
    """Calls of each system before any count."""
    starts: int
    """Times that each server is started."""
    idle_seconds: float


FULL: Final = Plan(
    levels=(Level(1, 20, 500), Level(8, 8, 480), Level(32, 8, 640), Level(128, 5, 1_280)),
    warm_up=500,
    starts=5,
    idle_seconds=10.0,
)
QUICK: Final = Plan(
    levels=(Level(1, 4, 100), Level(8, 1, 160), Level(32, 1, 320), Level(128, 1, 384)),
    warm_up=100,
    starts=1,
    idle_seconds=1.0,
)


@dataclass(slots=True)
class Tally:
    """What the slices of one system at one level came to."""

    ns: list[int] = field(default_factory=list)
    p50_us: list[float] = field(default_factory=list)
    """Of each slice."""
    seconds: float = 0.0
    client_cpu_seconds: float = 0.0
    server_cpu_seconds: float = 0.0

    def take(self, client: Client, server: Server | None, level: Level) -> None:
        """One more slice."""
        before = server.cpu_seconds() if server else 0.0
        found = client.ask(callers=level.callers, calls=level.calls)
        self.server_cpu_seconds += (server.cpu_seconds() if server else 0.0) - before
        self.ns += found.ns
        self.p50_us.append(round(statistics.median(found.ns) / 1e3, 2))
        self.seconds += found.seconds
        self.client_cpu_seconds += found.cpu_seconds

    def to_json(self, *, served: bool) -> dict[str, Any]:
        calls, times = len(self.ns), sorted(self.ns)

        def us(share: float) -> float:
            return round(times[min(calls - 1, int(share * calls))] / 1e3, 2)

        return {
            "calls": calls,
            "p50_us": us(0.5),
            "p95_us": us(0.95),
            "p99_us": us(0.99),
            "p999_us": us(0.999),
            "calls_per_second": round(calls / self.seconds, 1),
            "client_cpu_us": round(self.client_cpu_seconds / calls * 1e6, 1),
            "server_cpu_us": round(self.server_cpu_seconds / calls * 1e6, 1) if served else None,
            "slice_p50_us": self.p50_us,
        }


def measure(
    systems: Sequence[System],
    servers: Mapping[str, Server],
    plan: Plan,
    folder: Path,
    *,
    tokens: Mapping[str, str],
    show: Show,
) -> dict[str, Any]:
    """What ``systems`` and the servers that they need took. Raises RuntimeError where one
    does not run, or decides otherwise than the others.
    """
    needed = {each.server: servers[each.server] for each in systems if each.server}
    with contextlib.ExitStack() as stack:
        started = _start(needed, plan.starts, stack)
        show("every server has started")
        clients = {each.name: _client(each, servers, folder, tokens, stack) for each in systems}
        for client in clients.values():
            client.ask(callers=1, calls=plan.warm_up)
        show("every system decides rightly, and is warm")
        tallies = {each.name: {level: Tally() for level in plan.levels} for each in systems}
        for level in plan.levels:
            for each in systems:
                clients[each.name].ask(callers=level.callers, calls=level.calls)
            for _ in range(level.slices):
                for each in systems:
                    tally = tallies[each.name][level]
                    tally.take(clients[each.name], needed.get(each.server), level)
            show(f"{level.callers} callers")
        resident = {name: server.resident_bytes() for name, server in needed.items()}
        idle = _idle(needed, plan.idle_seconds)
        return {
            "systems": {
                each.name: {
                    "title": each.title,
                    "group": each.group,
                    "server": each.server,
                    "client_resident_bytes": clients[each.name].resident_bytes(),
                    "levels": {
                        str(level.callers): tally.to_json(served=bool(each.server))
                        for level, tally in tallies[each.name].items()
                    },
                }
                for each in systems
            },
            "servers": {
                name: {
                    "start_seconds": round(statistics.median(started[name]), 3),
                    "resident_bytes": resident[name],
                    "idle_cores": round(idle[name], 5),
                }
                for name in needed
            },
        }


def _start(
    servers: Mapping[str, Server], times: int, stack: contextlib.ExitStack
) -> dict[str, list[float]]:
    """Start each so many times, turn by turn, and leave it running until the stack ends."""
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(times):
        for name, server in servers.items():
            seconds[name].append(server.start())
            if turn + 1 < times:
                server.stop()
            else:
                stack.callback(server.stop)
    return seconds


def _client(
    system: System,
    servers: Mapping[str, Server],
    folder: Path,
    tokens: Mapping[str, str],
    stack: contextlib.ExitStack,
) -> Client:
    where = servers[system.server].where if system.server else {}
    options: dict[str, Any] = {**where, **system.options}
    if system.shows_token:
        options["tokens"] = tokens
    client = Client(
        PEERS_PYTHON if system.of_peer else Path(sys.executable),
        system.asker,
        options,
        folder / f"{system.name}.log",
    )
    stack.callback(client.close)
    if system.decides:
        for case, allowed in zip(CASES, client.cases(), strict=True):
            if allowed != case.allowed:
                raise RuntimeError(f"{system.name} answers {allowed} to {case.name}")
    return client


def _idle(servers: Mapping[str, Server], seconds: float) -> dict[str, float]:
    """The share of a core that each uses when nobody asks."""
    before = {name: server.cpu_seconds() for name, server in servers.items()}
    time.sleep(seconds)
    return {
        name: (server.cpu_seconds() - before[name]) / seconds for name, server in servers.items()
    }
