"""Errors say why with a code, and survive the way between processes."""

from __future__ import annotations

import pickle

import pytest

from pdp.channel import CallError
from pdp.client import BudgetRefused, PermitDenied
from pdp.errors import PdpError
from pdp.identity.resolver import IdentityError
from pdp.permit import PermitError
from pdp.spending import SpendingError


@pytest.mark.parametrize(
    "error",
    (
        PdpError("internal", "It failed."),
        PermitError("permit_used", "It is used."),
        PermitDenied("rate_limited", "wait", tool="t", decision_id="d", retry_after_seconds=1.5),
        BudgetRefused("tenant_budget_exceeded", "wait", refused_by="l", retry_after_seconds=1.5),
        CallError("pdp_unavailable", "It is away.", retry_after_seconds=2.0),
        IdentityError("tenant_missing", "It names no tenant.", actor="u"),
        SpendingError("budget_not_allowed"),
    ),
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_after_pickling(error: PdpError) -> None:
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert repr(copy) == f"{type(error).__name__}(reason_code={error.reason_code!r})"
