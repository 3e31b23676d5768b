"""The leases that a sidecar spends: how many, how large, and which of them pays for what."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pdp.budget.bounds import MAX_HOLD_SECONDS, MAX_LIMITS
from pdp.budget.lease_journal import LeaseRecord
from pdp.budget.ledger import Account, Charge, Limit, LimitState, Receipt, Scope, Warned, Window
from pdp.config import Lease as LeaseSettings
from pdp.config import OnOutage

MARGIN_SECONDS: Final = 10
"""For how much longer than a sidecar needs it a lease is held: covers clocks that run at
different speeds, and reports on their way."""
DRAW_AFTER: Final = 3
"""Operations that the shared ledger has done, within one lease's length, before it is
worth a lease."""
FIRST_CALLS: Final = 32
"""For how many calls like the last the first lease is to last."""
LEAST_CALLS: Final = 8
"""A lease for fewer calls is not drawn: so near its limit, a budget is for everyone."""
EXACT_SECONDS: Final = 1.0
"""For how long no lease is tried after one was refused, or would have been too small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """How a sidecar leases."""

    seconds: int = 30
    """For how long a lease is spent."""
    share: float = 1 / 8
    """The most of what remains under a limit that one lease takes."""
    longest_hold_seconds: int = 120
    """Holds that may last longer are made on the shared ledger."""
    on_outage: OnOutage = OnOutage.DENY

    @classmethod
    def of(cls, settings: LeaseSettings, *, hold_ttl_seconds: int) -> LeaseTerms:
        """As configured; holds may last as long as no lease is held for longer than any
        ledger lets a hold live.
        """
        room = MAX_HOLD_SECONDS - settings.seconds - MARGIN_SECONDS
        return cls(
            seconds=settings.seconds,
            share=settings.share,
            longest_hold_seconds=min(hold_ttl_seconds, room),
            on_outage=settings.on_outage,
        )

    @property
    def ttl_seconds(self) -> int:
        """How long the shared ledger holds a lease: as long as there may be holds under it.
        At most MAX_HOLD_SECONDS.
        """
        return self.seconds + self.longest_hold_seconds + MARGIN_SECONDS


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """A lease of this sidecar's, of which the shared ledger does not know all yet."""

    record: LeaseRecord
    limit: Limit = field(init=False)
    """What it is to the local ledger."""
    until: float = 0
    """When nothing more is done under it, by the clock that never stops."""
    left: int = 0
    """What the local ledger said last."""
    pending: int = 0
    """Amounts on their way to the local ledger; above 0 also while it is drawn."""
    retired: bool = True
    """Whether nothing more is done under it, and it can be reported."""

    def __post_init__(self) -> None:
        record = self.record
        self.limit = Limit(
            id=f"lease-{record.name}",
            budget=record.charge.budget,
            unit=record.charge.unit,
            window=Window.LIFETIME,
            limit=record.charge.amount,
            scope=Scope.TENANT,
            warn_at=(),
            on_expiry=record.limits[0].on_expiry,
        )

    def fits(self, amount: int, now: float) -> bool:
        """Whether it can pay."""
        return not self.retired and now < self.until and amount <= self.left - self.pending


@dataclass(slots=True, kw_only=True, eq=False)
class Pool:
    """Leases for one budget and unit, under the same limits, counted in the same accounts."""

    limits: tuple[Limit, ...]
    used_at: float
    leases: deque[Lease] = field(default_factory=deque)
    """The oldest first, which is spent first."""
    granted: int = 0
    """What the last lease held."""
    states: tuple[LimitState, ...] = ()
    """Its limits, as they stood when the shared ledger was last heard of."""
    warnings: tuple[Warned, ...] = ()
    """Thresholds that drawing a lease crossed, until somebody is told."""
    misses: int = 0
    """Operations that the shared ledger did since ``misses_since``."""
    misses_since: float = 0
    exact_until: float = 0
    drawing: bool = False

    @property
    def left(self) -> int:
        """What can be spent under its leases."""
        return sum(lease.left - lease.pending for lease in self.leases if not lease.retired)

    def lease_for(self, amount: int, now: float) -> Lease | None:
        """The first that can pay. Those that have ended are retired."""
        while self.leases and (self.leases[0].retired or self.leases[0].until <= now):
            self.leases.popleft().retired = True
        return next((lease for lease in self.leases if lease.fits(amount, now)), None)

    def states_now(self) -> dict[Limit, LimitState]:
        """Its limits, leases counted as held only as far as they are."""
        left = self.left
        return {
            state.limit: replace(state, held=max(0, state.held - left)) for state in self.states
        }

    def heard(self, states: Sequence[LimitState]) -> None:
        """The shared ledger has said how its limits stand."""
        by_limit = {state.limit: state for state in states}
        self.states = tuple(by_limit[limit] for limit in self.limits)

    def is_exact(self, now: float) -> None:
        """For a while, the shared ledger is asked."""
        self.exact_until = now + EXACT_SECONDS

    def is_for_everyone(self, now: float) -> None:
        """Nothing remains under a limit but what is leased: it returns."""
        self.is_exact(now)
        for lease in self.leases:
            lease.retired = True

    def is_missed(self, now: float, seconds: float) -> bool:
        """After an operation that was done for want of a lease: whether to draw one."""
        if now >= self.misses_since + seconds:
            self.misses, self.misses_since = 0, now
        self.misses += 1
        return self.misses >= DRAW_AFTER

    def renewal(self, now: float, seconds: float) -> int | None:
        """How much to draw before it runs low or old; None while it is neither."""
        until = self.leases[-1].until if self.leases else 0
        is_old = now >= until - seconds / 2
        if self.left < self.granted / 2:
            return self.granted if is_old else 2 * self.granted
        # In half a lease's time, less than half of it was spent.
        return self.granted // 2 if is_old else None

    def size(self, want: int, amount: int, share: float) -> int | None:
        """How large a lease can be for calls that take the amount; None where it is not
        worth one.
        """
        remaining = min((state.remaining for state in self.states), default=0)
        size = min(max(want, FIRST_CALLS * amount), int(remaining * share))
        return size if size >= LEAST_CALLS * amount else None


@dataclass(frozen=True, slots=True)
class Slice:
    """A charge, and the lease that pays for it."""

    charge: Charge
    pool: Pool
    lease: Lease


_PoolName = tuple[str, str, str, str, tuple[tuple[Limit, str], ...]]


class Pools:
    """Every pool of a sidecar."""

    def __init__(self) -> None:
        self._pools: dict[_PoolName, Pool] = {}

    def of(
        self, account: Account, charges: Sequence[Charge], applied: Sequence[Limit], now: float
    ) -> list[Pool]:
        """A pool for each charge; none where one of them can not be leased: rates and
        concurrency are for the shared ledger alone.
        """
        pools = []
        for charge in charges:
            limits = tuple(
                limit
                for limit in applied
                if (limit.budget, limit.unit) == (charge.budget, charge.unit)
            )
            if (
                not all(limit.window.is_calendar for limit in limits)
                or any(limit.on_expiry is not limits[0].on_expiry for limit in limits)
                or len(limits) == MAX_LIMITS  # a lost lease is charged under one more
            ):
                return []
            name = (
                account.tenant,
                account.organisation,
                charge.budget,
                charge.unit,
                tuple((limit, limit.counts_for(account)) for limit in limits),
            )
            pool = self._pools.get(name)
            if pool is None:
                pool = self._pools[name] = Pool(limits=limits, used_at=now)
            pool.used_at = now
            pools.append(pool)
        return pools

    def drop_idle(self, now: float, seconds: float) -> None:
        """Forget pools that nobody has used for so long."""
        for name, pool in list(self._pools.items()):
            spent = all(lease.retired for lease in pool.leases)
            if now > pool.used_at + seconds and spent and not pool.drawing:
                del self._pools[name]


def slices(charges: Sequence[Charge], pools: Sequence[Pool], now: float) -> list[Slice]:
    """A lease for each charge, or nothing."""
    found = []
    for charge, pool in zip(charges, pools, strict=True):
        lease = pool.lease_for(charge.amount, now)
        if lease is None:
            return []
        found.append(Slice(charge, pool, lease))
    return found


def receipt_under_leases(
    receipt: Receipt, paid: Sequence[Slice], limits: Sequence[Limit]
) -> Receipt:
    """The local ledger's receipt, with the real limits."""
    states: dict[Limit, LimitState] = {}
    for each in paid:
        states |= each.pool.states_now()
    return replace(
        receipt,
        limits=tuple(states[limit] for limit in limits if limit in states),
        warnings=told(each.pool for each in paid),
    )


def told(pools: Iterable[Pool]) -> tuple[Warned, ...]:
    """The pools' warnings, of which somebody is told now."""
    warnings: tuple[Warned, ...] = ()
    for pool in pools:
        warnings += pool.warnings
        pool.warnings = ()
    return warnings
