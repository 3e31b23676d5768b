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

DEFAULT_WARN_AT: Final = (50, 80, 95)

MAX_BUCKET: Final = MAX_AMOUNT // 1000
"""Largest ``burst * seconds`` of a rate: what it holds is counted in thousandths of a
second, in which its unit drains."""


class Window(StrEnum):
    """How long a limit counts before it starts again."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    LIFETIME = "lifetime"
    ROLLING = "rolling"
    """A rate, without a start: a bucket that holds ``burst`` units and drains ``limit``
    of them in every ``seconds`` (the generic cell rate algorithm, ITU-T I.371). It counts
    what is reserved or charged; no settlement, release or refund changes it."""
    CONCURRENT = "concurrent"
    """Counts what is held at the moment, and nothing that was spent."""

    @property
    def is_calendar(self) -> bool:
        """Whether spend counts under it, from a start to an end."""
        return self is not Window.ROLLING and self is not Window.CONCURRENT


class Scope(StrEnum):
    """What one account of a limit covers."""

    ORGANISATION = "organisation"
    """All tenants of the caller's organisation together; a tenant without one is an
    organisation of its own."""
    TENANT = "tenant"
    TEAM = "team"
    """A team of the tenant; actors without one count together."""
    ACTOR = "actor"
    SESSION = "session"
    """A session of the tenant; calls without one count together."""
    TOOL = "tool"


class OnExpiry(StrEnum):
    """What becomes of the amounts of a hold that nobody ended in time."""

    RELEASE = "release"
    """They return: nothing was spent, for all that is known."""
    CHARGE = "charge"
    """They count as spent, until the hold is settled after all."""


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
    """The most that spend plus holds may reach in a window: 0 to MAX_AMOUNT. Of a rate,
    at least 1: what drains in ``seconds``."""
    scope: Scope
    timezone: str = "UTC"
    """By whose calendar and clock windows begin: a name of the IANA time zone database."""
    seconds: int = 0
    """Of a rate: the time in which ``limit`` units drain. 0 for every other window."""
    burst: int = 0
    """Of a rate: the most at one moment. ``burst * seconds`` is at most MAX_BUCKET. 0 for
    every other window."""
    warn_at: tuple[int, ...] = DEFAULT_WARN_AT
    """Percent of the limit, ascending, at which spend plus holds give a warning, once in
    a window each. Not for rates and concurrency."""
    enforced: bool = True
    """False for a shadow limit: counted and reported like any other, it refuses nothing,
    and a charge that only shadow limits bound is refused as unlimited."""
    on_expiry: OnExpiry = OnExpiry.RELEASE
    """RELEASE for rates and concurrency."""
    until: int = 0
    """Of a lifetime that ends: when, in Unix seconds. From then on nothing can be held or
    spent under it (account_not_found), and it is cleared away as windows are. 0 for one that
    does not end, and for every other window."""

    def applies_to(self, account: Account) -> bool:
        """Whether it counts what is done for the account at all."""
        return self.scope is not Scope.TOOL or account.tool != ""

    def counts_for(self, account: Account) -> str:
        """Whose spend and holds stand together under it: within the account's tenant
        the team's, the actor's, the session's, the tool's or, where this is empty, the
        whole tenant's; the organisation's across its tenants.
        """
        return {
            Scope.ORGANISATION: account.organisation,
            Scope.TENANT: "",
            Scope.TEAM: account.team,
            Scope.ACTOR: account.actor,
            Scope.SESSION: account.session,
            Scope.TOOL: account.tool,
        }[self.scope]

    def shared_by(self, account: Account) -> str:
        """The tenant within which it counts, or "" where it counts across those of the
        account's organisation.
        """
        return "" if self.scope is Scope.ORGANISATION and account.organisation else account.tenant

    @property
    def most(self) -> int:
        """What may stand under it at one moment."""
        return self.burst if self.window is Window.ROLLING else self.limit

    def warnings_at(self) -> tuple[tuple[int, int], ...]:
        """(percent, amount from which it is reached), ascending; amounts are rounded up."""
        if not self.window.is_calendar or self.limit == 0:
            return ()
        return tuple((percent, -(-self.limit * percent // 100)) for percent in self.warn_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitState:
    """A limit as the ledger sees it."""

    limit: Limit
    spent: int
    """Of a rate: what has not drained yet, rounded up."""
    held: int
    resets_at: int | None
    """End of the window, Unix seconds; None for a lifetime without end and for concurrency.
    Of a rate: when all has drained, rounded up; None where nothing is left to drain."""
    granted: int = 0
    """What an operator has granted beyond the limit, for this window."""

    @property
    def remaining(self) -> int:
        """May be negative: after a limit was lowered, or settled above its hold."""
        return self.limit.most + self.granted - self.spent - self.held


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """A threshold of a limit that was crossed, for the first time in its window."""

    limit_id: str
    percent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """For whom an operation is done. Its fields come from a verified identity."""

    tenant: str
    actor: str
    tool: str = ""
    """Empty when the operation is for no tool; limits of scope ``tool`` then do
    not apply."""
    organisation: str = ""
    team: str = ""
    session: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyKey:
    """What makes an operation the same operation when it is tried again.

    Keys of different tenants, actors and operations do not meet.
    """

    operation: str
    """One of OPERATIONS in pdp.budget.bounds. The first that a hold meets says who may end
    it: see :meth:`Ledger.settle`."""
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
    """What was held, charged, settled, released or refunded; empty on a refusal."""
    limits: tuple[LimitState, ...] = ()
    """The limits that applied, after the operation. Empty on a replay, and on
    settle and release, which are given no limits."""
    refused_by: LimitState | None = None
    """The first enforced limit, in the policy's order, that refused; nothing was charged."""
    retry_after_seconds: int | None = None
    """With refused_by, at least 1: when its window ends, its earliest hold expires, or
    enough has drained, if that could make room; 1 for concurrency, as calls end at any
    time. None where waiting can not help."""
    shadow_refusals: tuple[LimitState, ...] = ()
    """Shadow limits that would have refused, as they stood before the operation. Empty
    on a replay, and where an enforced limit refused."""
    warnings: tuple[Warned, ...] = ()
    """Thresholds that the operation crossed, in the limits' order. Empty on a replay, and
    on a refusal."""
    over_hold: bool = False
    """On a settlement: more was spent than held, by all parts of it together."""
    late: bool = False
    """On a settlement: the hold had expired before."""


class LedgerError(PdpError):
    """The ledger refused an operation, or could not take it.

    Reason codes: idempotency_key_reused, budget_unlimited, hold_not_found,
    hold_already_settled, hold_already_released, hold_expired, charge_not_held,
    refund_exceeds_spend, account_not_found, budget_unavailable.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class PartState:
    """A charge of a hold, and what has become of it."""

    charge: Charge
    """What was held at first, or charged."""
    settled: int
    refunded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldState:
    """A hold, or a charge that was made at once, as the ledger keeps it."""

    id: str
    operation: str
    """What made it: "authorize", "reserve", "lease" or "charge"."""
    actor: str
    tool: str
    made_at: int
    """Unix seconds."""
    expires_at: int
    """Unix seconds; 0 for a charge."""
    state: str
    """"open", "settled" or "released". One that is open may have expired."""
    parts: tuple[PartState, ...]
    memo: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountState:
    """What counts together under one limit, as the ledger keeps it."""

    id: str
    """The store's own name for it; only for :meth:`Ledger.grant`."""
    limit: Limit
    """As it was named last."""
    counts_for: str
    """See Limit.counts_for."""
    starts_at: int
    """Start of the window, Unix seconds; 0 where it has none."""
    spent: int
    held: int
    granted: int
    resets_at: int | None
    """See LimitState."""


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
        memo: str = "",
    ) -> Receipt:
        """Hold amounts for ``ttl_seconds``. Without charges only the key and its
        note are remembered. A charge to which no enforced limit applies is refused with
        budget_unlimited. A pair of budget and unit stands at most once in charges,
        and a limit at most once in limits. ``memo`` is kept with the hold for whoever
        looks at it: at most 1 KiB, no secrets.
        """
        ...

    async def charge(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        memo: str = "",
    ) -> Receipt:
        """Reserve and settle in one step, under the same rules. Under a limit of
        concurrency there must be room, and nothing counts afterwards.
        """
        ...

    async def settle(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
        final: bool = True,
    ) -> Receipt:
        """Post what was spent to the windows in which the hold was made, and let
        the rest go; unless it is not ``final``, when the rest stays held, less what
        was posted, until the hold expires or is ended. None settles all that is still
        held. More than was held is recorded in full (over_hold); a hold that has
        expired is settled all the same (late), and what was charged on its expiry
        is put right. Raises hold_not_found for a hold of another tenant or actor,
        and budget_unavailable where a sum would pass MAX_AMOUNT.

        Who made a hold ends it: "settle" and "release" find what "reserve" made. A hold
        that "authorize" made backs a permit, so only "outcome" finds it, and
        "outcome" finds no other: whoever holds a permit can not take away first
        what pays for it. What "lease" made only "lease_settle" finds, also after it
        was settled: what is posted then is late, and nothing is held that it could
        come from.
        """
        ...

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """End a hold with nothing more spent than was settled in parts. Raises
        hold_expired for one that has. Finds holds as :meth:`settle` does. The receipt's
        charges are what was still held; those of which nothing was are left out.
        """
        ...

    async def refund(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        """Take back what was settled or charged under the id, whoever of the tenant did
        it, in the windows in which it counts. None takes back all that is left of it.
        Raises hold_not_found, charge_not_held, and refund_exceeds_spend where more
        would be refunded than was settled.
        """
        ...

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """The limits as they stand now. Limits of scope ``tool`` are left out
        when the account names no tool.
        """
        ...

    async def hold(self, tenant: str, hold_id: str) -> HoldState | None:
        """A hold or charge of the tenant, whoever made it, while it is kept."""
        ...

    async def holds(self, tenant: str, *, most: int) -> tuple[HoldState, ...]:
        """The tenant's open holds that have not expired, the earliest to expire first;
        at most ``most``, 1 to 1,000.
        """
        ...

    async def accounts(self, tenant: str, *, most: int) -> tuple[AccountState, ...]:
        """The accounts of the tenant whose window has not ended, by limit id, counts_for
        and start; at most ``most``, 1 to 1,000. Those of its organisation are not among
        them.
        """
        ...

    async def tenants(self, *, most: int) -> tuple[str, ...]:
        """Tenants of which the ledger keeps anything, by name; at most ``most``, 1 to
        10,000.
        """
        ...

    async def grant(
        self, account: Account, key: IdempotencyKey, *, account_id: str, amount: int
    ) -> Receipt:
        """Let ``amount`` more be spent in one account of the tenant than its limit says,
        until its window ends; below zero, take back of what was granted, at most all of
        it. Not for rates and concurrency. Raises account_not_found.
        """
        ...

    async def expire(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """Let a hold of the tenant expire now, whoever made it; what it holds returns,
        whatever its limits say of expiry. A settlement that comes all the same is late,
        and so is recorded in full. Raises hold_not_found, hold_already_settled,
        hold_already_released, hold_expired.
        """
        ...

    async def close(self) -> None:
        """Finish what has begun, make it durable, let go of the store."""
        ...
