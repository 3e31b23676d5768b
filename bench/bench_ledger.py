"""What a hold costs: reserve and settle, alone and with 32 concurrent callers.

Run: python bench/bench_ledger.py [operations]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
import uuid
from pathlib import Path

from pdp.budget.ledger import Account, Charge, IdempotencyKey, Limit, Scope, Window
from pdp.budget.sqlite import SqliteLedger
from pdp.storage import Durability

ACCOUNT = Account(tenant="acme", actor="alice", tool="orders.update")
CHARGES = (Charge("tools", "calls", 1),)
LIMITS = tuple(
    Limit(
        id=f"calls-{scope}",
        budget="tools",
        unit="calls",
        window=Window.DAY,
        limit=10**9,
        scope=scope,
    )
    for scope in (Scope.TENANT, Scope.ACTOR)
)
CONTENT = "0" * 64


async def reserve_and_settle(ledger: SqliteLedger, name: str) -> tuple[float, float]:
    started = time.perf_counter()
    hold = await ledger.reserve(
        ACCOUNT,
        IdempotencyKey(operation="reserve", key=name, content_sha256=CONTENT),
        charges=CHARGES,
        limits=LIMITS,
        ttl_seconds=60,
    )
    reserved = time.perf_counter()
    await ledger.settle(
        ACCOUNT,
        IdempotencyKey(operation="settle", key=name, content_sha256=CONTENT),
        hold_id=hold.id,
        charges=None,
    )
    return reserved - started, time.perf_counter() - reserved


async def measure(durability: Durability, callers: int, operations: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        ledger = SqliteLedger(Path(directory) / "ledger.sqlite", durability=durability)
        times: list[tuple[float, float]] = []

        async def call() -> None:
            for _ in range(operations // callers):
                times.append(await reserve_and_settle(ledger, str(uuid.uuid4())))  # noqa: PERF401

        started = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(callers)))
        elapsed = time.perf_counter() - started
        await ledger.close()
    print(
        f"{durability:8} {callers:3} callers"
        f"  reserve {quantiles([each[0] for each in times])}"
        f"  settle {quantiles([each[1] for each in times])}"
        f"  {2 * len(times) / elapsed:7.0f} operations/s"
    )


def quantiles(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    p50, p99 = (ordered[len(ordered) * percent // 100] * 1e6 for percent in (50, 99))
    return f"p50 {p50:6.0f} us  p99 {p99:6.0f} us"


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    for durability in Durability:
        for callers in (1, 32):
            asyncio.run(measure(durability, callers, count))
