"""Reason codes: why an answer is what it is.

One list for the whole product: policy, sidecar, stub and audit use the same
codes. A policy may return codes of its own, so a reason code travels as a plain
string; this enum names those that the product itself returns.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Final, Self

REASON_CODE_PATTERN: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
"""What a reason code looks like, a policy's own included."""


class ReasonCode(StrEnum):
    """The codes that the product itself returns, each with its meaning."""

    meaning: str

    def __new__(cls, code: str, meaning: str) -> Self:  # noqa: D102 - builds members
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member

    OK = "ok", "Allowed, executed, charged or recorded."

    # Identify
    TOKEN_MISSING = "token_missing", "The call carries no bearer token."
    TOKEN_INVALID = (
        "token_invalid",
        "The token is malformed, or its signature, issuer, audience or a claim is wrong.",
    )
    TOKEN_EXPIRED = "token_expired", "The token has expired."
    KEYS_UNAVAILABLE = (
        "keys_unavailable",
        "The keys of the token's issuer can not be had now.",
    )
    TENANT_MISSING = "tenant_missing", "The token is valid but names no tenant."
    TENANT_MISMATCH = (
        "tenant_mismatch",
        "Two trusted sources name different tenants, or the thing is another tenant's.",
    )
    TENANT_UNKNOWN = (
        "tenant_unknown",
        "The tenant is not one that the policy or the organisation map knows.",
    )
    TENANT_SUSPENDED = "tenant_suspended", "The tenant is known and suspended."

    ACTOR_REVOKED = "actor_revoked", "The actor may not act for the tenant any more."
    TOKEN_REVOKED = "token_revoked", "The token is valid and was revoked."
    REVOCATIONS_UNAVAILABLE = (
        "revocations_unavailable",
        "It can not be told who is revoked.",
    )

    WORKLOAD_REVOKED = "workload_revoked", "The workload may not ask any more."
    WORKLOAD_MISSING = (
        "workload_missing",
        "The workload that asks has not shown who it is, as it must here.",
    )
    WORKLOAD_INVALID = (
        "workload_invalid",
        "The workload's token is not valid, or its certificate names none that is known.",
    )

    # Authorize
    POLICY_DENIED = "policy_denied", "The policy says no, without a code of its own."
    TOOL_NOT_ALLOWED = (
        "tool_not_allowed",
        "The tool is not on the tenant's allowlist, or does not exist.",
    )
    ROLE_NOT_ALLOWED = "role_not_allowed", "None of the actor's roles may use the tool."
    WORKLOAD_NOT_ALLOWED = (
        "workload_not_allowed",
        "The workload that asks may not use the tool, for this tenant or at all.",
    )
    SCOPE_MISSING = (
        "scope_missing",
        "The token, or the tenant, lacks a scope that the tool needs.",
    )
    ARGUMENT_NOT_ALLOWED = (
        "argument_not_allowed",
        "An argument is outside what the policy allows.",
    )
    APPROVAL_REQUIRED = "approval_required", "A person must approve the call first."
    BUDGET_NOT_ALLOWED = "budget_not_allowed", "The actor may not charge this budget."
    MODEL_UNKNOWN = "model_unknown", "The price table has no price for the model, or for a unit."
    POLICY_UNDEFINED = (
        "policy_undefined",
        "The policy gives no answer; that is a denial.",
    )
    POLICY_INVALID = (
        "policy_invalid",
        "The policy's answer is not of the agreed form; that is a denial.",
    )
    POLICY_ERROR = "policy_error", "The policy failed while it ran; that is a denial."
    POLICY_TIMEOUT = (
        "policy_timeout",
        "The policy ran past its deadline; that is a denial.",
    )
    POLICY_UNAVAILABLE = (
        "policy_unavailable",
        "No policy engine could take the question.",
    )
    POLICY_STALE = (
        "policy_stale",
        "The policy could not be renewed for longer than is allowed; that is a denial.",
    )
    TENANT_BUDGET_EXCEEDED = (
        "tenant_budget_exceeded",
        "A limit of the tenant would be passed.",
    )
    BUDGET_UNLIMITED = (
        "budget_unlimited",
        "No limit applies to a charge, so it is refused.",
    )
    BUDGET_UNAVAILABLE = (
        "budget_unavailable",
        "The ledger could not take the operation.",
    )
    RATE_LIMITED = "rate_limited", "Too many calls at once."

    BATCH_REFUSED = (
        "batch_refused",
        "Another call of the batch is refused, and either all are made or none.",
    )

    # Delegation
    TOOL_NOT_DELEGATED = "tool_not_delegated", "The tool was not delegated to the agent."
    ARGUMENT_NOT_DELEGATED = (
        "argument_not_delegated",
        "An argument is outside what was delegated to the agent.",
    )
    BUDGET_NOT_DELEGATED = (
        "budget_not_delegated",
        "The budget was not delegated to the agent, or is counted by another sidecar.",
    )
    DELEGATION_TOO_WIDE = (
        "delegation_too_wide",
        "More would be delegated than the caller itself may.",
    )
    DELEGATION_TOO_DEEP = "delegation_too_deep", "Too many agents would act one for another."

    # Holds
    HOLD_NOT_FOUND = "hold_not_found", "There is no such hold of this actor."
    HOLD_ALREADY_SETTLED = "hold_already_settled", "The hold was settled before."
    HOLD_ALREADY_RELEASED = "hold_already_released", "The hold was released before."
    HOLD_EXPIRED = "hold_expired", "The hold has expired and its amounts have returned."
    CHARGE_NOT_HELD = (
        "charge_not_held",
        "A settlement names a budget and unit that the hold does not hold.",
    )

    REFUND_EXCEEDS_SPEND = (
        "refund_exceeds_spend",
        "More would be refunded than was settled and not refunded before.",
    )
    ACCOUNT_NOT_FOUND = (
        "account_not_found",
        "Nothing counts under that limit yet, or its window has ended.",
    )

    # Execute
    PERMIT_MISSING = "permit_missing", "There is no permit; the tool does not run."
    PERMIT_INVALID = (
        "permit_invalid",
        "The permit is malformed, or not signed by a known key.",
    )
    PERMIT_EXPIRED = "permit_expired", "The permit has expired, or is not valid yet."
    PERMIT_USED = (
        "permit_used",
        "Every use of the permit is spent, or its outcome is reported.",
    )
    PERMIT_REVOKED = (
        "permit_revoked",
        "The permit's tenant, actor, workload or delegation was revoked after it was issued.",
    )
    PERMIT_MISMATCH = (
        "permit_mismatch",
        "The permit is for another tool, other arguments, audience, tenant or sender.",
    )
    SENDER_UNKNOWN = (
        "sender_unknown",
        "Permits are bound to client certificates here, and the call came without one.",
    )
    PERMIT_UNAVAILABLE = (
        "permit_unavailable",
        "Permits can not be signed or redeemed now.",
    )
    OUTCOME_ALREADY_REPORTED = (
        "outcome_already_reported",
        "Another outcome was reported for this permit before.",
    )
    TOOL_FAILED = "tool_failed", "The tool ran under a permit and raised."

    # Audit
    AUDIT_UNAVAILABLE = (
        "audit_unavailable",
        "The audit record could not be written, so nothing was allowed.",
    )

    # Asking
    REQUEST_INVALID = (
        "request_invalid",
        "A field of the request is missing, malformed or out of bounds.",
    )
    ARGUMENTS_INVALID = (
        "arguments_invalid",
        "The arguments are not JSON of the agreed form and size.",
    )
    IDEMPOTENCY_KEY_REUSED = (
        "idempotency_key_reused",
        "The key was used before, with other content.",
    )
    DEADLINE_EXCEEDED = "deadline_exceeded", "The answer did not come in time."
    INTERNAL = "internal", "A fault in the PDP itself; nothing was allowed."

    # In a tool server
    CALL_UNDER_WAY = (
        "call_under_way",
        "The call is being done, or was cut off; its result is not there yet.",
    )

    # In the runtime's stub
    IDENTITY_MISSING = (
        "identity_missing",
        "The tool was called outside guard.acting_for(token).",
    )
    IDENTITY_ENDED = (
        "identity_ended",
        "The tool was called after its guard.acting_for(token) had ended.",
    )
    PDP_UNAVAILABLE = "pdp_unavailable", "The sidecar can not be reached."
    GUARD_FAILED = "guard_failed", "A fault in the stub; the tool did not run."
