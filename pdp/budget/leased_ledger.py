"""A shared ledger, and slices of it that a sidecar spends by itself.

A *lease* is a hold on the shared ledger, under the real limits, so that spend, holds and
leases together never pass a limit. What is done under it is kept by a local ledger, in
which the lease is a limit of its own, and the shared ledger is told the sum when the
lease ends. An amount under a lease that is never heard of again counts as spent when the
lease expires: what a sidecar that died, or that was stopped for too long, may have let
through is never more than what is counted.

Everything that no lease covers is done on the shared ledger: refusals always come from
there. Which of the two does an operation is decided at its first try, and is remembered
by the local ledger.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, TypeVar

from pdp.budget.bounds import (
    MAX_LIMITS,
    MAX_MEMO_BYTES,
    check_account,
    check_charges,
    check_hold_id,
    check_key,
    check_limits,
    check_memo,
    check_most,
    check_ttl,
)
from pdp.budget.lease_journal import LeaseJournal, LeaseRecord, Report, ReportKind
from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    AccountState,
    Charge,
    HoldState,
    IdempotencyKey,
    Ledger,
    LedgerError,
    Limit,
    LimitState,
    OnExpiry,
    Receipt,
    Scope,
    Warned,
    Window,
)
from pdp.reason import ReasonCode

T = TypeVar("T")

LOCAL_ID_PREFIX: Final = "leased-"
"""With what ids of the local ledger begin, and no others."""
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
TEND_SECONDS: Final = 1.0
LONGEST_MEMO: Final = MAX_MEMO_BYTES - 16 * 33
"""Bytes: leaves room for the names of as many leases as an operation can have."""
SURELY_KEPT_SECONDS: Final = 86_400
"""For how long the shared ledger surely knows a lease, unless it has lost it."""
KEPT_SECONDS: Final = 26 * 3600
"""Longer than any ledger lets a hold be settled, or refunded, late."""
PRUNE_BATCH: Final = 64
REMEMBERED_OUTCOMES: Final = 4096
FAILURES_IN_A_ROW: Final = 3
"""Reports that may fail before the others are left for later."""

_EXACT: Final = "exact: see the shared ledger"
"""The local ledger's note with a key whose answer the shared ledger keeps. The notes of
callers are JSON."""

_log: Final = logging.getLogger(__name__)


class OnOutage(StrEnum):
    """What goes on while the shared ledger does not answer."""

    DENY = "deny"
    """Nothing, from the first draw, report or operation that failed."""
    SPEND_LEASE = "spend_lease"
    """What is leased can be spent, until the lease ends."""


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

    @property
    def ttl_seconds(self) -> int:
        """How long the shared ledger holds a lease: as long as there may be holds under it.
        At most MAX_HOLD_SECONDS.
        """
        return self.seconds + self.longest_hold_seconds + MARGIN_SECONDS


@dataclass(slots=True, kw_only=True, eq=False)
class _Lease:
    """A lease of this sidecar's, drawn and not reported in full."""

    record: LeaseRecord
    limit: Limit
    """What it is to the local ledger."""
    until: float = 0
    """When nothing more is done under it, by the clock that never stops."""
    left: int = 0
    """What the local ledger said last."""
    pending: int = 0
    """Amounts on their way to the local ledger."""
    retired: bool = False
    """Whether nothing more is done under it."""

    def fits(self, amount: int, now: float) -> bool:
        return not self.retired and now < self.until and amount <= self.left - self.pending


_PoolName = tuple[str, str, str, str, tuple[tuple[Limit, str], ...]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Pool:
    """Leases for one budget and unit, under the same limits, counted in the same accounts."""

    limits: tuple[Limit, ...]
    leases: deque[_Lease] = field(default_factory=deque)
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
    used_at: float = 0

    @property
    def left(self) -> int:
        """What can be spent under its leases."""
        return sum(lease.left - lease.pending for lease in self.leases if not lease.retired)

    def states_now(self) -> dict[Limit, LimitState]:
        """Its limits, leases counted as held only as far as they are."""
        left = self.left
        return {
            state.limit: replace(state, held=max(0, state.held - left)) for state in self.states
        }


@dataclass(frozen=True, slots=True)
class _Slice:
    """A charge, and the lease under which it is made."""

    charge: Charge
    pool: _Pool
    lease: _Lease


class LeasedLedger:
    """The Ledger port on a shared ledger, a local one and a journal, all of which it
    closes when it is closed. Made by :meth:`open`.

    The local ledger's ids begin with LOCAL_ID_PREFIX, and nobody else uses it. A key, and
    a hold under a lease, is known to this sidecar alone. ``never_stops`` is a clock, in
    seconds, that goes on while the machine sleeps.
    """

    def __init__(
        self,
        *,
        shared: Ledger,
        local: Ledger,
        journal: LeaseJournal,
        terms: LeaseTerms,
        holder: str,
        clock: Callable[[], float],
        never_stops: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._shared = shared
        self._local = local
        self._journal = journal
        self._terms = terms
        self._memo = f"leased by {holder}"[:255]
        self._clock = clock
        self._never_stops = never_stops
        self._new_id = new_id
        self._pools: dict[_PoolName, _Pool] = {}
        self._leases: dict[str, _Lease] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._tending = asyncio.Lock()
        self._away = False
        """Whether the shared ledger did not answer when it was last asked."""
        self._no_draws_until = 0.0
        self._expired_outcomes: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        """(tenant, actor, key) of outcomes of holds that had expired on the shared ledger."""
        self._closed = False
        self.lost_leases = 0
        """Leases that the shared ledger did not know any more."""

    @classmethod
    async def open(
        cls,
        *,
        shared: Ledger,
        local: Ledger,
        journal: LeaseJournal,
        terms: LeaseTerms,
        holder: str,
        clock: Callable[[], float] = time.time,
        never_stops: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        tends_itself: bool = True,
    ) -> LeasedLedger:
        """Take up what an earlier run has left: its leases are reported, and not spent.
        ``holder`` names the sidecar to whoever looks at its leases. Without
        ``tends_itself`` leases are reported only when :meth:`tend` is called.
        """
        ledger = cls(
            shared=shared,
            local=local,
            journal=journal,
            terms=terms,
            holder=holder,
            clock=clock,
            never_stops=never_stops,
            new_id=new_id,
        )
        for record in await journal.unfinished():
            ledger._leases[record.name] = _Lease(
                record=record, limit=_local_limit(record), retired=True
            )
        if tends_itself:
            ledger._keeper = ledger._spawn(ledger._keep_tending())
        return ledger

    # Take

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
        """See Ledger.reserve."""
        check_ttl(ttl_seconds)
        return await self._complete(self._take(account, key, charges, limits, ttl_seconds, memo))

    async def charge(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        memo: str = "",
    ) -> Receipt:
        """See Ledger.charge."""
        return await self._complete(self._take(account, key, charges, limits, None, memo))

    async def _take(
        self,
        account: Account,
        key: IdempotencyKey,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
        memo: str,
    ) -> Receipt:
        check_account(account)
        check_key(key)
        check_charges(charges, least=1)
        check_limits(limits)
        check_memo(memo)
        if not charges:
            return await self._remember(account, key)
        applied = [
            limit
            for charge in charges
            for limit in limits
            if (limit.budget, limit.unit) == (charge.budget, charge.unit)
            and limit.applies_to(account)
        ]
        bounded = {(limit.budget, limit.unit) for limit in applied if limit.enforced}
        if any((charge.budget, charge.unit) not in bounded for charge in charges):
            # Refused, unless the key has an answer: then the local ledger knows of it.
            first = await self._local.reserve(
                account, key, charges=charges, limits=(), ttl_seconds=1
            )
            if not _is_exact(first):
                return first
            return await self._take_exactly(account, key, charges, limits, ttl_seconds, memo, ())
        now = self._never_stops()
        pools = self._pools_of(account, charges, applied, now)
        slices: list[_Slice] = []
        if (ttl_seconds or 0) <= self._terms.longest_hold_seconds and len(
            memo.encode()
        ) <= LONGEST_MEMO:
            slices = self._slices(charges, pools, now)
        if slices:
            receipt = await self._take_leased(account, key, slices, limits, ttl_seconds, memo)
            if receipt is not None:
                return receipt
        else:
            first = await self._local.reserve(
                account, replace(key, note=_EXACT), charges=(), limits=(), ttl_seconds=1
            )
            if not _is_exact(first):
                return first
        receipt = await self._take_exactly(account, key, charges, limits, ttl_seconds, memo, pools)
        for charge, pool in zip(charges, pools, strict=False):
            self._consider_draw(account, charge, pool)
        return receipt

    async def _remember(self, account: Account, key: IdempotencyKey) -> Receipt:
        """An operation without charges."""
        first = await self._local.reserve(account, key, charges=(), limits=(), ttl_seconds=1)
        outcome = (account.tenant, account.actor, key.key)
        is_of_shared = key.operation == "outcome" and outcome in self._expired_outcomes
        if _is_exact(first) or is_of_shared:
            return await self._ask(
                self._shared.reserve(account, key, charges=(), limits=(), ttl_seconds=1)
            )
        return first

    async def _take_leased(
        self,
        account: Account,
        key: IdempotencyKey,
        slices: Sequence[_Slice],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
        memo: str,
    ) -> Receipt | None:
        """Under leases; None where the key belongs to the shared ledger."""
        names = ",".join(each.lease.record.name for each in slices)
        charges = tuple(each.charge for each in slices)
        local_limits = tuple(each.lease.limit for each in slices)
        local_memo = f"{names} {memo}"
        for each in slices:
            each.lease.pending += each.charge.amount
        try:
            if ttl_seconds is None:
                receipt = await self._local.charge(
                    account, key, charges=charges, limits=local_limits, memo=local_memo
                )
            else:
                receipt = await self._local.reserve(
                    account,
                    key,
                    charges=charges,
                    limits=local_limits,
                    ttl_seconds=ttl_seconds,
                    memo=local_memo,
                )
        finally:
            for each in slices:
                each.lease.pending -= each.charge.amount
        for each, state in zip(slices, receipt.limits, strict=False):
            each.lease.left = state.remaining
            if state.remaining <= 0:
                each.lease.retired = True
        if _is_exact(receipt):
            return None
        for each in slices:
            self._consider_renewal(account, each)
        if receipt.replayed:
            return receipt
        states: dict[Limit, LimitState] = {}
        for each in slices:
            states |= each.pool.states_now()
        return replace(
            receipt,
            limits=tuple(states[limit] for limit in limits if limit in states),
            warnings=_told(each.pool for each in slices),
        )

    async def _take_exactly(
        self,
        account: Account,
        key: IdempotencyKey,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
        memo: str,
        pools: Sequence[_Pool],
    ) -> Receipt:
        """On the shared ledger, and learn from its answer how much there is to lease."""
        if ttl_seconds is None:
            receipt = await self._ask(
                self._shared.charge(account, key, charges=charges, limits=limits, memo=memo)
            )
        else:
            receipt = await self._ask(
                self._shared.reserve(
                    account,
                    key,
                    charges=charges,
                    limits=limits,
                    ttl_seconds=ttl_seconds,
                    memo=memo,
                )
            )
        if receipt.replayed:
            return receipt
        states = {state.limit: state for state in receipt.limits}
        for pool in pools:
            pool.states = tuple(states[limit] for limit in pool.limits)
            if receipt.refused_by is not None:
                # What is left of leases is for everyone now.
                pool.exact_until = self._never_stops() + EXACT_SECONDS
                for lease in pool.leases:
                    lease.retired = True
        if receipt.refused_by is not None:
            return receipt
        return replace(receipt, warnings=_told(pools) + receipt.warnings)

    # Leases

    def _pools_of(
        self, account: Account, charges: Sequence[Charge], applied: Sequence[Limit], now: float
    ) -> list[_Pool]:
        """A pool for each charge; none where one of them can not be leased."""
        pools = []
        for charge in charges:
            own = tuple(
                limit
                for limit in applied
                if (limit.budget, limit.unit) == (charge.budget, charge.unit)
            )
            if (
                not all(limit.window.is_calendar for limit in own)
                or any(limit.on_expiry is not own[0].on_expiry for limit in own)
                or len(own) == MAX_LIMITS  # see _never_refusing
            ):
                return []
            name = (
                account.tenant,
                account.organisation,
                charge.budget,
                charge.unit,
                tuple((limit, limit.counts_for(account)) for limit in own),
            )
            pool = self._pools.get(name)
            if pool is None:
                pool = self._pools[name] = _Pool(limits=own)
            pool.used_at = now
            pools.append(pool)
        return pools

    def _slices(
        self, charges: Sequence[Charge], pools: Sequence[_Pool], now: float
    ) -> list[_Slice]:
        """A lease for each charge, or nothing."""
        if self._away and self._terms.on_outage is OnOutage.DENY:
            return []
        slices: list[_Slice] = []
        for charge, pool in zip(charges, pools, strict=len(pools) > 0):
            while pool.leases and (pool.leases[0].retired or pool.leases[0].until <= now):
                pool.leases.popleft().retired = True
            for lease in pool.leases:
                if lease.fits(charge.amount, now):
                    slices.append(_Slice(charge, pool, lease))
                    break
            else:
                return []
        return slices

    def _consider_draw(self, account: Account, charge: Charge, pool: _Pool) -> None:
        """After an operation that the shared ledger has done for want of a lease."""
        now = self._never_stops()
        if any(lease.fits(charge.amount, now) for lease in pool.leases):
            return
        if now >= pool.misses_since + self._terms.seconds:
            pool.misses, pool.misses_since = 0, now
        pool.misses += 1
        if pool.misses >= DRAW_AFTER:
            self._begin_draw(account, charge, pool, want=pool.granted)

    def _consider_renewal(self, account: Account, taken: _Slice) -> None:
        """Before a pool runs low, or its leases end."""
        pool = taken.pool
        newest_until = pool.leases[-1].until if pool.leases else 0
        is_old = self._never_stops() >= newest_until - self._terms.seconds / 2
        is_low = pool.left < pool.granted / 2
        if is_low and not is_old:
            self._begin_draw(account, taken.charge, pool, want=2 * pool.granted)
        elif is_low:
            self._begin_draw(account, taken.charge, pool, want=pool.granted)
        elif is_old:
            # In half a lease's time, less than half of it was spent.
            self._begin_draw(account, taken.charge, pool, want=pool.granted // 2)

    def _begin_draw(self, account: Account, charge: Charge, pool: _Pool, *, want: int) -> None:
        """Draw a lease in the background, unless the shared ledger had better be asked."""
        now = self._never_stops()
        if (
            self._closed
            or pool.drawing
            or now < max(pool.exact_until, self._no_draws_until)
            or (self._away and self._terms.on_outage is OnOutage.DENY)
        ):
            return
        remaining = min((state.remaining for state in pool.states), default=0)
        amount = min(max(want, FIRST_CALLS * charge.amount), int(remaining * self._terms.share))
        if amount < LEAST_CALLS * charge.amount:
            pool.exact_until = now + EXACT_SECONDS
            return
        pool.drawing = True
        self._spawn(self._draw(account, replace(charge, amount=amount), pool))

    async def _draw(self, account: Account, charge: Charge, pool: _Pool) -> None:
        """Lease from the shared ledger. What fails on the way is told to nobody but
        those who look after the ledger: calls go on without a lease.
        """
        try:
            record = LeaseRecord(
                name=self._new_id(),
                account=account,
                charge=charge,
                limits=pool.limits,
                ttl_seconds=self._terms.ttl_seconds,
                asked_at=int(self._clock()),
            )
            await self._journal.add(record)
            lease = _Lease(record=record, limit=_local_limit(record), retired=True)
            # From here on it is reported, even if no answer comes.
            self._leases[record.name] = lease
            lease.pending = 1
            try:
                asked_at = self._never_stops()
                receipt = await self._ask_for(record)
                if receipt.id:
                    lease.record = await self._journal.drawn(record, receipt.id)
            finally:
                lease.pending = 0
            if receipt.refused_by is not None:
                del self._leases[record.name]
                await self._journal.forget(record)
                pool.exact_until = self._never_stops() + EXACT_SECONDS
                return
            self._put_to_use(lease, receipt, pool, asked_at)
        except LedgerError as error:
            _log.warning("a lease could not be drawn: %s", error.reason_code)
            pool.exact_until = self._never_stops() + EXACT_SECONDS
        finally:
            pool.drawing = False

    async def _ask_for(self, record: LeaseRecord) -> Receipt:
        return await self._ask(
            self._shared.reserve(
                record.account,
                _own_key("lease", record.name),
                charges=(record.charge,),
                limits=tuple(replace(limit, on_expiry=OnExpiry.CHARGE) for limit in record.limits),
                ttl_seconds=record.ttl_seconds,
                memo=self._memo,
            )
        )

    def _put_to_use(self, lease: _Lease, receipt: Receipt, pool: _Pool, asked_at: float) -> None:
        pool.states = tuple(
            replace(state, limit=limit)
            for limit, state in zip(pool.limits, receipt.limits, strict=True)
        )
        pool.warnings += receipt.warnings
        if receipt.shadow_refusals:
            # It would hide what a shadow limit refuses.
            pool.exact_until = self._never_stops() + EXACT_SECONDS
            return
        # The shared ledger's clock rules where windows end; its receipt tells the time,
        # rounded up.
        drawn_at = receipt.expires_at - lease.record.ttl_seconds
        ends = [
            state.resets_at - drawn_at - 1
            for state in receipt.limits
            if state.resets_at is not None
        ]
        lease.until = asked_at + min([self._terms.seconds, *ends])
        lease.left = lease.record.charge.amount
        lease.retired = False
        pool.granted = lease.left
        pool.leases.append(lease)

    # End

    async def settle(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
        final: bool = True,
    ) -> Receipt:
        """See Ledger.settle."""
        check_hold_id(hold_id)
        if not _is_local(hold_id):
            return await self._ask(
                self._shared.settle(account, key, hold_id=hold_id, charges=charges, final=final)
            )

        async def operation() -> Receipt:
            receipt = await self._local.settle(
                account, key, hold_id=hold_id, charges=charges, final=final
            )
            # Otherwise the lease has not ended: it is held as long as its holds are.
            if receipt.late or receipt.over_hold:
                await self._needs_report(account.tenant, hold_id)
            return receipt

        return await self._complete(operation())

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.release."""
        check_hold_id(hold_id)
        if _is_local(hold_id):
            return await self._local.release(account, key, hold_id=hold_id)
        try:
            return await self._ask(self._shared.release(account, key, hold_id=hold_id))
        except LedgerError as error:
            if error.reason_code == ReasonCode.HOLD_EXPIRED and key.operation == "outcome":
                # The caller goes on to remember the outcome: where the hold is.
                self._expired_outcomes[account.tenant, account.actor, key.key] = None
                if len(self._expired_outcomes) > REMEMBERED_OUTCOMES:
                    self._expired_outcomes.popitem(last=False)
            raise

    async def refund(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        """See Ledger.refund."""
        check_hold_id(hold_id)
        if not _is_local(hold_id):
            return await self._ask(
                self._shared.refund(account, key, hold_id=hold_id, charges=charges)
            )

        async def operation() -> Receipt:
            receipt = await self._local.refund(account, key, hold_id=hold_id, charges=charges)
            await self._needs_report(account.tenant, hold_id)
            return receipt

        return await self._complete(operation())

    async def _needs_report(self, tenant: str, hold_id: str) -> None:
        """What was spent under the hold's leases changes after they may be over. Durable
        before the caller is answered; one that is not answered tries again.
        """
        hold = await self._local.hold(tenant, hold_id)
        if hold is None:
            return
        names = hold.memo.partition(" ")[0].split(",")
        await self._journal.mark(names)
        missing = [name for name in names if name not in self._leases]
        for record in await self._journal.unfinished() if missing else ():
            if record.name in missing:
                self._leases[record.name] = _Lease(
                    record=record, limit=_local_limit(record), retired=True
                )

    # Look

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """See Ledger.state. Leases are held."""
        return await self._ask(self._shared.state(account, limits=limits))

    async def hold(self, tenant: str, hold_id: str) -> HoldState | None:
        """See Ledger.hold."""
        check_hold_id(hold_id)
        if not _is_local(hold_id):
            return await self._ask(self._shared.hold(tenant, hold_id))
        hold = await self._local.hold(tenant, hold_id)
        return hold and _without_names(hold)

    async def holds(self, tenant: str, *, most: int) -> tuple[HoldState, ...]:
        """See Ledger.holds. Leases, and this sidecar's holds under them, are among them."""
        check_most(most)
        local = await self._local.holds(tenant, most=most)
        shared = await self._ask(self._shared.holds(tenant, most=most))
        both = [*map(_without_names, local), *shared]
        both.sort(key=lambda each: (each.expires_at, each.id))
        return tuple(both[:most])

    async def accounts(self, tenant: str, *, most: int) -> tuple[AccountState, ...]:
        """See Ledger.accounts. Leases are held."""
        return await self._ask(self._shared.accounts(tenant, most=most))

    async def tenants(self, *, most: int) -> tuple[str, ...]:
        """See Ledger.tenants."""
        local = await self._local.tenants(most=most)
        shared = await self._ask(self._shared.tenants(most=most))
        return tuple(sorted({*local, *shared})[:most])

    # Operators

    async def grant(
        self, account: Account, key: IdempotencyKey, *, account_id: str, amount: int
    ) -> Receipt:
        """See Ledger.grant."""
        return await self._ask(
            self._shared.grant(account, key, account_id=account_id, amount=amount)
        )

    async def expire(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.expire."""
        check_hold_id(hold_id)
        if _is_local(hold_id):
            return await self._local.expire(account, key, hold_id=hold_id)
        return await self._ask(self._shared.expire(account, key, hold_id=hold_id))

    async def close(self) -> None:
        """See Ledger.close. What is left of leases returns to the shared ledger, if it
        answers; what does not, when the sidecar has started again.
        """
        if self._closed:
            return
        self._closed = True
        for lease in self._leases.values():
            lease.retired = True
        if self._keeper is not None:
            self._keeper.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.tend()
        await self._local.close()
        await self._journal.close()
        await self._shared.close()

    # Reports

    async def _keep_tending(self) -> None:
        while True:
            await asyncio.sleep(TEND_SECONDS)
            try:
                await asyncio.shield(self._spawn(self.tend()))
            except Exception:  # noqa: BLE001 - what is not reported now is reported next time
                _log.exception("leases could not be looked after")

    async def tend(self) -> None:
        """Report leases that have ended, and forget what nobody can ask for any more.
        What can not be done now is done another time.
        """
        async with self._tending:
            now = self._never_stops()
            for lease in self._leases.values():
                lease.retired = lease.retired or lease.until <= now
            await self._report_all()
            self._drop_idle_pools(now)

    async def _report_all(self) -> None:
        failures = 0
        for name, lease in list(self._leases.items()):
            if not lease.retired:
                continue
            try:
                await self._report(lease)
                failures = 0
            except LedgerError as error:
                # Next time it comes last: it may be the only one that can not be reported.
                self._leases[name] = self._leases.pop(name)
                failures += 1
                if failures == FAILURES_IN_A_ROW:
                    _log.warning("leases could not be reported: %s", error.reason_code)
                    return
        await self._forget_old()

    def _drop_idle_pools(self, now: float) -> None:
        for name, pool in list(self._pools.items()):
            idle = now > pool.used_at + 2 * self._terms.seconds
            if idle and not pool.drawing and all(lease.retired for lease in pool.leases):
                del self._pools[name]

    async def _report(self, lease: _Lease) -> None:
        """Tell the shared ledger all that it does not know of a lease. Raises LedgerError."""
        if lease.pending:
            return
        if not lease.record.hold_id and not await self._find_hold(lease):
            return
        marks = await self._journal.marks(lease.record)
        while report := lease.record.report or await self._due(lease):
            if lease.record.report is None:
                lease.record = await self._journal.begin_report(lease.record, report)
            if not await self._send(lease.record, report):
                if self._is_lost(lease.record) and report.kind is ReportKind.SETTLE:
                    anew = replace(report, kind=ReportKind.CHARGE, is_final=True)
                    lease.record = await self._journal.begin_report(lease.record, anew)
                    continue
                lease.record = replace(lease.record, report=replace(report, is_final=True))
            lease.record = await self._journal.end_report(lease.record)
        if lease.record.is_over and await self._journal.is_reported(lease.record, marks):
            self._leases.pop(lease.record.name, None)

    async def _find_hold(self, lease: _Lease) -> bool:
        """Ask again for a lease whose first answer did not arrive."""
        receipt = await self._ask_for(lease.record)
        if receipt.id:
            lease.record = await self._journal.drawn(lease.record, receipt.id)
            return True
        self._leases.pop(lease.record.name, None)
        await self._journal.forget(lease.record)
        return False

    async def _due(self, lease: _Lease) -> Report | None:
        """What the shared ledger is to be told next, of a lease that has ended."""
        record = lease.record
        [state] = await self._local.state(record.account, limits=(lease.limit,))
        if state.spent < record.reported:
            return Report(ReportKind.REFUND, record.reported - state.spent)
        if record.is_over:
            unreported = state.spent - record.reported
            return Report(ReportKind.SETTLE, unreported, is_final=True) if unreported else None
        if state.held == 0:
            return Report(ReportKind.SETTLE, state.spent - record.reported, is_final=True)
        if record.reports == 0 and state.remaining > 0:
            # What nothing holds returns at once: posted now, and refunded next.
            return Report(ReportKind.SETTLE, record.charge.amount - state.held)
        return None

    async def _send(self, record: LeaseRecord, report: Report) -> bool:
        """False where the shared ledger does not know the lease."""
        account, name = record.account, f"{record.name}-{record.reports}"
        charges = (replace(record.charge, amount=report.amount),)
        if report.kind is ReportKind.CHARGE and not report.amount:
            return True
        try:
            if report.kind is ReportKind.SETTLE:
                await self._ask(
                    self._shared.settle(
                        account,
                        _own_key("lease_settle", name),
                        hold_id=record.hold_id,
                        charges=charges,
                        final=report.is_final,
                    )
                )
            elif report.kind is ReportKind.REFUND:
                await self._ask(
                    self._shared.refund(
                        account,
                        _own_key("refund", name),
                        hold_id=record.hold_id,
                        charges=charges,
                    )
                )
            else:
                await self._ask(
                    self._shared.charge(
                        account,
                        _own_key("charge", name),
                        charges=charges,
                        limits=_never_refusing(record),
                        memo=self._memo,
                    )
                )
        except LedgerError as error:
            if error.reason_code == ReasonCode.BUDGET_UNAVAILABLE:
                raise
            _log.error("the shared ledger took no report of a lease: %s", error.reason_code)
            return False
        return True

    def _is_lost(self, record: LeaseRecord) -> bool:
        """Whether the shared ledger has lost a lease that it does not know, rather than
        charged it long ago. If so, no lease is drawn, or spent, until all that others may
        have of what is lost has ended.
        """
        if record.asked_at < self._clock() - SURELY_KEPT_SECONDS:
            return False
        self.lost_leases += 1
        _log.error(
            "the shared ledger has lost a lease: what was spent under it is charged anew, and"
            " nothing is leased for %d seconds",
            self._terms.seconds,
        )
        self._no_draws_until = self._never_stops() + self._terms.seconds
        for lease in self._leases.values():
            lease.retired = True
        return True

    async def _forget_old(self) -> None:
        """Leases under which nothing can be settled or refunded any more."""
        before = int(self._clock()) - KEPT_SECONDS
        for record in await self._journal.asked_before(before, PRUNE_BATCH):
            if record.name not in self._leases:
                await self._journal.forget(record)

    # Tasks

    async def _ask(self, answer: Awaitable[T]) -> T:
        """Of the shared ledger; notes whether it answers."""
        try:
            given = await answer
        except LedgerError as error:
            self._away = error.reason_code == ReasonCode.BUDGET_UNAVAILABLE
            raise
        self._away = False
        return given

    async def _complete(self, operation: Coroutine[Any, Any, T]) -> T:
        """An operation of several steps, which goes on where its caller does not."""
        return await asyncio.shield(self._spawn(operation))

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _is_local(hold_id: str) -> bool:
    return hold_id.startswith(LOCAL_ID_PREFIX)


def _is_exact(first: Receipt) -> bool:
    """Whether the local ledger's answer is that the shared one has the answer. A lease
    that had less left than it seemed refuses nobody.
    """
    return first.refused_by is not None or (first.id == "" and first.note == _EXACT)


def _local_limit(record: LeaseRecord) -> Limit:
    """A lease, as the local ledger counts it."""
    return Limit(
        id=f"lease-{record.name}",
        budget=record.charge.budget,
        unit=record.charge.unit,
        window=Window.LIFETIME,
        limit=record.charge.amount,
        scope=Scope.TENANT,
        warn_at=(),
        on_expiry=record.limits[0].on_expiry,
    )


def _never_refusing(record: LeaseRecord) -> tuple[Limit, ...]:
    """Limits under which what was spent counts where it did, and is always taken."""
    charge = record.charge
    lost = Limit(
        id="lost-leases",
        budget=charge.budget,
        unit=charge.unit,
        window=Window.LIFETIME,
        limit=MAX_AMOUNT,
        scope=Scope.TENANT,
        warn_at=(),
    )
    return (*(replace(limit, enforced=False) for limit in record.limits), lost)


def _own_key(operation: str, name: str) -> IdempotencyKey:
    """A key of the sidecar's own; whatever it stands for is written down before."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return IdempotencyKey(operation=operation, key=f"lease-{name}", content_sha256=digest)


def _told(pools: Iterable[_Pool]) -> tuple[Warned, ...]:
    """Warnings that somebody is told of now."""
    warnings: tuple[Warned, ...] = ()
    for pool in pools:
        warnings += pool.warnings
        pool.warnings = ()
    return warnings


def _without_names(hold: HoldState) -> HoldState:
    """As its maker knows it: the names of its leases are this ledger's own."""
    return replace(hold, memo=hold.memo.partition(" ")[2])
