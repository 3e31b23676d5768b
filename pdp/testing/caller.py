"""One caller of a sidecar, with the plain stubs of the contract and no retries."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from pdp.api.v1 import (
    authorization_pb2,
    authorization_pb2_grpc,
    budget_pb2_grpc,
    execution_pb2_grpc,
)
from pdp.channel import DETAILS_KEY
from pdp.closing import Closing


class Caller(Closing):
    """Calls as whoever the token names; threads may share it."""

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        credentials: grpc.ChannelCredentials | None = None,
        timeout_seconds: float = 20.0,
    ) -> None:
        """``metadata`` is sent besides the token. ``credentials`` are for TLS."""
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 100),
        )
        bearer = () if token is None else (("authorization", f"Bearer {token}"),)
        self.metadata = (*bearer, *metadata)
        self._channel = (
            grpc.insecure_channel(target, options=options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=options)
        )
        self.channel = grpc.intercept_channel(
            self._channel, _CallDefaults(self.metadata, timeout_seconds)
        )
        self.authorization = authorization_pb2_grpc.AuthorizationServiceStub(self.channel)
        self.budget = budget_pb2_grpc.BudgetServiceStub(self.channel)
        self.execution = execution_pb2_grpc.ExecutionServiceStub(self.channel)

    def authorize(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        request_id: str | None = None,
        **fields: Any,  # noqa: ANN401 - any further field of the request
    ) -> authorization_pb2.AuthorizeResponse:
        """Ask for one call; a request id is made where none is given."""
        request = authorization_pb2.AuthorizeRequest(
            request_id=request_id or str(uuid.uuid4()),
            action=authorization_pb2.Action(name=tool),
            arguments_json=json.dumps(arguments or {}).encode("utf-8"),
            **fields,
        )
        return self.authorization.Authorize(request)

    def close(self) -> None:
        """Close the connection; calls under way end as CANCELLED."""
        self._channel.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A call that ended with a status, and every detail that came with it."""

    status: grpc.StatusCode
    reason_code: str
    """Empty where gRPC itself refused."""
    message: str
    fields: tuple[str, ...] = ()
    """The fields of its google.rpc.BadRequest."""
    limits: tuple[str, ...] = ()
    """The subjects of its google.rpc.QuotaFailure."""
    retry_after_seconds: float | None = None


def refusal_of(call: Callable[..., object], *arguments: object, **named: object) -> Refusal:
    """Make a call that must be refused. Raises AssertionError where it is not."""
    try:
        call(*arguments, **named)
    except grpc.RpcError as error:
        return _read(error)
    raise AssertionError("the call was not refused")


def _read(error: grpc.RpcError) -> Refusal:
    details: dict[str, Any] = {}
    metadata: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                for kind in _DETAILS:
                    message = kind()
                    if detail.Unpack(message):
                        details[kind.__name__] = message
    info, bad, quota, retry = (details.get(kind.__name__) for kind in _DETAILS)
    return Refusal(
        status=error.code(),
        reason_code=info.reason if info else "",
        message=error.details() or "",
        fields=tuple(violation.field for violation in bad.field_violations) if bad else (),
        limits=tuple(violation.subject for violation in quota.violations) if quota else (),
        retry_after_seconds=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
    )


_DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.QuotaFailure,
    error_details_pb2.RetryInfo,
)


class _CallDefaults(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the caller's metadata, and a deadline where a call has none."""

    def __init__(self, metadata: tuple[tuple[str, str], ...], timeout_seconds: float) -> None:
        self._metadata = metadata
        self._timeout_seconds = timeout_seconds

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401 - gRPC's own shape
        return continuation(self._completed(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401 - gRPC's own shape
        return continuation(self._completed(details), request)

    def _completed(self, details: Any) -> _Details:  # noqa: ANN401 - gRPC's own shape
        return _Details(
            details.method,
            self._timeout_seconds if details.timeout is None else details.timeout,
            (*(details.metadata or ()), *self._metadata),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )


@dataclass(frozen=True, slots=True)
class _Details(grpc.ClientCallDetails):
    method: str
    timeout: float
    metadata: tuple[tuple[str, str], ...]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None
