"""What happens to a permit once it is issued: redeemed, and its outcome reported."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from pdp.admission import Lane
from pdp.audit.record import AuditReceipt, AuditRecord, Outcome
from pdp.budget.ledger import Account, Charge, IdempotencyKey, LedgerError, Receipt
from pdp.canonical import JsonObject, sha256_hex
from pdp.errors import PdpError, RequestError
from pdp.permit.claims import Permit, PermitError
from pdp.permit.uses import Use
from pdp.permit_revocation import check_not_revoked
from pdp.reason import ReasonCode
from pdp.rooms import Rooms, admitted, charges_json, receipt_detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Redemption:
    """A use of a permit that is asked for by a tool server."""

    permit: str = field(repr=False)
    idempotency_key: str
    tool: str
    arguments_sha256: str
    audience: str
    route_tenant: str = ""
    """The tenant whose listener it came by; empty for one that is everybody's."""
    trace_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Redeemed:
    """The use is spent, on record."""

    permit: Permit
    use: Use
    receipt: AuditReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a call."""

    permit: str = field(repr=False)
    executed: bool
    charges: tuple[Charge, ...]
    error_type: str
    uses: int = 0
    """Of a permit for several calls: how many were made, those that failed included."""
    certificate_sha256: str = ""
    """The client certificate of whoever reports, as in Permit.certificate_sha256."""
    route_tenant: str = ""
    """As in Redemption."""
    trace_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """The report is taken in, on record."""

    settled: tuple[Charge, ...]
    """What the hold was settled with; empty when there was none or it is released."""
    result: Receipt
    receipt: AuditReceipt


async def redeem(rooms: Rooms, redemption: Redemption) -> Redeemed:
    """Spend a use of the permit. Raises PermitError, on record, AdmissionError, on
    record within its bounds, and AuditError.
    """
    try:
        permit = _own_permit(rooms, redemption.permit)
    except PermitError as error:
        await rooms.audit.append(
            _record_of_redemption(redemption, None, error, rooms.strangers.admit())
        )
        raise
    async with admitted(
        rooms,
        Lane.ENDINGS,
        tenant=permit.tenant,
        actor=permit.actor,
        action=redemption.tool,
        request_id=redemption.idempotency_key,
        trace_id=redemption.trace_id,
    ):
        return await rooms.off_loop(_redeem(rooms, permit, redemption))


async def _redeem(rooms: Rooms, permit: Permit, redemption: Redemption) -> Redeemed:
    failure: PermitError | None = None
    use: Use | None = None
    try:
        _check_route(permit, redemption.route_tenant)
        rooms.permit_verifier.check_binding(
            permit,
            tool=redemption.tool,
            arguments_sha256=redemption.arguments_sha256,
            audience=redemption.audience,
        )
        rooms.permit_verifier.check_time(permit)
        check_not_revoked(rooms.revocations, permit)
        use = await rooms.permit_uses.redeem(permit, key=redemption.idempotency_key)
    except PermitError as error:
        failure = error
    receipt = await rooms.audit.append(_record_of_redemption(redemption, permit, failure, use=use))
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # whose traceback knows this frame: see decision
    assert use is not None  # noqa: S101 - no failure means a use
    return Redeemed(permit=permit, use=use, receipt=receipt)


def _record_of_redemption(
    redemption: Redemption,
    permit: Permit | None,
    failure: PermitError | None,
    unrecorded: int = 0,
    *,
    use: Use | None = None,
) -> AuditRecord:
    detail: JsonObject = {
        "audience": redemption.audience,
        **_unrecorded(unrecorded),
        **_disagreement(permit, redemption.route_tenant),
    }
    if use is not None and permit is not None and permit.max_uses != 1:
        detail["uses_left"] = use.uses_left
    return _record(
        permit,
        type="redemption",
        action=redemption.tool,
        outcome=Outcome.REDEEMED,
        failure=failure,
        request_id=redemption.idempotency_key,
        trace_id=redemption.trace_id,
        detail=detail,
        replayed=use is not None and use.replayed,
    )


async def report(rooms: Rooms, report: Report) -> Reported:
    """Take in what became of a call, or of all calls under one permit: close the permit,
    settle or release its hold.

    The permit proves who reports; it may have expired since. Raises RequestError,
    PermitError and LedgerError, on record, AdmissionError, on record within its bounds,
    and AuditError.
    """
    try:
        permit = _own_permit(rooms, report.permit)
    except PermitError as error:
        await rooms.audit.append(_record_of_report(report, None, error, rooms.strangers.admit()))
        raise
    async with admitted(
        rooms,
        Lane.ENDINGS,
        tenant=permit.tenant,
        actor=permit.actor,
        action=permit.tool,
        request_id=permit.transaction,
        trace_id=report.trace_id,
    ):
        return await rooms.off_loop(_report(rooms, permit, report))


async def _report(rooms: Rooms, permit: Permit, report: Report) -> Reported:
    result: Receipt | None = None
    failure: PdpError | None = None
    uses = report.uses
    try:
        _check_route(permit, report.route_tenant)
        rooms.permit_verifier.check_sender(permit, report.certificate_sha256)
        _check_uses(permit, report)
        # Whoever reports can not make fewer of them than tools have redeemed.
        uses = max(uses, await rooms.permit_uses.close_permit(permit))
        result = await _resolve_hold(rooms, permit, report, uses)
    except (RequestError, PermitError, LedgerError) as error:
        failure = error
        if failure.reason_code == ReasonCode.IDEMPOTENCY_KEY_REUSED:
            failure = PermitError(
                ReasonCode.OUTCOME_ALREADY_REPORTED,
                "Another outcome was reported for this permit before.",
            )
    receipt = await rooms.audit.append(
        _record_of_report(report, permit, failure, result=result, uses=uses)
    )
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # whose traceback knows this frame: see decision
    assert result is not None  # noqa: S101 - no failure means a result
    settled = result.charges if _costs(permit, report, uses) else ()
    return Reported(settled=settled, result=result, receipt=receipt)


def _check_route(permit: Permit, tenant: str) -> None:
    """Raises PermitError where the permit came by another tenant's listener."""
    if tenant and permit.tenant != tenant:
        raise PermitError(
            ReasonCode.TENANT_MISMATCH, "The permit is not of the tenant whose listener this is."
        )


def _disagreement(permit: Permit | None, tenant: str) -> JsonObject:
    if permit is None or not tenant or permit.tenant == tenant:
        return {}
    return {
        "sources": [
            {"source": "permit", "tenant": permit.tenant},
            {"source": "listener", "tenant": tenant},
        ]
    }


def _check_uses(permit: Permit, report: Report) -> None:
    """Raises RequestError."""
    least = 1 if permit.max_uses > 1 and (report.executed or report.charges) else 0
    if not least <= report.uses <= permit.max_uses:
        raise RequestError("uses", f"must be {least} to {permit.max_uses}")


def _record_of_report(
    report: Report,
    permit: Permit | None,
    failure: PdpError | None,
    unrecorded: int = 0,
    *,
    result: Receipt | None = None,
    uses: int = 0,
) -> AuditRecord:
    detail = (
        receipt_detail(result)
        | _unrecorded(unrecorded)
        | _disagreement(permit, report.route_tenant)
    )
    if permit is not None and permit.max_uses != 1:
        detail["uses"] = uses
        if uses != report.uses:
            detail["uses_reported"] = report.uses
    if report.error_type:
        detail["error_type"] = report.error_type
    return _record(
        permit,
        type="outcome",
        action=permit.tool if permit else "report",
        outcome=Outcome.EXECUTED if report.executed else Outcome.FAILED,
        failure=failure,
        success=ReasonCode.OK if report.executed else ReasonCode.TOOL_FAILED,
        trace_id=report.trace_id,
        charges=charges_json(result.charges) if result else (),
        detail=detail or None,
        replayed=result.replayed if result else False,
    )


def _unrecorded(number: int) -> JsonObject:
    return {"unrecorded": number} if number else {}


def _costs(permit: Permit, report: Report, uses: int) -> bool:
    """Whether the hold is settled; it is released when the one call failed at no cost, and
    when none of several was made.
    """
    return report.executed or bool(report.charges) or (permit.max_uses > 1 and uses > 0)


async def _resolve_hold(rooms: Rooms, permit: Permit, report: Report, uses: int) -> Receipt:
    """Settle or release what was held for the permit's calls; remembered under the
    permit's id, so that they have one outcome.
    """
    account = Account(tenant=permit.tenant, actor=permit.actor, tool=permit.tool)
    content: JsonObject = {
        "executed": report.executed,
        "charges": list(charges_json(report.charges)),
        "error_type": report.error_type,
    }
    if permit.max_uses != 1:
        content["uses"] = report.uses
    key = IdempotencyKey(operation="outcome", key=permit.id, content_sha256=sha256_hex(content))
    if permit.hold_id:
        if _costs(permit, report, uses):
            charges = report.charges or await _share(rooms, permit, uses)
            return await rooms.ledger.settle(account, key, hold_id=permit.hold_id, charges=charges)
        try:
            return await rooms.ledger.release(account, key, hold_id=permit.hold_id)
        except LedgerError as error:
            if error.reason_code != ReasonCode.HOLD_EXPIRED:
                raise
            # Its amounts have returned already; the outcome is only remembered.
    elif report.charges:
        raise LedgerError(ReasonCode.CHARGE_NOT_HELD, "Nothing is held for this call.")
    return await rooms.ledger.reserve(account, key, charges=(), limits=(), ttl_seconds=1)


async def _share(rooms: Rooms, permit: Permit, uses: int) -> tuple[Charge, ...] | None:
    """What so many uses cost, of what is held for all of them; None for the whole."""
    if permit.max_uses in {1, uses}:
        return None
    hold = await rooms.ledger.hold(permit.tenant, permit.hold_id)
    if hold is None:
        raise LedgerError(ReasonCode.HOLD_NOT_FOUND, "What was held is not known any more.")
    return tuple(
        replace(part.charge, amount=part.charge.amount * uses // permit.max_uses)
        for part in hold.parts
    )


def _own_permit(rooms: Rooms, token: str) -> Permit:
    """A permit that this sidecar issued. Another one's uses and holds are not here,
    even where both sign with the same key.
    """
    permit = rooms.permit_verifier.authenticate(token)
    if permit.ledger != rooms.ledger_id:
        raise PermitError(
            ReasonCode.PERMIT_MISMATCH,
            "Another sidecar issued the permit: redeem it and report on it there.",
        )
    return permit


def _record(
    permit: Permit | None,
    *,
    type: str,  # noqa: A002 - the record's own name for it
    action: str,
    outcome: Outcome,
    failure: PdpError | None,
    success: str = ReasonCode.OK,
    request_id: str | None = None,
    trace_id: str | None = None,
    charges: tuple[JsonObject, ...] = (),
    detail: JsonObject | None = None,
    replayed: bool = False,
) -> AuditRecord:
    return AuditRecord(
        type=type,
        tenant_id=permit.tenant if permit else None,
        actor_id=permit.actor if permit else None,
        identity=_identity_json(permit) if permit else None,
        action=action,
        outcome=outcome if failure is None else Outcome.DENIED,
        reason_code=success if failure is None else failure.reason_code,
        decision_id=permit.decision_id if permit else None,
        request_id=request_id or (permit.transaction if permit else None),
        trace_id=trace_id,
        policy_revision=permit.policy_revision if permit else None,
        permit_id=permit.id if permit else None,
        hold_id=(permit.hold_id or None) if permit else None,
        charges=charges or None,
        detail=detail,
        replayed=replayed or None,
    )


def _identity_json(permit: Permit) -> JsonObject | None:
    """AuditRecord.identity, as far as a permit names it."""
    known: JsonObject = {}
    if permit.workload:
        known["workload"] = permit.workload
    if permit.agents:
        known["agents"] = list(permit.agents)
        # Before them stands the user's token, if it has an id.
        known["delegations"] = list(permit.delegations[-len(permit.agents) :])
    return known or None
