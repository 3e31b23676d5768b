"""What an audit record says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from pdp.canonical import JsonObject
from pdp.errors import PdpError

MAX_INPUT_BYTES: Final = 32 * 1024
"""Largest policy input that a record holds; a larger one is left out, and the record says so."""


class Outcome(StrEnum):
    """What became of an action."""

    ALLOWED = "allowed"
    DENIED = "denied"
    REDEEMED = "redeemed"
    EXECUTED = "executed"
    FAILED = "failed"
    CHARGED = "charged"
    RESERVED = "reserved"
    SETTLED = "settled"
    RELEASED = "released"
    REFUNDED = "refunded"
    GRANTED = "granted"
    ACTIVATED = "activated"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One event, without secrets: no token, permit, credential, nor, unless the operator
    wants ``input`` kept, a raw argument.

    ``tenant_id`` and ``actor_id`` are None only where no identity was verified, and
    where the record is of the sidecar itself.
    Fields left None are left out of the file, except those two.
    """

    type: str
    """One of "decision", "listing", "shadow", "budget", "redemption", "outcome", "policy" or
    "revocation"."""
    tenant_id: str | None
    actor_id: str | None
    action: str
    """The tool, or the name of the operation."""
    outcome: Outcome
    reason_code: str
    identity: JsonObject | None = None
    """What else is known of who asks, as far as there is any: "issuer" (who vouches for the
    actor), "workload" (the runtime), "agents" (who acts for the actor, the first that was
    delegated to first) and "delegations" (their ids)."""
    decision_id: str | None = None
    request_id: str | None = None
    trace_id: str | None = None
    """From the W3C traceparent: 32 lower-case hexadecimal digits."""
    resource: JsonObject | None = None
    """{"type": ..., "id": ...}."""
    policy_revision: str | None = None
    arguments_digest: str | None = None
    """HMAC-SHA256 of the arguments' digest, keyed per tenant, so that guessed
    arguments can not be confirmed from the log."""
    permit_id: str | None = None
    """The permit's jti."""
    hold_id: str | None = None
    charges: tuple[JsonObject, ...] | None = None
    """What was held, spent or returned: {"budget", "unit", "amount"}."""
    limit_id: str | None = None
    """The limit that refused."""
    detail: JsonObject | None = None
    """What only this type of record has."""
    replayed: bool | None = None
    """True when the answer was given before."""
    input: JsonObject | None = None
    """The document that the policy was asked about, raw arguments included: only where
    the operator has chosen to record it, and it is not larger than MAX_INPUT_BYTES."""


@dataclass(frozen=True, slots=True)
class AuditReceipt:
    """Where a record lies in the chain."""

    sequence: int
    """From 1."""
    hash: str
    """64 lower-case hexadecimal digits."""


class AuditError(PdpError):
    """The record could not be made durable: reason code audit_unavailable."""


class AuditLog(Protocol):
    """Takes records in, and answers when they are durable."""

    @property
    def healthy(self) -> bool:
        """Whether the last record could be written."""
        ...

    async def append(self, record: AuditRecord) -> AuditReceipt:
        """Write the record. Raises AuditError. Once begun it completes even if the
        awaiting task is cancelled.
        """
        ...

    async def close(self) -> None:
        """Write what has been taken in, make it durable, close the file."""
        ...
