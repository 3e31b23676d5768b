"""Where a sidecar's revocations are kept, for commands that change them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from pdp.config import Config
from pdp.revocation.file import RevocationFile
from pdp.revocation.revocations import RevocationStore


@contextlib.asynccontextmanager
async def open_revocations(config: Config) -> AsyncIterator[RevocationStore]:
    """The shared store, or the file in the state directory. Raises StorageError."""
    if config.budget.store == "sqlite":
        yield RevocationFile(config.revocation_file)
        return
    from pdp.redis_store import open_redis  # noqa: PLC0415 - not everybody's
    from pdp.revocation.redis import RedisRevocations  # noqa: PLC0415

    store = await open_redis(config.budget.store)
    try:
        yield RedisRevocations(store)
    finally:
        await store.close()
