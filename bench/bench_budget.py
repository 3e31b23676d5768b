"""What budgets cost in each store, and how many overspends each way of keeping them
lets through.

Beside this product's ledgers stand, on the same Redis: what LiteLLM does (look whether
there is room, call, record what it cost), and the package `limits`, which is installed
into a temporary environment if the package index can be reached. Neither of them holds,
or knows a call that is tried again.

Run: python bench/bench_budget.py [operations]
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
import uuid
import venv
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from redis.asyncio import BlockingConnectionPool, Redis, UnixDomainSocketConnection

from pdp.budget.lease_pool import LeaseTerms
from pdp.budget.leased_ledger import open_leased
from pdp.budget.ledger import Account, Charge, IdempotencyKey, Ledger, Limit, Scope, Window
from pdp.budget.redis_ledger import RedisLedger
from pdp.budget.sqlite import SqliteLedger
from pdp.config import RedisSettings
from pdp.redis_store import open_redis
from pdp.storage import Durability
from tests.budget.redis_server import RedisServer

ACCOUNT = Account(tenant="acme", actor="alice", tool="orders.update")
CONTENT = "0" * 64
CAP = 50
BURST = 1000
LEASED_CAP = 500
"""Far enough from nothing that sidecars lease."""
CLIENTS = 8
TOOL_SECONDS = 0.005
"""How long the call takes that is paid for, in a burst."""

Call = Callable[[], Awaitable[bool]]
"""Takes what one call costs, if there is room, and records it; whether there was."""


def limits(most: int) -> tuple[Limit, ...]:
    return tuple(
        Limit(
            id=f"calls-{scope}",
            budget="tools",
            unit="calls",
            window=Window.LIFETIME,
            limit=most,
            scope=scope,
        )
        for scope in (Scope.TENANT, Scope.ACTOR)
    )


def on_ledger(ledger: Ledger, most: int, tool_seconds: float = 0) -> Call:
    async def call() -> bool:
        name = uuid.uuid4().hex
        hold = await ledger.reserve(
            ACCOUNT,
            IdempotencyKey(operation="reserve", key=name, content_sha256=CONTENT),
            charges=(Charge("tools", "calls", 1),),
            limits=limits(most),
            ttl_seconds=60,
        )
        if hold.refused_by is not None:
            return False
        if tool_seconds:
            await asyncio.sleep(tool_seconds)
        await ledger.settle(
            ACCOUNT,
            IdempotencyKey(operation="settle", key=name, content_sha256=CONTENT),
            hold_id=hold.id,
            charges=None,
        )
        return True

    return call


def check_then_record(client: Redis, most: int, tool_seconds: float = 0) -> Call:
    async def call() -> bool:
        if int(await client.get("spend") or 0) + 1 > most:
            return False
        if tool_seconds:
            await asyncio.sleep(tool_seconds)
        await client.incrby("spend", 1)
        return True

    return call


async def throughput(call: Call, callers: int, operations: int) -> str:
    seconds: list[float] = []

    async def repeat() -> None:
        for _ in range(operations // callers):
            started = time.perf_counter()
            assert await call()
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(repeat() for _ in range(callers)))
    elapsed = time.perf_counter() - started
    seconds.sort()
    p50, p99 = (seconds[len(seconds) * percent // 100] * 1e3 for percent in (50, 99))
    return f"{len(seconds) / elapsed:7.0f}/s  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms"


async def overspend(calls: list[Call], cap: int = CAP) -> int:
    """How many more than the cap get in, of a burst spread over several clients."""
    burst = BURST * cap // CAP
    turns = asyncio.Semaphore(BURST)

    async def one(number: int) -> bool:
        async with turns:
            return await calls[number % len(calls)]()

    return sum(await asyncio.gather(*map(one, range(burst)))) - cap


@asynccontextmanager
async def redis_ledgers(server: RedisServer, number: int) -> AsyncIterator[list[Ledger]]:
    settings = RedisSettings(unix=server.socket, timeout_ms=30_000)
    async with AsyncExitStack() as stack:
        ledgers: list[Ledger] = []
        for _ in range(number):
            ledger = RedisLedger(await open_redis(settings))
            stack.push_async_callback(ledger.close)
            ledgers.append(ledger)
        yield ledgers


async def measure_sqlite(durability: Durability, folder: Path, operations: int) -> None:
    ledger = SqliteLedger(folder / f"{durability}.sqlite", durability=durability)
    for callers in (1, 32):
        figures = await throughput(on_ledger(ledger, 10**9), callers, operations)
        show(f"SQLite, {durability}", callers, figures)
    await ledger.close()
    ledger = SqliteLedger(folder / f"{durability}-burst.sqlite", durability=durability)
    show_overspend(await overspend([on_ledger(ledger, CAP, TOOL_SECONDS)]))
    await ledger.close()


async def measure_redis(server: RedisServer, name: str, operations: int) -> None:
    async with redis_ledgers(server, CLIENTS) as ledgers:
        for callers in (1, 32):
            figures = await throughput(on_ledger(ledgers[0], 10**9), callers, operations)
            show(name, callers, figures)
    server.command("FLUSHALL")
    async with redis_ledgers(server, CLIENTS) as ledgers:
        show_overspend(
            await overspend([on_ledger(ledger, CAP, TOOL_SECONDS) for ledger in ledgers])
        )


@asynccontextmanager
async def leased_ledgers(
    server: RedisServer, folder: Path, number: int
) -> AsyncIterator[list[Ledger]]:
    async with redis_ledgers(server, number) as shared, AsyncExitStack() as stack:
        ledgers: list[Ledger] = []
        for each, ledger in enumerate(shared):
            own = folder / f"sidecar-{each}"
            own.mkdir(exist_ok=True)
            leased = await open_leased(
                ledger,
                own,
                durability=Durability.PROCESS,
                terms=LeaseTerms(),
                holder=own.name,
            )
            stack.push_async_callback(leased.close)
            ledgers.append(leased)
        yield ledgers


async def measure_leased(server: RedisServer, name: str, folder: Path, operations: int) -> None:
    server.command("FLUSHALL")
    async with leased_ledgers(server, folder, CLIENTS) as ledgers:
        for callers in (1, 32):
            figures = await throughput(on_ledger(ledgers[0], 10**9), callers, operations)
            show(name, callers, figures)
    for cap in (CAP, LEASED_CAP):
        server.command("FLUSHALL")
        async with leased_ledgers(server, folder, CLIENTS) as ledgers:
            calls = [on_ledger(ledger, cap, TOOL_SECONDS) for ledger in ledgers]
            show_overspend(await overspend(calls, cap), cap)


async def measure_check_then_record(server: RedisServer, operations: int) -> None:
    clients = [
        Redis(
            connection_pool=BlockingConnectionPool(
                connection_class=UnixDomainSocketConnection,
                path=str(server.socket),
                max_connections=16,  # as many as a sidecar opens
            )
        )
        for _ in range(CLIENTS)
    ]
    server.command("FLUSHALL")
    for callers in (1, 32):
        figures = await throughput(check_then_record(clients[0], 10**9), callers, operations)
        show("check, then record", callers, figures)
    server.command("FLUSHALL")
    show_overspend(
        await overspend([check_then_record(client, CAP, TOOL_SECONDS) for client in clients])
    )
    for client in clients:
        await client.aclose()


LIMITS_PROGRAM = """
import asyncio, json, sys, time
from limits import RateLimitItemPerDay
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

address, burst, cap, clients, operations = sys.argv[1], *map(int, sys.argv[2:])


def limiter():
    return FixedWindowRateLimiter(RedisStorage("async+redis+unix://" + address))


async def main():
    limiters, seconds = [limiter() for _ in range(clients)], []
    everything = RateLimitItemPerDay(10**9)

    async def repeat():
        for _ in range(operations // 32):
            started = time.perf_counter()
            assert await limiters[0].hit(everything, "acme")
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(repeat() for _ in range(32)))
    elapsed = time.perf_counter() - started
    capped = RateLimitItemPerDay(cap)
    admitted = await asyncio.gather(
        *(limiters[number % clients].hit(capped, "burst") for number in range(burst))
    )
    print(json.dumps([elapsed, sorted(seconds), sum(admitted)]))


asyncio.run(main())
"""


def measure_limits(server: RedisServer, folder: Path, operations: int) -> None:
    environment = folder / "limits"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    try:
        subprocess.run([*pip, "limits[async-redis]", "redis"], check=True, capture_output=True)
        done = subprocess.run(
            [
                *(python, "-c", LIMITS_PROGRAM, server.socket),
                *map(str, (BURST, CAP, CLIENTS, operations)),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr if isinstance(error.stderr, str) else error.stderr.decode()
        print(f"limits                       not measured: {said.strip().splitlines()[-1]}")
        return
    elapsed, seconds, admitted = json.loads(done.stdout)
    p50, p99 = (seconds[len(seconds) * percent // 100] * 1e3 for percent in (50, 99))
    show(
        "limits (hit only)",
        32,
        f"{len(seconds) / elapsed:7.0f}/s  p50 {p50:6.2f} ms  p99 {p99:6.2f} ms",
    )
    show_overspend(admitted - CAP)


def show(name: str, callers: int, figures: str) -> None:
    print(f"{name:28} {callers:3} callers  {figures}", flush=True)


def show_overspend(number: int, cap: int = CAP) -> None:
    burst = BURST * cap // CAP
    left = f", and {-number} left for later" if number < 0 else ""
    print(f"{'':28} overspends of {burst} against {cap}: {max(0, number)}{left}", flush=True)


def main() -> None:
    operations = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    print("reserve and settle, or what stands for them: one operation each")
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for durability in Durability:
            asyncio.run(measure_sqlite(durability, folder, operations))
        for appendfsync in ("everysec", "always"):
            server = RedisServer(folder / appendfsync, f"appendfsync {appendfsync}").start()
            try:
                asyncio.run(measure_redis(server, f"Redis, {appendfsync}", operations))
                leases = f"leased from Redis, {appendfsync}"
                asyncio.run(measure_leased(server, leases, folder, operations))
                if appendfsync == "everysec":
                    asyncio.run(measure_check_then_record(server, operations))
                    measure_limits(server, folder, operations)
            finally:
                server.stop()


if __name__ == "__main__":
    main()
