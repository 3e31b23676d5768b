"""The embedded engine: Rego compiled to Wasm by OPA, run in wasmtime."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum, auto
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from weakref import WeakValueDictionary

from pdp.canonical import JsonObject, JsonValue
from pdp.off_loop import run_off_loop
from pdp.policy import builtins
from pdp.policy.abi import (
    EPOCHS,
    DeadlineError,
    Image,
    Instance,
    ModuleError,
    Program,
    RunError,
    deadline_ticks,
)
from pdp.policy.bundle import Bundle
from pdp.policy.engine import (
    REQUIRED_ENTRYPOINTS,
    BundleError,
    Entrypoint,
    PolicyEngine,
    PolicyError,
    WalkedEngine,
)
from pdp.reason import ReasonCode

MAX_DOCUMENT_BYTES: Final = 4 * 1024 * 1024
"""Largest input document: the largest arguments, written as JSON text."""
MAX_WAITING_PER_WORKER: Final = 512
"""Questions that one worker has before it at most; one more is refused at once."""
MAX_WAIT_SECONDS: Final = 1.0
"""Longest wait for a worker. Past it, and past the deadline on top, an answer comes
even if the deadline inside the sandbox should fail."""
HELP_AFTER_SECONDS: Final = 0.005
"""How long one question may keep the first worker before others help. Where none does, one
thread alone is faster: two hand Python's lock to and fro, and take a third more time."""
_NICENESS: Final = 10
_log: Final = logging.getLogger(__name__)
_T = TypeVar("_T")


def compile_wasm(wasm: bytes) -> bytes:
    """Machine code of a policy module, for ``WasmEngine(compiled=...)``.

    It takes a third of a second and more. Raises BundleError.
    """
    return _program(wasm).machine_code()


class WasmEvaluator:
    """Evaluates one bundle, on the thread that asks; for one thread at a time.

    Raises BundleError when the bundle needs a built-in that the host does not
    have, lacks one of the entrypoints, or can not be loaded. A rule of any other name
    gives no answer.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        deadline_ms: int = 1_000,
        memory_max_mib: int = 512,
        entrypoints: Sequence[str] = REQUIRED_ENTRYPOINTS,
        clock_ns: Callable[[], int] = time.time_ns,
        image: Image | None = None,
    ) -> None:
        """``image`` is that of another evaluator of the same bundle."""
        self._program = _program(bundle.wasm)
        self._data: bytes | Image = bundle.data if image is None else image
        self._ticks = deadline_ticks(deadline_ms / 1000)
        self._memory_max_mib = memory_max_mib
        self._clock_ns = clock_ns
        self._instance: Instance | None = None
        try:
            instance = self._loaded()
            _check_builtins(instance.builtins.values(), bundle)
            _check_entrypoints(entrypoints, instance.entrypoints)
        except BundleError:
            self.close()
            raise

    def evaluate(self, entrypoint: str, document: JsonObject) -> JsonValue:
        """The value of a rule for ``input = document``.

        Raises PolicyError: policy_undefined, policy_timeout or policy_error. Its cause,
        if there is one, is a RunError, which quotes nothing.
        """
        try:
            encoded = _ENCODER.encode(document).encode()
            if len(encoded) > MAX_DOCUMENT_BYTES:
                raise RunError("the question is larger than it may be")
            values = self._values(entrypoint, encoded)
        except DeadlineError:
            raise _too_slow() from None
        except RunError as error:
            raise _failed() from error
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a denial
            # The error's text may quote what the policy was asked; it stays here.
            raise _failed() from RunError(type(error).__name__)
        if not values:
            raise PolicyError(ReasonCode.POLICY_UNDEFINED, "The policy gives no answer.")
        return values[0]

    def set_data(self, data: bytes) -> None:
        """Evaluate with another data document. Raises BundleError."""
        self.close()
        self._data = data
        self._loaded()

    def image(self) -> Image:
        """What other evaluators of the same bundle may share with this one. Raises
        BundleError.
        """
        try:
            self._data = image = self._loaded().into_image()
        except RunError as error:
            raise self._too_large(error) from None
        finally:
            self._instance = None
        self._loaded()
        return image

    def recover(self) -> None:
        """After a failure: do now what the next evaluation would have to do first."""
        # Whatever it is, the next evaluation meets it, and says so to whoever asks.
        with contextlib.suppress(Exception):
            self._loaded()

    def close(self) -> None:
        """Let go of the memory."""
        if self._instance is not None:
            self._instance.close()
            self._instance = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _values(self, entrypoint: str, document: bytes) -> list[JsonValue]:
        """At most one; none where the rule is not there, or has no value."""
        instance = self._loaded()
        number = instance.entrypoints.get(entrypoint)
        if number is None:
            return []
        try:
            with EPOCHS:
                said = instance.evaluate(number, document, ticks=self._ticks, lend=self._lend())
        except BaseException:
            # Whatever it was has left the memory in any state.
            self.close()
            raise
        return [result["result"] for result in _DECODER.decode(said.decode())]

    def _lend(self) -> Callable[[str, Sequence[bytes]], bytes | None]:
        evaluation = builtins.Evaluation(now_ns=self._clock_ns())
        return lambda name, arguments: builtins.call(name, arguments, evaluation)

    def _loaded(self) -> Instance:
        if self._instance is None:
            try:
                self._instance = Instance(
                    self._program,
                    data=self._data,
                    memory_max_bytes=self._memory_max_mib * 1024 * 1024,
                )
            except ModuleError as error:
                raise _refused(str(error)) from None
            except RunError as error:
                raise self._too_large(error) from None
        return self._instance

    def _too_large(self, error: RunError) -> BundleError:
        return _refused(
            f"can not be loaded within {self._memory_max_mib} MiB (policy.max_memory_mib): {error}"
        )


class WasmEngine(WalkedEngine):
    """Evaluates one bundle on worker threads, each evaluation within a deadline. The first
    takes what comes; the others help while one question keeps it for long.

    ``compiled`` is what :func:`compile_wasm` gave for the same Wasm. It runs as it is,
    outside of any sandbox, so it must never come from a bundle.

    Raises BundleError when the bundle needs a built-in that the host does not
    have, lacks an entrypoint, or can not be loaded: what this engine can not run it
    refuses now, not when a call is to be decided.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        deadline_ms: int,
        workers: int,
        memory_max_mib: int,
        compiled: bytes | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.revision = bundle.revision
        self._longest_seconds = MAX_WAIT_SECONDS + deadline_ms / 1000
        self._room = threading.Semaphore(workers * MAX_WAITING_PER_WORKER)
        self._closed = False
        self._questions: SimpleQueue[_Question | None] = SimpleQueue()
        self._at_work: set[_Question] = set()
        self._program = _program(bundle.wasm, compiled)
        with contextlib.ExitStack() as undo:
            image = None
            evaluators = []
            for _ in range(workers):
                evaluator = undo.enter_context(
                    WasmEvaluator(
                        bundle,
                        deadline_ms=deadline_ms,
                        memory_max_mib=memory_max_mib,
                        clock_ns=clock_ns,
                        image=image,
                    )
                )
                image = image or evaluator.image()
                evaluators.append(evaluator)
            undo.pop_all()
        self._help_wanted = threading.Semaphore(0)
        self._first_began_at: float | None = None
        """When the first worker began with what it is at."""
        first, *helpers = evaluators
        self._threads = [
            threading.Thread(target=target, args=(evaluator,), name="policy", daemon=True)
            for target, evaluator in [(self._work, first), *((self._help, one) for one in helpers)]
        ]
        for thread in self._threads:
            thread.start()

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        """The value of a rule for ``input = document``. Raises PolicyError."""

        async def alone(engine: PolicyEngine) -> JsonValue:
            return await engine.evaluate(entrypoint, document)

        return await self.walk(alone)

    async def walk(self, steps: Callable[[PolicyEngine], Coroutine[Any, Any, _T]]) -> _T:
        """See WalkedEngine.walk."""
        if self._closed or not self._room.acquire(blocking=False):
            raise _unavailable()
        question = _Question(steps)
        question.timer = question.loop.call_later(HELP_AFTER_SECONDS, self._look_after, question)
        self._questions.put(question)
        self._call_for_help()
        try:
            result: _T = await question.answer
        except asyncio.CancelledError:
            self._take_back(question)
            raise
        finally:
            question.timer.cancel()
        return result

    async def close(self) -> None:
        """Finish what has begun, then let go of threads and memory."""
        self._closed = True
        self._questions.put(None)
        self._help_wanted.release(len(self._threads))
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        for thread in self._threads:
            thread.join()

    def _call_for_help(self) -> bool:
        """Wake another worker, where one question keeps the first for long."""
        began_at = self._first_began_at
        if began_at is None or time.monotonic() - began_at < HELP_AFTER_SECONDS:
            return False
        self._help_wanted.release()
        return True

    def _look_after(self, question: _Question) -> None:
        """See to it that a question that waits is not forgotten behind a slow one."""
        waited = time.monotonic() - question.asked_at
        left = self._longest_seconds - waited
        if left <= 0 and self._expire(question):
            return
        pause = HELP_AFTER_SECONDS
        if question.stage is not _Stage.WAITING or self._call_for_help():
            # Another look all the same: the help may have gone to one that waits longer.
            pause = waited
        if left > 0:
            pause = min(pause, left)
        question.timer = question.loop.call_later(pause, self._look_after, question)

    def _expire(self, question: _Question) -> bool:
        """Let its asker wait no longer, if it is the policy that it waits for."""
        if not any(one.is_evaluated for one in tuple(self._at_work)):
            # What holds up the threads is a disk, which is nothing to tell of a policy.
            return False
        if self._take_back(question):
            question.refuse(_unavailable())
        elif question.leave(_Stage.EVALUATING):
            question.refuse(_too_slow())
        else:
            return False
        return True

    def _take_back(self, question: _Question) -> bool:
        """Whether no worker has begun with it; then none will."""
        if not question.leave(_Stage.WAITING):
            return False
        question.steps = None
        self._room.release()
        return True

    def _work(self, evaluator: WasmEvaluator) -> None:
        with evaluator:
            while (question := self._questions.get()) is not None:
                self._first_began_at = time.monotonic()
                self._take(question, evaluator)
                self._first_began_at = None
                del question  # its arguments are not to stay while this thread waits

    def _help(self, evaluator: WasmEvaluator) -> None:
        with evaluator:
            while self._help_wanted.acquire() and not self._closed:
                with contextlib.suppress(Empty):
                    question = self._questions.get_nowait()
                    if question is None:
                        self._questions.put(None)  # the first worker's
                    else:
                        self._take(question, evaluator)
                    del question

    def _take(self, question: _Question, evaluator: WasmEvaluator) -> None:
        steps = question.steps
        if steps is not None and question.go_on(_Stage.WALKING):
            self._at_work.add(question)
            self._answer(question, steps, evaluator)
            self._at_work.discard(question)

    def _answer(self, question: _Question, steps: _Steps, evaluator: WasmEvaluator) -> None:
        try:
            value = run_off_loop(steps(_EngineAtHand(self.revision, evaluator, question)))
        except BaseException as error:  # noqa: BLE001 - it belongs to the asker
            # A worker is busy until it has really finished, also when nobody waits for it.
            self._room.release()
            question.settle(None, error)
        else:
            self._room.release()
            question.settle(value, None)
        evaluator.recover()


_Steps = Callable[[PolicyEngine], Coroutine[Any, Any, Any]]


class _Stage(Enum):
    """How far a question has come."""

    WAITING = auto()
    WALKING = auto()
    EVALUATING = auto()
    LEFT = auto()
    """Nobody waits for it."""


class _Question:
    """What a worker is asked, and where its answer is awaited."""

    __slots__ = (
        "_lock",
        "answer",
        "asked_at",
        "is_evaluated",
        "loop",
        "stage",
        "steps",
        "timer",
    )

    timer: asyncio.TimerHandle
    """For the next look after it."""

    def __init__(self, steps: _Steps) -> None:
        self.steps: _Steps | None = steps
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self.loop.create_future()
        self.asked_at = time.monotonic()
        self.stage = _Stage.WAITING
        self.is_evaluated = False
        """Whether a worker is at it, also when the asker has left."""
        self._lock = threading.Lock()

    def go_on(self, stage: _Stage) -> bool:
        """The worker comes to the next stage, unless the asker has left."""
        with self._lock:
            if self.stage is _Stage.LEFT:
                return False
            self.stage = stage
            return True

    def leave(self, stage: _Stage) -> bool:
        """The asker leaves, if it is at that stage."""
        with self._lock:
            if self.stage is not stage:
                return False
            self.stage = _Stage.LEFT
            return True

    def settle(self, value: object, error: BaseException | None) -> None:
        """Answer it, from another thread."""
        with contextlib.suppress(RuntimeError):  # nobody waits on a loop that is closed
            self.loop.call_soon_threadsafe(self._settle, value, error)

    def refuse(self, error: PolicyError) -> None:
        """Answer it; on the asker's thread."""
        self._settle(None, error)

    def _settle(self, value: object, error: BaseException | None) -> None:
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(value)
        else:
            self.answer.set_exception(error)


class _EngineAtHand:
    """The engine as steps have it on one of its threads."""

    __slots__ = ("_evaluator", "_question", "revision")

    def __init__(self, revision: str, evaluator: WasmEvaluator, question: _Question) -> None:
        self.revision = revision
        self._evaluator = evaluator
        self._question = question

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        """The value of a rule, without waiting. Raises PolicyError."""
        self._go_on(_Stage.EVALUATING)
        self._question.is_evaluated = True
        try:
            return self._evaluator.evaluate(entrypoint, document)
        except PolicyError as error:
            if isinstance(error.__cause__, RunError):
                _log.warning(
                    "policy %s failed in %s: %s", self.revision, entrypoint, error.__cause__
                )
            raise
        finally:
            self._question.is_evaluated = False
            self._go_on(_Stage.WALKING)

    async def close(self) -> None:
        """Who opened the engine closes it."""

    def _go_on(self, stage: _Stage) -> None:
        if not self._question.go_on(stage):
            # Its asker was told so: nothing that follows may be done.
            raise _LeftError


class _LeftError(Exception):
    """Nobody waits for the steps any more."""


_programs: Final[WeakValueDictionary[bytes, Program]] = WeakValueDictionary()
"""Those in use, by the digest of their Wasm: a bundle in which only the data are new
needs no compilation.
"""
_programs_lock: Final = threading.Lock()


def _program(wasm: bytes | None, compiled: bytes | None = None) -> Program:
    if wasm is None:
        raise _refused("holds no policy.wasm")
    digest = hashlib.sha256(wasm).digest()
    with _programs_lock:
        program = _programs.get(digest)
        if program is None:
            try:
                program = _loaded_or_compiled(wasm, compiled)
            except ModuleError as error:
                raise _refused(str(error)) from None
            _programs[digest] = program
    return program


def _loaded_or_compiled(wasm: bytes, compiled: bytes | None) -> Program:
    if compiled is not None:
        return Program.from_machine_code(compiled, wasm=wasm)
    if threading.current_thread() is threading.main_thread():
        return Program.compile(wasm)
    # Calls are being answered meanwhile: they come first.
    with ThreadPoolExecutor(1, initializer=_give_way) as thread:
        return thread.submit(Program.compile, wasm).result()


def _give_way() -> None:
    """Lower the priority of this thread, for good."""
    thread = threading.get_native_id()
    # From where the process stands, as only root may raise it.
    niceness = os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS
    os.setpriority(os.PRIO_PROCESS, thread, niceness)


def _check_builtins(needed: Iterable[str], bundle: Bundle) -> None:
    missing = sorted(set(needed) - builtins.NAMES)
    if missing:
        uses = []
        for name in missing:
            files = [file for file, text in sorted(bundle.rego.items()) if f"{name}(" in text]
            uses.append(f"{name} (in {', '.join(files)})" if files else name)
        raise _refused(
            f"uses built-ins that the embedded engine does not have: {', '.join(uses)}. A real"
            " OPA runs it, `policy.engine: {opa: {managed: true}}`; or write the policy"
            " without them"
        )


def _check_entrypoints(wanted: Sequence[str], present: Collection[str]) -> None:
    absent = [str(name) for name in wanted if name not in present]
    if absent:
        raise _refused(
            f"has no entrypoint {', '.join(absent)}; build it with opa build -t wasm"
            f" {' '.join(f'-e {name}' for name in wanted)}"
        )


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("beyond what a double holds")
    return number


_ENCODER: Final = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":")
)
_DECODER: Final = json.JSONDecoder(parse_float=_finite)


def _too_slow() -> PolicyError:
    return PolicyError(ReasonCode.POLICY_TIMEOUT, "The policy ran past its deadline.")


def _failed() -> PolicyError:
    return PolicyError(ReasonCode.POLICY_ERROR, "The policy failed while it ran.")


def _unavailable() -> PolicyError:
    return PolicyError(
        ReasonCode.POLICY_UNAVAILABLE, "The policy engine can not take the question now."
    )


def _refused(what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {what}.")
