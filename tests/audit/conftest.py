from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdp.audit.log import ChainedAuditLog
from pdp.audit.record import AuditReceipt, AuditRecord, Outcome
from pdp.storage import Durability

NOON_NS = 1_795_521_600_123_456_789
"""2026-11-24T12:00:00.123456789Z."""


def make_record(**fields: Any) -> AuditRecord:
    """An allowed call of acme's alice, other than in what is given."""
    known: dict[str, Any] = {
        "type": "decision",
        "tenant_id": "acme",
        "actor_id": "alice",
        "action": "orders.update",
        "outcome": Outcome.ALLOWED,
        "reason_code": "ok",
    }
    return AuditRecord(**(known | fields))


def open_in(directory: Path, **options: Any) -> ChainedAuditLog:
    """A log of instance ``test`` whose clock stands at noon."""
    known: dict[str, Any] = {
        "instance": "test",
        "durability": Durability.PROCESS,
        "clock": lambda: NOON_NS,
    }
    return ChainedAuditLog(directory, **(known | options))


def write_in(directory: Path, records: Sequence[AuditRecord], **options: Any) -> list[AuditReceipt]:
    """Write the records one after the other, between a start and a stop record."""

    async def run() -> list[AuditReceipt]:
        log = open_in(directory, **options)
        try:
            return [await log.append(record) for record in records]
        finally:
            await log.close()

    return asyncio.run(run())


@pytest.fixture
def record() -> Callable[..., AuditRecord]:
    return make_record


@pytest.fixture
def open_log() -> Callable[..., ChainedAuditLog]:
    return open_in


@pytest.fixture
def write_log() -> Callable[..., list[AuditReceipt]]:
    return write_in


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "audit"
