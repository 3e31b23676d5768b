"""Connections to a sidecar, and what its errors mean: shared by stub and tool side."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pdp.errors import PdpError
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

if TYPE_CHECKING:
    import grpc
    from google.protobuf.duration_pb2 import Duration
    from google.protobuf.message import Message
    from google.rpc.status_pb2 import Status

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
                    {
                        "name": [{}],
                        "retryPolicy": {
                            "maxAttempts": 4,
                            "initialBackoff": "0.05s",
                            "maxBackoff": "0.5s",
                            "backoffMultiplier": 3,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ]
            }
        ),
    ),
    # A sidecar that restarts is found again within a second, not within minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    # This one is how long an attempt to connect may take, in spite of its name.
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
    # A proxy that the environment names for the web is not to see tokens.
    ("grpc.enable_http_proxy", 0),
)

MAX_TIMEOUT_SECONDS: Final = 60.0

_ON_THIS_MACHINE: Final = re.compile(
    r"unix(-abstract)?:.+|((ipv4|ipv6):)?(localhost|127(\.[0-9]{1,3}){3}|\[::1\]):[0-9]+"
)

Metadata = tuple[tuple[str, str], ...]

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


class _Channel(NamedTuple):
    channel: Any
    """A grpc.Channel, or a grpc.aio.Channel."""
    methods: Mapping[str, Callable[..., Any]]
    owner: object
    """The process, or event loop, that it works in."""


class _Connection:
    """What a blocking and an awaiting connection share. Neither is made before the
    first call.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float,
        credentials: grpc.ChannelCredentials | None,
    ) -> None:
        """``target`` is ``unix:///path`` or ``host:port``, with ``credentials`` for
        TLS; ``timeout_seconds`` bounds each call. Raises ValueError for a target
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
        self._open: _Channel | None = None

    def _method(
        self, name: str, owner: object, connect: Callable[..., grpc.Channel | grpc.aio.Channel]
    ) -> Callable[..., Any]:
        """A method over the channel of ``owner``, which is made if there is none."""
        found = self._open
        if found is None or found.owner != owner:
            channel = connect(self._target, self._credentials)
            self._open = found = _Channel(channel, _methods(channel), owner)
        return found.methods[name]

    def _take_channel(self) -> Any:  # noqa: ANN401 - of either kind
        found, self._open = self._open, None
        return found.channel if found is not None else None


class Connection(_Connection):
    """A blocking connection. Threads may share it, and it survives a fork."""

    def call(self, method: str, request: Message, metadata: Metadata = ()) -> Any:  # noqa: ANN401
        """The response. Raises CallError."""
        import grpc  # noqa: PLC0415 - as in connect

        try:
            return self._method(method, os.getpid(), connect)(
                request, timeout=self._timeout_seconds, metadata=metadata
            )
        except grpc.RpcError as error:
            raise call_error(error) from None

    def stream(self, method: str, request: Message, metadata: Metadata = ()) -> Any:  # noqa: ANN401
        """The call, to be iterated over for its messages, however long they take: it has
        no deadline, and is ended with its ``cancel()``. Iterating raises grpc.RpcError.
        """
        return self._method(method, os.getpid(), connect)(request, metadata=metadata)

    def close(self) -> None:
        """Close it; the next call opens it again."""
        channel = self._take_channel()
        if channel is not None:
            channel.close()


class AsyncConnection(_Connection):
    """An awaiting connection, of one event loop at a time."""

    async def call(self, method: str, request: Message, metadata: Metadata = ()) -> Any:  # noqa: ANN401
        """The response. Raises CallError."""
        import asyncio  # noqa: PLC0415 - as in connect

        import grpc  # noqa: PLC0415

        try:
            response = await self._method(method, asyncio.get_running_loop(), connect_async)(
                request, timeout=self._timeout_seconds, metadata=metadata
            )
        except grpc.RpcError as error:
            raise call_error(error) from None
        if response is None:  # how grpc.aio hands over what it can not read
            raise CallError(ReasonCode.INTERNAL, "The sidecar's answer can not be read.")
        return response

    async def close(self) -> None:
        """Close it; the next call opens it again."""
        channel = self._take_channel()
        if channel is not None:
            await channel.close()


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
    return CallError(
        _REASON_OF_STATUS.get(code.name, ReasonCode.INTERNAL),
        f"The sidecar could not be asked ({code.name}); see that it runs, and listens where it"
        " is looked for.",
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
