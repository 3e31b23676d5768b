"""The ledger of what is done under leases: one sidecar's own."""

from __future__ import annotations

import uuid
from typing import Final, Protocol

import apsw

from pdp.budget.ledger import Ledger
from pdp.budget.sqlite import SqliteLedger


def local_id(random: uuid.UUID) -> str:
    """An id of a local ledger: a UUID of version 8, whose meaning is its maker's
    (RFC 9562, section 5.8). Shared ledgers make those of version 4.
    """
    text = str(random)
    return f"{text[:_VERSION_AT]}8{text[_VERSION_AT + 1 :]}"


def is_local(hold_id: str) -> bool:
    """Whether it can only be a local ledger's."""
    return hold_id[_VERSION_AT : _VERSION_AT + 1] == "8"


_VERSION_AT: Final = 14


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
