"""Runs calls within their bounds, and says what became of each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import grpc

from pdp import spending
from pdp.admission import Admission, AdmissionError, Refusal
from pdp.errors import PdpError
from pdp.reason import ReasonCode
from pdp.server.metrics import Metrics
from pdp.server.status import abort, status_code

_log: Final = logging.getLogger(__name__)
_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[object, object]

MAX_CALLS_OF_NOBODY: Final = 1_024
"""Calls at the same time of whom it is not known yet, or never will be."""
_OVERFULL_SECONDS: Final = 1.0
"""When to ask again where not even that can be found out."""


class CallRunner:
    """Runs one call within its bounds: for how long, and how many at a time in all,
    beyond what is bounded by tenant.

    Work that has begun is finished even when its caller has gone, so that what
    was held or charged is always on record. A call that waits to be let in has not
    begun, and leaves with its caller.
    """

    def __init__(self, metrics: Metrics, admission: Admission, *, timeout_seconds: float) -> None:
        self._metrics = metrics
        self._admission = admission
        self._timeout_seconds = timeout_seconds
        self._max_calls = admission.max_calls + MAX_CALLS_OF_NOBODY
        self._under_way: set[asyncio.Task[object]] = set()

    async def run(self, context: _Context, method: str, work: Callable[[], Awaitable[_T]]) -> _T:
        """The result of ``work``; every failure ends the call with its status."""
        try:
            return await self.result(method, work, within_seconds=context.time_remaining())
        except PdpError as error:
            return await abort(context, error)

    async def result(
        self, method: str, work: Callable[[], Awaitable[_T]], *, within_seconds: float | None
    ) -> _T:
        """The result of ``work``, for a message that is no call of its own. Raises PdpError,
        whatever failed. ``within_seconds`` is how long the caller waits, if that is known.

        Either end is counted before it leaves, so that whoever has the answer finds it
        counted.
        """
        with self._metrics.timed(method) as timer:
            try:
                result = await self._bounded(work, within_seconds)
            except Exception as error:  # noqa: BLE001 - whatever it is, nothing is allowed
                failure = self.failure_of(method, error)
            else:
                timer.status = "OK"
                return result
            timer.status = status_code(failure).name
        try:
            raise failure
        finally:
            # The traceback knows this frame: if that knew the failure in turn, both would
            # hold the whole message until garbage is collected.
            del failure

    def failure_of(self, method: str, error: Exception) -> PdpError:
        """What the client learns of a failure, which is counted here."""
        if isinstance(error, PdpError):
            failure = error
        elif isinstance(error, TimeoutError):
            failure = PdpError(
                ReasonCode.DEADLINE_EXCEEDED,
                "The answer did not come in time; ask again with the same key.",
            )
        else:
            # The error's own text may quote data, so only its kind and the code
            # that it came from are logged; the client learns that it failed.
            places = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s failed with %s:\n%s", method, type(error).__name__, places)
            failure = PdpError(ReasonCode.INTERNAL, "The PDP failed; nothing was allowed.")
        if isinstance(failure, AdmissionError):
            self._metrics.admission_refused(failure.kind)
        if isinstance(failure, spending.SpendingError) and failure.refused_by is not None:
            self._metrics.budget_refused(method)
        self._metrics.failed(method, failure.reason_code)
        return failure

    async def drained(self) -> None:
        """Wait until all work that has begun is finished."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def _bounded(self, work: Callable[[], Awaitable[_T]], within_seconds: float | None) -> _T:
        if len(self._under_way) >= self._max_calls:
            raise AdmissionError(Refusal.FULL, retry_after_seconds=_OVERFULL_SECONDS)
        timeout = min(self._timeout_seconds, within_seconds or self._timeout_seconds)
        task = asyncio.ensure_future(work())
        self._under_way.add(task)
        task.add_done_callback(self._finished)
        try:
            if not await _ends_within(timeout, task):
                raise TimeoutError
            return task.result()
        finally:
            self._admission.abandon(task)
            del task  # which knows its failure: see result

    def _finished(self, task: asyncio.Task[object]) -> None:
        self._under_way.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()  # marks it as seen when its caller has gone


async def _ends_within(seconds: float, task: asyncio.Task[object]) -> bool:
    """Whether the task does, which goes on in any case. As asyncio.wait, at half its cost."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def wake(_: object = None) -> None:
        if not over.done():
            over.set_result(None)

    task.add_done_callback(wake)
    timer = loop.call_later(seconds, wake)
    try:
        await over
    finally:
        timer.cancel()
        task.remove_done_callback(wake)
    return task.done()
