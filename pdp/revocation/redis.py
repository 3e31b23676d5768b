"""Revocations in the shared store, for every sidecar on it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from pdp.redis_store import RedisStore
from pdp.revocation.revocations import (
    MAX_REVOCATIONS,
    Known,
    Revocation,
    RevocationError,
    Target,
    from_json,
    to_json,
)
from pdp.storage import StorageError

_T = TypeVar("_T")

KEY: Final = "pdp:{revocations}"
VERSION_KEY: Final = "pdp:{revocations}:version"


class RedisRevocations:
    """The RevocationStore port in one hash, which the store's owner closes."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store

    async def version(self) -> str:
        """See RevocationStore.version."""

        async def version() -> str:
            found = await self._store.command(KEY, "GET", VERSION_KEY)
            return found.decode() if found is not None else "0"

        return await self._complete(version)

    async def read(self) -> Known:
        """See RevocationStore.read."""

        async def read() -> Known:
            known: dict[Target, Revocation] = {}
            for member in await self._store.command(KEY, "HVALS", KEY):
                try:
                    known |= from_json(member)
                except ValueError as error:
                    raise RevocationError(f"A revocation in the shared store {error}.") from None
            return known

        return await self._complete(read)

    async def add(self, revocation: Revocation) -> None:
        """See RevocationStore.add."""

        async def add() -> None:
            if int(await self._store.command(KEY, "HLEN", KEY)) >= MAX_REVOCATIONS:
                raise RevocationError(
                    f"There are {MAX_REVOCATIONS} revocations already: lift some first."
                )
            await self._store.command(
                KEY, "HSET", KEY, _field(revocation.target), to_json([revocation]).decode()
            )
            # Afterwards, so that whoever sees the new version sees the revocation.
            await self._store.command(KEY, "INCR", VERSION_KEY)

        await self._complete(add)

    async def lift(self, target: Target) -> bool:
        """See RevocationStore.lift."""

        async def lift() -> bool:
            lifted = int(await self._store.command(KEY, "HDEL", KEY, _field(target)))
            await self._store.command(KEY, "INCR", VERSION_KEY)
            return lifted == 1

        return await self._complete(lift)

    async def _complete(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        try:
            return await self._store.complete(operation)
        except StorageError as error:
            raise RevocationError(error.message) from error


def _field(target: Target) -> str:
    return f"{target.kind.value}\n{target.tenant}\n{target.name}"
