"""The embedded engine: Rego compiled to Wasm by OPA, run in wasmtime."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import wasmtime
from opapywasm import OpaWasmError, OpaWasmPolicy, PolicyConfig
from opapywasm.types import UNDEFINED

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.bundle import Bundle
from pdp.policy.engine import BundleError, Entrypoint, PolicyError
from pdp.policy.epochs import TICK_SECONDS, Epochs
from pdp.reason import ReasonCode

ADMITTED_BUILTINS: Final[frozenset[str]] = frozenset()
"""Built-ins that the host may lend to a policy. OPA compiles most of them into the
module itself. One is admitted only when it answers as OPA's own does, which those
that opapywasm brings (sprintf, json.is_valid, yaml.*) do not."""

MAX_DOCUMENT_BYTES: Final = 4 * 1024 * 1024
"""Largest input document: the largest arguments, written as JSON text."""
MAX_DATA_BYTES: Final = 128 * 1024 * 1024
MAX_RESULT_BYTES: Final = 1024 * 1024
MAX_WAITING_PER_WORKER: Final = 512
"""Questions that one worker has before it at most; one more is refused at once."""
MAX_WAIT_SECONDS: Final = 1.0
"""Longest wait for a worker. Past it, and past the deadline on top, an answer comes
even if the deadline inside the sandbox should fail."""
_PAGE_BYTES: Final = 64 * 1024
_log: Final = logging.getLogger(__name__)
# The library logs what a policy prints and aborts with, which may quote its input.
logging.getLogger("opapywasm").setLevel(logging.WARNING)


class WasmEngine:
    """Evaluates one bundle on worker threads, each evaluation within a deadline.

    Raises BundleError when the bundle needs a built-in that the host does not
    have, lacks an entrypoint, or can not be evaluated at all: what this engine
    can not run it refuses now, not when a call is to be decided.
    """

    def __init__(
        self, bundle: Bundle, *, deadline_ms: int, workers: int, memory_max_mib: int
    ) -> None:
        self.revision = bundle.revision
        self._longest_seconds = MAX_WAIT_SECONDS + deadline_ms / 1000
        self._room = threading.Semaphore(workers * MAX_WAITING_PER_WORKER)
        self._closed = False
        try:
            self._policy = OpaWasmPolicy.from_wasm_bytes(
                bundle.wasm,
                PolicyConfig(
                    pool_size=workers,
                    # The first tick may come at once: one more, so that none is cut early.
                    eval_timeout_seconds=deadline_ms / 1000 + TICK_SECONDS,
                    max_memory_pages=memory_max_mib * 1024 * 1024 // _PAGE_BYTES,
                    max_input_bytes=MAX_DOCUMENT_BYTES,
                    max_data_bytes=MAX_DATA_BYTES,
                    max_result_bytes=MAX_RESULT_BYTES,
                    parse_raw_json_input=False,
                ),
            )
        except OpaWasmError as error:
            raise _refused(f"is not one that OPA has built for Wasm: {error}") from None
        try:
            _check_builtins(self._policy.builtins, bundle)
            _check_entrypoints(self._policy.entrypoints)
            self._policy.set_data(bundle.data)
            for entrypoint in Entrypoint:
                self._policy.evaluate(b"{}", entrypoint.value)
        except OpaWasmError as error:
            self._policy.close()
            raise _refused(
                f"can not be evaluated within {memory_max_mib} MiB (policy.max_memory_mib): {error}"
            ) from None
        except BundleError:
            self._policy.close()
            raise
        factory = self._policy._factory  # noqa: SLF001 - it has no other door to its ticker
        factory.epoch.close()
        self._epochs = Epochs(factory.engine)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="policy")

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        """The value of a rule for ``input = document``. Raises PolicyError."""
        if self._closed or not self._room.acquire(blocking=False):
            raise _unavailable()
        try:
            work = self._threads.submit(self._evaluate, entrypoint.value, document)
        except BaseException:
            self._room.release()
            raise
        # A worker is busy until it has really finished, also when nobody waits for it.
        work.add_done_callback(lambda _: self._room.release())
        try:
            async with asyncio.timeout(self._longest_seconds):
                return await asyncio.wrap_future(work)
        except TimeoutError:
            # A question that was still waiting has been taken back.
            raise (_unavailable() if work.cancelled() else _too_slow()) from None

    async def close(self) -> None:
        """Finish what has begun, then let go of threads and memory."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown)
        self._epochs.close()
        self._policy.close()

    def _evaluate(self, entrypoint: str, document: JsonObject) -> JsonValue:
        try:
            encoded = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
            with self._epochs:
                value = self._policy.evaluate(encoded, entrypoint)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a denial
            # The error's text may quote what the policy was asked; it stays here.
            if _is_interrupt(error):
                raise _too_slow() from None
            _log.warning(
                "policy %s failed in %s: %s", self.revision, entrypoint, type(error).__name__
            )
            raise PolicyError(ReasonCode.POLICY_ERROR, "The policy failed while it ran.") from None
        if value is UNDEFINED:
            raise PolicyError(ReasonCode.POLICY_UNDEFINED, "The policy gives no answer.")
        result: JsonValue = value
        return result


def _check_builtins(needed: Iterable[str], bundle: Bundle) -> None:
    missing = sorted(set(needed) - ADMITTED_BUILTINS)
    if missing:
        uses = []
        for name in missing:
            files = [file for file, text in sorted(bundle.rego.items()) if f"{name}(" in text]
            uses.append(f"{name} (in {', '.join(files)})" if files else name)
        raise _refused(
            f"uses built-ins that the embedded engine does not have: {', '.join(uses)}. Write the"
            " policy without them"
        )


def _check_entrypoints(present: Iterable[str]) -> None:
    absent = [name.value for name in Entrypoint if name.value not in set(present)]
    if absent:
        raise _refused(
            f"has no entrypoint {', '.join(absent)}; build it with opa build -t wasm"
            f" {' '.join(f'-e {name}' for name in Entrypoint)}"
        )


def _is_interrupt(error: Exception) -> bool:
    cause = error.__cause__
    return isinstance(cause, wasmtime.Trap) and cause.trap_code is wasmtime.TrapCode.INTERRUPT


def _too_slow() -> PolicyError:
    return PolicyError(ReasonCode.POLICY_TIMEOUT, "The policy ran past its deadline.")


def _unavailable() -> PolicyError:
    return PolicyError(
        ReasonCode.POLICY_UNAVAILABLE, "The policy engine can not take the question now."
    )


def _refused(what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {what}.")
