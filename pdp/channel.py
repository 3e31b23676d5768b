"""Connections to a sidecar, and what its errors mean: shared by stub and tool side."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from pdp.errors import PdpError
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

if TYPE_CHECKING:
    import grpc
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message
    from google.rpc.status_pb2 import Status

    from pdp.stream import AsyncStream, Stream

DETAILS_KEY: Final = "grpc-status-details-bin"
ERROR_DOMAIN: Final = "agent-pdp"
"""The google.rpc.ErrorInfo domain of the sidecar's own reasons."""

OPTIONS: Final = (
    # Every mutating call carries an idempotency key, so trying again is safe.
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    # A stream that can not be opened gives way to calls at once.
                    {
                        "name": [
                            {
                                "service": "pdp.v1.AuthorizationService",
                                "method": "AuthorizeStream",
                            }
                        ]
                    },
                    {
                        "name": [{}],
                        "retryPolicy": {
                            "maxAttempts": 4,
                            "initialBackoff": "0.05s",
                            "maxBackoff": "0.5s",
                            "backoffMultiplier": 3,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    },
                ]
            }
        ),
    ),
    # A sidecar that restarts is found again within a second, not within minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    # This one is how long an attempt to connect may take, in spite of its name.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A sidecar that hangs, or is cut off, is missed while a stream is open. Sidecars take a
    # ping every ten seconds.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy that the environment names for the web is not to see tokens.
    ("grpc.enable_http_proxy", 0),
)

MAX_TIMEOUT_SECONDS: Final = 60.0

_ON_THIS_MACHINE: Final = re.compile(
    r"unix(-abstract)?:.+|((ipv4|ipv6):)?(localhost|127(\.[0-9]{1,3}){3}|\[::1\]):[0-9]+"
)

Metadata = tuple[tuple[str, str], ...]
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750 2.1. Anything else can not travel as a bearer token."""

_REASON_OF_STATUS: Final = {
    "UNAVAILABLE": ReasonCode.PDP_UNAVAILABLE,
    "DEADLINE_EXCEEDED": ReasonCode.DEADLINE_EXCEEDED,
    "CANCELLED": ReasonCode.PDP_UNAVAILABLE,
}


class CallError(PdpError):
    """A call to the sidecar failed. ``reason_code`` is the sidecar's own word where
    it gave one.
    """

    def __init__(
        self,
        reason_code: str,
        message: str,
        *,
        retry_after_seconds: float | None = None,
        refused_by: str = "",
    ) -> None:
        super().__init__(reason_code, message)
        self.retry_after_seconds = retry_after_seconds
        self.refused_by = refused_by
        """Id of the limit that refused, where one did."""


def connect(target: str, credentials: grpc.ChannelCredentials | None = None) -> grpc.Channel:
    """A blocking channel: ``unix:///path`` or ``host:port``."""
    import grpc  # noqa: PLC0415 - importing the stub stays cheap until it is used

    if credentials is None:
        return grpc.insecure_channel(target, options=OPTIONS)
    return grpc.secure_channel(target, credentials, options=OPTIONS)


def connect_async(
    target: str, credentials: grpc.ChannelCredentials | None = None
) -> grpc.aio.Channel:
    """An asyncio channel."""
    import grpc.aio  # noqa: PLC0415 - as above

    if credentials is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS)
    return grpc.aio.secure_channel(target, credentials, options=OPTIONS)


_S = TypeVar("_S", bound="Stream | AsyncStream")


class _Channel(Generic[_S]):
    """A grpc.Channel or grpc.aio.Channel, and the stream of questions over it."""

    def __init__(self, channel: Any, open_stream: Callable[[Callable[..., Any]], _S]) -> None:  # noqa: ANN401 - of either kind
        self.channel = channel
        self.methods = _methods(channel)
        self.closed = False
        self._open_stream = open_stream
        self._stream: _S | None = None
        self._lock = threading.RLock()  # a signal handler may ask while its thread is in here

    def stream(self) -> _S | None:
        """The stream, which is opened if need be; None while there can be none."""
        with self._lock:
            if self._stream is not None:
                rests_until = self._stream.rests_until
                if rests_until is None:
                    return self._stream
                if time.monotonic() < rests_until:
                    return None
            self._stream = None
            if not self.closed:
                with contextlib.suppress(RuntimeError):  # no thread can be had for it
                    self._stream = self._open_stream(self.methods["AuthorizeStream"])
            return self._stream

    def check_open(self) -> None:
        """Raises CallError where it was closed in the meantime."""
        if self.closed:
            raise _error_of("CANCELLED")

    def stop(self) -> _S | None:
        """No stream is opened any more; the one that there was, to be closed."""
        with self._lock:
            self.closed = True
            stream, self._stream = self._stream, None
            return stream


class _Connection(Generic[_S]):
    """What a blocking and an awaiting connection share. Neither is made before the
    first call.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float,
        credentials: grpc.ChannelCredentials | None,
        workload_token: Callable[[], str] | None = None,
    ) -> None:
        """``target`` is ``unix:///path`` or ``host:port``, with ``credentials`` for
        TLS; ``timeout_seconds`` bounds each call. ``workload_token`` gives this workload's
        own token, as it is now, for each call. Raises ValueError for a target
        beyond this machine without credentials: tokens and permits would travel
        readable, and permit keys come from whoever answers.
        """
        if credentials is None and not _ON_THIS_MACHINE.fullmatch(target):
            raise ValueError(
                f"{target} is neither a unix: socket nor host:port on loopback, so it needs"
                " credentials: pass grpc.ssl_channel_credentials(...)"
            )
        if not 0 < timeout_seconds <= MAX_TIMEOUT_SECONDS:
            raise ValueError(f"timeout_seconds must be above 0, at most {MAX_TIMEOUT_SECONDS:.0f}")
        self._target = target
        self._timeout_seconds = timeout_seconds
        self._credentials = credentials
        self._workload_token = workload_token
        self._channels: dict[tuple[int, object], _Channel[_S]] = {}
        """By process and event loop. After a fork its parent's stays, untouched: even to
        let go of it can wait for a lock that nobody is left to release."""

    def _channel_of(
        self,
        loop: object,
        connect: Callable[..., grpc.Channel | grpc.aio.Channel],
        open_stream: Callable[[Callable[..., Any]], _S],
    ) -> _Channel[_S]:
        """The channel of this process and loop, which is made if there is none."""
        owner = (os.getpid(), loop)
        found = self._channels.get(owner)
        if found is None:
            for other in list(self._channels):
                if other[0] == owner[0] and other != owner:  # of a loop that was before
                    del self._channels[other]
            made = _Channel(connect(self._target, self._credentials), open_stream)
            found = self._channels.setdefault(owner, made)  # another thread may be first
        return found

    def _with_workload(self, metadata: Metadata) -> Metadata:
        """The metadata, and the workload's token. Raises CallError."""
        if self._workload_token is None:
            return metadata
        token = self._workload_token()
        if not _TOKEN.fullmatch(token):  # gRPC would show it in its error
            raise CallError(ReasonCode.WORKLOAD_INVALID, "The workload_token is no token.")
        return (*metadata, ("workload-authorization", f"Bearer {token}"))

    def _take_channel(self, loop: object) -> _Channel[_S] | None:
        return self._channels.pop((os.getpid(), loop), None)

    def _message(self, method: str, request: Any, metadata: Metadata) -> Any:  # noqa: ANN401 - as call
        """The request as a message of a stream; None where it is to travel as a call."""
        from pdp.stream import message_from  # noqa: PLC0415

        if method != "Authorize":
            return None
        return message_from(request, metadata, timeout_seconds=self._timeout_seconds)


class Connection(_Connection["Stream"]):
    """A blocking connection. Threads may share it, and it survives a fork."""

    def call(self, method: str, request: Message, metadata: Metadata = ()) -> Any:  # noqa: ANN401
        """The response. Raises CallError."""
        import grpc  # noqa: PLC0415 - as in connect

        from pdp.stream import NotAnswered, answer_from  # noqa: PLC0415

        channel = self._channel()
        metadata = self._with_workload(metadata)
        ends_at = time.monotonic() + self._timeout_seconds
        message = self._message(method, request, metadata)
        stream = channel.stream() if message is not None else None
        told: CallError | None = None
        if stream is not None:
            try:
                return answer_from(stream.ask(message, timeout_seconds=self._timeout_seconds))
            except NotAnswered as unanswered:
                channel.check_open()
                told = unanswered.told
            except TimeoutError:
                raise _error_of("DEADLINE_EXCEEDED") from None
        try:
            return channel.methods[method](
                request, timeout=ends_at - time.monotonic(), metadata=metadata
            )
        except grpc.RpcError as error:
            raise _telling(call_error(error), told) from None

    def stream(self, method: str, request: Message, metadata: Metadata = ()) -> Any:  # noqa: ANN401
        """The call, to be iterated over for its messages, however long they take: it has
        no deadline, and is ended with its ``cancel()``. Iterating raises grpc.RpcError.
        """
        return self._channel().methods[method](request, metadata=self._with_workload(metadata))

    def close(self) -> None:
        """Close it; the next call opens it again."""
        channel = self._take_channel(None)
        if channel is not None:
            stream = channel.stop()
            if stream is not None:
                stream.close()
            channel.channel.close()

    def _channel(self) -> _Channel[Stream]:
        from pdp.stream import Stream  # noqa: PLC0415 - as in connect

        return self._channel_of(None, connect, Stream)


class AsyncConnection(_Connection["AsyncStream"]):
    """An awaiting connection, of one event loop at a time."""

    async def call(self, method: str, request: Message, metadata: Metadata = ()) -> Any:  # noqa: ANN401
        """The response. Raises CallError."""
        import grpc  # noqa: PLC0415 - as in connect

        from pdp.stream import NotAnswered, answer_from  # noqa: PLC0415

        channel = self._channel()
        metadata = self._with_workload(metadata)
        ends_at = time.monotonic() + self._timeout_seconds
        message = self._message(method, request, metadata)
        stream = channel.stream() if message is not None else None
        told: CallError | None = None
        if stream is not None:
            try:
                return answer_from(await stream.ask(message, timeout_seconds=self._timeout_seconds))
            except NotAnswered as unanswered:
                channel.check_open()
                told = unanswered.told
            except TimeoutError:
                raise _error_of("DEADLINE_EXCEEDED") from None
        try:
            response = await channel.methods[method](
                request, timeout=ends_at - time.monotonic(), metadata=metadata
            )
        except grpc.RpcError as error:
            raise _telling(call_error(error), told) from None
        if response is None:  # how grpc.aio hands over what it can not read
            raise CallError(ReasonCode.INTERNAL, "The sidecar's answer can not be read.")
        return response

    async def close(self) -> None:
        """Close it; the next call opens it again."""
        import asyncio  # noqa: PLC0415 - as in connect

        channel = self._take_channel(asyncio.get_running_loop())
        if channel is not None:
            stream = channel.stop()
            if stream is not None:
                await stream.close()
            await channel.channel.close()

    def _channel(self) -> _Channel[AsyncStream]:
        import asyncio  # noqa: PLC0415 - as in connect

        from pdp.stream import AsyncStream  # noqa: PLC0415

        return self._channel_of(asyncio.get_running_loop(), connect_async, AsyncStream)


def _methods(channel: Any) -> Mapping[str, Callable[..., Any]]:  # noqa: ANN401 - of either kind
    from pdp.api.v1 import (  # noqa: PLC0415
        authorization_pb2_grpc,
        budget_pb2_grpc,
        execution_pb2_grpc,
    )

    authorization = authorization_pb2_grpc.AuthorizationServiceStub(channel)
    budget = budget_pb2_grpc.BudgetServiceStub(channel)
    execution = execution_pb2_grpc.ExecutionServiceStub(channel)
    return {
        "Authorize": authorization.Authorize,
        "AuthorizeBatch": authorization.AuthorizeBatch,
        "AuthorizeStream": authorization.AuthorizeStream,
        "Delegate": authorization.Delegate,
        "GetPermitKeys": execution.GetPermitKeys,
        "ListTools": authorization.ListTools,
        "RedeemPermit": execution.RedeemPermit,
        "ReleaseBudget": budget.ReleaseBudget,
        "ReportOutcome": execution.ReportOutcome,
        "ReserveBudget": budget.ReserveBudget,
        "SettleBudget": budget.SettleBudget,
        "Watch": authorization.Watch,
    }


def call_error(error: grpc.RpcError) -> CallError:
    """What a failed call means: the reason of the sidecar's google.rpc.ErrorInfo,
    or else one for the status, whoever set it. Never raises.
    """
    code = error.code()  # every failed call is also a grpc.Call
    metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            own = _own_error(value)
            if own is not None:
                return own
    return _error_of(code.name)


def _telling(error: CallError, told: CallError | None) -> CallError:
    """What says more: that time ran out while it was tried again and again, or what the
    sidecar had told the first time.
    """
    return told if told is not None and error.reason_code == ReasonCode.DEADLINE_EXCEEDED else error


def _error_of(status: str) -> CallError:
    """What a status means of which nothing else is known."""
    return CallError(
        _REASON_OF_STATUS.get(status, ReasonCode.INTERNAL),
        f"The sidecar could not be asked ({status}); see that it runs, listens where it is"
        " looked for, and, with TLS, that each side accepts the other's certificate.",
    )


def seconds_of(duration: Duration) -> float:
    """The length of a protobuf Duration, in range or not."""
    return float(duration.seconds) + duration.nanos / 1e9


def _own_error(details: bytes) -> CallError | None:
    """The sidecar's own word, if these details hold it."""
    from google.protobuf.message import DecodeError  # noqa: PLC0415 - only on failure
    from google.rpc import error_details_pb2, status_pb2  # noqa: PLC0415

    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    quota = error_details_pb2.QuotaFailure()
    try:
        status: Status = status_pb2.Status.FromString(details)
        for detail in status.details:
            # Each fills the message that it is of, and leaves the others.
            detail.Unpack(info)
            detail.Unpack(retry)
            detail.Unpack(quota)
    except DecodeError:
        return None
    if info.domain != ERROR_DOMAIN or not REASON_CODE_PATTERN.fullmatch(info.reason):
        return None
    return CallError(
        info.reason,
        status.message,
        retry_after_seconds=seconds_of(retry.retry_delay)
        if retry.HasField("retry_delay")
        else None,
        refused_by=quota.violations[0].subject.removeprefix("limit:") if quota.violations else "",
    )
