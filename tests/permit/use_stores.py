"""Every store of permit uses, as the tests that all of them must pass open it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

from pdp.config import RedisSettings
from pdp.permit.redis_uses import RedisPermitUses
from pdp.permit.uses import PermitUses, UsedPermits
from pdp.redis_store import open_redis
from pdp.storage import Durability
from tests.budget.redis_server import RedisServer

NOW = 1_800_000_000


class UseStore(Protocol):
    """A place where uses are kept while nobody has it open."""

    def opened(
        self, sidecars: int = 1
    ) -> contextlib.AbstractAsyncContextManager[Sequence[UsedPermits]]:
        """The store as each of several sidecars sees it."""
        ...


class SqliteUses:
    """One sidecar's own: several are one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "permits.db"

    @contextlib.asynccontextmanager
    async def opened(self, sidecars: int = 1) -> AsyncIterator[Sequence[UsedPermits]]:
        uses = PermitUses(self.path, durability=Durability.PROCESS, clock=lambda: NOW)
        try:
            yield [uses] * sidecars
        finally:
            await uses.close()


class RedisUses:
    def __init__(self, server: RedisServer) -> None:
        self.settings = RedisSettings(unix=server.socket, timeout_ms=10_000)

    @contextlib.asynccontextmanager
    async def opened(self, sidecars: int = 1) -> AsyncIterator[Sequence[UsedPermits]]:
        stores = [await open_redis(self.settings) for _ in range(sidecars)]
        try:
            yield [RedisPermitUses(store) for store in stores]
        finally:
            for store in stores:
                await store.close()
