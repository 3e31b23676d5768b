"""What operators ask and are told, between protobuf and the product's own types.

Every bound of the contract is checked here, before anything else runs.
"""

from __future__ import annotations

import re
from typing import Final

from pdp.api.v1 import admin_pb2
from pdp.budget.ledger import MAX_AMOUNT, AccountState, Charge, HoldState, LimitState, Window
from pdp.budget_admin import CountedAccount, Done, Grant, HoldRelease, Operation, SpendRefund
from pdp.errors import RequestError
from pdp.identity.subject import TENANT_PATTERN
from pdp.server.wire import (
    charges_from,
    charges_out,
    hold_id_from,
    key_from,
    limit_status,
    matching,
    receipt_out,
)

OPERATOR_PATTERN: Final = re.compile(r"[A-Za-z0-9._@-]{1,64}")
OPERATOR_FORM: Final = "1 to 64 of [A-Za-z0-9._@-]"
MAX_REASON: Final = 256

_MAX_LIMIT_ID: Final = 128
_MAX_COUNTS_FOR: Final = 255
_MAX_NAME: Final = 64


def tenant_from(value: str) -> str:
    """The tenant that is asked about. Raises RequestError."""
    return matching(
        "tenant_id",
        value,
        TENANT_PATTERN,
        "1 to 128 of [A-Za-z0-9._-], the first a letter or digit",
    )


def grant_from(request: admin_pb2.GrantBudgetRequest) -> Grant:
    """The grant that is asked for. Raises RequestError."""
    if request.amount == 0 or abs(request.amount) > MAX_AMOUNT:
        raise RequestError("amount", f"must be 1 to {MAX_AMOUNT}, or as much below zero")
    if request.window and request.window not in {each.value for each in Window}:
        raise RequestError("window", f"must be one of {', '.join(Window)}")
    return Grant(
        operation=_operation_from(request.operation),
        tenant=tenant_from(request.tenant_id),
        limit_id=_text("limit_id", request.limit_id, _MAX_LIMIT_ID),
        counts_for=_text("counts_for", request.counts_for, _MAX_COUNTS_FOR, least=0),
        amount=request.amount,
        budget=_text("budget", request.budget, _MAX_NAME, least=0),
        unit=_text("unit", request.unit, _MAX_NAME, least=0),
        window=request.window,
    )


def refund_from(request: admin_pb2.RefundSpendRequest) -> SpendRefund:
    """The refund that is asked for. Raises RequestError."""
    return SpendRefund(
        operation=_operation_from(request.operation),
        tenant=tenant_from(request.tenant_id),
        hold_id=hold_id_from(request.hold_id),
        charges=charges_from(request.charges, least=1),
    )


def release_from(request: admin_pb2.ReleaseHoldRequest) -> HoldRelease:
    """The release that is asked for. Raises RequestError."""
    return HoldRelease(
        operation=_operation_from(request.operation),
        tenant=tenant_from(request.tenant_id),
        hold_id=hold_id_from(request.hold_id),
        even_lease=request.even_lease,
    )


def _operation_from(operation: admin_pb2.Operation) -> Operation:
    return Operation(
        idempotency_key=key_from("operation.idempotency_key", operation.idempotency_key),
        operator=matching(
            "operation.operator", operation.operator, OPERATOR_PATTERN, OPERATOR_FORM
        ),
        reason=_text("operation.reason", operation.reason, MAX_REASON),
    )


def _text(field: str, value: str, longest: int, *, least: int = 1) -> str:
    if not least <= len(value) <= longest or not value.isprintable():
        raise RequestError(field, f"must be {least} to {longest} printable characters")
    return value


def grant_response(done: Done) -> admin_pb2.GrantBudgetResponse:
    """A grant on the wire."""
    return admin_pb2.GrantBudgetResponse(
        account=None if done.account is None else _account_out(done.account),
        audit=receipt_out(done.receipt),
        replayed=done.result.replayed,
    )


def refund_response(done: Done) -> admin_pb2.RefundSpendResponse:
    """A refund on the wire."""
    return admin_pb2.RefundSpendResponse(
        refunded=charges_out(done.result.charges),
        audit=receipt_out(done.receipt),
        replayed=done.result.replayed,
    )


def release_response(done: Done) -> admin_pb2.ReleaseHoldResponse:
    """A release on the wire."""
    return admin_pb2.ReleaseHoldResponse(
        released=charges_out(done.result.charges),
        audit=receipt_out(done.receipt),
        replayed=done.result.replayed,
    )


def counted_account_out(account: CountedAccount) -> admin_pb2.BudgetAccount:
    """An account on the wire, with what is leased of it."""
    counted = _account_out(account.state)
    counted.leased = account.leased
    return counted


def _account_out(account: AccountState) -> admin_pb2.BudgetAccount:
    status = LimitState(
        limit=account.limit,
        spent=account.spent,
        held=account.held,
        resets_at=account.resets_at,
        granted=account.granted,
    )
    counted = admin_pb2.BudgetAccount(status=limit_status(status), counts_for=account.counts_for)
    if account.starts_at:
        counted.starts_at.seconds = account.starts_at
    return counted


def hold_out(hold: HoldState) -> admin_pb2.BudgetHold:
    """A hold on the wire."""
    shown = admin_pb2.BudgetHold(
        hold_id=hold.id,
        operation=hold.operation,
        actor_id=hold.actor,
        tool=hold.tool,
        charges=charges_out(part.charge for part in hold.parts),
        settled=charges_out(
            Charge(part.charge.budget, part.charge.unit, part.settled)
            for part in hold.parts
            if part.settled
        ),
        memo=hold.memo,
    )
    shown.made_at.seconds = hold.made_at
    shown.expires_at.seconds = hold.expires_at
    return shown
