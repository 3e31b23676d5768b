"""Which permits are spent: the sidecar's memory of redemptions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, TypeVar

import apsw

from pdp.permit.claims import Permit, PermitError
from pdp.reason import ReasonCode
from pdp.storage import Durability, SqliteWriter, StorageError

_T = TypeVar("_T")

_SCHEMA: Final = """
CREATE TABLE permit_use (
    permit_id TEXT PRIMARY KEY,
    redemption_key TEXT,          -- NULL: closed without having been redeemed
    closed INTEGER NOT NULL,      -- 1: the outcome is reported
    forget_at INTEGER NOT NULL    -- Unix seconds, long after the permit has expired
) WITHOUT ROWID;
CREATE INDEX permit_use_by_age ON permit_use (forget_at);
"""
KEEP_SECONDS: Final = 86_400
"""How long a use is remembered past the permit's end, for clocks that are wrong."""
_FORGET_AT_ONCE: Final = 8
"""Old rows that one redemption clears away: more than it adds, so the table stays bounded."""


class UsedPermits(Protocol):
    """Lets every permit be redeemed once, also across restarts."""

    async def redeem(self, permit: Permit, *, key: str) -> bool:
        """Spend the permit's one use. True when this very redemption was made
        before, so that a lost reply can be asked for again.

        Raises PermitError: permit_used, permit_unavailable.
        """
        ...

    async def close_permit(self, permit: Permit) -> None:
        """Let the permit be redeemed no more. Raises PermitError (permit_unavailable)."""
        ...


class PermitUses:
    """UsedPermits in one SQLite file, for one sidecar."""

    def __init__(
        self, path: Path, *, durability: Durability, clock: Callable[[], float] = time.time
    ) -> None:
        self._writer = SqliteWriter(path, schema=_SCHEMA, durability=durability)
        self._clock = clock

    async def redeem(self, permit: Permit, *, key: str) -> bool:
        """See UsedPermits.redeem."""

        def operation(connection: apsw.Connection) -> bool:
            row = connection.execute(
                "SELECT redemption_key, closed FROM permit_use WHERE permit_id = ?", (permit.id,)
            ).fetchone()
            if row == (key, 0):
                return True
            if row is not None:
                raise PermitError(ReasonCode.PERMIT_USED, "The permit is used; ask for a new one.")
            self._write(connection, permit, key=key, closed=False)
            return False

        return await self._run(operation)

    async def close_permit(self, permit: Permit) -> None:
        """See UsedPermits.close_permit."""

        def operation(connection: apsw.Connection) -> None:
            self._write(connection, permit, key=None, closed=True)

        await self._run(operation)

    async def close(self) -> None:
        """Make everything durable and let go of the file."""
        await self._writer.close()

    def _write(
        self, connection: apsw.Connection, permit: Permit, *, key: str | None, closed: bool
    ) -> None:
        connection.execute(
            "INSERT INTO permit_use VALUES (?, ?, ?, ?)"
            " ON CONFLICT (permit_id) DO UPDATE SET closed = excluded.closed",
            (permit.id, key, int(closed), permit.expires_at + KEEP_SECONDS),
        )
        connection.execute(
            "DELETE FROM permit_use WHERE permit_id IN"
            " (SELECT permit_id FROM permit_use WHERE forget_at < ? LIMIT ?)",
            (int(self._clock()), _FORGET_AT_ONCE),
        )

    async def _run(self, operation: Callable[[apsw.Connection], _T]) -> _T:
        try:
            return await self._writer.run(operation)
        except StorageError:
            raise PermitError(
                ReasonCode.PERMIT_UNAVAILABLE, "The permit could not be spent; try again."
            ) from None
