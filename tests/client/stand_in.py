"""A sidecar that answers as it is told: for the answers that a real one never gives."""

from __future__ import annotations

import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.canonical import parse_object, sha256_hex
from pdp.permit import Permit
from pdp.permit.issuer import PermitIssuer
from pdp.permit.signing import SigningKey

Request = authorization_pb2.AuthorizeRequest
Response = authorization_pb2.AuthorizeResponse
Context = grpc.ServicerContext
Raw = Any
"""A message, or the bytes to send in its place."""
Event = authorization_pb2.WatchResponse
End = budget_pb2.SettleBudgetRequest | budget_pb2.ReleaseBudgetRequest

_SERVICE = "pdp.v1."


class StandIn:
    """Allows everything, unless ``answer``, ``answer_batch``, ``take_report``, ``hold`` or
    ``take_end`` are replaced. A model's quantities are charged to the budget llm as they are.
    """

    def __init__(self) -> None:
        self.key = SigningKey.generate()
        self.asked: list[Request] = []
        self.tokens: list[str] = []
        self.reports: list[execution_pb2.ReportOutcomeRequest] = []
        self.keys_asked = 0
        self.answer: Callable[[Request, Context], Raw] = lambda request, _: self.allow(request)
        self.take_report: Callable[[execution_pb2.ReportOutcomeRequest, Context], Raw] = (
            lambda _request, _context: execution_pb2.ReportOutcomeResponse()
        )
        self.reserves: list[budget_pb2.ReserveBudgetRequest] = []
        self.ends: list[End] = []
        """Every settlement, its parts too, and every release, as it came in."""
        self.hold: Callable[[budget_pb2.ReserveBudgetRequest, Context], Raw] = (
            lambda request, _context: self.held(request)
        )
        self.take_end: Callable[[End, Context], Raw] = lambda end, _context: self.ended(end)
        self.answer_batch: Callable[[authorization_pb2.AuthorizeBatchRequest, Context], Raw] = (
            lambda request, _context: self.allow_all(request)
        )
        self.revision = "r-1"
        """What a Watch tells first."""
        self.refuses_watch = False
        self.watch_tokens: list[str] = []
        self._watches: list[queue.SimpleQueue[Event | None]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="pdp-")
        self.target = f"unix://{Path(self._directory.name) / 'pdp.sock'}"
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        self._server.add_generic_rpc_handlers(
            (
                _handlers(
                    "AuthorizationService",
                    {
                        "Authorize": (Request, self._authorize),
                        "AuthorizeBatch": (authorization_pb2.AuthorizeBatchRequest, self._batch),
                    },
                ),
                grpc.method_handlers_generic_handler(
                    _SERVICE + "AuthorizationService",
                    {
                        "Watch": grpc.unary_stream_rpc_method_handler(
                            self._watch,
                            request_deserializer=authorization_pb2.WatchRequest.FromString,
                            response_serializer=Event.SerializeToString,
                        )
                    },
                ),
                _handlers(
                    "ExecutionService",
                    {
                        "ReportOutcome": (execution_pb2.ReportOutcomeRequest, self._report),
                        "GetPermitKeys": (execution_pb2.GetPermitKeysRequest, self._keys),
                    },
                ),
                _handlers(
                    "BudgetService",
                    {
                        "ReserveBudget": (budget_pb2.ReserveBudgetRequest, self._reserve),
                        "SettleBudget": (budget_pb2.SettleBudgetRequest, self._end),
                        "ReleaseBudget": (budget_pb2.ReleaseBudgetRequest, self._end),
                    },
                ),
            )
        )
        self._server.add_insecure_port(self.target)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self.released = threading.Event()
        """Set when the stand-in closes, for answers that are to hang until then."""

    def permit(self, request: Request, **changes: object) -> Permit:
        """The right permit for this question, with these fields changed."""
        now = int(time.time())
        right = Permit(
            id=str(uuid.uuid4()),
            issuer="agent-pdp",
            audience=request.audience or "tools",
            tenant="tenant_acme",
            actor="alice",
            tool=request.action.name,
            arguments_sha256=sha256_hex(parse_object(request.arguments_json, max_bytes=1 << 21)),
            scopes=(),
            transaction=request.request_id,
            decision_id=str(uuid.uuid4()),
            policy_revision="r-1",
            ledger="ledger-1",
            issued_at=now,
            expires_at=now + 60,
            resource=(
                f"{request.resource.type}/{request.resource.id}"
                if request.HasField("resource")
                else ""
            ),
        )
        return replace(right, **changes)  # type: ignore[arg-type]

    def allow(
        self, request: Request, *, signed_by: SigningKey | None = None, **changes: object
    ) -> Response:
        """Yes, with the right permit but for these changes."""
        permit = self.permit(request, **changes)
        signed = PermitIssuer(signed_by or self.key, issuer="agent-pdp").sign(permit)
        return Response(
            decision=True,
            reason_code="ok",
            decision_id=permit.decision_id,
            tenant_id="tenant_acme",
            actor_id="alice",
            permit=signed.token,
            max_uses=permit.max_uses if permit.max_uses > 1 else 0,
        )

    def allow_several(
        self, request: Request, max_uses: int, *held: tuple[str, str, int], **changes: Any
    ) -> Response:
        """Yes, to as many calls with any arguments, with this held for each."""
        response = self.allow(
            request, **{"arguments_sha256": "", "resource": "", "max_uses": max_uses, **changes}
        )
        response.hold.charges.extend(
            common_pb2.Charge(budget=budget, unit=unit, amount=amount * max_uses)
            for budget, unit, amount in held
        )
        return response

    def allow_all(
        self, request: authorization_pb2.AuthorizeBatchRequest
    ) -> authorization_pb2.AuthorizeBatchResponse:
        """Yes to each of them."""
        return authorization_pb2.AuthorizeBatchResponse(
            results=[
                authorization_pb2.BatchResult(answer=self.allow(each)) for each in request.questions
            ]
        )

    def tell(self, event: Event | None) -> None:
        """Tell everybody who watches; None ends it."""
        for watch in tuple(self._watches):
            watch.put(event)

    @property
    def watched(self) -> int:
        """How many watch now."""
        return len(self._watches)

    def held(self, request: budget_pb2.ReserveBudgetRequest) -> budget_pb2.ReserveBudgetResponse:
        """What is asked for is held."""
        return budget_pb2.ReserveBudgetResponse(
            hold_id=str(uuid.uuid4()),
            charges=request.charges or _charged(request.usage.quantities),
        )

    def ended(self, end: End) -> Raw:
        """What is named is settled."""
        if isinstance(end, budget_pb2.ReleaseBudgetRequest):
            return budget_pb2.ReleaseBudgetResponse()
        return budget_pb2.SettleBudgetResponse(settled=end.charges or _charged(end.quantities))

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.released.set()
        self._server.stop(None).wait()
        self._directory.cleanup()

    def _authorize(self, request: Request, context: Context) -> Raw:
        self.asked.append(request)
        self.tokens.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        return self.answer(request, context)

    def _batch(self, request: authorization_pb2.AuthorizeBatchRequest, context: Context) -> Raw:
        self.asked.extend(request.questions)
        self.tokens.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        return self.answer_batch(request, context)

    def _watch(self, _request: authorization_pb2.WatchRequest, context: Context) -> Iterator[Event]:
        self.watch_tokens.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        if self.refuses_watch:
            refuse(context, "rate_limited")
        watch: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        context.add_callback(lambda: watch.put(None))
        yield Event(policy=authorization_pb2.PolicyInForce(revision=self.revision))
        self._watches.append(watch)
        try:
            while (event := watch.get()) is not None:
                yield event
        finally:
            self._watches.remove(watch)

    def _report(self, request: execution_pb2.ReportOutcomeRequest, context: Context) -> Raw:
        self.reports.append(request)
        return self.take_report(request, context)

    def _reserve(self, request: budget_pb2.ReserveBudgetRequest, context: Context) -> Raw:
        self.reserves.append(request)
        self.tokens.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        return self.hold(request, context)

    def _end(self, request: End, context: Context) -> Raw:
        self.ends.append(request)
        self.tokens.append(str(dict(context.invocation_metadata()).get("authorization", "")))
        return self.take_end(request, context)

    def _keys(self, _request: execution_pb2.GetPermitKeysRequest, _context: Context) -> Raw:
        self.keys_asked += 1
        return execution_pb2.GetPermitKeysResponse(jwks_json=self.key.public_set.to_jwks())


def _handlers(service: str, methods: dict[str, tuple[Any, Callable[..., Raw]]]) -> Any:
    return grpc.method_handlers_generic_handler(
        _SERVICE + service,
        {
            name: grpc.unary_unary_rpc_method_handler(
                answer,
                request_deserializer=request.FromString,
                response_serializer=lambda raw: (
                    raw if isinstance(raw, bytes) else raw.SerializeToString()
                ),
            )
            for name, (request, answer) in methods.items()
        },
    )


def _charged(quantities: Iterable[common_pb2.Quantity]) -> list[common_pb2.Charge]:
    return [
        common_pb2.Charge(budget="llm", unit=each.unit, amount=each.amount) for each in quantities
    ]


def refuse(
    context: Context,
    reason_code: str,
    *,
    limit: str = "",
    retry_after_seconds: int | None = None,
    code: grpc.StatusCode = grpc.StatusCode.FAILED_PRECONDITION,
) -> NoReturn:
    """End the call as the sidecar does."""
    details: list[Any] = [ErrorInfo(reason=reason_code, domain="agent-pdp")]
    if limit:
        details.append(QuotaFailure(violations=[QuotaFailure.Violation(subject=f"limit:{limit}")]))
    if retry_after_seconds is not None:
        details.append(RetryInfo(retry_delay=Duration(seconds=retry_after_seconds)))
    status = Status(code=code.value[0], message="It is refused.")
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, status.message)
    raise AssertionError
