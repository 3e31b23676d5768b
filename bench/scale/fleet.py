"""Sidecars of one fleet: processes on one store, with bundle and keys from one origin."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bench.scale.counters import Process, read_process
from bench.scale.origin import BUNDLE, JWKS, Origin
from pdp.testing import SidecarProcess, TokenIssuer
from tests.budget.redis_server import RedisServer


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How the sidecars of a fleet are set up."""

    sidecars: int
    lease_seconds: int
    """0: nothing is leased."""
    bundle_poll_seconds: float
    jwks_poll_seconds: float
    at_once: int = 2
    """Sidecars that start at the same time: as many as there are cores."""


class Fleet:
    """Serves from when it is entered, until it is stopped."""

    def __init__(self, folder: Path, setting: Setting, origin: Origin, issuer: TokenIssuer) -> None:
        self.setting = setting
        self.origin = origin
        self.store = RedisServer(folder / "store")
        self.start_seconds: Sequence[float] = ()
        """What each sidecar took to be ready."""
        jwks = folder / "jwks.json"
        origin.put(JWKS, issuer.write_jwks(jwks).read_bytes())
        self.sidecars = [
            self._sidecar(folder / f"sidecar-{number}", issuer, f"sidecar-{number}")
            for number in range(setting.sidecars)
        ]

    def _sidecar(self, folder: Path, issuer: TokenIssuer, name: str) -> SidecarProcess:
        folder.mkdir(parents=True)
        setting, origin = self.setting, self.origin
        keys = {
            "issuer": issuer.issuer,
            "audiences": [issuer.audience],
            "jwks_url": origin.url(JWKS, name),
            "poll_seconds": setting.jwks_poll_seconds,
        }
        source = {"url": origin.url(BUNDLE, name), "poll_seconds": setting.bundle_poll_seconds}
        budget: dict[str, Any] = {"store": {"unix": str(self.store.socket), "timeout_ms": 10_000}}
        if setting.lease_seconds:
            budget["lease"] = {"seconds": setting.lease_seconds}
        return SidecarProcess(
            folder,
            issuer=issuer,
            bundle=folder,  # in place of which the policy below is taken
            config={
                "instance": name,
                "identity": {"mode": "jwt", "issuers": [keys]},
                "policy": {"bundles": {"main": {"http": source}}},
                "budget": budget,
            },
        )

    def processes(self) -> list[Process]:
        """What each sidecar has used."""
        return [
            read_process(sidecar.process.pid)
            for sidecar in self.sidecars
            if sidecar.process is not None
        ]

    def audit_bytes(self) -> int:
        """What is on record by now, of all sidecars."""
        logs = (sidecar.state / "audit" for sidecar in self.sidecars)
        return sum(file.stat().st_size for log in logs for file in log.glob("*.jsonl"))

    def stop(self) -> None:
        """End the sidecars in an orderly way; the store goes on."""
        for sidecar in self.sidecars:
            if sidecar.process is not None:
                sidecar.process.terminate()
        for sidecar in self.sidecars:
            if sidecar.process is not None:
                assert sidecar.process.wait(60) == 0, sidecar.log.read_text(encoding="utf-8")

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        with self._stack as stack:
            self.store.start()
            stack.callback(self.store.stop)
            for sidecar in self.sidecars:
                stack.callback(sidecar.close)
            with ThreadPoolExecutor(self.setting.at_once) as starting:
                self.start_seconds = list(starting.map(_timed_start, self.sidecars))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _timed_start(sidecar: SidecarProcess) -> float:
    begun_at = time.monotonic()
    sidecar.start()
    return time.monotonic() - begun_at
