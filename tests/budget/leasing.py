"""Sidecars that lease from one shared ledger, with the hands of all their clocks."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pdp.budget.lease_journal import LeaseJournal
from pdp.budget.lease_pool import LeaseTerms
from pdp.budget.leased_ledger import LeasedLedger
from pdp.budget.ledger import Account, Charge, IdempotencyKey, Ledger, LedgerError, Limit, Receipt
from pdp.budget.local_ledger import SqliteLocalLedger, local_id
from pdp.storage import Durability
from tests.budget.memory import MemoryLedger
from tests.budget.teller import ALICE, NOON, SAME, calls

T = TypeVar("T")
Call = Callable[[Ledger], Awaitable[Receipt]]


class Line:
    """The way to a shared ledger, which can be cut, and which a sidecar that is closed
    leaves open for the others.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.cut = False
        self.loses_answers = False
        self.asked: list[str] = []

    async def close(self) -> None:
        """The ledger is the others' too."""

    def __getattr__(self, name: str) -> Callable[..., Awaitable[object]]:
        method = getattr(self._ledger, name)

        async def ask(*arguments: object, **named: object) -> object:
            self.asked.append(name)
            if self.cut:
                raise LedgerError("budget_unavailable", "cut")
            answer = await method(*arguments, **named)
            if self.loses_answers:
                raise LedgerError("budget_unavailable", "lost on its way")
            return answer

        return ask


class Sidecar:
    """One sidecar's ledger, its files, and its line to the shared ledger."""

    def __init__(self, town: Town, folder: Path, name: str, terms: LeaseTerms) -> None:
        self.town = town
        self.name = name
        self.terms = terms
        self.line = Line(town.shared)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.open()

    def open(self) -> None:
        self.local = SqliteLocalLedger(
            self.folder / "leases.db",
            durability=Durability.PROCESS,
            clock=lambda: self.town.now,
            new_id=lambda: local_id(uuid.UUID(int=next(self.town.ids))),
        )
        self.journal = LeaseJournal(self.folder / "lease-journal.db", durability=Durability.PROCESS)
        self.ledger = self.town.do(
            LeasedLedger.open(
                shared=self.line,  # type: ignore[arg-type]
                local=self.local,
                journal=self.journal,
                terms=self.terms,
                holder=self.name,
                clock=lambda: self.town.now,
                never_stops=lambda: self.town.now,
                new_id=lambda: f"{self.name}-{next(self.town.ids)}",
                tends_itself=False,
            )
        )

    def crash(self) -> None:
        """What was not written is gone; the files are there again for the next run."""
        self.town.do(self.journal.close())
        self.town.do(self.local.close())
        self.open()

    def close(self) -> None:
        self.town.do(self.ledger.close())

    def tend(self) -> None:
        self.town.do(self.ledger.tend())

    @property
    def leases(self) -> int:
        """What it has leased and still spends."""
        return sum(
            lease.record.charge.amount
            for lease in self.ledger._reports.leases
            if not lease.retired and lease.until > self.town.now
        )

    def key(self, operation: str, name: str | None = None, content: str = SAME) -> IdempotencyKey:
        name = name or f"key-{self.name}-{next(self.town.ids)}"
        return IdempotencyKey(
            operation=operation, key=name, content_sha256=content, note=f'"{name}"'
        )

    def reserve(
        self,
        *charges: Charge,
        limits: Sequence[Limit],
        account: Account = ALICE,
        key: IdempotencyKey | None = None,
        ttl_seconds: int = 60,
        memo: str = "",
    ) -> Receipt:
        return self.town.do(
            self.ledger.reserve(
                account,
                key or self.key("reserve"),
                charges=charges,
                limits=limits,
                ttl_seconds=ttl_seconds,
                memo=memo,
            )
        )

    def charge(
        self,
        *charges: Charge,
        limits: Sequence[Limit],
        account: Account = ALICE,
        key: IdempotencyKey | None = None,
    ) -> Receipt:
        return self.town.do(
            self.ledger.charge(account, key or self.key("charge"), charges=charges, limits=limits)
        )

    def settle(
        self,
        hold_id: str,
        *charges: Charge,
        account: Account = ALICE,
        key: IdempotencyKey | None = None,
        final: bool = True,
    ) -> Receipt:
        return self.town.do(
            self.ledger.settle(
                account,
                key or self.key("settle"),
                hold_id=hold_id,
                charges=charges or None,
                final=final,
            )
        )

    def refund(self, hold_id: str, *charges: Charge, key: IdempotencyKey | None = None) -> Receipt:
        return self.town.do(
            self.ledger.refund(
                ALICE, key or self.key("refund"), hold_id=hold_id, charges=charges or None
            )
        )

    def warm_up(self, *limits: Limit, account: Account = ALICE) -> None:
        """Charge one call at a time until there is a lease."""
        before = self.leases
        for _ in range(8):
            self.charge(calls(1), limits=limits, account=account)
            if self.leases > before:
                return
        raise AssertionError("no lease was drawn")


class Town:
    """A shared ledger and the sidecars around it, asked in turn."""

    def __init__(self, folder: Path, shared: MemoryLedger | None = None) -> None:
        self.folder = folder
        self.now: float = NOON
        self.runner = asyncio.Runner()
        self.ids = itertools.count()
        self.shared = shared or MemoryLedger(
            clock=lambda: self.now, new_id=lambda: f"shared-{next(self.ids)}"
        )
        self.sidecars: list[Sidecar] = []

    def sidecar(self, name: str = "one", terms: LeaseTerms | None = None) -> Sidecar:
        sidecar = Sidecar(self, self.folder / name, name, terms or LeaseTerms())
        self.sidecars.append(sidecar)
        return sidecar

    def do(self, answer: Awaitable[T]) -> T:
        """And whatever goes on behind it."""

        async def wait() -> T:
            try:
                return await answer
            finally:
                for sidecar in self.sidecars:
                    while tasks := sidecar.ledger._tasks:
                        await asyncio.wait(tasks)

        return self.runner.run(wait())

    def count(self, limit: Limit, account: Account = ALICE) -> tuple[int, int]:
        """(spent, held) on the shared ledger."""
        [state] = self.do(self.shared.state(account, limits=(limit,)))
        return state.spent, state.held

    def close(self) -> None:
        for sidecar in self.sidecars:
            sidecar.close()
        self.runner.close()
