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
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

from pdp.budget.bounds import (
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
from pdp.budget.lease_journal import LeaseJournal, LeaseRecord
from pdp.budget.lease_pool import (
    Lease,
    LeaseTerms,
    Pool,
    Pools,
    Slice,
    receipt_under_leases,
    slices,
    told,
)
from pdp.budget.lease_reports import LeaseReports, SharedLine
from pdp.budget.ledger import (
    Account,
    AccountState,
    Charge,
    HoldState,
    IdempotencyKey,
    Ledger,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
)
from pdp.budget.local_ledger import LocalLedger, SqliteLocalLedger, is_local, local_id
from pdp.config import OnOutage
from pdp.reason import ReasonCode
from pdp.storage import Durability, StorageError

T = TypeVar("T")

TEND_SECONDS: Final = 1.0
LONGEST_MEMO: Final = MAX_MEMO_BYTES - 16 * 33
"""Bytes: leaves room for the names of as many leases as an operation can have."""
REMEMBERED_OUTCOMES: Final = 4096

_EXACT: Final = "exact: see the shared ledger"
"""The local ledger's note with a key whose answer the shared ledger keeps. The notes of
callers are JSON."""

_log: Final = logging.getLogger(__name__)


class LeasedLedger:
    """The Ledger port on a shared ledger, a local one and a journal, all of which it
    closes when it is closed. Made by :meth:`open`.

    Nobody else uses the local ledger, and its ids are made by local_id. A key, and a hold
    under a lease, is known to this sidecar alone. ``never_stops`` is a clock, in
    seconds, that goes on while the machine sleeps.
    """

    def __init__(
        self,
        *,
        shared: Ledger,
        local: LocalLedger,
        journal: LeaseJournal,
        terms: LeaseTerms,
        holder: str,
        clock: Callable[[], float],
        never_stops: Callable[[], float],
        new_id: Callable[[], str],
    ) -> None:
        self._line = SharedLine(shared)
        self._local = local
        self._journal = journal
        self._reports = LeaseReports(
            line=self._line,
            local=local,
            journal=journal,
            memo=f"leased by {holder}"[:255],
            clock=clock,
            lost=self._lease_is_lost,
        )
        self._terms = terms
        self._clock = clock
        self._never_stops = never_stops
        self._new_id = new_id
        self._pools = Pools()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keeper: asyncio.Task[None] | None = None
        self._tending = asyncio.Lock()
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
        local: LocalLedger,
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
        await ledger._reports.take_up()
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
        pools = self._pools.of(account, charges, applied, now)
        paid: list[Slice] = []
        if self._may_lease(ttl_seconds, memo) and pools:
            paid = slices(charges, pools, now)
        if paid:
            receipt = await self._take_leased(account, key, paid, limits, ttl_seconds, memo)
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

    def _may_lease(self, ttl_seconds: int | None, memo: str) -> bool:
        return (
            (ttl_seconds or 0) <= self._terms.longest_hold_seconds
            and len(memo.encode()) <= LONGEST_MEMO
            and not self._must_deny
        )

    @property
    def _must_deny(self) -> bool:
        return self._line.is_away and self._terms.on_outage is OnOutage.DENY

    async def _remember(self, account: Account, key: IdempotencyKey) -> Receipt:
        """An operation without charges."""
        first = await self._local.reserve(account, key, charges=(), limits=(), ttl_seconds=1)
        outcome = (account.tenant, account.actor, key.key)
        is_of_shared = key.operation == "outcome" and outcome in self._expired_outcomes
        if _is_exact(first) or is_of_shared:
            return await self._line.hear(
                self._line.ledger.reserve(account, key, charges=(), limits=(), ttl_seconds=1)
            )
        return first

    async def _take_leased(
        self,
        account: Account,
        key: IdempotencyKey,
        paid: Sequence[Slice],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
        memo: str,
    ) -> Receipt | None:
        """Under leases; None where the key belongs to the shared ledger."""
        names = ",".join(each.lease.record.name for each in paid)
        charges = tuple(each.charge for each in paid)
        local_limits = tuple(each.lease.limit for each in paid)
        local_memo = f"{names} {memo}"
        for each in paid:
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
            for each in paid:
                each.lease.pending -= each.charge.amount
        for each, state in zip(paid, receipt.limits, strict=False):
            each.lease.left = state.remaining
            if state.remaining <= 0:
                each.lease.retired = True
        if _is_exact(receipt):
            return None
        for each in paid:
            self._consider_renewal(account, each)
        if receipt.replayed:
            return receipt
        return receipt_under_leases(receipt, paid, limits)

    async def _take_exactly(
        self,
        account: Account,
        key: IdempotencyKey,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
        memo: str,
        pools: Sequence[Pool],
    ) -> Receipt:
        """On the shared ledger, and learn from its answer how much there is to lease."""
        if ttl_seconds is None:
            receipt = await self._line.hear(
                self._line.ledger.charge(account, key, charges=charges, limits=limits, memo=memo)
            )
        else:
            receipt = await self._line.hear(
                self._line.ledger.reserve(
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
        for pool in pools:
            pool.heard(receipt.limits)
            if receipt.refused_by is not None:
                pool.is_for_everyone(self._never_stops())
        if receipt.refused_by is not None:
            return receipt
        return replace(receipt, warnings=told(pools) + receipt.warnings)

    # Leases

    def _consider_draw(self, account: Account, charge: Charge, pool: Pool) -> None:
        """After an operation that the shared ledger has done."""
        now = self._never_stops()
        has_lease = pool.lease_for(charge.amount, now) is not None
        if not has_lease and pool.is_missed(now, self._terms.seconds):
            self._begin_draw(account, charge, pool, pool.granted)

    def _consider_renewal(self, account: Account, paid: Slice) -> None:
        want = paid.pool.renewal(self._never_stops(), self._terms.seconds)
        if want is not None:
            self._begin_draw(account, paid.charge, paid.pool, want)

    def _begin_draw(self, account: Account, charge: Charge, pool: Pool, want: int) -> None:
        """Draw a lease in the background, unless the shared ledger had better be asked."""
        now = self._never_stops()
        if (
            self._closed
            or self._must_deny
            or pool.drawing
            or now < max(pool.exact_until, self._no_draws_until)
        ):
            return
        size = pool.size(want, charge.amount, self._terms.share)
        if size is None:
            pool.is_exact(now)
            return
        pool.drawing = True
        self._spawn(self._draw(account, replace(charge, amount=size), pool))

    async def _draw(self, account: Account, charge: Charge, pool: Pool) -> None:
        """What fails on the way is for nobody but those who look after the ledger: calls
        go on without a lease.
        """
        record = LeaseRecord(
            name=self._new_id(),
            account=account,
            charge=charge,
            limits=pool.limits,
            ttl_seconds=self._terms.ttl_seconds,
            asked_at=int(self._clock()),
        )
        lease = Lease(record=record, pending=charge.amount)
        asked_at = self._never_stops()
        try:
            receipt = await self._reports.draw(lease)
        except LedgerError as error:
            _log.warning("a lease could not be drawn: %s", error.reason_code)
            pool.is_exact(self._never_stops())
        else:
            self._put_to_use(lease, receipt, pool, asked_at)
        finally:
            lease.pending = 0
            pool.drawing = False

    def _put_to_use(self, lease: Lease, receipt: Receipt, pool: Pool, asked_at: float) -> None:
        pool.heard(
            [
                replace(state, limit=limit)  # whose on_expiry was the lease's own
                for limit, state in zip(pool.limits, receipt.limits, strict=True)
            ]
        )
        if receipt.refused_by is not None or receipt.shadow_refusals:
            # Beyond a shadow limit, it would hide what that limit refuses.
            pool.is_exact(self._never_stops())
            return
        pool.warnings += receipt.warnings
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
        lease.retired = self._closed or asked_at < self._no_draws_until - self._terms.seconds
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
        if not is_local(hold_id):
            return await self._line.hear(
                self._line.ledger.settle(
                    account, key, hold_id=hold_id, charges=charges, final=final
                )
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
        if is_local(hold_id):
            return await self._local.release(account, key, hold_id=hold_id)
        try:
            return await self._line.hear(self._line.ledger.release(account, key, hold_id=hold_id))
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
        if not is_local(hold_id):
            return await self._line.hear(
                self._line.ledger.refund(account, key, hold_id=hold_id, charges=charges)
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
        await self._reports.changed(hold.memo.partition(" ")[0].split(","))

    # Look

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """See Ledger.state. Leases are held."""
        return await self._line.hear(self._line.ledger.state(account, limits=limits))

    async def hold(self, tenant: str, hold_id: str) -> HoldState | None:
        """See Ledger.hold."""
        check_hold_id(hold_id)
        if not is_local(hold_id):
            return await self._line.hear(self._line.ledger.hold(tenant, hold_id))
        hold = await self._local.hold(tenant, hold_id)
        return hold and _without_names(hold)

    async def holds(self, tenant: str, *, most: int) -> tuple[HoldState, ...]:
        """See Ledger.holds. Leases, and this sidecar's holds under them, are among them."""
        check_most(most)
        local = await self._local.holds(tenant, most=most)
        shared = await self._line.hear(self._line.ledger.holds(tenant, most=most))
        both = [*map(_without_names, local), *shared]
        both.sort(key=lambda each: (each.expires_at, each.id))
        return tuple(both[:most])

    async def accounts(self, tenant: str, *, most: int) -> tuple[AccountState, ...]:
        """See Ledger.accounts. Leases are held."""
        return await self._line.hear(self._line.ledger.accounts(tenant, most=most))

    async def tenants(self, *, most: int) -> tuple[str, ...]:
        """See Ledger.tenants."""
        local = await self._local.tenants(most=most)
        shared = await self._line.hear(self._line.ledger.tenants(most=most))
        return tuple(sorted({*local, *shared})[:most])

    # Operators

    async def grant(
        self, account: Account, key: IdempotencyKey, *, account_id: str, amount: int
    ) -> Receipt:
        """See Ledger.grant."""
        return await self._line.hear(
            self._line.ledger.grant(account, key, account_id=account_id, amount=amount)
        )

    async def expire(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.expire."""
        check_hold_id(hold_id)
        if is_local(hold_id):
            return await self._local.expire(account, key, hold_id=hold_id)
        return await self._line.hear(self._line.ledger.expire(account, key, hold_id=hold_id))

    async def close(self) -> None:
        """See Ledger.close. What is left of leases returns to the shared ledger, if it
        answers; what does not, when the sidecar has started again.
        """
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            self._keeper.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lease in self._reports.leases:
            lease.retired = True
        try:
            await self.tend()
        finally:
            await self._local.close()
            await self._journal.close()
            await self._line.ledger.close()

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
            for lease in self._reports.leases:
                lease.retired = lease.retired or lease.until <= now
            await self._reports.report_all()
            await self._reports.forget_old()
            self._pools.drop_idle(now, 2 * self._terms.seconds)

    def _lease_is_lost(self) -> None:
        """Nothing is leased until all that others have of what is lost has ended."""
        self.lost_leases += 1
        self._no_draws_until = self._never_stops() + self._terms.seconds
        for lease in self._reports.leases:
            lease.retired = True

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


async def open_leased(
    shared: Ledger, folder: Path, *, durability: Durability, terms: LeaseTerms, holder: str
) -> LeasedLedger:
    """A leased ledger with its files in the folder. Raises StorageError."""
    local = SqliteLocalLedger(
        folder / "leases.db",
        durability=durability,
        new_id=lambda: local_id(uuid.uuid4()),
    )
    try:
        # Written once for many calls: it can always wait for the disk.
        journal = LeaseJournal(folder / "lease-journal.db", durability=Durability.POWER)
    except StorageError:
        await local.close()
        raise
    try:
        return await LeasedLedger.open(
            shared=shared, local=local, journal=journal, terms=terms, holder=holder
        )
    except LedgerError as error:
        await journal.close()
        await local.close()
        raise StorageError(error.message) from error


def _is_exact(first: Receipt) -> bool:
    """Whether the local ledger's answer is that the shared one has the answer. A lease
    that had less left than it seemed refuses nobody.
    """
    return first.refused_by is not None or (first.id == "" and first.note == _EXACT)


def _without_names(hold: HoldState) -> HoldState:
    """As its maker knows it: the names of its leases are this ledger's own."""
    return replace(hold, memo=hold.memo.partition(" ")[2])
