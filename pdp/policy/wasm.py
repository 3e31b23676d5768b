"""The embedded engine: Rego compiled to Wasm by OPA, run in wasmtime."""

from __future__ import annotations

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from opapywasm import OpaWasmError, OpaWasmPolicy, PolicyConfig
from opapywasm.types import UNDEFINED

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.bundle import Bundle
from pdp.policy.engine import BundleError, Entrypoint, PolicyError
from pdp.reason import ReasonCode

ADMITTED_BUILTINS: Final[frozenset[str]] = frozenset()
"""Built-ins that the host may lend to a policy. OPA compiles most of them into the
module itself. One is admitted only when it answers as OPA's own does."""

MAX_DOCUMENT_BYTES: Final = 4 * 1024 * 1024
"""Largest input document: the largest arguments, written as JSON text."""
MAX_DATA_BYTES: Final = 128 * 1024 * 1024
MAX_RESULT_BYTES: Final = 1024 * 1024
MAX_WAITING_PER_WORKER: Final = 256
"""Questions that wait for one worker at most; one more is refused at once."""
_PAGE_BYTES: Final = 64 * 1024
_log: Final = logging.getLogger(__name__)


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
        self._deadline_seconds = deadline_ms / 1000
        self._most_waiting = workers * MAX_WAITING_PER_WORKER
        self._waiting = 0
        self._closed = False
        try:
            self._policy = OpaWasmPolicy.from_wasm_bytes(
                bundle.wasm,
                PolicyConfig(
                    pool_size=workers,
                    eval_timeout_seconds=self._deadline_seconds,
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
            self._check_needs()
            self._policy.set_data(bundle.data)
            self._policy.evaluate(b"{}", Entrypoint.AUTHZ_DECISION.value)
        except OpaWasmError as error:
            self._policy.close()
            raise _refused(f"can not be evaluated: {error}") from None
        except BundleError:
            self._policy.close()
            raise
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="policy")

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        """The value of a rule for ``input = document``. Raises PolicyError."""
        if self._closed or self._waiting >= self._most_waiting:
            raise PolicyError(
                ReasonCode.POLICY_UNAVAILABLE, "The policy engine can not take the question now."
            )
        self._waiting += 1
        work = asyncio.get_running_loop().run_in_executor(
            self._threads, self._evaluate, entrypoint.value, document
        )
        work.add_done_callback(self._answered)
        return await work

    async def close(self) -> None:
        """Finish what has begun, then let go of threads and memory."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown)
        self._policy.close()

    def _answered(self, work: asyncio.Future[JsonValue]) -> None:
        self._waiting -= 1
        if not work.cancelled():
            work.exception()  # marks it as seen when its caller has gone

    def _evaluate(self, entrypoint: str, document: JsonObject) -> JsonValue:
        try:
            encoded = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
            value = self._policy.evaluate(encoded, entrypoint)
        except OpaWasmError as error:
            # The library's text may quote what the policy was asked; it stays here.
            if "time limit" in str(error):
                raise PolicyError(
                    ReasonCode.POLICY_TIMEOUT, "The policy ran past its deadline."
                ) from None
            _log.warning(
                "policy %s failed in %s: %s", self.revision, entrypoint, type(error).__name__
            )
            raise PolicyError(ReasonCode.POLICY_ERROR, "The policy failed while it ran.") from None
        if value is UNDEFINED:
            raise PolicyError(ReasonCode.POLICY_UNDEFINED, "The policy gives no answer.")
        result: JsonValue = value
        return result

    def _check_needs(self) -> None:
        missing = sorted(self._policy.builtins.keys() - ADMITTED_BUILTINS)
        if missing:
            raise _refused(
                f"uses built-ins that the embedded engine does not have: {', '.join(missing)}"
            )
        absent = [name for name in Entrypoint if name.value not in self._policy.entrypoints]
        if absent:
            raise _refused(
                f"has no entrypoint {', '.join(absent)}; build it with opa build -t wasm"
                f" {' '.join(f'-e {name}' for name in Entrypoint)}"
            )


def _refused(what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {what}.")
