"""AuthorizeStream: questions as they come, answers as they are ready.

Each message is a call of its own, with its own identity, deadline, admission and
record. What the stream adds is only how messages travel.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

import grpc
from google.protobuf.message import DecodeError

from pdp.api.v1 import authorization_pb2
from pdp.channel import seconds_of
from pdp.errors import PdpError, RequestError
from pdp.identity.resolver import Credentials, Peer
from pdp.reason import ReasonCode
from pdp.server import wire
from pdp.server.metrics import Metrics
from pdp.server.runner import CallRunner
from pdp.server.status import abort, failure_out

MAX_STREAMS: Final = 1_024
"""Streams that are open at the same time on one listener. For one more the one that has been
idle for longest is ended, so that nobody takes all the places by doing nothing; where none is
idle, it is refused with rate_limited."""
MAX_UNDER_WAY: Final = 256
"""Messages of one stream that are under way, up to their answer's having left. More are
not read before there is room, so that they wait with the client."""

Decide = Callable[
    [authorization_pb2.AuthorizeRequest, Credentials, str | None],
    Awaitable[authorization_pb2.AuthorizeResponse],
]
"""Decides one call, given its credentials and trace id. Raises PdpError."""
_Context = grpc.aio.ServicerContext[object, object]


class Streams:
    """The streams of one listener."""

    def __init__(self, runner: CallRunner, metrics: Metrics, *, draining: asyncio.Event) -> None:
        self._runner = runner
        self._metrics = metrics
        self._draining = draining
        self._open: dict[_Stream, None] = {}
        """The one with the latest message is last."""

    async def serve(self, context: _Context, peer: Peer, decide: Decide) -> None:
        """Answer one stream's questions, until its client has no more or the sidecar is
        draining. Ends the stream with rate_limited where there are too many.
        """
        if len(self._open) >= MAX_STREAMS and not self._end_an_idle_one():
            refusal = PdpError(
                ReasonCode.RATE_LIMITED, "Too many streams are open; ask by Authorize instead."
            )
            await abort(context, self._runner.failure_of("AuthorizeStream", refusal))
        stream = _Stream(context, peer, decide, self._runner, self._draining, self._moved)
        self._open[stream] = None
        try:
            with self._metrics.streams.track_inprogress():
                await stream.serve()
        finally:
            self._open.pop(stream, None)

    def _moved(self, stream: _Stream) -> None:
        """A message has come on it."""
        if stream in self._open:  # and is not ended already
            self._open[stream] = self._open.pop(stream)

    def _end_an_idle_one(self) -> bool:
        idle = next((stream for stream in self._open if stream.idle), None)
        if idle is None:
            return False
        del self._open[idle]
        idle.ended.set()
        return True


class _Stream:
    def __init__(
        self,
        context: _Context,
        peer: Peer,
        decide: Decide,
        runner: CallRunner,
        draining: asyncio.Event,
        moved: Callable[[_Stream], None],
    ) -> None:
        self._moved = moved
        self.ended = asyncio.Event()
        """Set where it is to make room for another one."""
        self._context = context
        self._peer = peer
        self._decide = decide
        self._runner = runner
        self._draining = draining
        self._places = asyncio.Semaphore(MAX_UNDER_WAY)
        self._questions: dict[int, asyncio.Task[None]] = {}
        """Those that have no answer yet, by id."""
        self._answering: set[asyncio.Task[None]] = set()
        """Those, and the ones whose answer has not left yet."""
        self._writing = asyncio.Lock()

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return not self._answering

    async def serve(self) -> None:
        reading = asyncio.create_task(self._read())
        draining = asyncio.create_task(self._draining.wait())
        ended = asyncio.create_task(self.ended.wait())
        try:
            await asyncio.wait({reading, draining, ended}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            # Otherwise messages are still read while others are finished: they are told to
            # ask again.
            while self._answering:
                await asyncio.wait(self._answering)
        finally:
            for task in (reading, draining, ended, *self._answering):
                task.cancel()

    async def _read(self) -> None:
        while True:
            await self._places.acquire()
            try:
                message = await self._context.read()
            except DecodeError:
                # Which question it was can not be told, so no question has this id.
                self._begin(self._fail(0, RequestError("message", "can not be read")))
                continue
            except grpc.aio.BaseError:
                return  # the client has gone
            if isinstance(message, authorization_pb2.AuthorizeStreamRequest):
                self._take(message)
            else:  # grpc.aio.EOF
                return

    def _take(self, message: authorization_pb2.AuthorizeStreamRequest) -> None:
        self._moved(self)
        if message.WhichOneof("message") == "cancel":
            self._places.release()
            if question := self._questions.pop(message.id, None):
                question.cancel()
        elif message.id == 0 or message.id in self._questions:
            error = RequestError("id", "must be above 0, and no other question's under way")
            self._begin(self._fail(message.id, error))
        else:
            self._questions[message.id] = self._begin(self._answer(message))

    def _begin(self, work: Awaitable[None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._answering.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        self._places.release()

    async def _answer(self, message: authorization_pb2.AuthorizeStreamRequest) -> None:
        response = await self._response(message)
        # It can not be cancelled from here on: half an answer would spoil the stream.
        del self._questions[message.id]
        del message  # a client that does not read is not to fill memory with questions
        await self._write(response)

    async def _response(
        self, message: authorization_pb2.AuthorizeStreamRequest
    ) -> authorization_pb2.AuthorizeStreamResponse:
        timeout_seconds = seconds_of(message.timeout)
        try:
            answer = await self._runner.result(
                "Authorize",
                lambda: self._decided(message),
                within_seconds=timeout_seconds if timeout_seconds > 0 else None,
            )
        except PdpError as error:
            return authorization_pb2.AuthorizeStreamResponse(
                id=message.id, failure=failure_out(error)
            )
        return authorization_pb2.AuthorizeStreamResponse(id=message.id, answer=answer)

    async def _decided(
        self, message: authorization_pb2.AuthorizeStreamRequest
    ) -> authorization_pb2.AuthorizeResponse:
        if self._draining.is_set():
            raise PdpError(ReasonCode.PDP_UNAVAILABLE, "The sidecar is stopping; ask again.")
        if not message.HasField("question"):
            raise RequestError("message", "must be a question or a cancel")
        if message.HasField("timeout") and seconds_of(message.timeout) <= 0:
            raise RequestError("timeout", "must be above 0")
        credentials = Credentials(
            bearer=message.bearer or None,
            workload_token=message.workload_token or None,
            peer=self._peer,
        )
        return await self._decide(
            message.question, credentials, wire.trace_id_from(message.traceparent)
        )

    async def _fail(self, question_id: int, error: PdpError) -> None:
        failure = failure_out(self._runner.failure_of("Authorize", error))
        await self._write(
            authorization_pb2.AuthorizeStreamResponse(id=question_id, failure=failure)
        )

    async def _write(self, response: authorization_pb2.AuthorizeStreamResponse) -> None:
        async with self._writing:  # gRPC takes one message at a time
            with contextlib.suppress(grpc.aio.BaseError):  # the client has gone
                await self._context.write(response)
