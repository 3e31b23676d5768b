"""A real sidecar in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import yaml

from pdp.closing import Closing
from pdp.testing.issuer import TokenIssuer

START_TIMEOUT_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.005


class SidecarProcess(Closing):
    """``pdp serve`` on a Unix socket below ``directory``, which holds its
    configuration, state and log and survives restarts of it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        issuer: TokenIssuer,
        bundle: Path,
        config: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """``config`` takes the place of whole sections of the usual configuration;
        in ``listen`` only of the keys that it names. ``environment`` is added to
        that of this process.
        """
        self.directory = directory
        self.log = directory / "sidecar.log"
        # The path of a socket must be short, which that of a test's directory is not.
        self._sockets = tempfile.TemporaryDirectory(prefix="pdp-")
        self.socket = Path(self._sockets.name) / "pdp.sock"
        self.target = f"unix://{self.socket}"
        self.state = directory / "state"
        self.config_file = directory / "pdp.yaml"
        self._environment = {**os.environ, **(environment or {})}
        sections = dict(config or {})
        listen = {"unix": str(self.socket), "metrics": None, **sections.pop("listen", {})}
        self.config_file.write_text(
            yaml.safe_dump(
                {
                    "state_dir": str(self.state),
                    "instance": "test",
                    "listen": listen,
                    "identity": {
                        "mode": "jwt",
                        "issuers": [
                            {
                                "issuer": issuer.issuer,
                                "audiences": [issuer.audience],
                                "team_claim": "team",
                                "jwks_file": str(issuer.write_jwks(directory / "jwks.json")),
                            }
                        ],
                    },
                    "policy": {"bundle": str(bundle)},
                    **sections,
                }
            ),
            encoding="utf-8",
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._log_begins_at = 0

    def start(self) -> Self:
        """Start it, and wait until it answers. Raises RuntimeError with its log."""
        with self.log.open("ab") as log:
            self._log_begins_at = log.tell()
            self.process = subprocess.Popen(  # noqa: S603 - this product's own command
                [sys.executable, "-m", "pdp", "serve", "--config", str(self.config_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
            )
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        """Wait until it answers, and has said in its log where."""
        import grpc  # noqa: PLC0415 - only with a process to ask
        from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415

        assert self.process is not None  # noqa: S101 - started before
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        with grpc.insecure_channel(
            self.target, options=[("grpc.max_reconnect_backoff_ms", 50)]
        ) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            while time.monotonic() < deadline:
                if self.process.poll() is not None:
                    break
                try:
                    check(health_pb2.HealthCheckRequest(), timeout=0.5, wait_for_ready=True)
                except grpc.RpcError:
                    continue
                if self._said_where():
                    return
                time.sleep(_POLL_SECONDS)
        raise RuntimeError(f"the sidecar did not start:\n{self.log.read_text(encoding='utf-8')}")

    def _said_where(self) -> bool:
        with self.log.open("rb") as log:
            log.seek(self._log_begins_at)
            return b"pdp: serving on " in log.read()

    def terminate(self, *, timeout_seconds: float = 20.0) -> int:
        """SIGTERM, and wait; its exit code."""
        assert self.process is not None  # noqa: S101 - started before
        self.process.terminate()
        return self.process.wait(timeout_seconds)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        assert self.process is not None  # noqa: S101 - started before
        self.process.kill()
        self.process.wait(20)

    def close(self) -> None:
        """Terminate it if it runs, and remove its socket; ``directory`` stays."""
        if self.process is not None and self.process.poll() is None:
            self.terminate()
        self._sockets.cleanup()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise
