"""How far permits are spent: the sidecar's memory of redemptions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import apsw

from pdp.permit.claims import Permit, PermitError
from pdp.reason import ReasonCode
from pdp.storage import Durability, SqliteWriter, StorageError

_T = TypeVar("_T")

_SCHEMA: Final = """
CREATE TABLE permit_use (
    permit_id TEXT NOT NULL,
    redemption_key TEXT NOT NULL, -- '': closed, as the outcome is reported
    forget_at INTEGER NOT NULL,   -- Unix seconds, long after the permit has expired
    PRIMARY KEY (permit_id, redemption_key)
) WITHOUT ROWID;
CREATE INDEX permit_use_by_age ON permit_use (forget_at);
"""
_SCHEMA_VERSION: Final = 2
KEEP_SECONDS: Final = 86_400
"""How long a use is remembered past the permit's end, for clocks that are wrong."""
_FORGET_AT_ONCE: Final = 8
"""Old rows that one redemption clears away: more than it adds, so the table stays bounded."""


@dataclass(frozen=True, slots=True)
class Use:
    """A use of a permit that is spent."""

    replayed: bool
    """True when this very redemption was made before, so that a lost reply can be asked
    for again."""
    uses_left: int
    """How many more redemptions the permit allows, as things stand now."""


class UsedPermits(Protocol):
    """Lets every permit be redeemed as often as it allows, also across restarts."""

    async def redeem(self, permit: Permit, *, key: str) -> Use:
        """Spend a use of the permit; of all redemptions under one ``key`` together one.

        Raises PermitError: permit_used, permit_unavailable.
        """
        ...

    async def close_permit(self, permit: Permit) -> int:
        """Let the permit be redeemed no more; how often it was. Raises PermitError
        (permit_unavailable).
        """
        ...

    async def is_closed(self, permit: Permit) -> bool:
        """Whether the permit can be redeemed no more because it was closed. Raises
        PermitError (permit_unavailable).
        """
        ...


def permit_used() -> PermitError:
    """What every store raises for one redemption too many."""
    return PermitError(ReasonCode.PERMIT_USED, "The permit is used; ask for a new one.")


def store_failed() -> PermitError:
    """What every store raises where it can not answer."""
    return PermitError(
        ReasonCode.PERMIT_UNAVAILABLE, "The permit could not be looked up; try again."
    )


class PermitUses:
    """UsedPermits in one SQLite file, for one sidecar."""

    def __init__(
        self, path: Path, *, durability: Durability, clock: Callable[[], float] = time.time
    ) -> None:
        self._writer = SqliteWriter(
            path, schema=_SCHEMA, schema_version=_SCHEMA_VERSION, durability=durability
        )
        self._clock = clock

    async def redeem(self, permit: Permit, *, key: str) -> Use:
        """See UsedPermits.redeem."""

        def operation(connection: apsw.Connection) -> Use:
            keys = _keys(connection, permit)
            replayed = key in keys
            if _CLOSED in keys or (len(keys) >= permit.max_uses and not replayed):
                raise permit_used()
            if not replayed:
                self._write(connection, permit, key)
            return Use(replayed, permit.max_uses - len(keys | {key}))

        return await self._run(operation)

    async def close_permit(self, permit: Permit) -> int:
        """See UsedPermits.close_permit."""

        def operation(connection: apsw.Connection) -> int:
            keys = _keys(connection, permit)
            if _CLOSED not in keys:
                self._write(connection, permit, _CLOSED)
            return len(keys - {_CLOSED})

        return await self._run(operation)

    async def is_closed(self, permit: Permit) -> bool:
        """See UsedPermits.is_closed."""
        return await self._run(lambda connection: _CLOSED in _keys(connection, permit))

    async def close(self) -> None:
        """Make everything durable and let go of the file."""
        await self._writer.close()

    def _write(self, connection: apsw.Connection, permit: Permit, key: str) -> None:
        connection.execute(
            "INSERT INTO permit_use VALUES (?, ?, ?)",
            (permit.id, key, permit.expires_at + KEEP_SECONDS),
        )
        connection.execute(
            "DELETE FROM permit_use WHERE (permit_id, redemption_key) IN"
            " (SELECT permit_id, redemption_key FROM permit_use WHERE forget_at < ? LIMIT ?)",
            (int(self._clock()), _FORGET_AT_ONCE),
        )

    async def _run(self, operation: Callable[[apsw.Connection], _T]) -> _T:
        try:
            return await self._writer.run(operation)
        except StorageError:
            raise store_failed() from None


_CLOSED: Final = ""


def _keys(connection: apsw.Connection, permit: Permit) -> set[str]:
    return {
        key
        for (key,) in connection.execute(
            "SELECT redemption_key FROM permit_use WHERE permit_id = ?", (permit.id,)
        )
    }
