"""The servers that are asked: started, timed, read, stopped.

Each runs as its users run it, on this machine's loopback or a Unix socket, with everything
that is not asked of it left off.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench.peers import policies
from bench.peers.tenants import bundle
from pdp.testing import SidecarProcess, TokenIssuer

ROOT: Final = Path(__file__).absolute().parents[2]
CERBOS: Final = ROOT / ".tools" / "cerbos"
OPA: Final = ROOT / ".tools" / "opa"
AGT_TOKEN: Final = "a-token-of-the-benchmark"  # noqa: S105 - of a server that ends with the run
PEERS_PYTHON: Final = ROOT / ".tools" / "peers" / "bin" / "python"
START_TIMEOUT_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.002


class Server:
    """A process that answers once :meth:`start` returns."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        ready: Callable[[], bool],
        where: Mapping[str, str | int],
        folder: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``where`` is what its clients are told of where it listens."""
        self.where = where
        self._argv = [str(each) for each in argv]
        self._ready = ready
        self._environment = {**os.environ, **(environment or {})}
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it, and say after how many seconds it answered. Raises RuntimeError."""
        began = time.perf_counter()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        while not self._ready():
            if (
                self._process.poll() is not None
                or time.perf_counter() - began > START_TIMEOUT_SECONDS
            ):
                self.stop()
                raise RuntimeError(f"{self._argv[0]} did not start:\n{self.log.read_text()}")
            time.sleep(_POLL_SECONDS)
        return time.perf_counter() - began

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)
        self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Of the process and its threads, so far."""
        fields = (
            Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_bytes(self) -> int:
        return resident_bytes(self.pid)


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def healthy(target: str) -> Callable[[], bool]:
    """By the health service of gRPC."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    path = target.removeprefix("unix://").removeprefix("unix:")

    def ready() -> bool:
        # Only once there is somebody to connect to, or gRPC waits before it tries again.
        if not Path(path).exists():
            return False
        with grpc.insecure_channel(target, options=options) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            with contextlib.suppress(grpc.RpcError):
                answer = check(health_pb2.HealthCheckRequest(), timeout=1)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        return False

    return ready


def responds(port: int, path: str) -> Callable[[], bool]:
    """By HTTP."""

    def ready() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        with (
            contextlib.closing(connection),
            contextlib.suppress(OSError, http.client.HTTPException),
        ):
            connection.request("GET", path)
            return connection.getresponse().status == http.HTTPStatus.OK
        return False

    return ready


def cerbos(folder: Path, *, audit: bool) -> Server:
    socket_path = folder / "c.sock"
    policies.write_cerbos(folder / "policies")
    config = {
        "server": {
            "httpListenAddr": f"127.0.0.1:{free_port()}",
            "grpcListenAddr": f"unix:{socket_path}",
        },
        "storage": {
            "driver": "disk",
            "disk": {"directory": str(folder / "policies"), "watchForChanges": False},
        },
        "telemetry": {"disabled": True},
        "audit": {
            "enabled": audit,
            "backend": "file",
            "accessLogsEnabled": False,
            "decisionLogsEnabled": True,
            "file": {"path": str(folder / "decisions.log")},
        },
    }
    file = folder / "cerbos.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return Server(
        [CERBOS, "server", "--log-level=error", f"--config={file}"],
        ready=healthy(f"unix:{socket_path}"),
        where={"target": f"unix:{socket_path}"},
        folder=folder,
        environment={"CERBOS_NO_TELEMETRY": "1"},
    )


def opa(folder: Path, *, decision_logs: bool) -> Server:
    port = free_port()
    policies.write_opa(folder / "bundle")
    return Server(
        [
            OPA,
            "run",
            "--server",
            f"--addr=127.0.0.1:{port}",
            "--log-level=error",
            "--disable-telemetry",
            f"--set=decision_logs.console={'true' if decision_logs else 'false'}",
            folder / "bundle",
        ],
        ready=responds(port, "/health"),
        where={"port": port},
        folder=folder,
    )


def agt(folder: Path) -> Server:
    port = free_port()
    return Server(
        [PEERS_PYTHON, "-m", "agent_os.server", f"--port={port}", "--log-level=error"],
        ready=responds(port, "/health"),
        where={"port": port, "token": AGT_TOKEN},
        folder=folder,
        environment={"AGENT_OS_EXECUTION_TOKENS": f"alice={AGT_TOKEN}"},
    )


def ours(folder: Path, issuer: TokenIssuer, *, durability: str) -> Server:
    """``pdp serve``, with nothing but its limits on rates changed."""
    file, target = _configured(folder, issuer, durability=durability)
    return Server(
        [sys.executable, "-m", "pdp", "serve", "--config", file],
        ready=healthy(target),
        where={"target": target},
        folder=folder,
    )


def stages(folder: Path, issuer: TokenIssuer) -> Server:
    """The rooms of the same, without its wire."""
    file, target = _configured(folder, issuer, durability="process")
    return Server(
        [sys.executable, "-m", "bench.peers.stages", file, target],
        ready=healthy(target),
        where={"target": target},
        folder=folder,
    )


def _configured(folder: Path, issuer: TokenIssuer, *, durability: str) -> tuple[Path, str]:
    """The file of its configuration, and where it listens."""
    folder.mkdir(parents=True, exist_ok=True)
    target = f"unix://{folder / 'pdp.sock'}"
    with contextlib.closing(
        SidecarProcess(
            folder,
            issuer=issuer,
            bundle=bundle(folder / "bundle.tar.gz"),
            config={
                "listen": {"unix": str(folder / "pdp.sock")},
                "limits": ROOM,
                "budget": {"durability": durability},
                "audit": {"durability": durability},
            },
        )
    ) as sidecar:
        return sidecar.config_file, target


ROOM: Final = {
    "tenants": {
        "calls_per_second": 100_000,
        "burst": 100_000,
        "max_concurrent_calls": 1_000,
    },
}
"""More than any run asks for: it is cost that is measured, not refusal."""
