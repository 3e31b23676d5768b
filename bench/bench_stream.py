"""What a permit costs over the stub's stream, beside the same question as a unary call and
an empty health check, for 1, 8 and 32 callers that take turns in one run.

Run: python bench/bench_stream.py [rounds]
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, Final

from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdp.channel import AsyncConnection, Connection, connect, connect_async
from pdp.client import AsyncGuard, Guard
from pdp.testing import SidecarProcess, TokenIssuer

BUNDLE: Final = Path(__file__).parents[1] / "policies" / "bundle.tar.gz"
CALLERS: Final = (1, 8, 32)
CALLS_PER_ROUND: Final = 320
HEALTH: Final = "empty health check"

_orders: Final = itertools.count()
Times = dict[str, list[float]]


class Unary(Connection):
    """Makes every question a call."""

    def _message(self, *_question: object) -> None:
        return None


class AsyncUnary(AsyncConnection):
    """The same."""

    def _message(self, *_question: object) -> None:
        return None


class UnaryGuard(Guard):
    _connect = Unary


class AsyncUnaryGuard(AsyncGuard):
    _connect = AsyncUnary


def arguments() -> dict[str, str]:
    """Others than in any call before."""
    return {"order_id": str(next(_orders))}


def timed(call: Callable[[], object], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


async def timed_async(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        await call()
        times.append(time.perf_counter() - began)
    return times


def by_threads(ways: dict[str, Callable[[], object]], rounds: int) -> None:
    for callers in CALLERS:
        times: Times = {name: [] for name in ways}
        with ThreadPoolExecutor(callers) as threads:
            for turn in range(rounds + 1):
                for name, call in ways.items():
                    asking = [
                        threads.submit(copy_context().run, timed, call, CALLS_PER_ROUND // callers)
                        for _ in range(callers)
                    ]
                    found = [each for thread in asking for each in thread.result()]
                    if turn:  # the first one warms up
                        times[name] += found
        show(f"Guard, {callers} threads", times)


async def by_tasks(ways: dict[str, Callable[[], Coroutine[Any, Any, object]]], rounds: int) -> None:
    for callers in CALLERS:
        times: Times = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, call in ways.items():
                asking = [timed_async(call, CALLS_PER_ROUND // callers) for _ in range(callers)]
                found = [each for task in await asyncio.gather(*asking) for each in task]
                if turn:
                    times[name] += found
        show(f"AsyncGuard, {callers} tasks", times)


def show(title: str, times: Times) -> None:
    print(title)
    empty = statistics.median(times[HEALTH])
    for name, each in times.items():
        cuts = statistics.quantiles(each, n=100)
        print(
            f"  {name:20} p50 {cuts[49] * 1e6:7.0f} us   p99 {cuts[98] * 1e6:7.0f} us"
            f"   {cuts[49] / empty:4.1f} x empty"
        )


def main(rounds: int) -> None:
    issuer = TokenIssuer()
    token = issuer.token("tenant_acme", "alice", roles=["support_agent"], scopes=["orders:read"])
    limits = {
        "tenants": {"calls_per_second": 100_000, "burst": 100_000, "max_concurrent_calls": 1_000}
    }
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sidecar = stack.enter_context(
            SidecarProcess(directory, issuer=issuer, bundle=BUNDLE, config={"limits": limits})
        )
        guard = stack.enter_context(Guard(sidecar.target))
        unary = stack.enter_context(UnaryGuard(sidecar.target))
        channel = stack.enter_context(connect(sidecar.target))
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        with guard.acting_for(token), unary.acting_for(token):
            by_threads(
                {
                    HEALTH: lambda: check(health_pb2.HealthCheckRequest()),
                    "unary": lambda: unary.authorize("orders.read", arguments()),
                    "stream": lambda: guard.authorize("orders.read", arguments()),
                },
                rounds,
            )
        asyncio.run(main_async(sidecar.target, token, rounds))


async def main_async(target: str, token: str, rounds: int) -> None:
    async with (
        AsyncGuard(target) as guard,
        AsyncUnaryGuard(target) as unary,
        connect_async(target) as channel,
    ):
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        with guard.acting_for(token), unary.acting_for(token):
            await by_tasks(
                {
                    HEALTH: lambda: check(health_pb2.HealthCheckRequest()),
                    "unary": lambda: unary.authorize("orders.read", arguments()),
                    "stream": lambda: guard.authorize("orders.read", arguments()),
                },
                rounds,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
