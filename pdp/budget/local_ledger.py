"""The ledger of what is done under leases: one sidecar's own."""

from __future__ import annotations

from typing import Protocol

import apsw

from pdp.budget.ledger import Ledger
from pdp.budget.sqlite import SqliteLedger


class LocalLedger(Ledger, Protocol):
    """A ledger in which each lease is a limit of its own, for a lifetime."""

    async def forget(self, tenant: str, limit_id: str) -> None:
        """Nothing is held, settled or refunded under a limit of the tenant any more."""
        ...


class SqliteLocalLedger(SqliteLedger):
    """A LocalLedger in one SQLite file."""

    async def forget(self, tenant: str, limit_id: str) -> None:
        """See LocalLedger.forget."""

        def operation(db: apsw.Connection) -> None:
            db.execute("DELETE FROM account WHERE tenant = ? AND limit_id = ?", (tenant, limit_id))

        await self._run(operation)
