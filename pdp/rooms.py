"""What the steps are done with, and the steps that every kind of call shares."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, TypeVar

from pdp.admission import Admission, AdmissionError, Lane
from pdp.audit.record import AuditLog, AuditRecord, Outcome
from pdp.budget.ledger import Account, Charge, Ledger, Limit, LimitState, Receipt
from pdp.canonical import JsonObject
from pdp.identity.resolver import Credentials, IdentityError, IdentityResolver
from pdp.identity.subject import Subject
from pdp.off_loop import DiskThread
from pdp.permit.issuer import PermitIssuer
from pdp.permit.uses import UsedPermits
from pdp.permit.verifier import PermitVerifier
from pdp.policy.engine import ActivePolicy, Entrypoint, PolicyEngine, WalkedEngine
from pdp.policy.verdict import parse_limits
from pdp.reason import ReasonCode
from pdp.revocation.revocations import Kind, RevocationError, Revocations
from pdp.strangers import Strangers

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DelegationTerms:
    """How far callers may delegate."""

    max_depth: int = 8
    """Most agents that act one for another."""
    ttl_seconds: int = 300
    """How long a delegation lasts that names no time."""
    max_ttl_seconds: int = 3_600


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """The rooms of one sidecar, and what they share."""

    identity: IdentityResolver
    admission: Admission
    policy: ActivePolicy
    ledger: Ledger
    permits: PermitIssuer
    permit_verifier: PermitVerifier
    """Of this sidecar's own permits."""
    permit_uses: UsedPermits
    audit: AuditLog
    ledger_id: str
    """Names, in permits, the store of ledger and permit uses; sidecars that share one
    redeem and settle each other's permits."""
    strangers: Strangers
    revocations: Revocations
    digest_key: bytes = field(repr=False)
    """Keys the argument digests in audit records."""
    binds_permits: bool = False
    """Whether each permit is bound to the client certificate of whoever asks for it."""
    permit_ttl_seconds: int
    hold_ttl_seconds: int
    delegation: DelegationTerms = DelegationTerms()
    disk: DiskThread | None = None
    """Set where ledger, permit uses and audit log wait for nothing but a disk, and not for
    long: what is done with them then leaves the event loop once, for this thread, or for the
    policy's where that is asked before."""
    records_policy_input: bool = False
    """Whether a decision's record holds what the policy was asked, raw arguments included."""
    clock: Callable[[], float] = time.time
    """Unix seconds."""
    new_id: Callable[[], str] = lambda: str(uuid.uuid4())

    async def with_policy(
        self, policy: PolicyEngine, steps: Callable[[PolicyEngine], Coroutine[Any, Any, _T]]
    ) -> _T:
        """Do steps that ask the policy, on the policy's thread where they may leave the
        event loop. Raises what they raise, and PolicyError.
        """
        if self.disk is not None and isinstance(policy, WalkedEngine):
            return await policy.walk(steps)
        return await steps(policy)

    async def off_loop(self, steps: Coroutine[Any, Any, _T]) -> _T:
        """Do steps that need no policy, off the event loop where they may leave it."""
        return await (steps if self.disk is None else self.disk.run(steps))

    def arguments_digest(self, tenant: str, arguments_sha256: str) -> str:
        """HMAC-SHA256 of an arguments' digest under the tenant's own key, so that
        guessed arguments can not be confirmed, nor compared across tenants.
        """
        tenant_key = hmac.digest(self.digest_key, tenant.encode("utf-8"), "sha256")
        return hmac.new(tenant_key, arguments_sha256.encode("ascii"), hashlib.sha256).hexdigest()


class StepWatch:
    """Takes the time of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def done(self, step: str) -> None:
        """The step that was under way has ended; the next one begins."""
        now = time.perf_counter()
        self.seconds[step] = now - self._began
        self._began = now


async def identify(
    rooms: Rooms,
    credentials: Credentials,
    *,
    action: str,
    request_id: str | None = None,
    trace_id: str | None = None,
) -> Subject:
    """Identify: the verified caller. A failure is put on record, then raised as
    IdentityError; where it can not be put on record, AuditError, and where too many
    strangers ask, PdpError (rate_limited).
    """
    subject = None
    try:
        subject = await rooms.identity.resolve(credentials)
        _check_not_revoked(rooms, subject)
    except IdentityError as error:
        unrecorded = rooms.strangers.admit()
        detail: JsonObject = {"unrecorded": unrecorded} if unrecorded else {}
        if error.sources:
            detail["sources"] = [
                {"source": name, "tenant": tenant} for name, tenant in error.sources
            ]
        known = identity_json(subject) if subject else None
        if known is None and error.workload:
            known = {"workload": error.workload}
        await rooms.audit.append(
            AuditRecord(
                type="decision",
                tenant_id=error.tenant,
                actor_id=error.actor,
                identity=known,
                action=action,
                outcome=Outcome.DENIED,
                reason_code=error.reason_code,
                request_id=request_id,
                trace_id=trace_id,
                detail=detail or None,
            )
        )
        raise
    return subject


async def verified(rooms: Rooms, credentials: Credentials) -> Subject:
    """The caller, if the credentials hold now, off the record. Raises IdentityError."""
    subject = await rooms.identity.resolve(credentials)
    _check_not_revoked(rooms, subject)
    return subject


def identity_json(subject: Subject) -> JsonObject | None:
    """AuditRecord.identity of a subject."""
    known: JsonObject = {}
    if subject.issuer:
        known["issuer"] = subject.issuer
    if subject.workload:
        known["workload"] = subject.workload
    if subject.delegation is not None:
        known["agents"] = list(subject.delegation.agents)
        known["delegations"] = [link.id for link in subject.delegation.links]
    return known or None


def check_still_may_act(rooms: Rooms, subject: Subject) -> None:
    """For a caller who has waited since it was identified. Raises IdentityError, which is
    not on record.
    """
    if subject.delegation is not None and rooms.clock() >= subject.expires_at:
        raise IdentityError(
            ReasonCode.TOKEN_EXPIRED,
            "The delegation has expired meanwhile; ask whoever delegated for a new one.",
            tenant=subject.tenant,
            actor=subject.actor,
        )
    _check_not_revoked(rooms, subject)


def _check_not_revoked(rooms: Rooms, subject: Subject) -> None:
    """Raises IdentityError, for tokens that were verified before too."""
    try:
        found = rooms.revocations.find(
            tenant=subject.tenant,
            actor=subject.actor,
            token_ids=subject.token_ids,
            workload=subject.workload,
        )
    except RevocationError as error:
        code, message = error.reason_code, error.message
    else:
        if found is None:
            return
        code, message = _REVOKED[found.target.kind]
    raise IdentityError(code, message, tenant=subject.tenant, actor=subject.actor)


_REVOKED: Final = {
    Kind.TENANT: (ReasonCode.TENANT_SUSPENDED, "The tenant is suspended."),
    Kind.ACTOR: (ReasonCode.ACTOR_REVOKED, "The actor may not act any more."),
    Kind.WORKLOAD: (ReasonCode.WORKLOAD_REVOKED, "The workload may not ask any more."),
    Kind.TOKEN: (ReasonCode.TOKEN_REVOKED, "The token was revoked: get a new one."),
}


def admitted_as(
    rooms: Rooms,
    lane: Lane,
    subject: Subject,
    *,
    action: str,
    request_id: str | None = None,
    trace_id: str | None = None,
) -> contextlib.AbstractAsyncContextManager[None]:
    """As :func:`admitted`, for a caller who is identified."""
    return admitted(
        rooms,
        lane,
        tenant=subject.tenant,
        actor=subject.actor,
        identity=identity_json(subject),
        action=action,
        request_id=request_id,
        trace_id=trace_id,
    )


def admitted(
    rooms: Rooms,
    lane: Lane,
    *,
    tenant: str,
    actor: str,
    action: str,
    identity: JsonObject | None = None,
    request_id: str | None = None,
    trace_id: str | None = None,
) -> contextlib.AbstractAsyncContextManager[None]:
    """Isolate, first half: wait for the tenant's turn, and hold a place while the
    context lasts. A call that is one too many is put on record as far as such records
    are bounded, then raised as AdmissionError; where it can not be put on record,
    AuditError.
    """

    async def refused(error: AdmissionError) -> None:
        if error.unrecorded is not None:
            await rooms.audit.append(
                AuditRecord(
                    type="decision",
                    tenant_id=tenant,
                    actor_id=actor,
                    identity=identity,
                    action=action,
                    outcome=Outcome.DENIED,
                    reason_code=error.reason_code,
                    request_id=request_id,
                    trace_id=trace_id,
                    detail={"unrecorded": error.unrecorded} if error.unrecorded else None,
                )
            )
        await rooms.admission.hold_back(error)

    return _Admitted(rooms.admission.admitted(tenant, lane), refused)


class _Admitted(contextlib.AbstractAsyncContextManager[None]):
    """Written out: as generators, with a stack of contexts, it cost each call twice as much."""

    __slots__ = ("_place", "_refused")

    def __init__(
        self,
        place: contextlib.AbstractAsyncContextManager[None],
        refused: Callable[[AdmissionError], Awaitable[None]],
    ) -> None:
        self._place = place
        self._refused = refused

    async def __aenter__(self) -> None:
        try:
            await self._place.__aenter__()
        except AdmissionError as error:
            await self._refused(error)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._place.__aexit__(kind, error, traceback)


def isolate(subject: Subject, *, tool: str) -> Account:
    """Isolate: from here on the call is that tenant's and nobody else's. Budgets,
    permit, credentials and audit take the tenant from this, never from the
    request.
    """
    return Account(
        tenant=subject.tenant,
        actor=subject.actor,
        tool=tool,
        organisation=subject.organisation,
        team=subject.team,
        session=subject.session,
    )


async def limits_for(policy: PolicyEngine, document: JsonObject) -> tuple[Limit, ...]:
    """The limits that the policy names for a question. Raises PolicyError."""
    return parse_limits(await policy.evaluate(Entrypoint.BUDGET_LIMITS, document))


def charges_json(charges: Sequence[Charge]) -> tuple[JsonObject, ...]:
    """Charges as they stand in audit records and policy input."""
    return tuple(
        {"budget": charge.budget, "unit": charge.unit, "amount": charge.amount}
        for charge in charges
    )


def refusal_code(refused_by: LimitState) -> ReasonCode:
    """What a limit that refused comes to: what was spent, or how fast and how much at once."""
    if refused_by.limit.window.is_calendar:
        return ReasonCode.TENANT_BUDGET_EXCEEDED
    return ReasonCode.RATE_LIMITED


def receipt_detail(result: Receipt | None) -> JsonObject:
    """What a record says of a receipt that is out of the ordinary."""
    if result is None:
        return {}
    detail: JsonObject = {}
    if result.over_hold:
        detail["over_hold"] = True
    if result.late:
        detail["late"] = True
    if result.warnings:
        detail["warnings"] = [
            {"limit_id": each.limit_id, "percent": each.percent} for each in result.warnings
        ]
    if result.shadow_refusals:
        detail["shadow_refusals"] = [each.limit.id for each in result.shadow_refusals]
    return detail
