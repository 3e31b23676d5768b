"""Whether a permit still counts: what tool side and sidecar ask alike."""

from __future__ import annotations

from pdp.permit.claims import Permit, PermitError
from pdp.reason import ReasonCode
from pdp.revocation.revocations import RevocationError, Revocations


def check_not_revoked(revocations: Revocations, permit: Permit) -> None:
    """Raises PermitError: permit_revoked, revocations_unavailable."""
    try:
        found = revocations.find(
            tenant=permit.tenant,
            actor=permit.actor,
            token_ids=permit.delegations,
            workload=permit.workload,
        )
    except RevocationError as error:
        raise PermitError(error.reason_code, error.message) from None
    if found is not None:
        raise PermitError(
            ReasonCode.PERMIT_REVOKED,
            "The permit's tenant, actor, workload or delegation was revoked after it was issued.",
        )
