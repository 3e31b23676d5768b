"""What a guarded call costs (two calls of the sidecar: ask, report), beside an empty
health check on a channel of the same kind, and what each step takes in the sidecar.

Run: python bench/bench_guard.py [calls] [--profile]
"""

from __future__ import annotations

import contextlib
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdp.channel import connect
from pdp.client import Decision, Guard
from pdp.testing import SidecarProcess, TokenIssuer

BUNDLE = Path(__file__).parents[1] / "policies" / "bundle.tar.gz"


def measure(name: str, call: Callable[[], object], calls: int) -> None:
    for _ in range(50):
        call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    cuts = statistics.quantiles(times, n=100)
    print(f"{name:34} p50 {cuts[49]:7.0f} us   p99 {cuts[98]:7.0f} us")


def main(calls: int, *, profile: bool) -> None:
    issuer = TokenIssuer()
    token = issuer.token("tenant_acme", "alice", roles=["support_agent"], scopes=["orders:read"])
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = {"limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}}}
        sidecar = stack.enter_context(
            SidecarProcess(directory, issuer=issuer, bundle=BUNDLE, config=config)
        )
        decisions: list[Decision] = []
        guard = stack.enter_context(Guard(sidecar.target, observe=decisions.append))
        channel = stack.enter_context(connect(sidecar.target))
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]

        @guard.tool("orders.read")
        def read_order(order_id: str) -> str:
            return order_id

        stack.enter_context(guard.acting_for(token))
        measure("empty health check", lambda: check(health_pb2.HealthCheckRequest()), calls)
        measure("permit only (guard.authorize)", lambda: ask(guard), calls)
        measure("guarded call (ask, run, report)", lambda: read_order("918"), calls)
        steps = {
            step: statistics.median(decision.step_seconds[step] for decision in decisions) * 1e6
            for step in decisions[0].step_seconds
        }
        print("inside the sidecar, p50 us:", *(f"{step} {us:.0f}" for step, us in steps.items()))
        if profile:
            with cProfile.Profile() as profiler:
                for _ in range(calls):
                    read_order("918")
            pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def ask(guard: Guard) -> None:
    guard.authorize("orders.read", {"order_id": "918"})


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    main(numbers[0] if numbers else 1000, profile="--profile" in sys.argv)
