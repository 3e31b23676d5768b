"""What a sidecar has to know of its leases after a crash: which it drew from the shared
ledger, and what of them it has reported there.

Written before the shared ledger is asked, so that whatever may have been done there is
known here, and is asked for again under the same idempotency key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from pdp.budget.bounds import check_account, check_charges, check_limits
from pdp.budget.ledger import Account, Charge, LedgerError, Limit
from pdp.budget.receipt_json import limit_from_json, limit_to_json
from pdp.reason import ReasonCode
from pdp.storage import Durability, SqliteWriter, StorageError

T = TypeVar("T")

_SCHEMA: Final = """
CREATE TABLE lease (
    name TEXT PRIMARY KEY,
    account TEXT NOT NULL, -- JSON object, as are the next two lists
    charge TEXT NOT NULL,
    limits TEXT NOT NULL,
    ttl_seconds INTEGER NOT NULL,
    asked_at INTEGER NOT NULL,
    hold_id TEXT NOT NULL, -- empty until the shared ledger has answered
    is_over INTEGER NOT NULL,
    marks INTEGER NOT NULL, -- how often something may have changed since it was reported
    reported INTEGER NOT NULL,
    reports INTEGER NOT NULL,
    report TEXT -- JSON, while it is not known to have arrived: [kind, amount, is final]
) STRICT, WITHOUT ROWID;
CREATE INDEX lease_unfinished ON lease (name) WHERE NOT is_over OR marks;
CREATE INDEX lease_by_age ON lease (asked_at);
"""
_COLUMNS: Final = (
    "name, account, charge, limits, ttl_seconds, asked_at, hold_id, is_over, reported, reports,"
    " report"
)


class ReportKind(StrEnum):
    """How the shared ledger learns what was spent under a lease."""

    SETTLE = "settle"
    REFUND = "refund"
    CHARGE = "charge"
    """The shared ledger has lost the lease."""


@dataclass(frozen=True, slots=True)
class Report:
    """A change that the shared ledger is told of."""

    kind: ReportKind
    amount: int
    is_final: bool = False
    """With SETTLE: the lease is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """A lease, as the journal knows it."""

    name: str
    """Also the idempotency key under which it is drawn."""
    account: Account
    """For whom it was drawn first."""
    charge: Charge
    """What was drawn."""
    limits: tuple[Limit, ...]
    ttl_seconds: int
    """For how long the shared ledger holds it."""
    asked_at: int
    """Unix seconds."""
    hold_id: str = ""
    """The shared ledger's name for it; empty until it has answered."""
    is_over: bool = False
    """Whether it was settled finally."""
    reported: int = 0
    """What the shared ledger has been told was spent, less what was refunded."""
    reports: int = 0
    """Reports that were begun."""
    report: Report | None = None
    """The last of them, until it is known to have arrived."""


class LeaseJournal:
    """Leases in one SQLite file. Raises StorageError when it can not be opened;
    every method raises LedgerError with budget_unavailable when nothing was written.
    """

    def __init__(self, path: Path, *, durability: Durability) -> None:
        self._writer = SqliteWriter(path, schema=_SCHEMA, durability=durability)

    async def add(self, lease: LeaseRecord) -> None:
        """Before it is drawn."""
        row = (
            lease.name,
            json.dumps(asdict(lease.account)),
            json.dumps([lease.charge.budget, lease.charge.unit, lease.charge.amount]),
            json.dumps([limit_to_json(limit) for limit in lease.limits]),
            lease.ttl_seconds,
            lease.asked_at,
        )
        await self._execute(
            "INSERT INTO lease VALUES (?, ?, ?, ?, ?, ?, '', 0, 0, 0, 0, NULL)", row
        )

    async def drawn(self, lease: LeaseRecord, hold_id: str) -> LeaseRecord:
        """The shared ledger holds it."""
        await self._execute("UPDATE lease SET hold_id = ? WHERE name = ?", (hold_id, lease.name))
        return replace(lease, hold_id=hold_id)

    async def forget(self, lease: LeaseRecord) -> None:
        """Nothing will ever be known of it again."""
        await self._execute("DELETE FROM lease WHERE name = ?", (lease.name,))

    async def begin_report(self, lease: LeaseRecord, report: Report) -> LeaseRecord:
        """Before the shared ledger is told."""
        await self._execute(
            "UPDATE lease SET reports = reports + 1, report = ? WHERE name = ?",
            (json.dumps([report.kind, report.amount, report.is_final]), lease.name),
        )
        return replace(lease, reports=lease.reports + 1, report=report)

    async def end_report(self, lease: LeaseRecord) -> LeaseRecord:
        """The report has arrived."""
        report = lease.report
        if report is None:
            return lease
        change = -report.amount if report.kind is ReportKind.REFUND else report.amount
        ended = replace(
            lease,
            reported=lease.reported + change,
            is_over=lease.is_over or report.is_final,
            report=None,
        )
        await self._execute(
            "UPDATE lease SET reported = ?, is_over = ?, report = NULL WHERE name = ?",
            (ended.reported, ended.is_over, lease.name),
        )
        return ended

    async def mark(self, names: Sequence[str]) -> None:
        """What was spent under leases that may be over has changed."""

        def operation(db: apsw.Connection) -> None:
            db.executemany(
                "UPDATE lease SET marks = marks + 1 WHERE name = ?", [(name,) for name in names]
            )

        await self._run(operation)

    async def marks(self, lease: LeaseRecord) -> int:
        """For :meth:`is_reported`, before it is looked at what was spent."""

        def operation(db: apsw.Connection) -> int:
            marks: int = db.execute(
                "SELECT coalesce(max(marks), 0) FROM lease WHERE name = ?", (lease.name,)
            ).get
            return marks

        return await self._run(operation)

    async def is_reported(self, lease: LeaseRecord, marks: int) -> bool:
        """All that was spent under a lease has been reported. False where it was marked
        meanwhile.
        """

        def operation(db: apsw.Connection) -> bool:
            db.execute(
                "UPDATE lease SET marks = 0 WHERE name = ? AND marks = ?", (lease.name, marks)
            )
            return db.changes() > 0

        return await self._run(operation)

    async def unfinished(self) -> list[LeaseRecord]:
        """Leases that are not over, or of which more is to be reported."""
        return await self._select("WHERE NOT is_over OR marks", ())

    async def asked_before(self, asked_at: int, most: int) -> list[LeaseRecord]:
        """Leases asked for before a moment, the oldest first."""
        return await self._select("WHERE asked_at < ? ORDER BY asked_at LIMIT ?", (asked_at, most))

    async def close(self) -> None:
        """Let go of the file."""
        await self._writer.close()

    async def _select(self, where: str, values: tuple[int, ...]) -> list[LeaseRecord]:
        def operation(db: apsw.Connection) -> list[Any]:
            # What is inserted is one of this module's own clauses.
            return db.execute(f"SELECT {_COLUMNS} FROM lease {where}", values).fetchall()  # noqa: S608 - our own names

        rows = await self._run(operation)
        try:
            return [_record(row) for row in rows]
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            raise LedgerError(
                ReasonCode.BUDGET_UNAVAILABLE,
                "A lease in lease-journal.db can not be read: restore the file.",
            ) from None

    async def _execute(self, statement: str, values: tuple[str | int, ...]) -> None:
        def operation(db: apsw.Connection) -> None:
            db.execute(statement, values)

        await self._run(operation)

    async def _run(self, operation: Callable[[apsw.Connection], T]) -> T:
        try:
            return await self._writer.run(operation)
        except StorageError as error:
            raise LedgerError(ReasonCode.BUDGET_UNAVAILABLE, error.message) from error


def _record(row: tuple[Any, ...]) -> LeaseRecord:
    """Raises ValueError and others for what this module has not written."""
    name, account, charge, limits, ttl, asked_at, hold_id, is_over, reported, reports, report = row
    lent_to = Account(**json.loads(account))
    check_account(lent_to)
    drawn = Charge(*json.loads(charge))
    check_charges([drawn], least=1)
    counted_under = tuple(limit_from_json(each) for each in json.loads(limits))
    check_limits(counted_under)
    unsent = None
    if report is not None:
        kind, amount, is_final = json.loads(report)
        unsent = Report(ReportKind(kind), amount, bool(is_final))
        check_charges([replace(drawn, amount=amount)], least=0)
    return LeaseRecord(
        name=name,
        account=lent_to,
        charge=drawn,
        limits=counted_under,
        ttl_seconds=ttl,
        asked_at=asked_at,
        hold_id=hold_id,
        is_over=bool(is_over),
        reported=reported,
        reports=reports,
        report=unsent,
    )
