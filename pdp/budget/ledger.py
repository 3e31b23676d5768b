"""The ledger port: what every store of budgets promises.

Two-phase, after TigerBeetle: a hold is reserved, then settled, released, or it
expires; each hold is resolved at most once. Holds live apart from spend. Every
amount is an integer. All limits that apply to an operation are checked and
charged together, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from pdp.errors import PdpError

MAX_AMOUNT: Final = 2**53 - 1
"""Largest amount and limit: what a Lua number and a JSON number keep exact."""


class Window(StrEnum):
    """How long a limit counts before it starts again, in UTC."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    LIFETIME = "lifetime"


class Scope(StrEnum):
    """What one account of a limit covers, always within one tenant."""

    TENANT = "tenant"
    ACTOR = "actor"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Charge:
    """An amount of one unit against one budget."""

    budget: str
    unit: str
    amount: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit as the policy names it for one subject."""

    id: str
    budget: str
    unit: str
    window: Window
    limit: int
    """The most that spend plus holds may reach in a window: 0 to MAX_AMOUNT."""
    scope: Scope

    def applies_to(self, account: Account) -> bool:
        """Whether it counts what is done for the account at all."""
        return self.scope is not Scope.TOOL or account.tool != ""

    def counts_for(self, account: Account) -> str:
        """Whose spend and holds stand together under it, within the account's tenant: the
        actor's, the tool's or, where this is empty, the whole tenant's.
        """
        return {Scope.TENANT: "", Scope.ACTOR: account.actor, Scope.TOOL: account.tool}[self.scope]


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """A limit as the ledger sees it."""

    limit: Limit
    spent: int
    held: int
    resets_at: int | None
    """End of the window, Unix seconds; None for a lifetime limit."""

    @property
    def remaining(self) -> int:
        """May be negative: after a limit was lowered, or settled above its hold."""
        return self.limit.limit - self.spent - self.held


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """For whom an operation is done. Its fields come from a verified identity."""

    tenant: str
    actor: str
    tool: str = ""
    """Empty when the operation is for no tool; limits of scope ``tool`` then do
    not apply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyKey:
    """What makes an operation the same operation when it is tried again.

    Keys of different tenants, actors and operations do not meet.
    """

    operation: str
    """One of "authorize", "charge", "reserve", "settle", "release" or "outcome"."""
    key: str
    content_sha256: str
    """Digest of everything that the caller asked for. The same key with another
    digest is refused with idempotency_key_reused."""
    note: str = ""
    """Kept with the first answer and returned with it: what the caller of the
    ledger needs to give the very same answer again. At most 16 KiB. No secrets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What came of an operation; the same again when it is tried again."""

    replayed: bool
    """True when this is the first answer to an earlier try."""
    note: str
    """The first try's note."""
    id: str = ""
    """Id of the hold or charge; empty when nothing was charged."""
    expires_at: int = 0
    """When the hold expires, Unix seconds by the ledger's clock; 0 if there is none."""
    charges: tuple[Charge, ...] = ()
    """What was held, charged, settled or released; empty on a refusal."""
    limits: tuple[LimitState, ...] = ()
    """The limits that applied, after the operation. Empty on a replay, and on
    settle and release, which are given no limits."""
    refused_by: LimitState | None = None
    """The first limit, in the policy's order, that refused; nothing was charged."""
    retry_after_seconds: int | None = None
    """With refused_by: when its window ends, or its earliest hold expires, if
    that could make room; None where waiting can not help."""
    over_hold: bool = False
    """On a settlement: more was spent than held."""
    late: bool = False
    """On a settlement: the hold had expired before."""


class LedgerError(PdpError):
    """The ledger refused an operation, or could not take it.

    Reason codes: idempotency_key_reused, budget_unlimited, hold_not_found,
    hold_already_settled, hold_already_released, hold_expired, charge_not_held,
    budget_unavailable.
    """


class Ledger(Protocol):
    """A store of budgets. Every method is atomic, and durable before it returns.

    A refusal for want of budget is a Receipt with ``refused_by``, remembered
    under the idempotency key like any other answer. Every other refusal is a
    LedgerError and leaves no trace. When the store can not answer, LedgerError
    with budget_unavailable. Once a call has begun it completes even if the
    awaiting task is cancelled.

    ValueError for what no caller should send: the bounds are in pdp.budget.bounds.
    Callers check what comes from outside, and what a policy returns, before.
    """

    async def reserve(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int,
    ) -> Receipt:
        """Hold amounts for ``ttl_seconds``. Without charges only the key and its
        note are remembered. A charge to which no limit applies is refused with
        budget_unlimited. A pair of budget and unit stands at most once in charges,
        and a limit at most once in limits.
        """
        ...

    async def charge(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
    ) -> Receipt:
        """Reserve and settle in one step, under the same rules."""
        ...

    async def settle(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        """Post what was spent to the windows in which the hold was made, and let
        the rest go. None settles all that is held. More than was held is recorded
        in full (over_hold); a hold that has expired is settled all the same (late).
        Raises hold_not_found for a hold of another tenant or actor, and
        budget_unavailable where a sum would pass MAX_AMOUNT.

        A hold that "authorize" made backs a permit, so only "outcome" finds it, and
        "outcome" finds no other: whoever holds a permit can not take away first
        what pays for it.
        """
        ...

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """End a hold with nothing spent. Raises hold_expired for one that has. Finds
        holds as :meth:`settle` does.
        """
        ...

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """The limits as they stand now. Limits of scope ``tool`` are left out
        when the account names no tool.
        """
        ...

    async def close(self) -> None:
        """Finish what has begun, make it durable, let go of the store."""
        ...
