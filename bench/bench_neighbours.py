"""What a flood of one tenant costs another: its latency with and without the flood, in
turns in the same run.

Run: python bench/bench_neighbours.py [rounds]

The flood comes from a process of its own, which keeps 64 calls of one tenant under way
for as long as it is let, without regard to what it is told. It has what the other
callers leave of the machine (nice): what is measured is the sidecar, and not how the
machine shares its cores among clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc

from pdp.api.v1 import authorization_pb2, authorization_pb2_grpc
from pdp.testing import Caller, SidecarProcess, TokenIssuer

BUNDLE = Path(__file__).parents[1] / "policies" / "bundle.tar.gz"
PHASE_SECONDS = 20.0
AT_ONCE = 64
PER_SECOND = 50


async def flood(target: str, token: str) -> None:
    """Ask without end; print what came of it when the input ends."""
    outcomes: Counter[str] = Counter()

    async def ask(stub: authorization_pb2_grpc.AuthorizationServiceAsyncStub) -> None:
        while True:
            request = authorization_pb2.AuthorizeRequest(
                request_id=str(uuid.uuid4()),
                action=authorization_pb2.Action(name="orders.read"),
                arguments_json=b'{"order_id": "918"}',
            )
            try:
                await stub.Authorize(request, metadata=[("authorization", f"Bearer {token}")])
            except grpc.aio.AioRpcError as error:
                outcomes[error.code().name] += 1
            else:
                outcomes["OK"] += 1

    async with grpc.aio.insecure_channel(target, options=[("grpc.enable_retries", 0)]) as channel:
        stub: authorization_pb2_grpc.AuthorizationServiceAsyncStub
        stub = authorization_pb2_grpc.AuthorizationServiceStub(channel)
        asking = [asyncio.create_task(ask(stub)) for _ in range(AT_ONCE)]
        print("flooding", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    print(*(f"{name}={count}" for name, count in outcomes.items()))


@contextlib.contextmanager
def flooding(target: str, token: str, outcomes: Counter[str]) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, __file__, "flood", target, token],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "flooding"
    yield
    for outcome in process.communicate()[0].split():
        name, _, count = outcome.partition("=")
        outcomes[name] += int(count)


def timed(caller: Caller, seconds: float) -> list[float]:
    """Milliseconds of calls that a caller within its own rate makes."""
    times = []
    begins_at = time.perf_counter()
    for number in range(int(seconds * PER_SECOND)):
        time.sleep(max(0.0, begins_at + number / PER_SECOND - time.perf_counter()))
        began = time.perf_counter()
        answer = caller.authorize("orders.read", {"order_id": "918"})
        assert answer.decision, answer.reason_code
        times.append((time.perf_counter() - began) * 1e3)
    return times


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def main(rounds: int) -> None:
    issuer = TokenIssuer()
    tokens = [
        issuer.token(tenant, "alice", roles=["support_agent"], scopes=["orders:read"])
        for tenant in ("tenant_acme", "tenant_globex")
    ]
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sidecar = stack.enter_context(SidecarProcess(directory, issuer=issuer, bundle=BUNDLE))
        caller = stack.enter_context(Caller(sidecar.target, token=tokens[0]))
        timed(caller, 1.0)
        quiet: list[float] = []
        flooded: list[float] = []
        outcomes: Counter[str] = Counter()
        for _ in range(rounds):
            quiet += timed(caller, PHASE_SECONDS)
            with flooding(sidecar.target, tokens[1], outcomes):
                flooded += timed(caller, PHASE_SECONDS)
    for name, times in (("quiet", quiet), ("beside the flood", flooded)):
        cuts = statistics.quantiles(times, n=100)
        print(
            f"{name:17} {len(times):6} calls, all allowed   p50 {cuts[49]:6.2f} ms   "
            f"p99 {cuts[98]:6.2f} ms   max {max(times):6.2f} ms"
        )
    print("the flood:", ", ".join(f"{count} {name}" for name, count in outcomes.items()))
    print(f"p99 beside the flood / quiet p99 = {p99(flooded) / p99(quiet):.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["flood"]:
        os.nice(19)
        asyncio.run(flood(sys.argv[2], sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
