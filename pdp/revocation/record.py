"""Revocations on record, once a sidecar goes by them."""

from __future__ import annotations

from pdp.audit.record import AuditLog, AuditRecord, Outcome
from pdp.reason import ReasonCode
from pdp.revocation.revocations import Kind, Revocation


async def record_revocation(audit: AuditLog, revocation: Revocation, in_force: bool) -> None:  # noqa: FBT001 - as Heard says
    """Put on record that a revocation came in force, or was lifted. Raises AuditError."""
    target = revocation.target
    await audit.append(
        AuditRecord(
            type="revocation",
            tenant_id=target.tenant or None,
            actor_id=target.name if target.kind is Kind.ACTOR else None,
            action=f"revoke.{target.kind}",
            outcome=Outcome.ACTIVATED if in_force else Outcome.RELEASED,
            reason_code=ReasonCode.OK,
            detail={
                "by": revocation.by,
                "reason": revocation.reason,
                "at": revocation.at,
                "until": revocation.until,
                **({"token_id": target.name} if target.kind is Kind.TOKEN else {}),
                **({"workload": target.name} if target.kind is Kind.WORKLOAD else {}),
            },
        )
    )
