"""Questions over one AuthorizeStream, seen from the client.

A round trip on a stream that is open costs less than a call. A stream promises no
more than that: whatever it does not answer is for its caller to ask again by a call,
under the same request id.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc

from pdp.api.v1 import authorization_pb2
from pdp.channel import CallError, Metadata, seconds_of
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

MAX_QUESTION_BYTES: Final = 64 * 1024
"""A larger question would hold up those behind it, and is asked by a call."""
MAX_UNDER_WAY: Final = 128
"""Questions on one stream at the same time, well within what a sidecar takes; more are
asked by calls."""
REST_SECONDS: Final = 1.0
"""After a stream has ended, none is opened for so long."""
REST_UNIMPLEMENTED_SECONDS: Final = 60.0
"""The same where the sidecar knows no streams: it may be replaced by one that does."""

_BEARER: Final = re.compile(r"[Bb]earer ([!-~]+)")
_END: Final = None
"""Among messages: there are no more. Among answers: there will be none."""

Message = authorization_pb2.AuthorizeStreamRequest
Response = authorization_pb2.AuthorizeStreamResponse


class NotAnswered(Exception):  # noqa: N818 - nothing is wrong with the question
    """The stream does not answer this question; a call may."""

    def __init__(self, told: CallError | None = None) -> None:
        super().__init__()
        self.told = told
        """Why not, where the sidecar has said so."""


def message_from(
    request: authorization_pb2.AuthorizeRequest, metadata: Metadata, *, timeout_seconds: float
) -> Message | None:
    """The question as a message of a stream, without an id; None where it must travel as
    a call.
    """
    if request.ByteSize() > MAX_QUESTION_BYTES:
        return None
    message = Message(question=request)
    message.timeout.FromNanoseconds(int(timeout_seconds * 1e9))
    for key, value in metadata:
        if key == "traceparent" and not message.traceparent:
            message.traceparent = value
            continue
        bearer = _BEARER.fullmatch(value)
        if bearer is None:
            return None
        if key == "authorization" and not message.bearer:
            message.bearer = bearer[1]
        elif key == "workload-authorization" and not message.workload_token:
            message.workload_token = bearer[1]
        else:
            return None
    return message


def answer_from(response: Response) -> authorization_pb2.AuthorizeResponse:
    """The answer. Raises CallError, as a call would, and NotAnswered for what a call would
    try again.
    """
    if response.WhichOneof("result") == "answer":
        return response.answer
    failure = response.failure
    error = None
    if REASON_CODE_PATTERN.fullmatch(failure.reason_code):
        error = CallError(
            failure.reason_code,
            failure.message,
            retry_after_seconds=(
                seconds_of(failure.retry_after) if failure.HasField("retry_after") else None
            ),
        )
    if failure.code == grpc.StatusCode.UNAVAILABLE.value[0]:
        raise NotAnswered(error)
    raise error or CallError(ReasonCode.INTERNAL, "The sidecar's answer can not be read.")


def _cancelled(question_id: int) -> Message:
    return Message(id=question_id, cancel=authorization_pb2.Cancel())


class _Waiting:
    """Who waits for which answer. An id is never used again, so an answer that comes late
    finds nobody.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may ask while its thread is in here
        self._ids = itertools.count(1)
        self._deliver: dict[int, Callable[[Response | None], None]] = {}
        self.heard = 0
        """Answers that have come, to whatever question."""
        self.rests_until: float | None = None
        """Once the stream has ended: when, by the monotonic clock, to open another."""

    def enter(self, deliver: Callable[[Response | None], None]) -> int:
        """The id of a new question. Raises NotAnswered."""
        with self._lock:
            if self.rests_until is not None or len(self._deliver) >= MAX_UNDER_WAY:
                raise NotAnswered
            question_id = next(self._ids)
            self._deliver[question_id] = deliver
            return question_id

    def leave(self, question_id: int) -> bool:
        """The question is not waited for any more; whether it was until now."""
        with self._lock:
            return self._deliver.pop(question_id, None) is not None

    def take(self, response: Response) -> None:
        """Give an answer to whoever waits for it."""
        self.heard += 1
        with self._lock:
            deliver = self._deliver.pop(response.id, None)
        if deliver is not None:
            deliver(response)

    def end(self, error: grpc.RpcError | None) -> None:
        """The stream has ended, perhaps with an error."""
        unknown = error is not None and error.code() is grpc.StatusCode.UNIMPLEMENTED
        rest_seconds = REST_UNIMPLEMENTED_SECONDS if unknown else REST_SECONDS
        with self._lock:
            self.rests_until = time.monotonic() + rest_seconds
            left, self._deliver = self._deliver, {}
        for deliver in left.values():
            deliver(_END)


class Stream:
    """A stream that the threads of one process share."""

    def __init__(self, method: Callable[[Iterator[Message]], Any]) -> None:
        """``method`` is AuthorizeStream of a blocking stub. Raises RuntimeError where no
        thread can be had.
        """
        self._waiting = _Waiting()
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        call = method(iter(self._messages.get, _END))
        # The thread knows nothing of the stream itself, which ends with its last user.
        self._reader = threading.Thread(
            target=_read, args=(call, self._messages, self._waiting), name="pdp-stream", daemon=True
        )
        try:
            self._reader.start()
        except RuntimeError:
            self._messages.put(_END)
            call.cancel()
            raise
        self._stop = weakref.finalize(self, _stop, os.getpid(), call)

    @property
    def rests_until(self) -> float | None:
        """As that of its questions."""
        return self._waiting.rests_until

    def ask(self, message: Message, *, timeout_seconds: float) -> Response:
        """The answer. Raises NotAnswered, and TimeoutError."""
        answer: queue.SimpleQueue[Response | None] = queue.SimpleQueue()
        heard = self._waiting.heard
        message.id = self._waiting.enter(answer.put)
        self._messages.put(message)
        try:
            response = answer.get(timeout=timeout_seconds)
        except queue.Empty:
            if heard == self._waiting.heard:
                self._stop()  # it may be dead, and not know
            raise TimeoutError from None
        finally:
            if self._waiting.leave(message.id):
                self._messages.put(_cancelled(message.id))
        if response is None:
            raise NotAnswered
        return response

    def close(self) -> None:
        """End it, and wait until its thread has ended."""
        self._stop()
        self._reader.join()


def _read(call: Any, messages: queue.SimpleQueue[Message | None], waiting: _Waiting) -> None:  # noqa: ANN401 - as many as there are
    ended_with = None
    try:
        for response in call:
            waiting.take(response)
    except grpc.RpcError as error:
        ended_with = error
    finally:
        messages.put(_END)  # for gRPC's own thread, which waits for more
        waiting.end(ended_with)


def _stop(process_id: int, call: Any) -> None:  # noqa: ANN401
    # In the child of a fork nobody is left to answer, and locks may be held for ever.
    if process_id == os.getpid():
        call.cancel()


class AsyncStream:
    """A stream that the tasks of one event loop share."""

    def __init__(self, method: Callable[[], Any]) -> None:
        """``method`` is AuthorizeStream of an awaiting stub."""
        self._waiting = _Waiting()
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        call = method()
        # The task knows nothing of the stream itself, which ends with its last user.
        self._reader = asyncio.create_task(_read_async(call, self._messages, self._waiting))
        loop = asyncio.get_running_loop()
        self._stop = weakref.finalize(self, _stop_async, os.getpid(), loop, call)
        self._stop.atexit = False  # then its loop has ended, and so has it

    @property
    def rests_until(self) -> float | None:
        """As that of its questions."""
        return self._waiting.rests_until

    async def ask(self, message: Message, *, timeout_seconds: float) -> Response:
        """The answer. Raises NotAnswered, and TimeoutError."""
        answer: asyncio.Future[Response | None] = asyncio.get_running_loop().create_future()
        heard = self._waiting.heard
        message.id = self._waiting.enter(lambda response: _resolve(answer, response))
        self._messages.put_nowait(message)
        try:
            async with asyncio.timeout(timeout_seconds):
                response = await answer
        except TimeoutError:
            if heard == self._waiting.heard:
                self._stop()  # it may be dead, and not know
            raise
        finally:
            if self._waiting.leave(message.id):
                self._messages.put_nowait(_cancelled(message.id))
        if response is None:
            raise NotAnswered
        return response

    async def close(self) -> None:
        """End it, and wait until it has ended."""
        self._stop()
        await asyncio.wait({self._reader})


async def _read_async(call: Any, messages: asyncio.Queue[Message], waiting: _Waiting) -> None:  # noqa: ANN401
    writing = asyncio.create_task(_write_async(call, messages))
    ended_with = None
    try:
        async for response in call:
            if response is None:  # how grpc.aio hands over what it can not read
                break
            waiting.take(response)
    except grpc.RpcError as error:
        ended_with = error
    finally:
        call.cancel()
        waiting.end(ended_with)
        writing.cancel()  # it may wait for a connection that never comes
        await asyncio.wait({writing})


async def _write_async(call: Any, messages: asyncio.Queue[Message]) -> None:  # noqa: ANN401
    # A task of its own, for gRPC ends a stream when whoever writes to it is cancelled.
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # it has ended
        while True:
            await call.write(await messages.get())


def _stop_async(process_id: int, loop: asyncio.AbstractEventLoop, call: Any) -> None:  # noqa: ANN401
    # Garbage is collected in whatever thread, and perhaps after the loop has ended.
    if process_id == os.getpid():
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(call.cancel)


def _resolve(answer: asyncio.Future[Response | None], response: Response | None) -> None:
    if not answer.done():  # it is, where its task is cancelled in the same instant
        answer.set_result(response)
