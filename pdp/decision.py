"""The five steps, in order: Identify, Isolate, Authorize, Execute, Audit.

This module and its neighbours, :mod:`pdp.spending` and :mod:`pdp.execution`, are
the only places that know more than one room. They do no I/O of their own: rooms,
clock and ids are passed in, so that any answer can be worked out again.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Final

from pdp.admission import Lane
from pdp.audit.record import MAX_INPUT_BYTES, AuditReceipt, AuditRecord, Outcome
from pdp.budget.ledger import (
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    Receipt,
)
from pdp.canonical import JsonObject, JsonValue, canonical_bytes, sha256_hex
from pdp.errors import RequestError
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.subject import Subject
from pdp.narrowing import NotDelegated, check_delegated, limits_within
from pdp.permit.claims import Permit, PermitError
from pdp.policy.engine import Entrypoint, PolicyEngine, PolicyError
from pdp.policy.question import authorize_input
from pdp.policy.verdict import Verdict, parse_verdict
from pdp.reason import ReasonCode
from pdp.rooms import (
    Rooms,
    StepWatch,
    admitted_as,
    charges_json,
    check_still_may_act,
    identify,
    identity_json,
    isolate,
    limits_for,
    receipt_detail,
    refusal_code,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """May this call be made? Every field is well-formed and within its bounds."""

    request_id: str
    """The caller's idempotency key."""
    tool: str
    resource: JsonObject | None
    """{"type": ..., "id": ...}, if the caller named one."""
    arguments: JsonObject = field(repr=False)
    arguments_sha256: str
    context: JsonObject = field(repr=False)
    audience: str
    trace_id: str | None = None
    batch: str = ""
    """Of a batch that is to be allowed as a whole or not at all: its digest, so that
    none of its questions is another one's that is asked alone."""

    def content_sha256(self, subject: Subject) -> str:
        """The same for the same question of the same subject, whenever and however
        often it is asked. A token with other roles or scopes asks another question.
        """
        content: JsonObject = {
            "identity": identity_json(subject),
            "roles": list(subject.roles),
            "scopes": list(subject.scopes),
            "tool": self.tool,
            "resource": self.resource,
            "arguments_sha256": self.arguments_sha256,
            "context": self.context,
            "audience": self.audience,
        }
        return sha256_hex({**content, "batch": self.batch} if self.batch else content)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked for, before it is known by whom."""

    request_id: str
    tool: str
    trace_id: str | None
    read: Callable[[], Awaitable[Question]] = field(repr=False)
    """Reads the rest, which costs time and memory, and so is done only for a caller
    who is known. Raises RequestError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The decision on one call of one subject."""

    subject: Subject
    reason_code: str
    """ReasonCode.OK exactly when permit is set."""
    decision_id: str
    policy_revision: str
    permit: Permit | None = None
    charges: tuple[Charge, ...] = ()
    """What is held for the call."""
    hold_expires_at: int = 0
    """Unix seconds; 0 when nothing is held."""
    policy_max_uses: int = 1
    """How many calls the policy would have let the permit be for."""
    result: Receipt | None = None
    """What the ledger said, where it was asked."""

    @property
    def replayed(self) -> bool:
        """True when this is the first answer to an earlier try."""
        return self.result is not None and self.result.replayed


@dataclass(frozen=True, slots=True)
class _Ruling:
    verdict: Verdict
    limits: tuple[Limit, ...]
    policy_revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An answer that is on record."""

    answer: Answer
    receipt: AuditReceipt
    step_seconds: dict[str, float]
    """What each step took."""


async def authorize(rooms: Rooms, credentials: Credentials, asked: Asked) -> Recorded:
    """Decide one call. Returns only after the hold and the audit record are durable.

    A refusal by the policy, or for want of budget, is an Answer without a permit.
    Raises IdentityError, RequestError (arguments_invalid) and LedgerError
    (idempotency_key_reused, budget_unavailable) and PermitError (permit_unavailable),
    each of which is on record too, and AuditError; and AdmissionError, on record within
    its bounds, before anything of the call but its name is read.
    """
    watch = StepWatch()

    subject = await identify(
        rooms,
        credentials,
        action=asked.tool,
        request_id=asked.request_id,
        trace_id=asked.trace_id,
    )
    watch.done("identify")
    return await authorize_as(rooms, subject, asked, watch)


async def authorize_as(rooms: Rooms, subject: Subject, asked: Asked, watch: StepWatch) -> Recorded:
    """Decide one call of a caller who is identified. Raises as :func:`authorize` does:
    IdentityError where the identity has ended since.
    """
    async with admitted_as(
        rooms,
        Lane.QUESTIONS,
        subject,
        action=asked.tool,
        request_id=asked.request_id,
        trace_id=asked.trace_id,
    ):
        return await _decide(rooms, subject, asked, watch)


async def _decide(rooms: Rooms, subject: Subject, asked: Asked, watch: StepWatch) -> Recorded:
    """The other four steps, of a call that was let in."""
    account = isolate(subject, tool=asked.tool)
    try:
        question = await asked.read()
    except RequestError as error:
        await rooms.audit.append(_record_of_unread(asked, subject, error))
        raise
    watch.done("isolate")

    document = _document(rooms, subject, question)
    revision = rooms.policy.revision

    async def with_policy(policy: PolicyEngine) -> _Outcome:
        try:
            answer = await _authorize_and_execute(
                rooms, subject, account, question, document, policy, watch
            )
        except _REFUSALS as error:
            return await recorded(error, policy.revision)
        audit = await rooms.audit.append(_record(rooms, question, answer, document))
        watch.done("audit")
        return _Outcome(answer, audit, None)

    async def recorded(failure: _Refusal, revision: str) -> _Outcome:
        watch.done("authorize")
        answer = Answer(
            subject=subject,
            reason_code=failure.reason_code,
            decision_id=rooms.new_id(),
            policy_revision=revision,
        )
        audit = await rooms.audit.append(_record(rooms, question, answer, document))
        watch.done("audit")
        # Its traceback knows frames that know this outcome: both would hold the whole
        # message until garbage is collected.
        return _Outcome(answer, audit, failure.with_traceback(None))

    try:
        _check_sender(rooms, subject)
        check_delegated(subject, tool=question.tool, arguments=question.arguments)
        with rooms.policy.pin() as policy:
            revision = policy.revision
            outcome = await rooms.with_policy(policy, with_policy)
    except _REFUSALS as error:
        outcome = await recorded(error, revision)

    failure = outcome.failure
    if failure is not None and (
        isinstance(failure, IdentityError) or failure.reason_code in _ERRORS_IN_ASKING
    ):
        try:
            raise failure
        finally:
            del outcome, failure  # as its traceback knows this frame too
    return Recorded(answer=outcome.answer, receipt=outcome.audit, step_seconds=watch.seconds)


_Refusal = NotDelegated | PolicyError | IdentityError | LedgerError | PermitError
_REFUSALS: Final = (NotDelegated, PolicyError, IdentityError, LedgerError, PermitError)


@dataclass(frozen=True, slots=True)
class _Outcome:
    answer: Answer
    audit: AuditReceipt
    failure: _Refusal | None


async def _authorize_and_execute(
    rooms: Rooms,
    subject: Subject,
    account: Account,
    question: Question,
    document: JsonObject,
    policy: PolicyEngine,
    watch: StepWatch,
) -> Answer:
    value = await policy.evaluate(Entrypoint.AUTHZ_DECISION, document)
    ruling = await _rule(policy, document, value)
    check_still_may_act(rooms, subject)
    receipt = await _hold(rooms, subject, account, question, ruling)
    watch.done("authorize")
    answer = await _execute(rooms, subject, question, receipt)
    watch.done("execute")
    return answer


_ERRORS_IN_ASKING: Final = frozenset(
    {
        ReasonCode.IDEMPOTENCY_KEY_REUSED,
        ReasonCode.BUDGET_UNAVAILABLE,
        ReasonCode.PERMIT_UNAVAILABLE,
    }
)
"""What the stores refuse without a decision on the call itself."""


def _check_sender(rooms: Rooms, subject: Subject) -> None:
    """Raises PermitError where a permit would have nobody to be bound to."""
    if rooms.binds_permits and not subject.certificate_sha256:
        raise PermitError(
            ReasonCode.SENDER_UNKNOWN,
            "Permits are bound to client certificates here: ask over TLS with one.",
        )


def _document(rooms: Rooms, subject: Subject, question: Question) -> JsonObject:
    """What the policy is shown of the call."""
    return authorize_input(
        subject,
        tool=question.tool,
        arguments=question.arguments,
        resource=question.resource,
        time=rooms.clock(),
        request_id=question.request_id,
        context=question.context,
    )


async def _rule(policy: PolicyEngine, document: JsonObject, value: JsonValue) -> _Ruling:
    """Authorize, first half: the policy's verdict, and the limits that apply to
    what it charges.
    """
    verdict = parse_verdict(value)
    limits: tuple[Limit, ...] = ()
    if verdict.charges:
        charged = {(charge.budget, charge.unit) for charge in verdict.charges}
        limits = tuple(
            limit
            for limit in await limits_for(policy, document)
            if (limit.budget, limit.unit) in charged
        )
    return _Ruling(verdict, limits, policy.revision)


async def _hold(
    rooms: Rooms, subject: Subject, account: Account, question: Question, ruling: _Ruling
) -> Receipt:
    """Authorize, second half: remember the answer under the request id, and hold
    what the call may cost, in one durable step: for all calls of the permit, or, where
    the limits have no room for so many, for one.
    """
    verdict = ruling.verdict
    issued_at = int(rooms.clock())
    ttl_seconds = min(
        verdict.permit_ttl_seconds or rooms.permit_ttl_seconds, rooms.permit_ttl_seconds
    )
    expires_at = issued_at + ttl_seconds
    if subject.delegation is not None:
        expires_at = min(expires_at, int(subject.expires_at))
    charges = verdict.charges if verdict.allow else ()
    binds_arguments, max_uses = _terms(verdict, subject, question.tool)
    first_answer: JsonObject = {
        "allow": verdict.allow,
        "reason_code": verdict.reason_code,
        "decision_id": rooms.new_id(),
        "policy_revision": ruling.policy_revision,
        "permit_id": rooms.new_id(),
        "scopes": list(verdict.scopes),
        "issued_at": issued_at,
        "expires_at": expires_at,
        "certificate_sha256": subject.certificate_sha256 if rooms.binds_permits else "",
        "policy_max_uses": verdict.max_uses,
    }

    async def reserve(key: str, *, binds_arguments: bool, max_uses: int) -> Receipt:
        terms: JsonObject = {"binds_arguments": binds_arguments, "max_uses": max_uses}
        return await rooms.ledger.reserve(
            account,
            IdempotencyKey(
                operation="authorize",
                key=key,
                content_sha256=question.content_sha256(subject),
                note=json.dumps(first_answer | terms),
            ),
            charges=_times(max_uses, charges),
            limits=limits_within(subject, account, charges, ruling.limits, rooms.ledger_id),
            ttl_seconds=rooms.hold_ttl_seconds,
        )

    receipt = await reserve(question.request_id, binds_arguments=binds_arguments, max_uses=max_uses)
    if receipt.refused_by is not None and json.loads(receipt.note)["max_uses"] > 1:
        # Under a key that no caller can choose: a request id has no space.
        once = f"once {sha256_hex({'request_id': question.request_id})}"
        receipt = await reserve(once, binds_arguments=True, max_uses=1)
    return receipt


def _terms(verdict: Verdict, subject: Subject, tool: str) -> tuple[bool, int]:
    """Whether the permit binds the arguments, and how many calls it allows: what the policy
    says, unless the actor has delegated the tool under rules for its arguments. Those are
    kept by looking at each call.
    """
    if subject.delegation is not None and subject.delegation.arguments.get(tool):
        return True, 1
    return verdict.binds_arguments, verdict.max_uses


def _times(number: int, charges: tuple[Charge, ...]) -> tuple[Charge, ...]:
    return tuple(replace(charge, amount=charge.amount * number) for charge in charges)


async def _execute(rooms: Rooms, subject: Subject, question: Question, receipt: Receipt) -> Answer:
    """Execute: sign the permit that the ledger's receipt stands for, if it stands
    for one. A receipt of an earlier try gives the earlier answer, to the letter, until
    the outcome of the call is reported: the permit then is used, and whoever would still
    run the tool under it is told so.
    """
    first = json.loads(receipt.note)
    reason_code = first["reason_code"]
    if receipt.refused_by is not None:
        reason_code = refusal_code(receipt.refused_by).value
    permit = None
    if first["allow"] and receipt.refused_by is None:
        binds_arguments = first["binds_arguments"]
        permit = Permit(
            id=first["permit_id"],
            issuer=rooms.permits.issuer,
            audience=question.audience,
            tenant=subject.tenant,
            actor=subject.actor,
            tool=question.tool,
            arguments_sha256=question.arguments_sha256 if binds_arguments else "",
            scopes=tuple(first["scopes"]),
            transaction=question.request_id,
            decision_id=first["decision_id"],
            policy_revision=first["policy_revision"],
            ledger=rooms.ledger_id,
            issued_at=first["issued_at"],
            expires_at=first["expires_at"],
            hold_id=receipt.id,
            resource=_resource_text(question.resource) if binds_arguments else "",
            max_uses=first["max_uses"],
            agents=subject.delegation.agents if subject.delegation else (),
            certificate_sha256=first["certificate_sha256"],
            delegations=subject.token_ids if subject.delegation else (),
            workload=subject.workload,
        )
        if receipt.replayed and await rooms.permit_uses.is_closed(permit):
            permit, reason_code = None, ReasonCode.PERMIT_USED.value
        else:
            permit = rooms.permits.sign(permit)
    return Answer(
        subject=subject,
        reason_code=reason_code,
        decision_id=first["decision_id"],
        policy_revision=first["policy_revision"],
        permit=permit,
        charges=receipt.charges if permit else (),
        hold_expires_at=receipt.expires_at if permit else 0,
        policy_max_uses=first["policy_max_uses"],
        result=receipt,
    )


def _record(rooms: Rooms, question: Question, answer: Answer, document: JsonObject) -> AuditRecord:
    """Audit: what is written before the answer leaves."""
    subject, permit, result = answer.subject, answer.permit, answer.result
    recorded = rooms.records_policy_input
    fits = recorded and len(canonical_bytes(document)) <= MAX_INPUT_BYTES
    detail = receipt_detail(result)
    if recorded and not fits:
        detail["input_omitted"] = True
    if permit is not None and permit.max_uses != 1:
        detail["max_uses"] = permit.max_uses
    if permit is not None and permit.max_uses != answer.policy_max_uses:
        detail["policy_max_uses"] = answer.policy_max_uses
    return AuditRecord(
        type="decision",
        tenant_id=subject.tenant,
        actor_id=subject.actor,
        identity=identity_json(subject),
        action=question.tool,
        outcome=Outcome.DENIED if permit is None else Outcome.ALLOWED,
        reason_code=answer.reason_code,
        decision_id=answer.decision_id,
        request_id=question.request_id,
        trace_id=question.trace_id,
        resource=question.resource,
        policy_revision=answer.policy_revision,
        arguments_digest=rooms.arguments_digest(subject.tenant, question.arguments_sha256),
        permit_id=permit.id if permit else None,
        hold_id=(permit.hold_id or None) if permit else None,
        charges=charges_json(answer.charges) or None,
        limit_id=result.refused_by.limit.id if result and result.refused_by else None,
        replayed=answer.replayed or None,
        input=document if fits else None,
        detail=detail or None,
    )


def _record_of_unread(asked: Asked, subject: Subject, error: RequestError) -> AuditRecord:
    return AuditRecord(
        type="decision",
        tenant_id=subject.tenant,
        actor_id=subject.actor,
        identity=identity_json(subject),
        action=asked.tool,
        outcome=Outcome.DENIED,
        reason_code=error.reason_code,
        request_id=asked.request_id,
        trace_id=asked.trace_id,
    )


def _resource_text(resource: JsonObject | None) -> str:
    return f"{resource['type']}/{resource['id']}" if resource else ""
