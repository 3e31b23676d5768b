"""What a call costs that is made under a permit for several, beside the bare function and
beside a call that is asked for and reported: through both faces of the guard.

Run: python bench/bench_reusable.py [calls]
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from pdp.client import AsyncGuard, Guard
from pdp.policy.archive import pack, read_archive
from pdp.testing import SidecarProcess, TokenIssuer

BUNDLE = Path(__file__).parents[1] / "policies" / "bundle.tar.gz"
TARGET_US = 10


def bundle_for_several(path: Path) -> Path:
    """The starter bundle, under which reading orders is permitted a thousand times at once."""
    files = read_archive(BUNDLE.read_bytes(), place="starter")
    data = json.loads(files["data.json"])
    data["tools"]["orders.read"]["permit"] = {"binds": ["tool"], "max_uses": 1_000}
    data["tools"]["orders.read"].pop("charge", None)
    path.write_bytes(pack({**files, "data.json": json.dumps(data).encode()}))
    return path


def read_order(order_id: str) -> str:
    return order_id


async def read_order_awaited(order_id: str) -> str:
    return order_id


def times_us(call: Callable[[str], object], calls: int) -> list[float]:
    times = []
    for number in range(calls):
        argument = str(number)
        started = time.perf_counter()
        call(argument)
        times.append((time.perf_counter() - started) * 1e6)
    return times


async def times_us_awaited(call: Callable[[str], Awaitable[object]], calls: int) -> list[float]:
    times = []
    for number in range(calls):
        argument = str(number)
        started = time.perf_counter()
        await call(argument)
        times.append((time.perf_counter() - started) * 1e6)
    return times


def show(face: str, bare: list[float], kept: list[float], asked: list[float]) -> None:
    p50_bare, p50_kept, p50_asked = (statistics.median(each) for each in (bare, kept, asked))
    p99 = statistics.quantiles(kept, n=100)[98]
    added = p50_kept - p50_bare
    print(f"{face}: bare function          p50 {p50_bare:8.2f} us")
    print(f"{face}: under a permit it has  p50 {p50_kept:8.2f} us   p99 {p99:.2f} us")
    print(f"{face}: asked and reported     p50 {p50_asked:8.2f} us")
    print(
        f"{face}: adds {added:.2f} us to a bare call (target {TARGET_US}), which is"
        f" {p50_kept / p50_bare:.0f} times it; an asked call is {p50_asked / p50_kept:.0f}"
        " times a kept one"
    )


def measure(target: str, token: str, calls: int) -> None:
    with Guard(target) as guard, Guard(target, keep_permits=False) as asking:
        kept = guard.tool("orders.read")(read_order)
        asked = asking.tool("orders.read")(read_order)
        with guard.acting_for(token), asking.acting_for(token):
            for _ in range(50):
                kept("918")
                asked("918")
                time.sleep(0.002)
            show(
                "Guard     ",
                times_us(read_order, calls),
                times_us(kept, calls),
                times_us(asked, calls // 10),
            )


async def measure_awaited(target: str, token: str, calls: int) -> None:
    async with AsyncGuard(target) as guard, AsyncGuard(target, keep_permits=False) as asking:
        kept = guard.tool("orders.read")(read_order_awaited)
        asked = asking.tool("orders.read")(read_order_awaited)
        with guard.acting_for(token), asking.acting_for(token):
            for _ in range(50):
                await kept("918")
                await asked("918")
                await asyncio.sleep(0.002)
            show(
                "AsyncGuard",
                await times_us_awaited(read_order_awaited, calls),
                await times_us_awaited(kept, calls),
                await times_us_awaited(asked, calls // 10),
            )


def main(calls: int) -> None:
    issuer = TokenIssuer()
    token = issuer.token("tenant_acme", "alice", roles=["support_agent"], scopes=["orders:read"])
    config = {"limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}}}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        bundle = bundle_for_several(directory / "bundle.tar.gz")
        with SidecarProcess(directory, issuer=issuer, bundle=bundle, config=config) as sidecar:
            measure(sidecar.target, token, calls)
            asyncio.run(measure_awaited(sidecar.target, token, calls))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5_000)
