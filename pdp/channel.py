"""gRPC channels to a sidecar, and what its errors mean: shared by stub and tool side."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from pdp.errors import PdpError
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

if TYPE_CHECKING:
    import grpc
    from google.protobuf.duration_pb2 import Duration
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
)

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
        self, reason_code: str, message: str, *, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(reason_code, message)
        self.retry_after_seconds = retry_after_seconds


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
    try:
        status: Status = status_pb2.Status.FromString(details)
        for detail in status.details:
            # Each fills the message that it is of, and leaves the other.
            detail.Unpack(info)
            detail.Unpack(retry)
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
    )
