"""How the shared ledger learns what was done under a lease.

The local ledger knows what was spent under it, and the journal what the shared ledger has
been told; the difference is what is due. A report is in the journal before it is sent,
and has a key of its own, so that it counts once however often it is sent.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from pdp.budget.lease_journal import LeaseJournal, LeaseRecord, Report, ReportKind
from pdp.budget.lease_pool import Lease
from pdp.budget.ledger import (
    MAX_AMOUNT,
    IdempotencyKey,
    Ledger,
    LedgerError,
    Limit,
    OnExpiry,
    Receipt,
    Scope,
    Window,
)
from pdp.budget.local_ledger import LocalLedger
from pdp.reason import ReasonCode

T = TypeVar("T")

SURELY_KEPT_SECONDS: Final = 86_400
"""For how long the shared ledger surely knows a lease, unless it has lost it."""
KEPT_SECONDS: Final = 26 * 3600
"""Longer than any ledger lets a hold be settled, or refunded, late."""
PRUNE_BATCH: Final = 64
FAILURES_IN_A_ROW: Final = 3
"""Reports that may fail before the others are left for later."""

_log: Final = logging.getLogger(__name__)


class SharedLine:
    """A shared ledger, and whether it answers."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.is_away = False
        """Whether it did not answer when it was last asked."""

    async def hear(self, answer: Awaitable[T]) -> T:
        """An answer of the ledger's."""
        try:
            given = await answer
        except LedgerError as error:
            self.is_away = error.reason_code == ReasonCode.BUDGET_UNAVAILABLE
            raise
        self.is_away = False
        return given


class LeaseReports:
    """The leases of a sidecar of which the shared ledger does not know all.

    ``memo`` stands beside every lease in the shared ledger. ``lost`` is called when the
    shared ledger has forgotten a lease.
    """

    def __init__(
        self,
        *,
        line: SharedLine,
        local: LocalLedger,
        journal: LeaseJournal,
        memo: str,
        clock: Callable[[], float],
        lost: Callable[[], None],
    ) -> None:
        self._line = line
        self._local = local
        self._journal = journal
        self._memo = memo
        self._clock = clock
        self._lost = lost
        self._leases: dict[str, Lease] = {}

    @property
    def leases(self) -> list[Lease]:
        """Those being drawn or spent, and those that have ended."""
        return list(self._leases.values())

    async def take_up(self) -> None:
        """Leases of which the journal alone knows."""
        for record in await self._journal.unfinished():
            if record.name not in self._leases:
                self._leases[record.name] = Lease(record=record)

    async def draw(self, lease: Lease) -> Receipt:
        """Ask the shared ledger for a lease, which must be pending. Unless that is
        refused it is reported from here on, even if no answer comes.
        """
        await self._journal.add(lease.record)
        self._leases[lease.record.name] = lease
        return await self._ask_for(lease)

    async def changed(self, names: Sequence[str]) -> None:
        """What was spent under leases may have changed after they were over. Durable
        before this returns.
        """
        await self._journal.mark(names)
        if any(name not in self._leases for name in names):
            await self.take_up()

    async def report_all(self) -> None:
        """Tell the shared ledger all it does not know of leases that are retired. What
        can not be told now is left for the next time.
        """
        failures = 0
        for lease in self.leases:
            if not lease.retired or lease.pending:
                continue
            try:
                await self._report(lease)
                failures = 0
            except LedgerError as error:
                # Next time it comes last: it may be the only one that can not be told.
                self._leases[lease.record.name] = self._leases.pop(lease.record.name)
                failures += 1
                if failures == FAILURES_IN_A_ROW:
                    _log.warning("leases could not be reported: %s", error.reason_code)
                    return

    async def forget_old(self) -> None:
        """Leases under which nothing can be settled or refunded any more."""
        before = int(self._clock()) - KEPT_SECONDS
        for record in await self._journal.asked_before(before, PRUNE_BATCH):
            if record.name not in self._leases:
                await self._local.forget(record.account.tenant, Lease(record=record).limit.id)
                await self._journal.forget(record)

    async def _ask_for(self, lease: Lease) -> Receipt:
        record = lease.record
        receipt = await self._line.hear(
            self._line.ledger.reserve(
                record.account,
                _key("lease", record.name),
                charges=(record.charge,),
                limits=tuple(replace(limit, on_expiry=OnExpiry.CHARGE) for limit in record.limits),
                ttl_seconds=record.ttl_seconds,
                memo=self._memo,
            )
        )
        if receipt.refused_by is None:
            lease.record = await self._journal.drawn(record, receipt.id)
        else:
            self._leases.pop(record.name, None)
            await self._journal.forget(record)
        return receipt

    async def _report(self, lease: Lease) -> None:
        if not lease.record.hold_id and (await self._ask_for(lease)).refused_by is not None:
            return
        marks = await self._journal.marks(lease.record)
        while report := lease.record.report or await self._due(lease):
            if lease.record.report is None:
                lease.record = await self._journal.begin_report(lease.record, report)
            if not await self._send(lease.record, report):
                if report.kind is ReportKind.SETTLE and self._is_lost(lease.record):
                    anew = replace(report, kind=ReportKind.CHARGE, is_final=True)
                    lease.record = await self._journal.begin_report(lease.record, anew)
                    continue
                lease.record = replace(lease.record, report=replace(report, is_final=True))
            lease.record = await self._journal.end_report(lease.record)
        if lease.record.is_over and await self._journal.is_reported(lease.record, marks):
            self._leases.pop(lease.record.name, None)

    async def _due(self, lease: Lease) -> Report | None:
        """What the shared ledger is to be told next."""
        record = lease.record
        [state] = await self._local.state(record.account, limits=(lease.limit,))
        unreported = state.spent - record.reported
        if unreported < 0:
            return Report(ReportKind.REFUND, -unreported)
        if record.is_over:
            return Report(ReportKind.SETTLE, unreported, is_final=True) if unreported else None
        if state.held == 0:
            return Report(ReportKind.SETTLE, unreported, is_final=True)
        if record.reports == 0 and state.remaining > 0:
            # What nobody holds returns at once: it is posted now, and refunded next.
            return Report(ReportKind.SETTLE, record.charge.amount - state.held)
        return None

    async def _send(self, record: LeaseRecord, report: Report) -> bool:
        """False where the shared ledger can not take it, ever."""
        shared, account = self._line.ledger, record.account
        name = f"{record.name}-{record.reports}"
        charges = (replace(record.charge, amount=report.amount),)
        try:
            if report.kind is ReportKind.SETTLE:
                await self._line.hear(
                    shared.settle(
                        account,
                        _key("lease_settle", name),
                        hold_id=record.hold_id,
                        charges=charges,
                        final=report.is_final,
                    )
                )
            elif report.kind is ReportKind.REFUND:
                await self._line.hear(
                    shared.refund(
                        account, _key("refund", name), hold_id=record.hold_id, charges=charges
                    )
                )
            elif report.amount:
                await self._line.hear(
                    shared.charge(
                        account,
                        _key("charge", name),
                        charges=charges,
                        limits=_never_refusing(record, self._clock()),
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
        charged it in full long ago.
        """
        if record.asked_at < self._clock() - SURELY_KEPT_SECONDS:
            return False
        _log.error("the shared ledger has lost a lease: what was spent under it is charged anew")
        self._lost()
        return True


def _key(operation: str, name: str) -> IdempotencyKey:
    """A key of the sidecar's own: what it stands for is in the journal."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return IdempotencyKey(operation=operation, key=f"lease-{name}", content_sha256=digest)


def _never_refusing(record: LeaseRecord, now: float) -> tuple[Limit, ...]:
    """Limits under which what was spent counts where it did, and is always taken."""
    lasting = (limit for limit in record.limits if not limit.until or now < limit.until)
    lost = Limit(
        id="lost-leases",
        budget=record.charge.budget,
        unit=record.charge.unit,
        window=Window.LIFETIME,
        limit=MAX_AMOUNT,
        scope=Scope.TENANT,
        warn_at=(),
    )
    return (*(replace(limit, enforced=False) for limit in lasting), lost)
