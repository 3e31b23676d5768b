"""Every store of budgets, as the tests that all of them must pass open it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pdp.budget.ledger import Ledger
from pdp.budget.redis_ledger import RedisLedger
from pdp.budget.sqlite import SqliteLedger
from pdp.config import RedisSettings
from pdp.redis_store import open_redis
from pdp.storage import Durability
from tests.budget.memory import MemoryLedger
from tests.budget.redis_server import RedisServer

Clock = Callable[[], float]
NewId = Callable[[], str]

DAY = 86_400


def new_uuid() -> str:
    return str(uuid.uuid4())


class Store(Protocol):
    """A place where budgets are kept while no ledger is open on it."""

    clock_per_tenant: bool
    """Whether the time that one tenant has seen leaves the others alone."""

    async def open(
        self, clock: Clock, *, new_id: NewId = new_uuid, retention_seconds: int = DAY
    ) -> Ledger: ...


class MemoryStore:
    clock_per_tenant = False

    def __init__(self) -> None:
        self.ledger: MemoryLedger | None = None

    async def open(
        self, clock: Clock, *, new_id: NewId = new_uuid, retention_seconds: int = DAY
    ) -> Ledger:
        if self.ledger is None:
            self.ledger = MemoryLedger(
                clock=clock, new_id=new_id, retention_seconds=retention_seconds
            )
        self.ledger.closed = False
        return self.ledger


class SqliteStore:
    clock_per_tenant = False

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.sqlite"

    async def open(
        self, clock: Clock, *, new_id: NewId = new_uuid, retention_seconds: int = DAY
    ) -> Ledger:
        return SqliteLedger(
            self.path,
            durability=Durability.PROCESS,
            clock=clock,
            new_id=new_id,
            retention_seconds=retention_seconds,
        )


class RedisStoreOfTests:
    clock_per_tenant = True

    def __init__(self, server: RedisServer, *, connections: int = 8) -> None:
        self.settings = RedisSettings(
            unix=server.socket, timeout_ms=10_000, connections=connections
        )

    async def open(
        self, clock: Clock, *, new_id: NewId = new_uuid, retention_seconds: int = DAY
    ) -> Ledger:
        store = await open_redis(self.settings)
        return RedisLedger(store, clock=clock, new_id=new_id, retention_seconds=retention_seconds)
