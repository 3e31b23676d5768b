"""Spend that is not tied to one tool call: the same steps, without a permit."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final

from pdp.admission import Lane
from pdp.audit.record import AuditReceipt, AuditRecord, Outcome
from pdp.budget.bounds import MAX_LIMITS
from pdp.budget.ledger import (
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
)
from pdp.canonical import JsonObject, JsonValue, sha256_hex
from pdp.errors import PdpError
from pdp.identity.resolver import Credentials
from pdp.identity.subject import Subject
from pdp.narrowing import NotDelegated, limits_within, links_of, may_end, slices_of
from pdp.policy.engine import Entrypoint, PolicyEngine, PolicyError
from pdp.policy.question import Usage, budget_input
from pdp.policy.verdict import BudgetVerdict, parse_budget_verdict
from pdp.reason import ReasonCode
from pdp.rooms import (
    Rooms,
    admitted_as,
    charges_json,
    identify,
    identity_json,
    isolate,
    limits_for,
    receipt_detail,
    refusal_code,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """A charge or reservation that is asked for, well-formed and within bounds."""

    idempotency_key: str
    charges: tuple[Charge, ...]
    """Empty where the policy is to price the usage."""
    tool: str
    """Empty when it is for no tool."""
    usage: Usage | None = None
    ttl_seconds: int = 0
    """For a reservation; 0 takes the configured default."""
    trace_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldEnd:
    """A settlement or release that is asked for."""

    idempotency_key: str
    hold_id: str
    charges: tuple[Charge, ...] = ()
    quantities: tuple[tuple[str, int], ...] = ()
    """In place of charges: units and how many were used of the model for which the hold was
    made, to be priced as they were then."""
    partial: bool = False
    """Whether more will follow, for which the rest stays held."""
    trace_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """What is to be taken back of a charge, or of a hold that was settled."""

    idempotency_key: str
    hold_id: str
    charges: tuple[Charge, ...] = ()
    """Empty for all that is left of it."""
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
    """Charge now. Raises SpendingError, NotDelegated, IdentityError, PolicyError,
    LedgerError, all of them on record, AdmissionError, on record within its bounds, and
    AuditError.
    """

    async def post(account: Account, key: IdempotencyKey, ruling: _Ruling) -> Receipt:
        return await rooms.ledger.charge(
            account, key, charges=ruling.charges, limits=ruling.limits, memo=ruling.memo
        )

    return await _spend(rooms, credentials, spend, "charge", Outcome.CHARGED, post)


async def reserve(rooms: Rooms, credentials: Credentials, spend: Spend) -> Spent:
    """Hold amounts. Raises as :func:`charge` does."""

    async def post(account: Account, key: IdempotencyKey, ruling: _Ruling) -> Receipt:
        return await rooms.ledger.reserve(
            account,
            key,
            charges=ruling.charges,
            limits=ruling.limits,
            ttl_seconds=spend.ttl_seconds or rooms.hold_ttl_seconds,
            memo=ruling.memo,
        )

    return await _spend(rooms, credentials, spend, "reserve", Outcome.RESERVED, post)


async def settle(rooms: Rooms, credentials: Credentials, end: HoldEnd) -> Spent:
    """Post what was spent under a hold of the caller, or of whom it has delegated to.
    Raises IdentityError, AdmissionError, LedgerError, AuditError and, where usage is to be
    priced, PolicyError and SpendingError.
    """

    async def post(subject: Subject, account: Account, key: IdempotencyKey) -> Receipt:
        charges = end.charges
        if end.quantities:
            charges = await _price_of(rooms, subject, end)
        return await rooms.ledger.settle(
            account, key, hold_id=end.hold_id, charges=charges, final=not end.partial
        )

    return await _end(rooms, credentials, end, "settle", Outcome.SETTLED, post)


async def release(rooms: Rooms, credentials: Credentials, end: HoldEnd) -> Spent:
    """End a hold with nothing more spent. Raises IdentityError, AdmissionError, LedgerError,
    AuditError.
    """

    async def post(subject: Subject, account: Account, key: IdempotencyKey) -> Receipt:  # noqa: ARG001
        return await rooms.ledger.release(account, key, hold_id=end.hold_id)

    return await _end(rooms, credentials, end, "release", Outcome.RELEASED, post)


async def refund(rooms: Rooms, credentials: Credentials, refund: Refund) -> Spent:
    """Take back what was spent, if the policy lets the caller. Raises as :func:`charge`
    does.
    """

    async def post(account: Account, key: IdempotencyKey, ruling: _Ruling) -> Receipt:
        return await rooms.ledger.refund(
            account, key, hold_id=refund.hold_id, charges=ruling.charges or None
        )

    spend = Spend(
        idempotency_key=refund.idempotency_key,
        charges=refund.charges,
        tool="",
        trace_id=refund.trace_id,
    )
    return await _spend(
        rooms, credentials, spend, "refund", Outcome.REFUNDED, post, hold_id=refund.hold_id
    )


async def state(
    rooms: Rooms, credentials: Credentials, *, tool: str
) -> tuple[tuple[LimitState, ...], str]:
    """The caller's limits as they stand, and the policy revision that names them.
    Raises IdentityError, AdmissionError, PolicyError, LedgerError.
    """
    subject = await identify(rooms, credentials, action="budget.get")
    async with admitted_as(rooms, Lane.QUESTIONS, subject, action="budget.get"):
        document = _document(rooms, subject, "get", tool=tool)
        with rooms.policy.pin() as policy:
            limits = await limits_for(policy, document)
            revision = policy.revision
        if subject.delegation and subject.delegation.ledger == rooms.ledger_id:
            limits = (*limits, *slices_of(subject))[:MAX_LIMITS]
        return await rooms.ledger.state(isolate(subject, tool=tool), limits=limits), revision


@dataclass(frozen=True, slots=True)
class _Ruling:
    """What the policy says of a spend that it allows."""

    charges: tuple[Charge, ...]
    limits: tuple[Limit, ...]
    pricing: JsonObject
    """Of usage: the model and the version of its price, for the settlement."""
    memo: str = ""
    """What is kept with the hold, as JSON: the pricing and, where an agent asks, the
    delegations under which it does."""


_Post = Callable[[Account, IdempotencyKey, _Ruling], Awaitable[Receipt]]
_PostEnd = Callable[[Subject, Account, IdempotencyKey], Awaitable[Receipt]]


async def _spend(
    rooms: Rooms,
    credentials: Credentials,
    spend: Spend,
    operation: str,
    outcome: Outcome,
    post: _Post,
    *,
    hold_id: str = "",
) -> Spent:
    subject = await identify(
        rooms,
        credentials,
        action=f"budget.{operation}",
        request_id=spend.idempotency_key,
        trace_id=spend.trace_id,
    )
    async with admitted_as(
        rooms,
        Lane.QUESTIONS,
        subject,
        action=f"budget.{operation}",
        request_id=spend.idempotency_key,
        trace_id=spend.trace_id,
    ):
        return await _spend_as(rooms, subject, spend, operation, outcome, post, hold_id)


async def _spend_as(
    rooms: Rooms,
    subject: Subject,
    spend: Spend,
    operation: str,
    outcome: Outcome,
    post: _Post,
    hold_id: str,
) -> Spent:
    attempt = _Attempt(rooms.new_id(), rooms.policy.revision, spend.charges)

    async def with_policy(policy: PolicyEngine) -> Spent | _Refusal:
        try:
            document = _document(
                rooms,
                subject,
                operation,
                charges=spend.charges,
                usage=spend.usage,
                tool=spend.tool,
                request_id=spend.idempotency_key,
            )
            ruling = await _rule(policy, document, spend, operation)
            attempt.charges, attempt.pricing = ruling.charges, ruling.pricing
            key = IdempotencyKey(
                operation=operation,
                key=spend.idempotency_key,
                content_sha256=sha256_hex(_content(subject, spend, hold_id)),
                note=json.dumps([attempt.decision_id, attempt.policy_revision, ruling.pricing]),
            )
            account = isolate(subject, tool=spend.tool)
            result = await post(account, key, _within(rooms, subject, account, ruling))
            attempt.posted(result)
        except _REFUSALS as error:
            return await recorded(error)
        return await recorded(None)

    async def recorded(failure: _Refusal | None) -> Spent | _Refusal:
        result = attempt.result
        receipt = await rooms.audit.append(
            AuditRecord(
                type="budget",
                tenant_id=subject.tenant,
                actor_id=subject.actor,
                identity=identity_json(subject),
                action=f"budget.{operation}",
                outcome=outcome if failure is None else Outcome.DENIED,
                reason_code=ReasonCode.OK if failure is None else failure.reason_code,
                decision_id=attempt.decision_id,
                request_id=spend.idempotency_key,
                trace_id=spend.trace_id,
                policy_revision=attempt.policy_revision,
                hold_id=hold_id or (result.id if result else "") or None,
                charges=charges_json(attempt.charges) or None,
                limit_id=result.refused_by.limit.id if result and result.refused_by else None,
                detail=_detail(spend, attempt.pricing, result) or None,
                replayed=(result.replayed or None) if result else None,
            )
        )
        if failure is not None:
            return failure.with_traceback(None)  # which knows this frame: see decision
        assert result is not None  # noqa: S101 - no failure means a result
        return Spent(
            result=result,
            receipt=receipt,
            decision_id=attempt.decision_id,
            policy_revision=attempt.policy_revision,
        )

    try:
        _check_delegated(subject, spend, operation)
        with rooms.policy.pin() as policy:
            attempt.policy_revision = policy.revision
            spent = await rooms.with_policy(policy, with_policy)
    except (NotDelegated, PolicyError) as error:
        spent = await recorded(error)
    try:
        if isinstance(spent, Spent):
            return spent
        raise spent
    finally:
        del spent


_Refusal = NotDelegated | PolicyError | LedgerError | SpendingError
_REFUSALS: Final = (NotDelegated, PolicyError, LedgerError, SpendingError)


@dataclass(slots=True)
class _Attempt:
    """How far a spend has come."""

    decision_id: str
    policy_revision: str
    charges: tuple[Charge, ...]
    pricing: JsonObject = field(default_factory=dict)
    result: Receipt | None = None

    def posted(self, result: Receipt) -> None:
        """The ledger has answered. Raises SpendingError where a limit refused."""
        self.result = result
        self.decision_id, self.policy_revision, self.pricing = json.loads(result.note)
        self.charges = result.charges or self.charges
        if result.refused_by is not None:
            raise SpendingError(
                refusal_code(result.refused_by),
                refused_by=result.refused_by,
                retry_after_seconds=result.retry_after_seconds,
            )


async def _rule(
    policy: PolicyEngine, document: JsonObject, spend: Spend, operation: str
) -> _Ruling:
    """What the policy says. Raises PolicyError and SpendingError."""
    verdict = _allowed(await policy.evaluate(Entrypoint.BUDGET_DECISION, document))
    if operation == "refund":
        return _Ruling(spend.charges, (), {})
    limits = await limits_for(policy, document)
    if spend.usage is None:
        return _Ruling(spend.charges, limits, {})
    return _Ruling(
        _priced(verdict),
        limits,
        {"model": spend.usage.model, "price_version": verdict.price_version},
    )


def _within(rooms: Rooms, subject: Subject, account: Account, ruling: _Ruling) -> _Ruling:
    """The ruling for an agent: its slices of the budget count too, and who it is stays with
    what is held. Raises NotDelegated.
    """
    links: JsonObject = {"delegations": [*links_of(subject)]} if subject.delegation else {}
    kept = ruling.pricing | links
    return replace(
        ruling,
        limits=limits_within(subject, account, ruling.charges, ruling.limits, rooms.ledger_id),
        memo=json.dumps(kept) if kept else "",
    )


async def _price_of(rooms: Rooms, subject: Subject, end: HoldEnd) -> tuple[Charge, ...]:
    """What was used under a hold, at the prices that it was made at. Raises LedgerError,
    PolicyError and SpendingError.
    """
    hold = await rooms.ledger.hold(subject.tenant, end.hold_id)
    if hold is None or hold.actor != subject.actor:
        raise LedgerError(
            ReasonCode.HOLD_NOT_FOUND, "There is no such hold of this actor: check its id."
        )
    memo = json.loads(hold.memo or "{}")
    if "model" not in memo:
        raise LedgerError(
            ReasonCode.CHARGE_NOT_HELD,
            "The hold was reserved with charges, not with usage: settle it with charges.",
        )
    document = _document(
        rooms,
        subject,
        "settle",
        usage=Usage(model=memo["model"], quantities=end.quantities),
        price_version=memo["price_version"],
        tool=hold.tool,
        request_id=end.idempotency_key,
    )
    with rooms.policy.pin() as policy:
        return _priced(_allowed(await policy.evaluate(Entrypoint.BUDGET_DECISION, document)))


def _allowed(answer: JsonValue) -> BudgetVerdict:
    verdict = parse_budget_verdict(answer)
    if not verdict.allow:
        raise SpendingError(verdict.reason_code)
    return verdict


def _priced(verdict: BudgetVerdict) -> tuple[Charge, ...]:
    """The charges of usage. What has no price is not free."""
    if verdict.charges is None:
        raise PolicyError(
            ReasonCode.POLICY_INVALID,
            "The policy allows the usage and puts no price on it: its answer lacks charges.",
        )
    return verdict.charges


def _check_delegated(subject: Subject, spend: Spend, operation: str) -> None:
    """Raises NotDelegated: refunds are the actor's own matter, and what is spent for a tool
    is for one that was delegated.
    """
    delegation = subject.delegation
    if delegation is None:
        return
    if operation == "refund" or (spend.tool and spend.tool not in delegation.tools):
        raise NotDelegated(ReasonCode.TOOL_NOT_DELEGATED)


def _content(subject: Subject, spend: Spend, hold_id: str) -> JsonObject:
    """What makes a spend the same when it is tried again."""
    content: JsonObject = {
        "charges": list(charges_json(spend.charges)),
        "tool": spend.tool,
        "ttl_seconds": spend.ttl_seconds,
    }
    if spend.usage is not None:
        content["usage"] = {
            "model": spend.usage.model,
            "quantities": dict(spend.usage.quantities),
        }
    if hold_id:
        content["hold_id"] = hold_id
    if subject.delegation is not None:
        content["delegations"] = [*links_of(subject)]
    return content


def _detail(spend: Spend, pricing: JsonObject, result: Receipt | None) -> JsonObject:
    detail = receipt_detail(result)
    if spend.tool:
        detail["tool"] = spend.tool
    return detail | pricing


def _document(
    rooms: Rooms,
    subject: Subject,
    operation: str,
    *,
    charges: tuple[Charge, ...] = (),
    usage: Usage | None = None,
    price_version: str = "",
    tool: str = "",
    request_id: str = "",
) -> JsonObject:
    return budget_input(
        subject,
        operation=operation,
        charges=charges,
        usage=usage,
        price_version=price_version,
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
    post: _PostEnd,
) -> Spent:
    subject = await identify(
        rooms,
        credentials,
        action=f"budget.{operation}",
        request_id=end.idempotency_key,
        trace_id=end.trace_id,
    )
    async with admitted_as(
        rooms,
        Lane.ENDINGS,
        subject,
        action=f"budget.{operation}",
        request_id=end.idempotency_key,
        trace_id=end.trace_id,
    ):
        steps = _end_as(rooms, subject, end, operation, outcome, post)
        return await (steps if end.quantities else rooms.off_loop(steps))


async def _end_as(
    rooms: Rooms,
    subject: Subject,
    end: HoldEnd,
    operation: str,
    outcome: Outcome,
    post: _PostEnd,
) -> Spent:
    result: Receipt | None = None
    failure: PdpError | None = None
    content: JsonObject = {
        "hold_id": end.hold_id,
        "charges": list(charges_json(end.charges)),
        "quantities": dict(end.quantities),
        "partial": end.partial,
    }
    key = IdempotencyKey(
        operation=operation, key=end.idempotency_key, content_sha256=sha256_hex(content)
    )
    detail: JsonObject = {"partial": True} if end.partial else {}
    try:
        await _check_own_hold(rooms, subject, end.hold_id)
        result = await post(subject, isolate(subject, tool=""), key)
    except (LedgerError, PolicyError, SpendingError) as error:
        failure = error
    receipt = await rooms.audit.append(
        AuditRecord(
            type="budget",
            tenant_id=subject.tenant,
            actor_id=subject.actor,
            identity=identity_json(subject),
            action=f"budget.{operation}",
            outcome=outcome if failure is None else Outcome.DENIED,
            reason_code=ReasonCode.OK if failure is None else failure.reason_code,
            request_id=end.idempotency_key,
            trace_id=end.trace_id,
            hold_id=end.hold_id,
            charges=charges_json(result.charges if result else end.charges) or None,
            detail=(detail | receipt_detail(result)) or None,
            replayed=(result.replayed or None) if result else None,
        )
    )
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # whose traceback knows this frame: see decision
    assert result is not None  # noqa: S101 - no failure means a result
    return Spent(result=result, receipt=receipt)


async def _check_own_hold(rooms: Rooms, subject: Subject, hold_id: str) -> None:
    """Raises LedgerError where an agent would end what another one holds: the actor's own,
    or a sibling's.
    """
    if subject.delegation is None:
        return
    hold = await rooms.ledger.hold(subject.tenant, hold_id)
    # What else is held has another memo, and is not ended here.
    is_theirs = hold is not None and hold.operation == "reserve"
    memo = json.loads(hold.memo or "{}") if hold is not None and is_theirs else {}
    if not may_end(subject, memo.get("delegations", [])):
        raise LedgerError(
            ReasonCode.HOLD_NOT_FOUND, "There is no such hold of this agent: check its id."
        )
