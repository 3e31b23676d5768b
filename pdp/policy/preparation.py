"""From what sources hold to what an engine runs: verified, compiled, tested.

While calls are being answered this is done in a process of its own, which gives way
to them and takes its memory with it when it ends.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pdp.policy.archive import Files
from pdp.policy.bundle import Bundle, Part, assemble, read_part
from pdp.policy.compile import compile_rego, find_opa
from pdp.policy.delta import apply_delta
from pdp.policy.engine import BundleError
from pdp.policy.signature import VerificationKey, Verifier
from pdp.reason import ReasonCode

TIMEOUT_SECONDS: Final = 300
"""Longest time that a bundle may take to be prepared, its tests included."""
_NICENESS: Final = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What one source holds, not yet verified."""

    name: str
    place: str
    chain: tuple[Files, ...] = field(repr=False)
    """A whole bundle, and the delta bundles upon it."""
    verifier: Verifier | None = field(repr=False)
    """Who must have signed it; None: nobody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How bundles are prepared."""

    embedded: bool
    """Whether the embedded engine is to run them, which needs Wasm."""
    opa: Path | None
    """The opa command; None for the one on PATH."""
    run_tests: bool
    """Whether the tests that they carry must pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What an engine is made of."""

    bundle: Bundle
    compiled: bytes | None = field(repr=False)
    """Machine code of the bundle's Wasm, for the embedded engine."""
    sequences: Mapping[str, int | None]
    """By the bundle's name: how new it says it is."""
    revisions: Mapping[str, str]
    """By the bundle's name: its own revision."""


def prepare(received: Sequence[Received], rules: Rules) -> Prepared:
    """Verify, put together, compile and test. Raises BundleError."""
    parts = [_part(one) for one in received]
    bundle = assemble(parts)
    compiled = None
    if rules.embedded:
        # wasmtime is not imported where an OPA server decides.
        from pdp.policy.wasm import compile_wasm  # noqa: PLC0415

        if bundle.wasm is None:
            wasm = compile_rego(bundle.rego, bundle.data, opa=rules.opa)
            bundle = Bundle(revision=bundle.revision, data=bundle.data, rego=bundle.rego, wasm=wasm)
        assert bundle.wasm is not None  # noqa: S101 - it was compiled if it was not there
        compiled = compile_wasm(bundle.wasm)
    if rules.run_tests:
        _run_tests(bundle, rules.opa)
    return Prepared(
        bundle=bundle,
        compiled=compiled,
        sequences={part.name: part.manifest.sequence for part in parts},
        revisions={part.name: part.manifest.revision for part in parts},
    )


def _part(received: Received) -> Part:
    whole, *deltas = received.chain
    part = read_part(whole, name=received.name, place=received.place, verifier=received.verifier)
    for delta in deltas:
        part = apply_delta(
            part, delta, name=received.name, place=received.place, verifier=received.verifier
        )
    return part


def _run_tests(bundle: Bundle, opa: Path | None) -> None:
    from pdp.policy.authoring.testing import run_tests  # noqa: PLC0415 - seldom wanted

    failures = run_tests(bundle, opa=find_opa(opa))
    if failures:
        shown = "\n".join(f"  {failure}" for failure in failures[:20])
        raise BundleError(
            ReasonCode.POLICY_UNAVAILABLE,
            f"The policy bundle {bundle.revision} fails its own tests:\n{shown}",
        )


async def prepare_apart(received: Sequence[Received], rules: Rules) -> Prepared:
    """As :func:`prepare`, in a process of its own. Raises BundleError."""
    apart = _Apart()
    try:
        return await asyncio.to_thread(apart.prepare, received, rules)
    finally:
        apart.end()


class _Apart:
    """One process. It is begun on a thread, as to begin one takes a moment, and by
    subprocess, which needs no fork of what the sidecar holds in memory.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = False

    def prepare(self, received: Sequence[Received], rules: Rules) -> Prepared:
        """Have it done. Raises BundleError."""
        request = _request(received, rules)
        # What it leaves when it is killed must not stay: it may be tenants' data.
        with tempfile.TemporaryDirectory(
            prefix="pdp-prepare-", ignore_cleanup_errors=True
        ) as scratch:
            with self._lock:
                if self._ended:
                    raise _failed("is not prepared: the sidecar stops")
                self._process = process = subprocess.Popen(
                    [sys.executable, "-I", "-m", "pdp.policy.preparation"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=_environment() | {"TMPDIR": scratch},
                    start_new_session=True,  # which what it starts is killed with
                )
            with process:
                try:
                    output, _ = process.communicate(request, timeout=TIMEOUT_SECONDS)
                except subprocess.TimeoutExpired:
                    _kill(process)
                    raise _failed(f"was not prepared within {TIMEOUT_SECONDS} seconds") from None
        if process.returncode != 0:
            raise _failed(f"could not be prepared: the process ended with {process.returncode}")
        return _answer(output)

    def end(self) -> None:
        """Nobody waits any longer."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                _kill(self._process)


def _environment() -> dict[str, str]:
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    # wasmtime's compiler then keeps to one thread: calls need the other cores.
    return environment | {"RAYON_NUM_THREADS": "1"}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and the opa that it may be waiting for."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _failed(what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {what}.")


# Between the processes: one line of JSON, and then the bytes that it gives lengths of.
# No pickle, which could do anything to who reads it. Yet the process is trusted: the
# machine code that it hands over is run as it is. What keeps a bundle from having a say in
# that code is wasmtime's compiler, there as here.


def _framed(header: Mapping[str, Any], blobs: Sequence[bytes]) -> bytes:
    line = json.dumps({**header, "lengths": [len(blob) for blob in blobs]}).encode()
    return b"".join((line, b"\n", *blobs))


def _unframed(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    line, _, rest = data.partition(b"\n")
    header = json.loads(line)
    blobs, start = [], 0
    for length in header["lengths"]:
        blobs.append(rest[start : start + length])
        start += length
    return header, blobs


def _request(received: Sequence[Received], rules: Rules) -> bytes:
    header: dict[str, Any] = {
        "rules": [rules.embedded, str(rules.opa) if rules.opa else None, rules.run_tests],
        "received": [
            {
                "name": one.name,
                "place": one.place,
                "chain": [list(files) for files in one.chain],
                "verifier": _verifier_json(one.verifier),
            }
            for one in received
        ],
    }
    return _framed(
        header, [blob for one in received for files in one.chain for blob in files.values()]
    )


def _verifier_json(verifier: Verifier | None) -> Any:  # noqa: ANN401 - JSON
    return verifier and {
        "scope": verifier.scope,
        "keys": {
            key_id: [base64.b64encode(key.pem).decode(), key.algorithm]
            for key_id, key in verifier.keys.items()
        },
    }


def _verifier(value: Any) -> Verifier | None:  # noqa: ANN401 - JSON
    return value and Verifier(
        keys={
            key_id: VerificationKey(pem=base64.b64decode(pem), algorithm=algorithm)
            for key_id, (pem, algorithm) in value["keys"].items()
        },
        scope=value["scope"],
    )


def _reply(request: bytes) -> bytes:
    header, blobs = _unframed(request)
    left = iter(blobs)
    received = [
        Received(
            name=one["name"],
            place=one["place"],
            chain=tuple({path: next(left) for path in paths} for paths in one["chain"]),
            verifier=_verifier(one["verifier"]),
        )
        for one in header["received"]
    ]
    embedded, opa, run_tests = header["rules"]
    rules = Rules(embedded=embedded, opa=Path(opa) if opa else None, run_tests=run_tests)
    try:
        prepared = prepare(received, rules)
    except BundleError as error:
        return _framed({"error": error.message}, [])
    bundle = prepared.bundle
    return _framed(
        {
            "revision": bundle.revision,
            "rego": dict(bundle.rego),
            "wasm": bundle.wasm is not None,
            "compiled": prepared.compiled is not None,
            "sequences": dict(prepared.sequences),
            "revisions": dict(prepared.revisions),
        },
        [bundle.data, bundle.wasm or b"", prepared.compiled or b""],
    )


def _answer(output: bytes) -> Prepared:
    header, blobs = _unframed(output)
    if "error" in header:
        raise BundleError(ReasonCode.POLICY_UNAVAILABLE, header["error"])
    data, wasm, compiled = blobs
    return Prepared(
        bundle=Bundle(
            revision=header["revision"],
            data=data,
            rego=header["rego"],
            wasm=wasm if header["wasm"] else None,
        ),
        compiled=compiled if header["compiled"] else None,
        sequences=header["sequences"],
        revisions=header["revisions"],
    )


if __name__ == "__main__":
    os.nice(_NICENESS)
    # Who would end it, and what it starts, may have been killed.
    longest = TIMEOUT_SECONDS * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_CPU, (longest, longest))
    sys.stdout.buffer.write(_reply(sys.stdin.buffer.read()))
