"""What a decision costs inside the sidecar, without gRPC: the real rooms, opened as the
sidecar opens them, asked on its event loop. By step, with the CPU time of the whole process
and the switches between threads for each call.

A second row per tool waits a millisecond before every call, as a sidecar does that is not
asked in a tight loop: caches are cold, and threads asleep. The last one is of the reports on
what became of calls; its CPU time and switches are of question and report together.

Run: python bench/bench_inside.py [calls]
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import uvloop

from pdp.api.v1 import authorization_pb2
from pdp.config import Config, load_config
from pdp.decision import Recorded, authorize
from pdp.execution import Report, report
from pdp.identity.resolver import Credentials
from pdp.permit.ring import LiveKeys
from pdp.policy.bundle import Bundle, load_bundle
from pdp.policy.live import LivePolicy
from pdp.policy.wasm import WasmEngine
from pdp.rooms import Rooms
from pdp.server.metrics import Metrics
from pdp.server.sidecar import open_rooms
from pdp.server.trusted_keys import TrustedKeys
from pdp.server.wire import QuestionReader, authorize_response
from pdp.testing import SidecarProcess, TokenIssuer

BUNDLE: Final = Path(__file__).parents[1] / "policies" / "bundle.tar.gz"
TENANT: Final = "tenant_acme"
CALLERS: Final = (1, 8, 32)
PAUSE_SECONDS: Final = 0.001
QUESTIONS: Final = {"orders.read": {}, "orders.update": {"status": "shipped"}}
"""A tool that charges nothing, and one that holds a call under two limits."""
MANY_CALLS: Final = {
    "tenants": {"calls_per_second": 100_000, "burst": 100_000, "max_concurrent_calls": 1_000}
}
_numbers: Final = itertools.count()


@dataclass
class Measured:
    """What the calls of one round took."""

    seconds: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


@dataclass(frozen=True)
class Sidecar:
    """The rooms, and what stands around them for each call."""

    rooms: Rooms
    metrics: Metrics
    reader: QuestionReader
    credentials: Credentials

    async def decide(self, tool: str) -> Recorded:
        """As the servicer does it, arguments other than in any call before."""
        number = next(_numbers)
        request = authorization_pb2.AuthorizeRequest(
            request_id=f"00000000-0000-4000-8000-{number:012d}",
            arguments_json=json.dumps({"order_id": str(number), **QUESTIONS[tool]}).encode(),
        )
        request.action.name = tool
        recorded = await authorize(
            self.rooms, self.credentials, self.reader.asked(request, trace_id=None)
        )
        self.metrics.decided(recorded)
        authorize_response(recorded).SerializeToString()
        assert recorded.answer.permit is not None, recorded.answer.reason_code
        return recorded

    async def report(self, recorded: Recorded) -> None:
        """Tell that the call was made."""
        assert recorded.answer.permit is not None
        token = recorded.answer.permit.token
        await report(self.rooms, Report(permit=token, executed=True, charges=(), error_type=""))

    async def measure_reports(self, tool: str, calls: int, into: Measured) -> None:
        """Ask and report, one call after the other."""
        for _ in range(calls):
            recorded = await self.decide(tool)
            began = time.perf_counter()
            await self.report(recorded)
            into.seconds.append(time.perf_counter() - began)

    async def measure(self, tool: str, calls: int, pause_seconds: float, into: Measured) -> None:
        """Ask one call after the other."""
        for _ in range(calls):
            if pause_seconds:
                await asyncio.sleep(pause_seconds)
            began = time.perf_counter()
            recorded = await self.decide(tool)
            into.seconds.append(time.perf_counter() - began)
            for step, seconds in recorded.step_seconds.items():
                into.steps[step].append(seconds)


def without_limits(bundle: Bundle) -> Bundle:
    """The starter bundle, whose budgets never run out."""
    document = json.loads(bundle.data)
    for limit in document["tenants"][TENANT]["limits"]:
        limit["limit"] = 10**12
    return replace(bundle, data=json.dumps(document).encode())


def configured(directory: Path, issuer: TokenIssuer) -> Config:
    """The usual configuration of a sidecar."""
    sidecar = SidecarProcess(directory, issuer=issuer, bundle=BUNDLE, config={"limits": MANY_CALLS})
    sidecar.close()
    return load_config(sidecar.config_file, {})


@contextlib.asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Sidecar]:
    issuer = TokenIssuer()
    config = configured(directory, issuer)
    config.state_dir.mkdir(mode=0o700)
    metrics = Metrics()
    policy = LivePolicy(
        WasmEngine(
            without_limits(load_bundle(BUNDLE)),
            deadline_ms=config.policy.evaluation_timeout_ms,
            workers=config.policy.workers,
            memory_max_mib=config.policy.max_memory_mib,
        )
    )
    keys = LiveKeys(config.permit_key_file, make=True)
    async with open_rooms(
        config,
        keys,
        policy,
        trusted_keys=TrustedKeys(metrics),
        service_class_failed=metrics.service_class_failed,
    ) as rooms:
        token = issuer.token(
            TENANT, "alice", roles=["support_agent"], scopes=["orders:read", "orders:write"]
        )
        yield Sidecar(
            rooms=rooms,
            metrics=metrics,
            reader=QuestionReader(default_audience=config.permit.default_audience),
            credentials=Credentials(bearer=token),
        )
    await policy.close()


async def row(
    sidecar: Sidecar,
    tool: str,
    calls: int,
    callers: int,
    pause_seconds: float,
    *,
    reports: bool = False,
) -> str:
    measured = Measured()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            if reports:
                group.create_task(sidecar.measure_reports(tool, calls // callers, measured))
            else:
                group.create_task(sidecar.measure(tool, calls // callers, pause_seconds, measured))
    elapsed = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    done = len(measured.seconds)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    switches = after.ru_nvcsw - before.ru_nvcsw
    cuts = statistics.quantiles(measured.seconds, n=100)
    steps = "  ".join(
        f"{step} {statistics.median(taken) * 1e6:.0f}" for step, taken in measured.steps.items()
    )
    return (
        f"{tool:14} {callers:3} callers{', reports' if reports else ', paused' if pause_seconds else '':9}"
        f" p50 {cuts[49] * 1e6:6.0f}  p99 {cuts[98] * 1e6:6.0f} us"
        f"  CPU {cpu / done * 1e6:5.0f} us  switches {switches / done:5.1f}"
        f"  {done / elapsed:6.0f}/s  [{steps}]"
    )


async def main(calls: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with opened(Path(directory)) as sidecar:
            for tool in QUESTIONS:
                await row(sidecar, tool, calls // 4, 1, 0)  # to warm up
                print(await row(sidecar, tool, calls, 1, PAUSE_SECONDS))
                for callers in CALLERS:
                    print(await row(sidecar, tool, calls, callers, 0))
                print(await row(sidecar, tool, calls, 1, 0, reports=True))


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000))
