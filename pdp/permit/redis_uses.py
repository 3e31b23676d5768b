"""Which permits are spent, for all sidecars that share a Redis or Valkey."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Final

from pdp.permit.claims import Permit, PermitError
from pdp.permit.uses import KEEP_SECONDS
from pdp.reason import ReasonCode
from pdp.redis_store import RedisStore, Script, tenant_key
from pdp.storage import StorageError

_USE: Final = Script(Path(__file__).parent / "scripts" / "use.lua")


class RedisPermitUses:
    """See pdp.permit.uses.UsedPermits. The store is closed by whoever opened it."""

    def __init__(self, store: RedisStore) -> None:
        self._store = store

    async def redeem(self, permit: Permit, *, key: str) -> bool:
        """See UsedPermits.redeem."""
        answer = await self._use(permit, key)
        if answer == "used":
            raise PermitError(ReasonCode.PERMIT_USED, "The permit is used; ask for a new one.")
        return answer == "again"

    async def close_permit(self, permit: Permit) -> None:
        """See UsedPermits.close_permit."""
        await self._use(permit, "")

    async def _use(self, permit: Permit, key: str) -> str:
        keys = [tenant_key(permit.tenant, "permit", permit.id)]
        arguments = [
            uuid.uuid4().hex,
            key,
            str(permit.expires_at + KEEP_SECONDS),
            str(KEEP_SECONDS),
        ]

        async def operation() -> str:
            (answer,) = await self._store.run(_USE, keys, arguments)
            return answer

        try:
            return await self._store.complete(operation)
        except StorageError:
            raise PermitError(
                ReasonCode.PERMIT_UNAVAILABLE, "The permit could not be spent; try again."
            ) from None
