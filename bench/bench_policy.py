"""What one question to the embedded engine costs, as ratios to an empty hop between
threads and to ten tenants; what a load costs, and whether reloads leave memory behind.

Run: python bench/bench_policy.py [questions]
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import uvloop

from pdp.canonical import JsonObject
from pdp.identity.subject import Subject
from pdp.policy.bundle import Bundle, load_bundle
from pdp.policy.engine import Entrypoint
from pdp.policy.question import authorize_input
from pdp.policy.wasm import WasmEngine, WasmEvaluator, compile_wasm

BUNDLE = Path(__file__).parents[1] / "policies" / "bundle.tar.gz"
SIZES = (10, 100, 1_000, 10_000)
MEMORY_MAX_MIB = 512
RELOADS = 200


def with_tenants(bundle: Bundle, count: int) -> Bundle:
    document = json.loads(bundle.data)
    pattern = document["tenants"]["tenant_acme"]
    for number in range(count - len(document["tenants"])):
        document["tenants"][f"tenant_{number}"] = pattern
    return replace(bundle, data=json.dumps(document, separators=(",", ":")).encode())


def question() -> JsonObject:
    subject = Subject(
        tenant="tenant_acme",
        actor="alice",
        roles=("support_agent",),
        scopes=("orders:read",),
        issuer="https://idp.example",
    )
    return authorize_input(
        subject,
        tool="orders.read",
        arguments={"order_id": "918"},
        resource=None,
        time=1_700_000_000,
        request_id="0123456789abcdef",
        context={},
    )


def cuts(times: list[float]) -> tuple[float, float]:
    """p50 and p99 in microseconds."""
    of_hundred = statistics.quantiles(times, n=100)
    return of_hundred[49] * 1e6, of_hundred[98] * 1e6


def timed(call: Callable[[], object], times: int) -> tuple[float, float]:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return cuts(taken[times // 10 :])


async def timed_async(call: Callable[[], Awaitable[object]], times: int) -> tuple[float, float]:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        await call()
        taken.append(time.perf_counter() - started)
    return cuts(taken[times // 10 :])


def resident_kib() -> int:
    gc.collect()
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def engine_of(bundle: Bundle, compiled: bytes | None, *, workers: int = 2) -> WasmEngine:
    return WasmEngine(
        bundle,
        deadline_ms=200,
        workers=workers,
        memory_max_mib=MEMORY_MAX_MIB,
        compiled=compiled,
    )


async def questions(bundle: Bundle, compiled: bytes, times: int) -> None:
    asked = question()
    hop, _ = await timed_async(lambda: asyncio.to_thread(int), times)
    print(f"an empty hop to a thread and back: p50 {hop:.0f} us")
    first: dict[str, float] = {}
    for size in SIZES:
        sized = with_tenants(bundle, size)
        before = resident_kib()
        engine = engine_of(sized, compiled)
        held_mib = (resident_kib() - before) / 1024 / 2
        p50, p99 = await timed_async(
            partial(engine.evaluate, Entrypoint.AUTHZ_DECISION, asked), times
        )
        first.setdefault("engine", p50)
        await engine.close()
        with WasmEvaluator(sized, memory_max_mib=MEMORY_MAX_MIB) as evaluator:
            alone50, alone99 = timed(
                partial(evaluator.evaluate, Entrypoint.AUTHZ_DECISION, asked), times
            )
        first.setdefault("alone", alone50)
        print(
            f"{size:6} tenants: engine p50 {p50:4.0f} p99 {p99:4.0f} us"
            f" ({p50 / hop:.2f} x hop, {p50 / first['engine']:.2f} x 10 tenants);"
            f" evaluator p50 {alone50:3.0f} p99 {alone99:3.0f} us"
            f" ({alone50 / first['alone']:.2f} x); {held_mib:.1f} MiB a worker"
        )


async def loads(bundle: Bundle, compiled: bytes) -> None:
    for name, code in (("compiling", None), ("machine code", compiled)):
        started = time.perf_counter()
        engine = engine_of(bundle, code)
        print(f"load, {name}: {(time.perf_counter() - started) * 1e3:.1f} ms")
        await engine.close()
        del engine


async def reloads(bundle: Bundle, compiled: bytes) -> None:
    resident: list[int] = []
    for number in range(RELOADS):
        engine = engine_of(with_tenants(bundle, 100 + number % 2), compiled)
        await engine.evaluate(Entrypoint.AUTHZ_DECISION, question())
        await engine.close()
        del engine
        resident.append(resident_kib())
    late = resident[RELOADS // 4 :]
    slope, _ = statistics.linear_regression(range(len(late)), late)
    print(
        f"{RELOADS} reloads: resident {resident[0] / 1024:.1f} to {resident[-1] / 1024:.1f} MiB,"
        f" slope {slope * 1024:.0f} bytes a reload"
    )


async def main(times: int) -> None:
    bundle = load_bundle(BUNDLE)
    assert bundle.wasm is not None
    compiled = compile_wasm(bundle.wasm)
    await loads(bundle, compiled)
    await questions(bundle, compiled, times)
    await reloads(bundle, compiled)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3_000))
