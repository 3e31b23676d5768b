"""What grows with what: tenants, tools, rules, arguments, entries in the ledger, sidecars on
one Redis. Each axis runs all its sizes side by side, and they take turns, so that a ratio to
the smallest holds on a machine that has slow moments.

Run: python -m bench.growth [--axes tenants tools ...] [--quick] [--output json]

Decisions are asked over the stub's stream, one at a time, arguments other than in any call
before. The ledger is asked by itself; its entries are put there by one statement in its own
schema, with keys spread as random ones are, since making ten million calls would take days.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import apsw

from bench.grown import READ, ROLE, SCOPES, WRITE, tenant, write_bundle
from bench.peers.servers import Server
from bench.smoke import cpu_seconds, resident_bytes, serving
from pdp.budget.ledger import Account, Charge, IdempotencyKey, Limit, Scope, Window
from pdp.budget.sqlite import PRUNE_BATCH, SqliteLedger
from pdp.client import Guard
from pdp.errors import PdpError
from pdp.storage import Durability
from pdp.testing import TokenIssuer
from tests.budget.redis_server import RedisServer

ACTING: Final = 10
"""Tenants that call, spread over all there are: what grows is how many are known."""
FLAT_AT: Final = 10_000
"""Up to so many tenants a decision is to take what it takes with the fewest."""
MANY_TENANTS_MIB: Final = {100_000: 4_096}
"""The usual bound on a policy's memory has room for some 10,000 tenants."""
KIB: Final = 1_024
MOST_TEXT: Final = 1_024 * KIB
DAY_SECONDS: Final = 86_400
CLEARED_BY_A_CALL: Final = 2 * PRUNE_BATCH
"""Answers at most: a call holds, and settles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    slices: int
    calls: int
    """Of each size in each slice."""
    tenants: Sequence[int]
    tools: Sequence[int]
    rules: Sequence[int]
    arguments_kib: Sequence[int]
    entries: Sequence[int]
    sidecars: Sequence[int]


FULL: Final = Effort(
    slices=24,
    calls=40,
    tenants=(10, 100, 1_000, 10_000, 100_000),
    tools=(2, 10, 100, 1_000),
    rules=(1, 10, 100, 500),
    arguments_kib=(1, 10, 100, 1_000),
    entries=(10, 1_000, 100_000, 1_000_000, 10_000_000),
    sidecars=(1, 4, 16, 64),
)
QUICK: Final = Effort(
    slices=3,
    calls=10,
    tenants=(10, 100),
    tools=(2, 10),
    rules=(1, 10),
    arguments_kib=(1, 10),
    entries=(10, 1_000),
    sidecars=(1, 2),
)

Say = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Size:
    """One size of an axis, and what its calls took."""

    size: int
    call: Callable[[], object]
    servers: Sequence[int] = ()
    """Process ids of those whose CPU counts."""
    medians: list[float] = field(default_factory=list)
    """Seconds, of each slice."""
    cpu: list[float] = field(default_factory=list)
    """Seconds of the servers for a call, of each slice."""
    more: dict[str, float] = field(default_factory=dict)
    """What else was measured."""

    def turn(self, calls: int) -> None:
        before, times = sum(map(cpu_seconds, self.servers)), []
        for _ in range(calls):
            began = time.perf_counter()
            self.call()
            times.append(time.perf_counter() - began)
        self.cpu.append((sum(map(cpu_seconds, self.servers)) - before) / calls)
        self.medians.append(statistics.median(times))

    def beside(self, smallest: Size) -> dict[str, float]:
        """In numbers, with the ratio of the slices that both took."""
        found = {
            "size": self.size,
            "p50_us": round(statistics.median(self.medians) * 1e6, 1),
            "ratio": round(_ratio(self.medians, smallest.medians), 3),
        }
        if self.servers:
            found["cpu_us"] = round(statistics.median(self.cpu) * 1e6, 1)
            found["cpu_ratio"] = round(_ratio(self.cpu, smallest.cpu), 3)
        return found | self.more


def _ratio(of: Sequence[float], to: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(of, to, strict=True))


def take_turns(sizes: Sequence[Size], effort: Effort) -> list[dict[str, float]]:
    """Measure them side by side; the first turns warm up."""
    for each in sizes:
        each.turn(effort.calls)
        each.turn(effort.calls)
        each.medians.clear()
        each.cpu.clear()
    for number in range(effort.slices):
        # Nobody always comes after the same one.
        first = number % len(sizes)
        for each in (*sizes[first:], *sizes[:first]):
            each.turn(effort.calls)
    return [each.beside(sizes[0]) for each in sizes]


class Asking:
    """Asks one sidecar for a tool, by turns for tenants that are spread over all it knows."""

    def __init__(
        self, guard: Guard, tokens: Sequence[str], tool: str, arguments: Mapping[str, str]
    ) -> None:
        self._guard, self._tokens = guard, tokens
        self._tool, self._arguments = tool, arguments
        self._number = 0

    def __call__(self) -> object:
        self._number += 1
        with self._guard.acting_for(self._tokens[self._number % len(self._tokens)]):
            return self._guard.authorize(
                self._tool, {"order_id": str(self._number), **self._arguments}
            )


def tokens_of(issuer: TokenIssuer, tenants: int) -> list[str]:
    acting = min(ACTING, tenants)
    return [
        issuer.token(tenant(number * tenants // acting), "alice", roles=[ROLE], scopes=SCOPES)
        for number in range(acting)
    ]


def started(server: Server) -> dict[str, float]:
    """Milliseconds from start to ready: the second time, with a state directory in use."""
    server.start()
    server.stop()
    return {"start_ms": round(server.start() * 1e3)}


def decisions(
    sizes: Sequence[int],
    effort: Effort,
    say: Say,
    *,
    bundle: Callable[[int], dict[str, Any]],
    policy_mib: Mapping[int, int] | None = None,
    tool: str = WRITE,
    arguments: Callable[[int], Mapping[str, str]] = lambda _size: {"status": "shipped"},
) -> list[dict[str, float]]:
    """A sidecar for each size; ``bundle`` gives the options of its bundle, ``policy_mib`` a
    bound on its policy's memory where that is not the usual one.
    """
    issuer = TokenIssuer()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="growth-")))
        points = []
        for size in sizes:
            options = bundle(size)
            file = write_bundle(directory / f"{size}.tar.gz", **options)
            policy: dict[str, Any] = {"bundle": str(file)}
            if policy_mib and size in policy_mib:
                policy["max_memory_mib"] = policy_mib[size]
            server = stack.enter_context(
                serving(directory / str(size), issuer, file, config={"policy": policy})
            )
            more = started(server)
            say(f"  {size:,} is ready")
            guard = stack.enter_context(
                Guard(str(server.where["target"]), timeout_seconds=20, keep_permits=False)
            )
            asking = Asking(
                guard, tokens_of(issuer, options.get("tenants", 1)), tool, arguments(size)
            )
            points.append(Size(size=size, call=asking, servers=[server.pid], more=more))
        found = take_turns(points, effort)
        for point, row in zip(points, found, strict=True):
            row["resident_mib"] = round(resident_bytes(point.servers[0]) / 2**20, 1)
        return found


def by_tenants(effort: Effort, say: Say) -> list[dict[str, float]]:
    return decisions(
        effort.tenants,
        effort,
        say,
        bundle=lambda size: {"tenants": size},
        policy_mib=MANY_TENANTS_MIB,
    )


def by_tools(effort: Effort, say: Say) -> list[dict[str, float]]:
    return decisions(effort.tools, effort, say, bundle=lambda size: {"tools": size})


def by_rules(effort: Effort, say: Say) -> list[dict[str, float]]:
    return decisions(effort.rules, effort, say, bundle=lambda size: {"rules": size})


def by_arguments(effort: Effort, say: Say) -> list[dict[str, float]]:
    found = decisions(
        effort.arguments_kib,
        effort,
        say,
        bundle=lambda _size: {"longest_text": MOST_TEXT},
        tool=READ,
        arguments=lambda size: {"text": "x" * (size * KIB)},
    )
    found.append(beyond_the_bound())
    return found


def beyond_the_bound() -> dict[str, Any]:
    """More than a megabyte is refused: the reason, and what that takes."""
    issuer = TokenIssuer()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="growth-")))
        file = write_bundle(directory / "bundle.tar.gz", longest_text=MOST_TEXT)
        server = stack.enter_context(serving(directory / "sidecar", issuer, file))
        server.start()
        guard = stack.enter_context(Guard(str(server.where["target"]), keep_permits=False))
        stack.enter_context(guard.acting_for(tokens_of(issuer, 1)[0]))
        times, reasons = [], set()
        for number in range(10):
            began = time.perf_counter()
            try:
                guard.authorize(READ, {"order_id": str(number), "text": "x" * (MOST_TEXT + KIB)})
            except PdpError as error:
                reasons.add(str(error.reason_code))
            times.append(time.perf_counter() - began)
        (reason,) = reasons
        return {
            "size": MOST_TEXT // KIB + 1,
            "p50_us": round(statistics.median(times) * 1e6, 1),
            "refused": reason,
        }


# The ledger.

_ACCOUNT: Final = Account(tenant=tenant(0), actor="alice", tool=WRITE)
_CHARGES: Final = (Charge("tools", "calls", 1),)
_LIMITS: Final = tuple(
    Limit(
        id=f"calls-{scope}",
        budget="tools",
        unit="calls",
        window=Window.DAY,
        limit=10**12,
        scope=scope,
    )
    for scope in (Scope.TENANT, Scope.ACTOR)
)
_NOTHING: Final = "0" * 64
# Of a call that was settled two rows that answer it again, and its hold. i runs in the order
# of age, and its share of all in the order of keys: b-trees fill fast, and new keys, which are
# random, fall between the old ones.
_FILL: Final = """
WITH RECURSIVE call(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM call WHERE i < :calls)
INSERT INTO {table} SELECT {columns} FROM call, {table} AS one WHERE one.{where}
"""
_KEY: Final = "printf('%08x-0000-4000-8000-%012x', i * 4294967295 / :calls, i)"


@dataclass(slots=True)
class Store:
    """A ledger with so many entries, and the clock that it goes by."""

    ledger: SqliteLedger
    loop: asyncio.AbstractEventLoop
    later_seconds: float = 0.0

    def call(self) -> object:
        """Hold for one call, and settle it."""
        return self.loop.run_until_complete(self._call())

    async def _call(self) -> None:
        name = str(uuid.uuid4())
        hold = await self.ledger.reserve(
            _ACCOUNT,
            IdempotencyKey(operation="reserve", key=name, content_sha256=_NOTHING),
            charges=_CHARGES,
            limits=_LIMITS,
            ttl_seconds=60,
        )
        await self.ledger.settle(
            _ACCOUNT,
            IdempotencyKey(operation="settle", key=name, content_sha256=_NOTHING),
            hold_id=hold.id,
            charges=None,
        )


def fill(file: Path, calls: int) -> None:
    """Copy the one call that is there, so many times over."""
    connection = apsw.Connection(str(file))
    connection.execute("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")
    # Answers are numbered in the order of their age: both of a call side by side.
    copied = (
        ("hold", "id = (SELECT min(id) FROM hold)", {"id": _KEY}),
        ("answer", "sequence = 1", {"key": _KEY, "hold": _KEY, "sequence": "2 * i + 1"}),
        ("answer", "sequence = 2", {"key": _KEY, "sequence": "2 * i + 2"}),
    )
    for name, where, changed in copied:
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({name})")]
        connection.execute(
            _FILL.format(
                table=name,
                columns=", ".join(changed.get(each, f"one.{each}") for each in columns),
                where=where,
            ),
            {"calls": calls},
        )
    connection.close()
    # As the ledger keeps it.
    connection = apsw.Connection(str(file))
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()


@contextlib.contextmanager
def filled(file: Path, entries: int, loop: asyncio.AbstractEventLoop) -> Iterator[Size]:
    def clock() -> float:
        return time.time() + store.later_seconds

    def opened() -> SqliteLedger:
        return SqliteLedger(file, durability=Durability.PROCESS, clock=clock)

    store = Store(opened(), loop)
    store.call()
    loop.run_until_complete(store.ledger.close())
    began = time.perf_counter()
    fill(file, entries // 2)
    more = {"fill_s": round(time.perf_counter() - began, 1)}
    more["file_mib"] = round(file.stat().st_size / 2**20, 1)
    began = time.perf_counter()
    store.ledger = opened()
    store.call()
    more["open_ms"] = round((time.perf_counter() - began) * 1e3, 1)
    try:
        yield Size(size=entries, call=store.call, more=more)
    finally:
        loop.run_until_complete(store.ledger.close())


def by_entries(effort: Effort, say: Say) -> list[dict[str, float]]:
    loop = asyncio.new_event_loop()
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="growth-")))
        points = []
        for entries in effort.entries:
            points.append(
                stack.enter_context(filled(directory / f"{entries}.sqlite", entries, loop))
            )
            say(f"  {entries:,} are there")
        found = take_turns(points, effort)
        # Two days later all of them are out of retention, and each call clears some away.
        for point in points:
            store = point.call.__self__  # type: ignore[attr-defined]
            store.later_seconds = 2 * DAY_SECONDS
        clearing = take_turns(points, effort)
        cleared = CLEARED_BY_A_CALL * effort.calls * (effort.slices + 2)
        for row, later in zip(found, clearing, strict=True):
            if row["size"] > cleared:  # or they were gone before the end
                row["clearing_p50_us"] = later["p50_us"]
                row["clearing_ratio"] = later["ratio"]
        return found


# Sidecars on one Redis.


class RoundRobin:
    """Asks one after the other."""

    def __init__(self, every: Sequence[Callable[[], object]]) -> None:
        self._every = every
        self._number = 0

    def __call__(self) -> object:
        self._number += 1
        return self._every[self._number % len(self._every)]()


def by_sidecars(effort: Effort, say: Say) -> list[dict[str, float]]:
    """All are connected all the time, and so many of them are asked, by turns."""
    issuer = TokenIssuer()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="growth-")))
        store = RedisServer(directory / "redis").start()
        stack.callback(store.stop)
        assert store.process is not None
        file = write_bundle(directory / "bundle.tar.gz")
        tokens = tokens_of(issuer, 1)
        asking = []
        for number in range(max(effort.sidecars)):
            server = stack.enter_context(
                serving(
                    directory / str(number),
                    issuer,
                    file,
                    config={
                        "instance": f"sidecar-{number}",
                        "budget": {"store": {"unix": str(store.socket), "timeout_ms": 10_000}},
                    },
                )
            )
            server.start()
            guard = stack.enter_context(
                Guard(str(server.where["target"]), timeout_seconds=20, keep_permits=False)
            )
            asking.append(Asking(guard, tokens, WRITE, {"status": "shipped"}))
        say(f"  {len(asking)} sidecars are ready")
        for each in asking:
            each()
        return take_turns(
            [
                Size(size=count, call=RoundRobin(asking[:count]), servers=[store.process.pid])
                for count in effort.sidecars
            ],
            effort,
        )


# What it comes to.

AXES: Final[Mapping[str, Callable[[Effort, Say], list[dict[str, Any]]]]] = {
    "tenants": by_tenants,
    "tools": by_tools,
    "rules": by_rules,
    "arguments": by_arguments,
    "ledger": by_entries,
    "sidecars": by_sidecars,
}
_TITLES: Final = {
    "tenants": "Tenants in the policy; ten of them call",
    "tools": "Tools, each on the tenant's allowlist",
    "rules": "Further rules in Rego, each asked before a call is allowed",
    "arguments": "KiB of arguments; above 1 MiB the call is refused",
    "ledger": "Entries in the ledger (SQLite): a hold and its settlement, without a sidecar",
    "sidecars": "Sidecars on one Redis, asked by turns; CPU is that of Redis",
}
_HEADS: Final = {
    "size": "size",
    "p50_us": "p50 us",
    "ratio": "x the smallest",
    "cpu_us": "CPU us for a call",
    "cpu_ratio": "x the smallest",
    "start_ms": "start to ready ms",
    "resident_mib": "resident MiB",
    "file_mib": "file MiB",
    "open_ms": "opened after ms",
    "clearing_p50_us": "while old ones are cleared: p50 us",
    "clearing_ratio": "x the smallest",
    "refused": "refused as",
}


def table(axis: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shown = [key for key in _HEADS if any(key in row for row in rows)]
    return {
        "title": _TITLES[axis],
        "heads": [_HEADS[key] for key in shown],
        "rows": [[_cell(key, row.get(key)) for key in shown] for row in rows],
    }


def _cell(key: str, value: object) -> str:
    if isinstance(value, str):
        return f"`{value}`"
    if not isinstance(value, int | float):
        return ""
    return f"{value:.2f}" if key.endswith("ratio") else f"{value:,.0f}"


def measure(effort: Effort, axes: Sequence[str], say: Say) -> dict[str, Any]:
    found = {}
    for axis in axes:
        say(axis)
        found[axis] = AXES[axis](effort, say)
    flat = [row for row in found.get("tenants", ()) if row["size"] == FLAT_AT]
    return {
        "cores": os.cpu_count(),
        "axes": found,
        **({"flat": {"tenants": FLAT_AT, "ratio": flat[0]["ratio"]}} if flat else {}),
        "tables": [table(axis, rows) for axis, rows in found.items()],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    options.add_argument("--quick", action="store_true", help="small sizes, for a look")
    options.add_argument("--output", choices=("text", "json"), default="text")
    chosen = options.parse_args()
    found = measure(
        QUICK if chosen.quick else FULL,
        chosen.axes,
        lambda line: print(line, file=sys.stderr, flush=True),
    )
    if chosen.output == "json":
        print(json.dumps(found, indent=2))
        return
    for each in found["tables"]:
        print(each["title"])
        for row in (each["heads"], *each["rows"]):
            print("   ".join(f"{cell:>20}" for cell in row))


if __name__ == "__main__":
    main()
