"""What the sidecar answered to one question, for whoever watches the guard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdp.api.v1 import authorization_pb2
from pdp.client.spend import Charge, charges_of, warnings_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """An answer of the sidecar, yes or no. It holds no secret: no permit, no token,
    no argument.
    """

    tool: str
    request_id: str
    allowed: bool
    """What the sidecar said. The tool runs only if its permit then verifies."""
    reason_code: str
    decision_id: str
    """The decision in the audit log."""
    tenant: str
    actor: str
    policy_revision: str
    max_uses: int
    """How many calls it allows; 0 where it allows none."""
    charges: tuple[Charge, ...]
    """What is held for all of them: budget, unit, amount."""
    refused_by: str
    """Id of the limit that refused; empty where none did."""
    warnings: tuple[tuple[str, int], ...]
    """Thresholds that the hold has crossed: id of the limit, percent of it."""
    shadow_refusals: tuple[str, ...]
    """Ids of the limits that would have refused, if they were enforced."""
    audit_sequence: int
    audit_hash: str
    """Where the audit record lies: kept elsewhere, the two prove that the log was
    not cut (``pdp audit verify --receipt SEQUENCE:HASH``)."""
    replayed: bool
    """The answer to an earlier try of the same question."""
    step_seconds: Mapping[str, float]
    """What each step took inside the sidecar."""

    @classmethod
    def of(
        cls,
        request: authorization_pb2.AuthorizeRequest,
        response: authorization_pb2.AuthorizeResponse,
    ) -> Decision:
        """Read an answer."""
        return cls(
            tool=request.action.name,
            request_id=request.request_id,
            allowed=response.decision,
            reason_code=response.reason_code,
            decision_id=response.decision_id,
            tenant=response.tenant_id,
            actor=response.actor_id,
            policy_revision=response.policy_revision,
            # A sidecar of before says nothing of it.
            max_uses=max(response.max_uses, 1) if response.decision else 0,
            charges=charges_of(response.hold.charges),
            refused_by=response.refused_by.limit_id,
            warnings=warnings_of(response.warnings),
            shadow_refusals=tuple(limit.limit_id for limit in response.shadow_refusals),
            audit_sequence=response.audit.sequence,
            audit_hash=response.audit.hash,
            replayed=response.replayed,
            step_seconds={
                step.step: step.duration.ToTimedelta().total_seconds() for step in response.steps
            },
        )
