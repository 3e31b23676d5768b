"""Protobuf on the outside, the product's own types on the inside.

Every bound of the contract is checked here, before anything else runs.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.audit.record import AuditReceipt
from pdp.budget.ledger import MAX_AMOUNT, Charge, LimitState
from pdp.budget.ledger import Receipt as LedgerReceipt
from pdp.canonical import JsonError, JsonObject, parse_object, sha256_hex
from pdp.decision import Asked, Question, Recorded
from pdp.errors import RequestError
from pdp.execution import Redeemed, Redemption, Report, Reported
from pdp.identity.resolver import Credentials, Peer
from pdp.listing import Listing
from pdp.permit.claims import MAX_USES
from pdp.permit.jws import MAX_LENGTH as MAX_PERMIT_LENGTH
from pdp.policy.question import Usage
from pdp.reason import ReasonCode
from pdp.spending import HoldEnd, Refund, Spend, Spent

MAX_ARGUMENTS_BYTES: Final = 1024 * 1024
MAX_CONTEXT_BYTES: Final = 16 * 1024
MAX_CHARGES: Final = 16
MAX_QUANTITIES: Final = 8
MAX_HOLD_SECONDS: Final = 3600
LARGE_BYTES: Final = 4 * 1024
"""Arguments above this are parsed and digested in a thread, not on the event loop."""

_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_RESOURCE_TYPE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_RESOURCE_TYPE_FORM: Final = "1 to 128 of [A-Za-z0-9._:-], the first a letter or digit"
_AUDIENCE: Final = re.compile(r"[A-Za-z0-9:/._-]{1,255}")
_BUDGET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ERROR_TYPE: Final = re.compile(r"[A-Za-z0-9_.]{1,64}")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_MAX_RESOURCE_ID: Final = 255
_MALFORMED: Final = "malformed"

Metadata = Iterable[tuple[str, str | bytes]]


def credentials_of(metadata: Metadata, peer: Peer) -> Credentials:
    """What a caller shows. What is no bearer token, or several, comes out as a token that
    is not valid, so that it is refused and put on record like one.
    """
    found: dict[str, str | None] = {}
    for name in ("authorization", "workload-authorization"):
        values = [value for key, value in metadata if key == name]
        found[name] = _bearer(values) if values else None
    return Credentials(
        bearer=found["authorization"],
        workload_token=found["workload-authorization"],
        peer=peer,
    )


def _bearer(values: Sequence[str | bytes]) -> str:
    scheme, _, token = str(values[0]).partition(" ")
    return token if len(values) == 1 and scheme.lower() == "bearer" and token else _MALFORMED


def trace_id_of(metadata: Metadata) -> str | None:
    """The trace id of the first W3C traceparent that is well-formed, if there is one."""
    for key, value in metadata:
        if key == "traceparent" and isinstance(value, str):
            trace_id = trace_id_from(value)
            if trace_id is not None:
                return trace_id
    return None


def trace_id_from(traceparent: str) -> str | None:
    """The trace id of a W3C traceparent; None where it is malformed."""
    match = _TRACEPARENT.fullmatch(traceparent)
    return match[1] if match and match[1] != "0" * 32 else None


class QuestionReader:
    """Reads the questions of AuthorizeRequests: what is cheap at once, arguments and
    context only when they are asked for. Large ones are read in a thread, one
    after the other, so that they hold up neither small ones nor the event loop.
    """

    def __init__(self, *, default_audience: str) -> None:
        self._default_audience = default_audience
        self._large_one = asyncio.Lock()

    def asked(
        self,
        request: authorization_pb2.AuthorizeRequest,
        *,
        trace_id: str | None,
        batch: str = "",
    ) -> Asked:
        """What is asked for. Raises RequestError; so does reading the rest. ``batch`` is as
        in Question.
        """
        resource: JsonObject | None = None
        if request.HasField("resource"):
            resource = {
                "type": matching(
                    "resource.type", request.resource.type, _RESOURCE_TYPE, _RESOURCE_TYPE_FORM
                ),
                "id": _resource_id(request.resource.id),
            }
        request_id = key_from("request_id", request.request_id)
        tool = matching("action.name", request.action.name, _NAME, _NAME_FORM)
        audience = matching(
            "audience", request.audience or self._default_audience, _AUDIENCE, "an id"
        )

        async def read() -> Question:
            arguments, digest = await self._arguments(request.arguments_json)
            return Question(
                request_id=request_id,
                tool=tool,
                resource=resource,
                arguments=arguments,
                arguments_sha256=digest,
                context=context_from(request.context_json),
                audience=audience,
                trace_id=trace_id,
                batch=batch,
            )

        return Asked(request_id=request_id, tool=tool, trace_id=trace_id, read=read)

    async def _arguments(self, data: bytes) -> tuple[JsonObject, str]:
        if len(data) <= LARGE_BYTES:
            return _arguments(data)
        async with self._large_one:
            return await asyncio.to_thread(_arguments, data)


def authorize_response(recorded: Recorded) -> authorization_pb2.AuthorizeResponse:
    """The answer on the wire."""
    answer = recorded.answer
    response = authorization_pb2.AuthorizeResponse(
        decision=answer.permit is not None,
        reason_code=answer.reason_code,
        decision_id=answer.decision_id,
        tenant_id=answer.subject.tenant,
        actor_id=answer.subject.actor,
        namespace=answer.subject.namespace,
        policy_revision=answer.policy_revision,
        audit=receipt_out(recorded.receipt),
        replayed=answer.replayed,
    )
    for step, seconds in recorded.step_seconds.items():
        # In place: a message that is made apart and copied in takes three times as long.
        nanos = min(int(seconds * 1e9), 999_999_999)
        response.steps.add(step=step).duration.nanos = nanos
    if answer.permit is not None:
        response.permit = answer.permit.token
        response.scopes.extend(answer.permit.scopes)
        response.permit_expires_at.seconds = answer.permit.expires_at
        response.max_uses = answer.permit.max_uses
        if answer.permit.hold_id:
            response.hold.hold_id = answer.permit.hold_id
            response.hold.expires_at.seconds = answer.hold_expires_at
            response.hold.charges.extend(charges_out(answer.charges))
    result = answer.result
    if result is not None:
        if result.refused_by is not None:
            response.refused_by.CopyFrom(limit_status(result.refused_by))
            if result.retry_after_seconds is not None:
                response.retry_after.seconds = result.retry_after_seconds
        response.warnings.extend(_warnings(result))
        response.shadow_refusals.extend(map(limit_status, result.shadow_refusals))
    return response


def context_from(data: bytes) -> JsonObject:
    """Free context for the policy. Raises RequestError."""
    return _json("context_json", data, MAX_CONTEXT_BYTES)


def tools_response(listing: Listing) -> authorization_pb2.ListToolsResponse:
    """A listing of tools on the wire."""
    return authorization_pb2.ListToolsResponse(
        tools=[
            authorization_pb2.VisibleTool(
                name=tool.name, callable=tool.callable, reason_code=tool.reason_code
            )
            for tool in listing.tools
        ],
        policy_revision=listing.policy_revision,
    )


def spend_from(
    request: budget_pb2.ChargeBudgetRequest | budget_pb2.ReserveBudgetRequest,
    *,
    trace_id: str | None,
) -> Spend:
    """The spend that is asked for. Raises RequestError."""
    ttl_seconds = request.ttl_seconds if isinstance(request, budget_pb2.ReserveBudgetRequest) else 0
    if not 0 <= ttl_seconds <= MAX_HOLD_SECONDS:
        raise RequestError("ttl_seconds", f"must be 0 to {MAX_HOLD_SECONDS}")
    usage = _usage(request.usage) if request.HasField("usage") else None
    if bool(request.charges) is (usage is not None):
        raise RequestError("charges", "must name at least one charge, or usage, and not both")
    return Spend(
        idempotency_key=key_from("idempotency_key", request.idempotency_key),
        charges=charges_from(request.charges, least=1),
        usage=usage,
        tool=tool_from(request.tool),
        ttl_seconds=ttl_seconds,
        trace_id=trace_id,
    )


def hold_end_from(
    request: budget_pb2.SettleBudgetRequest | budget_pb2.ReleaseBudgetRequest,
    *,
    trace_id: str | None,
) -> HoldEnd:
    """The settlement or release that is asked for. Raises RequestError."""
    idempotency_key = key_from("idempotency_key", request.idempotency_key)
    hold_id = hold_id_from(request.hold_id)
    if isinstance(request, budget_pb2.ReleaseBudgetRequest):
        return HoldEnd(idempotency_key=idempotency_key, hold_id=hold_id, trace_id=trace_id)
    if request.charges and request.quantities:
        raise RequestError("quantities", "must be empty where charges are named")
    if request.partial and not request.charges and not request.quantities:
        raise RequestError("partial", "must name in charges or quantities what is spent")
    return HoldEnd(
        idempotency_key=idempotency_key,
        hold_id=hold_id,
        charges=charges_from(request.charges, least=0),
        quantities=_quantities("quantities", request.quantities),
        partial=request.partial,
        trace_id=trace_id,
    )


def refund_from(request: budget_pb2.RefundBudgetRequest, *, trace_id: str | None) -> Refund:
    """The refund that is asked for. Raises RequestError."""
    return Refund(
        idempotency_key=key_from("idempotency_key", request.idempotency_key),
        hold_id=hold_id_from(request.hold_id),
        charges=charges_from(request.charges, least=1),
        trace_id=trace_id,
    )


def tool_from(tool: str) -> str:
    """The tool of a budget request, which may be empty. Raises RequestError."""
    return tool_named("tool", tool) if tool else ""


def tool_named(field: str, tool: str) -> str:
    """A tool's name. Raises RequestError."""
    return matching(field, tool, _NAME, _NAME_FORM)


def charge_response(spent: Spent) -> budget_pb2.ChargeBudgetResponse:
    """A charge on the wire."""
    return budget_pb2.ChargeBudgetResponse(
        charge_id=spent.result.id,
        limits=[limit_status(state) for state in spent.result.limits],
        decision_id=spent.decision_id,
        policy_revision=spent.policy_revision,
        audit=receipt_out(spent.receipt),
        replayed=spent.result.replayed,
        charges=charges_out(spent.result.charges),
        warnings=_warnings(spent.result),
        shadow_refusals=map(limit_status, spent.result.shadow_refusals),
    )


def reserve_response(spent: Spent) -> budget_pb2.ReserveBudgetResponse:
    """A reservation on the wire."""
    return budget_pb2.ReserveBudgetResponse(
        hold_id=spent.result.id,
        expires_at=Timestamp(seconds=spent.result.expires_at),
        limits=[limit_status(state) for state in spent.result.limits],
        decision_id=spent.decision_id,
        policy_revision=spent.policy_revision,
        audit=receipt_out(spent.receipt),
        replayed=spent.result.replayed,
        charges=charges_out(spent.result.charges),
        warnings=_warnings(spent.result),
        shadow_refusals=map(limit_status, spent.result.shadow_refusals),
    )


def settle_response(spent: Spent) -> budget_pb2.SettleBudgetResponse:
    """A settlement on the wire."""
    return budget_pb2.SettleBudgetResponse(
        over_hold=spent.result.over_hold,
        late=spent.result.late,
        audit=receipt_out(spent.receipt),
        replayed=spent.result.replayed,
        settled=charges_out(spent.result.charges),
    )


def release_response(spent: Spent) -> budget_pb2.ReleaseBudgetResponse:
    """A release on the wire."""
    return budget_pb2.ReleaseBudgetResponse(
        audit=receipt_out(spent.receipt), replayed=spent.result.replayed
    )


def refund_response(spent: Spent) -> budget_pb2.RefundBudgetResponse:
    """A refund on the wire."""
    return budget_pb2.RefundBudgetResponse(
        refunded=charges_out(spent.result.charges),
        decision_id=spent.decision_id,
        policy_revision=spent.policy_revision,
        audit=receipt_out(spent.receipt),
        replayed=spent.result.replayed,
    )


def limit_status(state: LimitState) -> common_pb2.LimitStatus:
    """A limit on the wire."""
    status = common_pb2.LimitStatus(
        limit_id=state.limit.id,
        budget=state.limit.budget,
        unit=state.limit.unit,
        window=state.limit.window.value,
        scope=state.limit.scope.value,
        limit=state.limit.limit,
        spent=state.spent,
        held=state.held,
        remaining=state.remaining,
        granted=state.granted,
        timezone=state.limit.timezone,
        seconds=state.limit.seconds,
        burst=state.limit.burst,
        shadow=not state.limit.enforced,
    )
    if state.resets_at is not None:
        status.resets_at.seconds = state.resets_at
    return status


def redemption_from(
    request: execution_pb2.RedeemPermitRequest, *, route_tenant: str, trace_id: str | None
) -> Redemption:
    """The redemption that is asked for, by that tenant's listener. Raises RequestError."""
    return Redemption(
        permit=_permit(request.permit),
        idempotency_key=key_from("idempotency_key", request.idempotency_key),
        tool=matching("tool", request.tool, _NAME, _NAME_FORM),
        arguments_sha256=request.arguments_sha256
        and matching(
            "arguments_sha256", request.arguments_sha256, _SHA256, "64 lower-case hex digits"
        ),
        audience=matching("audience", request.audience, _AUDIENCE, "an id"),
        route_tenant=route_tenant,
        trace_id=trace_id,
    )


def redeem_response(redeemed: Redeemed) -> execution_pb2.RedeemPermitResponse:
    """A redemption on the wire."""
    return execution_pb2.RedeemPermitResponse(
        tenant_id=redeemed.permit.tenant,
        actor_id=redeemed.permit.actor,
        decision_id=redeemed.permit.decision_id,
        uses_left=redeemed.use.uses_left,
        audit=receipt_out(redeemed.receipt),
        replayed=redeemed.use.replayed,
    )


def report_from(
    request: execution_pb2.ReportOutcomeRequest,
    *,
    certificate_sha256: str,
    route_tenant: str,
    trace_id: str | None,
) -> Report:
    """The report that is made by whoever has that certificate, by that tenant's listener.
    Raises RequestError.
    """
    if request.outcome not in (execution_pb2.OUTCOME_EXECUTED, execution_pb2.OUTCOME_FAILED):
        raise RequestError("outcome", "must be OUTCOME_EXECUTED or OUTCOME_FAILED")
    if request.error_type:
        matching("error_type", request.error_type, _ERROR_TYPE, "the name of an error")
    if not 0 <= request.uses <= MAX_USES:
        raise RequestError("uses", f"must be 0 to {MAX_USES}")
    return Report(
        permit=_permit(request.permit),
        executed=request.outcome == execution_pb2.OUTCOME_EXECUTED,
        charges=charges_from(request.charges, least=0),
        error_type=request.error_type,
        uses=request.uses,
        certificate_sha256=certificate_sha256,
        route_tenant=route_tenant,
        trace_id=trace_id,
    )


def report_response(reported: Reported) -> execution_pb2.ReportOutcomeResponse:
    """A report's answer on the wire."""
    return execution_pb2.ReportOutcomeResponse(
        settled=charges_out(reported.settled),
        audit=receipt_out(reported.receipt),
        replayed=reported.result.replayed,
    )


_NAME_FORM: Final = "1 to 128 characters of [A-Za-z0-9._:/-], the first a letter or digit"


def matching(field: str, value: str, pattern: re.Pattern[str], form: str) -> str:
    """The value. Raises RequestError where it is not of the form."""
    if not pattern.fullmatch(value):
        raise RequestError(field, f"must be {form}")
    return value


def key_from(field: str, value: str) -> str:
    """An idempotency key. Raises RequestError."""
    return matching(field, value, _KEY, "1 to 255 printable ASCII characters without spaces")


def _resource_id(value: str) -> str:
    if not value or len(value) > _MAX_RESOURCE_ID or not value.isprintable():
        raise RequestError("resource.id", "must be 1 to 255 printable characters")
    return value


def _permit(value: str) -> str:
    if len(value) > MAX_PERMIT_LENGTH:
        raise RequestError("permit", f"must be at most {MAX_PERMIT_LENGTH} characters")
    return value


def _arguments(data: bytes) -> tuple[JsonObject, str]:
    arguments = _json("arguments_json", data, MAX_ARGUMENTS_BYTES)
    return arguments, sha256_hex(arguments)


def _json(field: str, data: bytes, max_bytes: int) -> JsonObject:
    try:
        return parse_object(data or b"{}", max_bytes=max_bytes)
    except JsonError as error:
        raise RequestError(field, str(error), reason_code=ReasonCode.ARGUMENTS_INVALID) from None


def charges_from(
    charges: Sequence[common_pb2.Charge], *, least: int, field: str = "charges"
) -> tuple[Charge, ...]:
    """Charges of at least ``least`` each. Raises RequestError."""
    if len(charges) > MAX_CHARGES:
        raise RequestError(field, f"must be at most {MAX_CHARGES}")
    read = []
    for index, charge in enumerate(charges):
        place = f"{field}[{index}]"
        matching(f"{place}.budget", charge.budget, _BUDGET, "1 to 64 of [a-z0-9._-]")
        matching(f"{place}.unit", charge.unit, _BUDGET, "1 to 64 of [a-z0-9._-]")
        if not least <= charge.amount <= MAX_AMOUNT:
            raise RequestError(f"{place}.amount", f"must be {least} to {MAX_AMOUNT}")
        read.append(Charge(charge.budget, charge.unit, charge.amount))
    if len({(charge.budget, charge.unit) for charge in read}) != len(read):
        raise RequestError(field, "must name each budget and unit at most once")
    return tuple(read)


def _usage(usage: common_pb2.Usage) -> Usage:
    if not usage.quantities:
        raise RequestError("usage.quantities", "must name at least one quantity")
    return Usage(
        model=matching("usage.model", usage.model, _NAME, _NAME_FORM),
        quantities=_quantities("usage.quantities", usage.quantities),
    )


def _quantities(
    field: str, quantities: Sequence[common_pb2.Quantity]
) -> tuple[tuple[str, int], ...]:
    if len(quantities) > MAX_QUANTITIES:
        raise RequestError(field, f"must be at most {MAX_QUANTITIES}")
    read: dict[str, int] = {}
    for index, quantity in enumerate(quantities):
        matching(f"{field}[{index}].unit", quantity.unit, _BUDGET, "1 to 64 of [a-z0-9._-]")
        if not 0 <= quantity.amount <= MAX_AMOUNT:
            raise RequestError(f"{field}[{index}].amount", f"must be 0 to {MAX_AMOUNT}")
        read[quantity.unit] = quantity.amount
    if len(read) != len(quantities):
        raise RequestError(field, "must name each unit at most once")
    return tuple(sorted(read.items()))


def hold_id_from(value: str) -> str:
    """The id of a hold or charge. Raises RequestError."""
    return matching("hold_id", value, _UUID, "a UUID in lower case")


def _warnings(result: LedgerReceipt) -> list[common_pb2.BudgetWarning]:
    return [
        common_pb2.BudgetWarning(limit_id=each.limit_id, percent=each.percent)
        for each in result.warnings
    ]


def charges_out(charges: Iterable[Charge]) -> list[common_pb2.Charge]:
    """Charges on the wire."""
    return [
        common_pb2.Charge(budget=charge.budget, unit=charge.unit, amount=charge.amount)
        for charge in charges
    ]


def receipt_out(receipt: AuditReceipt) -> common_pb2.AuditReceipt:
    """Where the record lies, on the wire."""
    return common_pb2.AuditReceipt(sequence=receipt.sequence, hash=receipt.hash)
