"""What the sidecar costs where it does nothing: from start to ready, resident memory, and
CPU while idle; beside an empty gRPC server in Python, which is the floor, and beside Cerbos
where ``.tools/cerbos`` is there.

Run: python bench/bench_footprint.py [--starts 7] [--idle-seconds 10] [--output json]

Ready is the first answer of gRPC health that says so. What is started takes turns, each
start with a state directory that has been used before, as after a restart of its container;
"first" is the start with a state directory that does not yet exist.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdp.policy.archive import pack, read_archive
from pdp.testing import Caller, SidecarProcess, TokenIssuer

ROOT: Final = Path(__file__).parents[1]
STARTER: Final = ROOT / "policies" / "bundle.tar.gz"
CERBOS: Final = ROOT / ".tools" / "cerbos"
TENANTS: Final = 10_000
CALLS: Final = 1_000
READY_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 3.0
"""After a start, before anything is measured of what is resident or idle."""
BYTECODE: Final = "PYTHONDONTWRITEBYTECODE"
"""Is made empty: in an image bytecode is there, and not made anew at each start."""
EMPTY_SERVER: Final = """
import asyncio, sys
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

async def serve():
    server = grpc.aio.server()
    probes = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    server.add_insecure_port(sys.argv[1])
    await server.start()
    await probes.set("", health_pb2.HealthCheckResponse.SERVING)
    await server.wait_for_termination()

asyncio.run(serve())
"""


@dataclass(frozen=True, kw_only=True)
class System:
    """One that is started, and says over gRPC health that it is ready."""

    name: str
    argv: Sequence[str]
    socket: Path
    state: Path | None = None
    """What it keeps from one start to the next."""

    @contextlib.contextmanager
    def running(self) -> Iterator[tuple[int, float]]:
        """The process, ready, and how many seconds that took."""
        self.socket.unlink(missing_ok=True)
        began = time.perf_counter()
        process = subprocess.Popen(
            self.argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPYCACHEPREFIX": str(self.socket.parent), BYTECODE: ""},
        )
        # Nobody reads on: what they say at the start fits into the pipe.
        try:
            while not is_ready(self.socket):
                if process.poll() is not None or time.perf_counter() - began > READY_SECONDS:
                    process.kill()
                    raise RuntimeError(process.communicate()[1].decode())
                time.sleep(0.001)
            yield process.pid, time.perf_counter() - began
        finally:
            process.terminate()
            process.communicate(timeout=20)


def is_ready(socket: Path) -> bool:
    # A channel of its own for each look, or gRPC waits longer and longer between two tries.
    if not socket.exists():
        return False
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def memory_mib(pid: int) -> dict[str, float]:
    """Resident; and in proportion, where pages that processes share are counted once."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    return {
        "rss": round(kib["Rss"] / 1024, 1),
        "pss": round(kib["Pss"] / 1024, 1),
        "anonymous": round(kib["Anonymous"] / 1024, 1),
        "files": round(memory_files(pid) / 1024 / 1024, 1),
    }


def memory_files(pid: int) -> int:
    """Bytes in files that have no name (memfd): not resident where no page of theirs is
    mapped yet, and memory all the same.
    """
    total = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(descriptor.readlink()).startswith("/memfd:"):
                total += descriptor.stat().st_blocks * 512
    return total


def cpu_seconds(pid: int) -> float:
    """Of all threads that now run, by the scheduler's own clock."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def idle_percent(pid: int, seconds: float) -> float:
    """Of one core."""
    before, began = cpu_seconds(pid), time.perf_counter()
    time.sleep(seconds)
    return round(100 * (cpu_seconds(pid) - before) / (time.perf_counter() - began), 3)


def with_tenants(count: int, path: Path) -> Path:
    """The starter bundle with its first tenant so many times over."""
    files = read_archive(STARTER.read_bytes(), place=str(STARTER))
    data = json.loads(files["data.json"])
    tenant = next(iter(data["tenants"].values()))
    data["tenants"] |= {f"tenant_{number}": tenant for number in range(count)}
    path.write_bytes(pack({**files, "data.json": json.dumps(data).encode()}))
    return path


def ours(
    directory: Path, issuer: TokenIssuer, bundle: Path, config: Mapping[str, object] | None = None
) -> SidecarProcess:
    directory.mkdir()
    return SidecarProcess(directory, issuer=issuer, bundle=bundle, config=config)


def cerbos(directory: Path) -> System:
    policies = directory / "policies"
    policies.mkdir(parents=True)
    (policies / "orders.yaml").write_text(
        """
apiVersion: api.cerbos.dev/v1
resourcePolicy:
  resource: orders
  version: default
  rules:
    - {actions: [read], effect: EFFECT_ALLOW, roles: [support_agent]}
""",
        encoding="utf-8",
    )
    socket = directory / "cerbos.sock"
    settings = directory / "cerbos.yaml"
    settings.write_text(
        json.dumps(
            {
                "server": {"grpcListenAddr": f"unix:{socket}", "httpListenAddr": "127.0.0.1:0"},
                "storage": {"driver": "disk", "disk": {"directory": str(policies)}},
                "telemetry": {"disabled": True},
            }
        ),
        encoding="utf-8",
    )
    return System(
        name="cerbos",
        argv=[str(CERBOS), "server", f"--config={settings}", "--log-level=error"],
        socket=socket,
    )


def systems(directory: Path, issuer: TokenIssuer, stack: contextlib.ExitStack) -> list[System]:
    found = []
    bytecode = ["-X", f"pycache_prefix={directory}"]
    console = str(Path(sys.executable).with_name("pdp"))
    for name, command in (
        ("pdp serve", [console]),
        ("python -m pdp serve", [sys.executable, "-m", "pdp"]),
        # As the image's /usr/bin/pdp begins.
        ("python -I -m pdp serve", [sys.executable, "-I", *bytecode, "-m", "pdp"]),
    ):
        sidecar = ours(directory / name.replace(" ", "_"), issuer, STARTER)
        stack.callback(sidecar.close)
        found.append(
            System(
                name=name,
                argv=[*command, "serve", "--config", str(sidecar.config_file)],
                socket=sidecar.socket,
                state=sidecar.state,
            )
        )
    socket = directory / "empty.sock"
    empty = [sys.executable, "-c", EMPTY_SERVER, f"unix:{socket}"]
    found.append(System(name="empty grpc.aio server", argv=empty, socket=socket))
    if CERBOS.exists():
        found.append(cerbos(directory / "cerbos"))
    return found


def start_seconds(every: Sequence[System], starts: int) -> dict[str, dict[str, float]]:
    """By the system's name: the first start, and median and best of those after it."""
    times: dict[str, list[float]] = {system.name: [] for system in every}
    for system in every:
        with system.running():  # which leaves its bytecode
            pass
        if system.state is not None:
            shutil.rmtree(system.state)
    for _ in range(starts + 1):
        for system in every:
            with system.running() as (_pid, seconds):
                times[system.name].append(seconds)
    return {
        name: {
            "first_ms": round(first * 1e3),
            "median_ms": round(statistics.median(rest) * 1e3),
            "best_ms": round(min(rest) * 1e3),
        }
        for name, (first, *rest) in times.items()
    }


def at_rest(system: System, idle_seconds: float) -> dict[str, object]:
    with system.running() as (pid, _seconds):
        time.sleep(SETTLE_SECONDS)
        return {"ready": memory_mib(pid), "idle_percent": idle_percent(pid, idle_seconds)}


def under_calls(sidecar: SidecarProcess, token: str) -> dict[str, dict[str, float]]:
    with sidecar, Caller(sidecar.target, token=token) as caller:
        assert sidecar.process is not None
        time.sleep(SETTLE_SECONDS)
        ready = memory_mib(sidecar.process.pid)
        for number in range(CALLS):
            answer = caller.authorize("orders.read", {"order_id": str(number)})
            assert answer.decision, answer.reason_code
        return {"ready": ready, "after_calls": memory_mib(sidecar.process.pid)}


def measure(starts: int, idle_seconds: float, say: Callable[[str], None]) -> dict[str, object]:
    issuer = TokenIssuer()
    token = issuer.token("tenant_acme", "alice", roles=["support_agent"], scopes=["orders:read"])
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="foot-")))
        every = systems(directory, issuer, stack)
        say("starting")
        seconds = start_seconds(every, starts) if starts else {}
        rest = {}
        for system in every:
            if not system.name.startswith("python "):  # the same as by the console script
                say(f"{system.name} at rest")
                rest[system.name] = at_rest(system, idle_seconds)
        ample = {"tenants": {"calls_per_second": 100_000, "burst": 100_000}}
        calls = {}
        for name, bundle in (
            ("starter bundle", STARTER),
            (f"{TENANTS} tenants", with_tenants(TENANTS, directory / "tenants.tar.gz")),
        ):
            say(f"{CALLS} calls with {name}")
            sidecar = ours(directory / name.replace(" ", "-"), issuer, bundle, {"limits": ample})
            calls[name] = under_calls(sidecar, token)
    return {"start": seconds, "rest": rest, "calls": calls, "cores": os.cpu_count()}


def show(measured: dict) -> None:
    for name, times in measured["start"].items():
        print(
            f"{name:24} start to ready: first {times['first_ms']:5} ms   then median"
            f" {times['median_ms']:5} ms   best {times['best_ms']:5} ms"
        )
    for name, seen in measured["rest"].items():
        print(f"{name:24} idle {seen['idle_percent']:6.3f} % of a core   {shown(seen['ready'])}")
    for name, seen in measured["calls"].items():
        for when, memory in seen.items():
            print(f"{name:24} {when.replace('_', ' '):12} {shown(memory)}")


def shown(memory: dict[str, float]) -> str:
    return (
        f"RSS {memory['rss']:6.1f} MiB   PSS {memory['pss']:6.1f}"
        f"   anonymous {memory['anonymous']:6.1f}   memory files {memory['files']:6.1f}"
    )


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--starts", type=int, default=7)
    options.add_argument("--idle-seconds", type=float, default=10.0)
    options.add_argument("--output", choices=("text", "json"), default="text")
    chosen = options.parse_args()
    result = measure(
        chosen.starts, chosen.idle_seconds, lambda line: print(line, file=sys.stderr, flush=True)
    )
    if chosen.output == "json":
        print(json.dumps(result, indent=2))
    else:
        show(result)
