"""How an error reaches a gRPC client: one table, one shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Final, NoReturn

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from pdp.admission import AdmissionError
from pdp.api.v1 import authorization_pb2
from pdp.budget.ledger import Limit, Window
from pdp.channel import DETAILS_KEY, ERROR_DOMAIN
from pdp.errors import PdpError, RequestError
from pdp.reason import ReasonCode
from pdp.spending import SpendingError

STATUS_OF_REASON: Final[Mapping[str, grpc.StatusCode]] = {
    ReasonCode.TOKEN_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.TOKEN_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.TOKEN_EXPIRED: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.KEYS_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.TENANT_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.TENANT_MISMATCH: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.TENANT_UNKNOWN: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.ACTOR_REVOKED: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.TOKEN_REVOKED: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.WORKLOAD_REVOKED: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.WORKLOAD_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.WORKLOAD_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.REVOCATIONS_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.PERMIT_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.PERMIT_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.PERMIT_MISMATCH: grpc.StatusCode.PERMISSION_DENIED,
    ReasonCode.PERMIT_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.PERMIT_USED: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.PERMIT_REVOKED: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.HOLD_NOT_FOUND: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.HOLD_ALREADY_SETTLED: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.HOLD_ALREADY_RELEASED: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.HOLD_EXPIRED: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.CHARGE_NOT_HELD: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.REFUND_EXCEEDS_SPEND: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.ACCOUNT_NOT_FOUND: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonCode.REQUEST_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ReasonCode.ARGUMENTS_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ReasonCode.IDEMPOTENCY_KEY_REUSED: grpc.StatusCode.ALREADY_EXISTS,
    ReasonCode.OUTCOME_ALREADY_REPORTED: grpc.StatusCode.ALREADY_EXISTS,
    ReasonCode.TENANT_BUDGET_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ReasonCode.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ReasonCode.POLICY_TIMEOUT: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.POLICY_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.POLICY_STALE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.BUDGET_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.PERMIT_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.AUDIT_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.PDP_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ReasonCode.INTERNAL: grpc.StatusCode.INTERNAL,
}
"""Every other code is the policy's word: PERMISSION_DENIED."""


def status_code(error: PdpError) -> grpc.StatusCode:
    """The gRPC status of an error."""
    if isinstance(error, SpendingError) and error.refused_by is None:
        # The policy's own word, even where it borrows a code of the product.
        return grpc.StatusCode.PERMISSION_DENIED
    return STATUS_OF_REASON.get(error.reason_code, grpc.StatusCode.PERMISSION_DENIED)


async def abort(context: grpc.aio.ServicerContext[object, object], error: PdpError) -> NoReturn:
    """End the call with the error's status, its fixed text and its details."""
    code = status_code(error)
    status = Status(code=code.value[0], message=error.message)
    for detail in _details(error):
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    try:
        await context.abort(
            code, error.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
        )
    except BaseException as ending:
        # gRPC keeps it with the call, and its traceback knows frames that know the call:
        # both would hold the whole message until garbage is collected.
        let_go = partial(_let_go_of_frames, ending)
        context.add_done_callback(let_go)  # type: ignore[arg-type]  # its stub names a class
        raise
    raise AssertionError  # abort always raises; mypy can not know


def _let_go_of_frames(ending: BaseException, _: object) -> None:
    ending.__traceback__ = None
    ending.__context__ = None


def failure_out(error: PdpError) -> authorization_pb2.Failure:
    """The same for one question of many, whose call goes on."""
    return authorization_pb2.Failure(
        code=status_code(error).value[0],
        reason_code=error.reason_code,
        message=error.message,
        retry_after=_retry_after(error),
    )


def _retry_after(error: PdpError) -> Duration | None:
    if not isinstance(error, SpendingError | AdmissionError) or error.retry_after_seconds is None:
        return None
    # Never rounded down: whoever waits so long is not told to wait again.
    millis = math.ceil(error.retry_after_seconds * 1000)
    return Duration(seconds=millis // 1000, nanos=millis % 1000 * 1_000_000)


def _details(error: PdpError) -> list[ErrorInfo | BadRequest | QuotaFailure | RetryInfo]:
    details: list[ErrorInfo | BadRequest | QuotaFailure | RetryInfo] = [
        ErrorInfo(reason=error.reason_code, domain=ERROR_DOMAIN)
    ]
    if isinstance(error, RequestError):
        violation = BadRequest.FieldViolation(field=error.field, description=error.description)
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, SpendingError) and error.refused_by is not None:
        limit = error.refused_by.limit
        details.append(
            QuotaFailure(
                violations=[
                    QuotaFailure.Violation(
                        subject=f"limit:{limit.id}",
                        description=f"{error.refused_by.remaining} {limit.unit} remain of"
                        f" {_bound_of(limit)}",
                    )
                ]
            )
        )
    delay = _retry_after(error)
    if delay is not None:
        details.append(RetryInfo(retry_delay=delay))
    return details


def _bound_of(limit: Limit) -> str:
    if limit.window is Window.ROLLING:
        return f"{limit.burst} at once and {limit.limit} in {limit.seconds} seconds"
    if limit.window is Window.CONCURRENT:
        return f"{limit.limit} at the same time"
    return f"{limit.limit} per {limit.window}"
