"""What the stub raises."""

from __future__ import annotations

from pdp.errors import PdpError


class PermitDenied(PdpError):  # noqa: N818 - it reads as what happened
    """The tool did not run.

    ``reason_code`` says why: the policy's word, the ledger's, or one of the stub's
    own (identity_missing, identity_ended, arguments_invalid, pdp_unavailable,
    deadline_exceeded, permit_invalid, guard_failed, ...).
    """

    def __init__(
        self,
        reason_code: str,
        message: str,
        *,
        tool: str,
        decision_id: str = "",
        retry_after_seconds: float | None = None,
        refused_by: str = "",
    ) -> None:
        super().__init__(reason_code, f"{tool} did not run: {message} ({reason_code})")
        self.tool = tool
        self.decision_id = decision_id
        """The decision in the audit log; empty when none was made."""
        self.retry_after_seconds = retry_after_seconds
        """When to ask again, if waiting can help."""
        self.refused_by = refused_by
        """Id of the limit that refused, where one did."""


class BudgetRefused(PdpError):  # noqa: N818 - as above
    """Nothing is reserved, so nothing may be spent.

    ``reason_code`` says why, as :class:`PermitDenied` does: tenant_budget_exceeded,
    model_unknown, budget_not_allowed, ...
    """

    def __init__(
        self,
        reason_code: str,
        message: str,
        *,
        refused_by: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(reason_code, f"nothing was reserved: {message} ({reason_code})")
        self.refused_by = refused_by
        """Id of the limit that refused, where one did."""
        self.retry_after_seconds = retry_after_seconds
        """When to ask again, if waiting can help."""


class DelegationRefused(PdpError):  # noqa: N818 - as above
    """Nothing is delegated, or what was received is no delegation: nobody acts.

    ``reason_code`` says why: delegation_too_wide, delegation_too_deep, request_invalid,
    identity_missing, token_invalid, ...
    """

    def __init__(self, reason_code: str, message: str) -> None:
        super().__init__(reason_code, f"no delegation: {message} ({reason_code})")


class ListingRefused(PdpError):  # noqa: N818 - as above
    """It is not known which tools there are.

    ``reason_code`` says why, as :class:`PermitDenied` does.
    """

    def __init__(
        self, reason_code: str, message: str, *, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(reason_code, f"no tools are listed: {message} ({reason_code})")
        self.retry_after_seconds = retry_after_seconds
        """When to ask again, if waiting can help."""


class IdentityLacking(PdpError):  # noqa: N818 - as above
    """The running code acts for nobody. It becomes a PermitDenied, BudgetRefused or
    DelegationRefused:
    identity_missing, identity_ended, token_invalid.
    """
