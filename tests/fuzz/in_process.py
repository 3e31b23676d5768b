"""A whole sidecar in this process, so that a fuzzer sees where its inputs lead."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Final

import grpc

from pdp.canonical import JsonObject
from pdp.config import load_config
from pdp.server.policy import load_policy
from pdp.server.sidecar import serve
from pdp.testing import build_bundle
from tests.fuzz import jose

ROOT: Final = Path(__file__).parents[2]
TENANT: Final = "tenant_acme"
START_SECONDS: Final = 60.0
_CONFIG: Final = """
state_dir: state
instance: fuzzed
listen: {{unix: {socket}, metrics: null}}
identity:
  mode: jwt
  issuers: [{{issuer: "https://id.example", audiences: [agent-service], jwks_file: jwks.json}}]
policy: {{bundle: bundle.tar.gz}}
limits: {{tenants: {{calls_per_second: 100000, max_concurrent_calls: 100}}}}
"""


def token(**changes: object) -> str:
    """A user's token that lasts; the same in every run."""
    claims: JsonObject = {
        "iss": "https://id.example",
        "aud": "agent-service",
        "sub": "user-7",
        "exp": 4_000_000_000,
        "tenant_id": TENANT,
        "roles": ["agent"],
        "jti": "token-1",
    }
    payload = json.dumps({**claims, **changes}).encode()
    return jose.compact({"alg": "EdDSA", "kid": jose.KID, "typ": "JWT"}, payload)


class Sidecar:
    """It, and channels to it. What it logs as an error, or puts on record, is kept."""

    def __init__(self, directory: Path) -> None:
        (directory / "jwks.json").write_bytes(jose.JWKS)
        build_bundle(
            ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
        )
        socket = directory / "s"
        file = directory / "pdp.yaml"
        file.write_text(_CONFIG.format(socket=socket), encoding="utf-8")
        self.directory = directory
        self.errors = _Errors()
        logging.getLogger("pdp").addHandler(self.errors)
        self._loop = _Loop()
        started: Future[str] = Future()
        self._thread = threading.Thread(
            target=self._serve, args=(file, started), name="sidecar", daemon=True
        )
        self._thread.start()
        started.result(START_SECONDS)
        self.channel = grpc.insecure_channel(
            f"unix://{socket}", options=[("grpc.max_receive_message_length", -1)]
        )
        self.operators = grpc.insecure_channel(f"unix://{directory}/state/admin/pdp.sock")
        self._read_to = 0

    def new_records(self) -> bytes:
        """What has been put on record since the last time."""
        (segment,) = (self.directory / "state/audit").glob("*.jsonl")
        with segment.open("rb") as log:
            log.seek(self._read_to)
            content = log.read()
        self._read_to += len(content)
        return content

    def _serve(self, file: Path, started: Future[str]) -> None:
        try:
            config = load_config(file, {})
            loaded: Future[object] = Future()
            loaded.set_result(load_policy(config.policy, config.state_dir))
            with self._loop.closing():
                self._loop.run_until_complete(
                    serve(config, loaded=loaded, started=started.set_result)  # type: ignore[arg-type]
                )
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    def close(self) -> None:
        self.channel.close()
        self.operators.close()
        self._loop.stop_serving()
        self._thread.join(30)
        logging.getLogger("pdp").removeHandler(self.errors)
        shutil.rmtree(self.directory, ignore_errors=True)


class _Errors(logging.Handler):
    """Errors, and failures of the server's own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


class _Loop(asyncio.SelectorEventLoop):
    """Signals come to the main thread only, so it is told otherwise when to stop."""

    def add_signal_handler(self, sig: int, callback: Callable[..., object], *args: object) -> None:
        if sig == signal.SIGTERM:
            self._stop = functools.partial(callback, *args)

    def stop_serving(self) -> None:
        self.call_soon_threadsafe(self._stop)

    def closing(self) -> _Closing:
        return _Closing(self)


class _Closing:
    def __init__(self, loop: _Loop) -> None:
        self._loop = loop

    def __enter__(self) -> None:
        asyncio.set_event_loop(self._loop)

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


@functools.cache
def sidecar() -> Sidecar:
    """The one of this process, until close_sidecar."""
    return Sidecar(Path(tempfile.mkdtemp(prefix="fuzz-")))


def close_sidecar() -> None:
    """End the one of this process, if there is one. It can not be left to the interpreter's
    end, which ends the threads first that it closes by.
    """
    if sidecar.cache_info().currsize:
        sidecar().close()
        sidecar.cache_clear()
