"""Spend that is not tied to one tool call: the same steps, without a permit."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pdp.admission import Lane
from pdp.audit.record import AuditReceipt, AuditRecord, Outcome
from pdp.budget.ledger import (
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
)
from pdp.canonical import JsonObject, sha256_hex
from pdp.errors import PdpError
from pdp.identity.resolver import Credentials
from pdp.identity.subject import Subject
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.question import budget_input
from pdp.policy.verdict import parse_budget_verdict
from pdp.reason import ReasonCode
from pdp.rooms import (
    Rooms,
    admitted,
    charges_json,
    identify,
    isolate,
    limits_for,
    settlement_detail,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """A charge or reservation that is asked for, well-formed and within bounds."""

    idempotency_key: str
    charges: tuple[Charge, ...]
    tool: str
    """Empty when it is for no tool."""
    ttl_seconds: int = 0
    """For a reservation; 0 takes the configured default."""
    trace_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldEnd:
    """A settlement or release that is asked for."""

    idempotency_key: str
    hold_id: str
    charges: tuple[Charge, ...] = ()
    trace_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What came of it, on record."""

    result: Receipt
    receipt: AuditReceipt
    decision_id: str = ""
    policy_revision: str = ""


class SpendingError(PdpError):
    """The policy, or a limit, refused. The reason code says which;
    ``refused_by`` and ``retry_after_seconds`` are set for a limit.
    """

    def __init__(
        self,
        reason_code: str,
        *,
        refused_by: LimitState | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(
            reason_code,
            "A limit of the tenant would be passed."
            if refused_by
            else "The policy does not let this actor charge these budgets.",
        )
        self.refused_by = refused_by
        self.retry_after_seconds = retry_after_seconds


async def charge(rooms: Rooms, credentials: Credentials, spend: Spend) -> Spent:
    """Charge now. Raises SpendingError, IdentityError, PolicyError, LedgerError, all
    of them on record, AdmissionError, on record within its bounds, and AuditError.
    """

    async def post(account: Account, key: IdempotencyKey, limits: tuple[Limit, ...]) -> Receipt:
        return await rooms.ledger.charge(account, key, charges=spend.charges, limits=limits)

    return await _spend(rooms, credentials, spend, "charge", Outcome.CHARGED, post)


async def reserve(rooms: Rooms, credentials: Credentials, spend: Spend) -> Spent:
    """Hold amounts. Raises as :func:`charge` does."""

    async def post(account: Account, key: IdempotencyKey, limits: tuple[Limit, ...]) -> Receipt:
        return await rooms.ledger.reserve(
            account,
            key,
            charges=spend.charges,
            limits=limits,
            ttl_seconds=spend.ttl_seconds or rooms.hold_ttl_seconds,
        )

    return await _spend(rooms, credentials, spend, "reserve", Outcome.RESERVED, post)


async def settle(rooms: Rooms, credentials: Credentials, end: HoldEnd) -> Spent:
    """End a hold with what was spent. Raises IdentityError, AdmissionError, LedgerError,
    AuditError.
    """

    async def post(account: Account, key: IdempotencyKey) -> Receipt:
        return await rooms.ledger.settle(account, key, hold_id=end.hold_id, charges=end.charges)

    return await _end(rooms, credentials, end, "settle", Outcome.SETTLED, post)


async def release(rooms: Rooms, credentials: Credentials, end: HoldEnd) -> Spent:
    """End a hold with nothing spent. Raises as :func:`settle` does."""

    async def post(account: Account, key: IdempotencyKey) -> Receipt:
        return await rooms.ledger.release(account, key, hold_id=end.hold_id)

    return await _end(rooms, credentials, end, "release", Outcome.RELEASED, post)


async def state(
    rooms: Rooms, credentials: Credentials, *, tool: str
) -> tuple[tuple[LimitState, ...], str]:
    """The caller's limits as they stand, and the policy revision that names them.
    Raises IdentityError, AdmissionError, PolicyError, LedgerError.
    """
    subject = await identify(rooms, credentials, action="budget.get")
    async with admitted(
        rooms, Lane.QUESTIONS, tenant=subject.tenant, actor=subject.actor, action="budget.get"
    ):
        document = _document(rooms, subject, "get", (), tool, "")
        with rooms.policy.pin() as policy:
            limits = await limits_for(policy, document)
            revision = policy.revision
        return await rooms.ledger.state(isolate(subject, tool=tool), limits=limits), revision


async def _spend(
    rooms: Rooms,
    credentials: Credentials,
    spend: Spend,
    operation: str,
    outcome: Outcome,
    post: Callable[[Account, IdempotencyKey, tuple[Limit, ...]], Awaitable[Receipt]],
) -> Spent:
    subject = await identify(
        rooms,
        credentials,
        action=f"budget.{operation}",
        request_id=spend.idempotency_key,
        trace_id=spend.trace_id,
    )
    async with admitted(
        rooms,
        Lane.QUESTIONS,
        tenant=subject.tenant,
        actor=subject.actor,
        action=f"budget.{operation}",
        request_id=spend.idempotency_key,
        trace_id=spend.trace_id,
    ):
        return await _spend_as(rooms, subject, spend, operation, outcome, post)


async def _spend_as(
    rooms: Rooms,
    subject: Subject,
    spend: Spend,
    operation: str,
    outcome: Outcome,
    post: Callable[[Account, IdempotencyKey, tuple[Limit, ...]], Awaitable[Receipt]],
) -> Spent:
    decision_id, revision = rooms.new_id(), rooms.policy.revision
    result: Receipt | None = None
    failure: PdpError | None = None
    try:
        document = _document(
            rooms, subject, operation, spend.charges, spend.tool, spend.idempotency_key
        )
        with rooms.policy.pin() as policy:
            answer = await policy.evaluate(Entrypoint.BUDGET_DECISION, document)
            revision = policy.revision
            verdict = parse_budget_verdict(answer)
            if not verdict.allow:
                raise SpendingError(verdict.reason_code)
            limits = await limits_for(policy, document)
        key = IdempotencyKey(
            operation=operation,
            key=spend.idempotency_key,
            content_sha256=sha256_hex(
                {
                    "charges": list(charges_json(spend.charges)),
                    "tool": spend.tool,
                    "ttl_seconds": spend.ttl_seconds,
                }
            ),
            note=json.dumps([decision_id, revision]),
        )
        result = await post(isolate(subject, tool=spend.tool), key, limits)
        decision_id, revision = json.loads(result.note)
        if result.refused_by is not None:
            raise SpendingError(
                ReasonCode.TENANT_BUDGET_EXCEEDED,
                refused_by=result.refused_by,
                retry_after_seconds=result.retry_after_seconds,
            )
    except (PolicyError, LedgerError, SpendingError) as error:
        failure = error
    receipt = await rooms.audit.append(
        AuditRecord(
            type="budget",
            tenant_id=subject.tenant,
            actor_id=subject.actor,
            action=f"budget.{operation}",
            outcome=outcome if failure is None else Outcome.DENIED,
            reason_code=ReasonCode.OK if failure is None else failure.reason_code,
            decision_id=decision_id,
            request_id=spend.idempotency_key,
            trace_id=spend.trace_id,
            policy_revision=revision,
            hold_id=(result.id or None) if result else None,
            charges=charges_json(spend.charges),
            limit_id=result.refused_by.limit.id if result and result.refused_by else None,
            detail={"tool": spend.tool} if spend.tool else None,
            replayed=(result.replayed or None) if result else None,
        )
    )
    if failure is not None:
        raise failure
    assert result is not None  # noqa: S101 - no failure means a result
    return Spent(result=result, receipt=receipt, decision_id=decision_id, policy_revision=revision)


def _document(
    rooms: Rooms,
    subject: Subject,
    operation: str,
    charges: tuple[Charge, ...],
    tool: str,
    request_id: str,
) -> JsonObject:
    return budget_input(
        subject,
        operation=operation,
        charges=charges,
        tool=tool,
        time=rooms.clock(),
        request_id=request_id,
    )


async def _end(
    rooms: Rooms,
    credentials: Credentials,
    end: HoldEnd,
    operation: str,
    outcome: Outcome,
    post: Callable[[Account, IdempotencyKey], Awaitable[Receipt]],
) -> Spent:
    subject = await identify(
        rooms,
        credentials,
        action=f"budget.{operation}",
        request_id=end.idempotency_key,
        trace_id=end.trace_id,
    )
    async with admitted(
        rooms,
        Lane.ENDINGS,
        tenant=subject.tenant,
        actor=subject.actor,
        action=f"budget.{operation}",
        request_id=end.idempotency_key,
        trace_id=end.trace_id,
    ):
        return await _end_as(rooms, subject, end, operation, outcome, post)


async def _end_as(
    rooms: Rooms,
    subject: Subject,
    end: HoldEnd,
    operation: str,
    outcome: Outcome,
    post: Callable[[Account, IdempotencyKey], Awaitable[Receipt]],
) -> Spent:
    result: Receipt | None = None
    failure: LedgerError | None = None
    try:
        result = await post(
            isolate(subject, tool=""),
            IdempotencyKey(
                operation=operation,
                key=end.idempotency_key,
                content_sha256=sha256_hex(
                    {"hold_id": end.hold_id, "charges": list(charges_json(end.charges))}
                ),
            ),
        )
    except LedgerError as error:
        failure = error
    receipt = await rooms.audit.append(
        AuditRecord(
            type="budget",
            tenant_id=subject.tenant,
            actor_id=subject.actor,
            action=f"budget.{operation}",
            outcome=outcome if failure is None else Outcome.DENIED,
            reason_code=ReasonCode.OK if failure is None else failure.reason_code,
            request_id=end.idempotency_key,
            trace_id=end.trace_id,
            hold_id=end.hold_id,
            charges=charges_json(result.charges if result else end.charges) or None,
            detail=settlement_detail(result),
            replayed=(result.replayed or None) if result else None,
        )
    )
    if failure is not None:
        raise failure
    assert result is not None  # noqa: S101 - no failure means a result
    return Spent(result=result, receipt=receipt)
