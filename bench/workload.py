"""What a guard adds to a whole agent's workload: 1,000 tool calls, 80 % reads and 20 % writes,
for one tenant and for 1,000, by the same functions with a guard and without.

Run: python -m bench.workload [--rounds 5] [--output json]

Calls come in sessions of ten, eight reads and two writes, each by the next tenant; no two
have the same arguments. A write holds a call under two limits, runs, and reports. Reads are
measured under a permit for a thousand of them, and with a permit for each. Every way of
calling takes its turn of fifty calls before any takes its next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message

from bench.grown import NO_RATE, READ, ROLE, SCOPES, WRITE, tenant, write_bundle
from bench.smoke import cpu_seconds, read, update
from pdp.channel import Connection
from pdp.client import Guard
from pdp.testing import SidecarProcess, TokenIssuer

CALLS: Final = 1_000
SESSION: Final = 10
WRITES: Final = (4, 9)
"""Which calls of a session."""
TURN: Final = 50
TENANTS: Final = (1, 1_000)
WARM_UP: Final = 500


class Counting(Connection):
    """Counts what is sent to the sidecar, over the stream or as calls."""

    sent = 0

    def call(self, method: str, request: Message, metadata: Any = ()) -> Any:  # noqa: ANN401 - as what it wraps
        type(self).sent += 1
        return super().call(method, request, metadata)


class CountingGuard(Guard):
    """Sends over it."""

    _connect = Counting


@dataclass(slots=True)
class Spent:
    """What the calls of one way took."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {READ: [], WRITE: []})
    client_cpu: float = 0.0
    sidecar_cpu: float = 0.0
    sent: int = 0

    @property
    def calls(self) -> int:
        return sum(len(each) for each in self.seconds.values())


@dataclass(slots=True, kw_only=True)
class Way:
    """A way to call the two functions for so many tenants."""

    tenants: int
    name: str
    functions: dict[str, Callable[..., object]]
    acting: Callable[[str], contextlib.AbstractContextManager[object]]
    """For the token of whoever calls."""
    tokens: Sequence[str]
    sidecar: int | None
    """Process id of who is asked."""
    made: int = 0
    spent: Spent = field(default_factory=Spent)

    def turn(self, calls: int) -> None:
        """Make so many calls, whole sessions of them."""
        client, sent = time.process_time(), Counting.sent
        before = cpu_seconds(self.sidecar) if self.sidecar else 0.0
        for _ in range(calls // SESSION):
            self._session()
        self.spent.client_cpu += time.process_time() - client
        self.spent.sidecar_cpu += (cpu_seconds(self.sidecar) if self.sidecar else 0.0) - before
        self.spent.sent += Counting.sent - sent

    def _session(self) -> None:
        with self.acting(self.tokens[self.made // SESSION % len(self.tokens)]):
            for number in range(SESSION):
                self.made += 1
                order = str(self.made)
                tool = WRITE if number in WRITES else READ
                arguments = {"status": "shipped"} if tool == WRITE else {}
                function = self.functions[tool]
                began = time.perf_counter()
                function(order_id=order, **arguments)
                self.spent.seconds[tool].append(time.perf_counter() - began)


BARE, REUSED, EACH = "without a guard", "permits for 1,000 reads", "a permit for each call"


@contextlib.contextmanager
def ways(directory: Path, tenants: int) -> Iterator[list[Way]]:
    """All three ways for so many tenants; each guarded one asks a sidecar of its own."""
    issuer = TokenIssuer()
    tokens = [
        issuer.token(tenant(number), "alice", roles=[ROLE], scopes=SCOPES)
        for number in range(tenants)
    ]
    plain: dict[str, Callable[..., object]] = {READ: read, WRITE: update}
    with contextlib.ExitStack() as stack:
        found = [
            Way(
                tenants=tenants,
                name=BARE,
                functions=plain,
                acting=lambda _token: contextlib.nullcontext(),
                tokens=tokens,
                sidecar=None,
            )
        ]
        for name, reusable in ((REUSED, True), (EACH, False)):
            folder = directory / f"{tenants}-{reusable}"
            folder.mkdir()
            bundle = write_bundle(
                folder / "bundle.tar.gz", tenants=tenants, reusable_reads=reusable
            )
            sidecar = stack.enter_context(
                SidecarProcess(folder, issuer=issuer, bundle=bundle, config={"limits": NO_RATE})
            )
            assert sidecar.process is not None
            guard = stack.enter_context(CountingGuard(sidecar.target, timeout_seconds=20))
            found.append(
                Way(
                    tenants=tenants,
                    name=name,
                    functions={tool: guard.tool(tool)(each) for tool, each in plain.items()},
                    acting=guard.acting_for,
                    tokens=tokens,
                    sidecar=sidecar.process.pid,
                )
            )
        yield found


def measure(
    rounds: int,
    say: Callable[[str], None],
    *,
    calls: int = CALLS,
    sizes: Sequence[int] = TENANTS,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """``rounds`` times so many calls each way, for each number of tenants in ``sizes``."""
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="workload-")))
        every = [way for tenants in sizes for way in stack.enter_context(ways(directory, tenants))]
        for way in every:
            way.turn(warm_up)
            way.spent = Spent()
        say("warm")
        for number in range(rounds):
            for _ in range(calls // TURN):
                for way in every:
                    way.turn(TURN)
            say(f"round {number + 1} of {rounds}")
        results = [row for tenants in sizes for row in _results(every, tenants)]
    return {
        "calls": rounds * calls,
        "cores": os.cpu_count(),
        "ways": results,
        "tables": [_table(results)],
    }


def _results(every: Sequence[Way], tenants: int) -> Iterator[dict[str, Any]]:
    """Of the guarded ways, less what the bare functions took."""
    bare, *guarded = (way for way in every if way.tenants == tenants)
    bare_us = {tool: statistics.median(each) * 1e6 for tool, each in bare.spent.seconds.items()}
    for way in guarded:
        spent, calls = way.spent, way.spent.calls
        added = {
            tool: [taken * 1e6 - bare_us[tool] for taken in each]
            for tool, each in spent.seconds.items()
        }
        yield {
            "tenants": tenants,
            "way": way.name,
            "bare_us": {tool: round(us, 3) for tool, us in bare_us.items()},
            "reads_us": _cuts(added[READ]),
            "writes_us": _cuts(added[WRITE]),
            "all_us": _cuts(added[READ] + added[WRITE]),
            "rpcs_per_1000": round(spent.sent / calls * 1_000),
            "client_cpu_us": round((spent.client_cpu - bare.spent.client_cpu) / calls * 1e6, 1),
            "sidecar_cpu_us": round(spent.sidecar_cpu / calls * 1e6, 1),
        }


def _cuts(times: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=100)
    return {
        "mean": round(statistics.fmean(times), 1),
        "p50": round(cuts[49], 1),
        "p99": round(cuts[98], 1),
    }


def _table(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            f"{each['tenants']:,}",
            each["way"],
            f"{each['all_us']['mean'] / 1e3:,.2f}",
            *(
                f"{each[kind][cut]:,.0f}" if each[kind][cut] >= 10 else f"{each[kind][cut]:.1f}"
                for kind in ("reads_us", "writes_us")
                for cut in ("p50", "p99")
            ),
            f"{each['rpcs_per_1000']:,}",
            f"{each['client_cpu_us']:,.0f}",
            f"{each['sidecar_cpu_us']:,.0f}",
        ]
        for each in results
    ]
    return {
        "title": "What a guard adds to an agent's 1,000 calls: 800 reads, 200 writes",
        "heads": [
            "tenants",
            "reads under",
            "all calls: mean ms",
            "a read: p50 us",
            "p99",
            "a write: p50 us",
            "p99",
            "messages for 1,000 calls",
            "CPU us for a call: client",
            "sidecar",
        ],
        "rows": rows,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--output", choices=("text", "json"), default="text")
    chosen = options.parse_args()
    found = measure(chosen.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    if chosen.output == "json":
        print(json.dumps(found, indent=2))
        return
    for table in found["tables"]:
        print(table["title"])
        for row in (table["heads"], *table["rows"]):
            print("   ".join(f"{cell:>24}" for cell in row))


if __name__ == "__main__":
    main()
