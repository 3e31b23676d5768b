"""The journal of leases after a crash, a broken disk or a stranger's hand (pdp.budget.lease_journal)."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import apsw

from pdp.budget.bounds import check_account, check_charges, check_limits
from pdp.budget.lease_journal import LeaseJournal, LeaseRecord, Report, ReportKind
from pdp.budget.ledger import MAX_AMOUNT, Account, Charge, LedgerError
from pdp.canonical import JsonValue
from pdp.storage import Durability, StorageError
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.contract import SECRET
from tests.fuzz.targets.redis_replies import HOLD, LIMITS

SPACE: Final = Path(tempfile.mkdtemp(prefix="fuzz-journal-"))
atexit.register(shutil.rmtree, SPACE, ignore_errors=True)
FILE: Final = SPACE / "lease-journal.db"
LEASES: Final = [
    LeaseRecord(
        name=f"lease-{number}",
        account=Account(tenant="tenant_acme", actor="user-7", session=SECRET),
        charge=Charge("llm", "calls", 6),
        limits=tuple(LIMITS),
        ttl_seconds=60,
        asked_at=1_800_000_000 + number,
    )
    for number in range(2)
]
JSON_COLUMNS: Final = ("account", "charge", "limits", "report")
COLUMNS: Final = ("name", "ttl_seconds", "asked_at", "hold_id", "is_over", "marks", "reported")
ODD: Final = (0, 1, -1, 2**53, 2**63 - 1, -(2**63), "", "\0", "lease-1", "x" * 300)


async def _write() -> None:
    journal = LeaseJournal(FILE, durability=Durability.PROCESS)
    for lease in LEASES:
        await journal.add(lease)
        drawn = await journal.drawn(lease, HOLD)
        await journal.begin_report(drawn, Report(ReportKind.SETTLE, 5, is_final=True))
    await journal.close()


asyncio.run(_write())
WRITTEN: Final = FILE.read_bytes()


def samples() -> Iterable[bytes]:
    yield b"\0"
    yield b"\1\0\0"
    yield b"\2\0"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    for left in SPACE.iterdir():
        left.unlink()
    match choices.number(3):
        case 0:
            FILE.write_bytes(edited_bytes(WRITTEN, choices))
        case 1:
            FILE.write_bytes(WRITTEN)
            _edit_rows(choices)
        case _:
            FILE.write_bytes(WRITTEN)
            # What a crash has left of the log.
            (SPACE / f"{FILE.name}-wal").write_bytes(choices.rest())
    try:
        leases = asyncio.run(_read())
    except (StorageError, LedgerError) as error:
        assert SECRET not in f"{error} {error!r}"  # noqa: PT017 - what it shows
        return False
    for lease in leases:
        check_account(lease.account)
        check_charges([lease.charge], least=1)
        check_limits(lease.limits)
        if lease.report is not None:
            assert type(lease.report.amount) is int
            assert 0 <= lease.report.amount <= MAX_AMOUNT
    return any(lease.name == LEASES[0].name for lease in leases)


async def _read() -> Sequence[LeaseRecord]:
    journal = LeaseJournal(FILE, durability=Durability.PROCESS)
    try:
        found = await journal.unfinished()
        assert await journal.asked_before(2**53, 100) is not None
        for lease in found:
            await journal.end_report(lease)
        return found
    finally:
        await journal.close()


def _edit_rows(choices: Choices) -> None:
    db = apsw.Connection(str(FILE))
    try:
        for _ in range(choices.number(4)):
            if choices.yes():
                column = choices.pick(COLUMNS)
                value: object = choices.pick(ODD) if choices.yes() else choices.text()
            else:
                column = choices.pick(JSON_COLUMNS)
                (text,) = next(iter(db.execute(f"SELECT {column} FROM lease")))  # noqa: S608 - our own names
                value = _edited_json(text, choices)
            with contextlib.suppress(apsw.Error):  # of another type than the column's
                db.execute(f"UPDATE lease SET {column} = ? WHERE name = 'lease-0'", (value,))  # noqa: S608 - same
    finally:
        db.close()


def _edited_json(text: str, choices: Choices) -> str:
    try:
        value: JsonValue = json.loads(text)
    except ValueError:  # it was changed before
        return text
    if choices.yes():
        return edited_bytes(text.encode(), choices).decode("utf-8", "replace")
    if isinstance(value, list) and choices.yes():
        # Each limit is JSON in JSON.
        value = [_edited_limit(each, choices) for each in value]
    return json.dumps(edited(value, choices))


def _edited_limit(value: JsonValue, choices: Choices) -> JsonValue:
    if not isinstance(value, str) or not value.startswith("["):
        return value
    return json.dumps(edited(json.loads(value), choices))
