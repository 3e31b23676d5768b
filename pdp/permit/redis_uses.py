"""How far permits are spent, for all sidecars that share a Redis or Valkey."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Final, TypeVar

from pdp.permit.claims import Permit
from pdp.permit.uses import KEEP_SECONDS, Use, permit_used, store_failed
from pdp.redis_store import RedisStore, Script, tenant_key
from pdp.storage import StorageError

_T = TypeVar("_T")

_USE: Final = Script(Path(__file__).parent / "scripts" / "use.lua")
_IS_CLOSED: Final = Script(Path(__file__).parent / "scripts" / "is_closed.lua")
_IS_CLOSED_ANSWERS: Final[Mapping[str, bool]] = {"0": False, "1": True}


class RedisPermitUses:
    """See pdp.permit.uses.UsedPermits. The store is closed by whoever opened it."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store

    async def redeem(self, permit: Permit, *, key: str) -> Use:
        """See UsedPermits.redeem."""
        answer, redeemed = await self._use(permit, key, {"redeemed", "again", "used"})
        if answer == "used":
            raise permit_used()
        return Use(replayed=answer == "again", uses_left=permit.max_uses - redeemed)

    async def close_permit(self, permit: Permit) -> int:
        """See UsedPermits.close_permit."""
        _, redeemed = await self._use(permit, "", {"closed"})
        return redeemed

    async def is_closed(self, permit: Permit) -> bool:
        """See UsedPermits.is_closed."""
        arguments = [uuid.uuid4().hex]

        async def operation() -> bool:
            (answer,) = await self._store.run(_IS_CLOSED, [_key(permit)], arguments)
            return _IS_CLOSED_ANSWERS[answer]

        return await self._complete(operation)

    async def _use(self, permit: Permit, key: str, expected: Collection[str]) -> tuple[str, int]:
        arguments = [
            uuid.uuid4().hex,
            key,
            str(permit.max_uses),
            str(permit.expires_at + KEEP_SECONDS),
            str(KEEP_SECONDS),
        ]

        async def operation() -> tuple[str, int]:
            answer, redeemed = await self._store.run(_USE, [_key(permit)], arguments)
            if answer not in expected or int(redeemed) < 0:
                raise ValueError("not an answer of the script's")
            return answer, int(redeemed)

        return await self._complete(operation)

    async def _complete(self, operation: Callable[[], Awaitable[_T]]) -> _T:
        try:
            return await self._store.complete(operation)
        except StorageError:
            raise store_failed() from None


def _key(permit: Permit) -> str:
    return tenant_key(permit.tenant, "permit", permit.id)
