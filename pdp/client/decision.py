"""What the sidecar answered to one question, for whoever watches the guard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdp.api.v1 import authorization_pb2


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
    charges: tuple[tuple[str, str, int], ...]
    """What is held for the call: budget, unit, amount."""
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
            charges=tuple(
                (charge.budget, charge.unit, charge.amount) for charge in response.hold.charges
            ),
            audit_sequence=response.audit.sequence,
            audit_hash=response.audit.hash,
            replayed=response.replayed,
            step_seconds={
                step.step: step.duration.ToTimedelta().total_seconds() for step in response.steps
            },
        )
