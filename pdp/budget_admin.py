"""What operators do with budgets: each change is put on record before it is made, and
again with what came of it.

A tenant's call that the audit log can not take in was at worst charged for nothing. What
an operator changes lets more be spent, so it is not begun unless it is on record.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from pdp.audit.record import AuditReceipt, AuditRecord, Outcome
from pdp.budget.ledger import (
    Account,
    AccountState,
    Charge,
    HoldState,
    IdempotencyKey,
    LedgerError,
    Receipt,
    Scope,
)
from pdp.canonical import JsonObject, sha256_hex
from pdp.errors import PdpError, RequestError
from pdp.reason import ReasonCode
from pdp.rooms import Rooms, charges_json

MOST_LISTED: Final = 1000
"""Accounts, and holds, of a tenant."""
MOST_TENANTS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Who does something, and why."""

    idempotency_key: str
    operator: str
    """As the operator says: whoever can open the admin socket may do all of it."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """More that may be spent in one account than its limit says."""

    operation: Operation
    tenant: str
    limit_id: str
    counts_for: str
    amount: int
    """Below zero: what is taken back of earlier grants."""
    budget: str = ""
    """This, unit and window are empty where the limit's id says enough."""
    unit: str = ""
    window: str = ""

    def is_of(self, account: AccountState) -> bool:
        """Whether it means this account."""
        limit = account.limit
        return (
            (limit.id, account.counts_for) == (self.limit_id, self.counts_for)
            and self.budget in ("", limit.budget)
            and self.unit in ("", limit.unit)
            and self.window in ("", limit.window.value)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendRefund:
    """What is to be taken back of a charge, or of a hold that was settled."""

    operation: Operation
    tenant: str
    hold_id: str
    charges: tuple[Charge, ...] = ()
    """Empty for all that is left of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldRelease:
    """A hold that is to expire now."""

    operation: Operation
    tenant: str
    hold_id: str
    even_lease: bool = False
    """Also where a sidecar may go on to spend what it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What came of a change, on record."""

    result: Receipt
    receipt: AuditReceipt
    account: AccountState | None = None
    """Of a grant: the account as it stands now, if its window has not ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedAccount:
    """An account, and how much of what is held in it is leased to sidecars."""

    state: AccountState
    leased: int


async def tenants(rooms: Rooms) -> tuple[str, ...]:
    """The tenants of which the ledger keeps anything. Raises LedgerError."""
    return await rooms.ledger.tenants(most=MOST_TENANTS)


async def holds(rooms: Rooms, tenant: str) -> tuple[HoldState, ...]:
    """The tenant's open holds. Raises LedgerError."""
    return await rooms.ledger.holds(tenant, most=MOST_LISTED)


async def accounts(rooms: Rooms, tenant: str) -> tuple[CountedAccount, ...]:
    """The tenant's accounts. Raises LedgerError."""
    found = await rooms.ledger.accounts(tenant, most=MOST_LISTED)
    leases = [each for each in await holds(rooms, tenant) if each.operation == "lease"]
    return tuple(CountedAccount(state=each, leased=_leased(each, leases)) for each in found)


def _leased(account: AccountState, leases: Sequence[HoldState]) -> int:
    limit = account.limit
    held = sum(
        part.charge.amount - part.settled
        for lease in leases
        if _counts_in(account, lease)
        for part in lease.parts
        if (part.charge.budget, part.charge.unit) == (limit.budget, limit.unit)
    )
    # The two lists are not of the same moment.
    return max(0, min(held, account.held))


def _counts_in(account: AccountState, lease: HoldState) -> bool:
    """Whether a lease is held in the account, as far as a hold tells for whom it is."""
    if lease.made_at < account.starts_at:
        return False
    known = {Scope.TENANT: "", Scope.ACTOR: lease.actor, Scope.TOOL: lease.tool}
    return known.get(account.limit.scope) == account.counts_for


async def grant(rooms: Rooms, asked: Grant) -> Done:
    """Let more be spent. Raises LedgerError, RequestError, AuditError."""
    account: AccountState | None = None
    content: JsonObject = {
        "tenant": asked.tenant,
        "limit_id": asked.limit_id,
        "counts_for": asked.counts_for,
        "amount": asked.amount,
        "budget": asked.budget,
        "unit": asked.unit,
        "window": asked.window,
    }

    async def act(operator: Account, key: IdempotencyKey) -> Receipt:
        nonlocal account
        account = await _account_of(rooms, asked)
        # The ledger says that there is none, but for a grant that it has answered before.
        account_id = "" if account is None else account.id
        return await rooms.ledger.grant(operator, key, account_id=account_id, amount=asked.amount)

    done = await _change(
        rooms,
        asked.operation,
        asked.tenant,
        "grant",
        Outcome.GRANTED,
        content,
        act,
        detail={
            "limit_id": asked.limit_id,
            "counts_for": asked.counts_for,
            "amount": asked.amount,
        },
    )
    if account is not None and done.result.limits:
        (state,) = done.result.limits
        account = replace(account, granted=state.granted, spent=state.spent, held=state.held)
    return replace(done, account=account)


async def _account_of(rooms: Rooms, asked: Grant) -> AccountState | None:
    """The account that is meant. Raises LedgerError, RequestError."""
    listed = await rooms.ledger.accounts(asked.tenant, most=MOST_LISTED)
    found = [account for account in listed if asked.is_of(account)]
    if len(found) > 1:
        raise RequestError(
            "limit_id", "stands for several accounts: name budget, unit and window too"
        )
    if found and not found[0].limit.window.is_calendar:
        raise RequestError("limit_id", "is of a rate or of concurrency, which take no grants")
    return found[0] if found else None


async def refund(rooms: Rooms, asked: SpendRefund) -> Done:
    """Take back what was spent. Raises LedgerError, AuditError."""

    async def act(operator: Account, key: IdempotencyKey) -> Receipt:
        return await rooms.ledger.refund(
            operator, key, hold_id=asked.hold_id, charges=asked.charges or None
        )

    content: JsonObject = {
        "tenant": asked.tenant,
        "hold_id": asked.hold_id,
        "charges": list(charges_json(asked.charges)),
    }
    return await _change(
        rooms,
        asked.operation,
        asked.tenant,
        "refund",
        Outcome.REFUNDED,
        content,
        act,
        hold_id=asked.hold_id,
        charges=asked.charges,
    )


async def release(rooms: Rooms, asked: HoldRelease) -> Done:
    """Let a hold expire now. Raises LedgerError, RequestError, AuditError."""

    async def act(operator: Account, key: IdempotencyKey) -> Receipt:
        if not asked.even_lease:
            hold = await rooms.ledger.hold(asked.tenant, asked.hold_id)
            if hold is not None and hold.operation == "lease":
                raise RequestError(
                    "even_lease",
                    "must be true to release a lease: see first that its sidecar is gone for good",
                )
        return await rooms.ledger.expire(operator, key, hold_id=asked.hold_id)

    content: JsonObject = {
        "tenant": asked.tenant,
        "hold_id": asked.hold_id,
        "even_lease": asked.even_lease,
    }
    return await _change(
        rooms,
        asked.operation,
        asked.tenant,
        "release",
        Outcome.RELEASED,
        content,
        act,
        hold_id=asked.hold_id,
    )


_OPERATION_OF: Final = {"grant": "grant", "refund": "refund", "release": "expire"}
"""The ledger's word for each change."""


async def _change(
    rooms: Rooms,
    operation: Operation,
    tenant: str,
    name: str,
    outcome: Outcome,
    content: JsonObject,
    act: Callable[[Account, IdempotencyKey], Awaitable[Receipt]],
    *,
    detail: JsonObject | None = None,
    hold_id: str | None = None,
    charges: tuple[Charge, ...] = (),
) -> Done:
    operator = Account(tenant=tenant, actor=f"operator:{operation.operator}")
    begun = AuditRecord(
        type="budget",
        tenant_id=tenant,
        actor_id=operator.actor,
        action=f"budget.{name}",
        outcome=Outcome.ALLOWED,
        reason_code=ReasonCode.OK,
        request_id=operation.idempotency_key,
        hold_id=hold_id,
        charges=charges_json(charges) or None,
        detail={"reason": operation.reason, **(detail or {})},
    )
    await rooms.audit.append(begun)
    result: Receipt | None = None
    failure: PdpError | None = None
    key = IdempotencyKey(
        operation=_OPERATION_OF[name],
        key=operation.idempotency_key,
        content_sha256=sha256_hex(content),
    )
    try:
        result = await act(operator, key)
    except (LedgerError, RequestError) as error:
        failure = error
    receipt = await rooms.audit.append(
        replace(
            begun,
            outcome=outcome if failure is None else Outcome.DENIED,
            reason_code=ReasonCode.OK if failure is None else failure.reason_code,
            charges=charges_json(result.charges if result else charges) or None,
            replayed=(result.replayed or None) if result else None,
        )
    )
    if failure is not None:
        raise failure
    assert result is not None  # noqa: S101 - no failure means a result
    return Done(result=result, receipt=receipt)
