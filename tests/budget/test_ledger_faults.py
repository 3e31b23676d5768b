"""What the ledger promises when the process dies, and when the disk is full."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from pdp.budget.ledger import (
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    Scope,
    Window,
)
from pdp.budget.sqlite import SqliteLedger
from pdp.storage import Durability

ALICE = Account(tenant="acme", actor="alice")
ONE_CALL = (Charge("tools", "calls", 1),)
MANY = Limit(
    id="ever",
    budget="tools",
    unit="calls",
    window=Window.LIFETIME,
    limit=10**9,
    scope=Scope.TENANT,
)
CONTENT = "a" * 64


def key(operation: str, name: str) -> IdempotencyKey:
    return IdempotencyKey(operation=operation, key=name, content_sha256=CONTENT)


# Eight callers. Each charges, reserves and settles in turn, prints what was
# acknowledged as "operation key id", and begins with the call whose answer its
# predecessor may not have seen.
WORKER = """
import asyncio, os, sys
from pathlib import Path
from pdp.budget.ledger import *
from pdp.budget.sqlite import SqliteLedger
from pdp.storage import Durability

ALICE = Account(tenant="acme", actor="alice")
ONE_CALL = (Charge("tools", "calls", 1),)
MANY = Limit(id="ever", budget="tools", unit="calls", window=Window.LIFETIME, limit=10**9,
             scope=Scope.TENANT)

def key(operation, name):
    return IdempotencyKey(operation=operation, key=name, content_sha256="a" * 64)

def acknowledge(operation, name, receipt):
    os.write(1, f"{operation} {name} {receipt.id}\\n".encode())

async def call(ledger, caller, number):
    while True:
        name = f"{caller}-{number}"
        receipt = await ledger.charge(ALICE, key("charge", name), charges=ONE_CALL, limits=[MANY])
        acknowledge("charge", name, receipt)
        hold = await ledger.reserve(ALICE, key("reserve", name), charges=ONE_CALL, limits=[MANY],
                                    ttl_seconds=3600)
        acknowledge("reserve", name, hold)
        receipt = await ledger.settle(ALICE, key("settle", name), hold_id=hold.id, charges=None)
        acknowledge("settle", name, receipt)
        number += 1

async def main():
    ledger = SqliteLedger(Path(sys.argv[1]), durability=Durability(sys.argv[2]))
    await asyncio.gather(*(call(ledger, i, int(n)) for i, n in enumerate(sys.argv[3:])))

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("durability", Durability)
def test_twenty_kills_lose_nothing_acknowledged_and_double_nothing(
    tmp_path: Path, durability: Durability
) -> None:
    path = tmp_path / "ledger.sqlite"
    acknowledged: dict[tuple[str, str], str] = {}
    next_number = [0] * 8
    dice = random.Random(918)  # noqa: S311 - a repeatable choice
    for _ in range(20):
        for operation, name, answer_id in killed_while_working(
            path, durability, next_number, lines=dice.randrange(1, 1500)
        ):
            # A call that was made again has the first answer again.
            assert acknowledged.setdefault((operation, name), answer_id) == answer_id
            caller, number = map(int, name.split("-"))
            next_number[caller] = max(next_number[caller], number)

    async def open_and_close() -> None:
        await SqliteLedger(path, durability=durability).close()

    asyncio.run(open_and_close())
    db = apsw.Connection(str(path))
    assert db.pragma("integrity_check") == "ok"
    rows: list[Any] = db.execute(
        "SELECT operation, key, json_extract(receipt, '$.id') FROM answer"
    ).fetchall()
    answers = {(operation, name): answer_id for operation, name, answer_id in rows}
    assert answers.items() >= acknowledged.items()
    # Unacknowledged at most: what each of the callers had asked when it was killed.
    assert len(answers) <= len(acknowledged) + 8 * 20
    done = [operation for operation, _ in answers]
    spent, held = db.execute("SELECT spent, held FROM account").get
    assert spent == done.count("charge") + done.count("settle")
    assert held == done.count("reserve") - done.count("settle")
    db.close()


def killed_while_working(
    path: Path, durability: Durability, next_number: list[int], lines: int
) -> Iterator[tuple[str, str, str]]:
    """What a worker acknowledged until it was killed, about ``lines`` answers in."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(path), durability, *map(str, next_number)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    for count, line in enumerate(worker.stdout):
        if count == lines:
            worker.kill()
        if line.endswith("\n"):
            operation, name, answer_id = line.split()
            yield operation, name, answer_id
    worker.stdout.close()
    assert worker.wait() == -9


def test_a_full_disk_is_budget_unavailable_and_later_works(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = SqliteLedger(tmp_path / "ledger.sqlite", durability=Durability.PROCESS)

        async def charge(name: str) -> bool:
            receipt = await ledger.charge(
                ALICE, key("charge", name), charges=ONE_CALL, limits=[MANY]
            )
            return receipt.replayed

        await charge("first")
        pages = await ledger._writer.run(lambda db: db.pragma("page_count"))
        await ledger._writer.run(lambda db: db.pragma("max_page_count", pages + 1))
        done = ["first"]
        refusal: LedgerError | None = None
        while refusal is None:
            try:
                await charge(f"more-{len(done)}")
            except LedgerError as error:
                refusal = error
            else:
                done.append(f"more-{len(done)}")
        assert refusal.reason_code == "budget_unavailable"
        for _ in range(3):
            with pytest.raises(LedgerError):
                await charge("refused")
        await ledger._writer.run(lambda db: db.pragma("max_page_count", 2**20))
        assert not await charge("refused")
        for name in done:
            assert await charge(name)
        (state,) = await ledger.state(ALICE, limits=[MANY])
        assert state.spent == len(done) + 1
        await ledger.close()

    asyncio.run(scenario())


# The write itself fails, in the log: no file may grow beyond a size.
CRAMPED = """
import asyncio, resource, sys
from pathlib import Path
from pdp.budget.ledger import *
from pdp.budget.sqlite import SqliteLedger
from pdp.storage import Durability

ALICE = Account(tenant="acme", actor="alice")
MANY = Limit(id="ever", budget="tools", unit="calls", window=Window.LIFETIME, limit=10**9,
             scope=Scope.TENANT)

def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    ledger = SqliteLedger(Path(sys.argv[1]), durability=Durability.POWER)
    done = set()

    async def charge(number):
        key = IdempotencyKey(operation="charge", key=f"k{number}", content_sha256="a" * 64)
        try:
            receipt = await ledger.charge(
                ALICE, key, charges=[Charge("tools", "calls", 1)], limits=[MANY])
        except LedgerError as error:
            assert error.reason_code == "budget_unavailable", error.reason_code
            return False
        assert receipt.replayed == (number in done), number
        done.add(number)
        return True

    allow(200_000)
    failures = 0
    for start in range(0, 400, 16):
        answers = await asyncio.gather(*(charge(n) for n in range(start, start + 16)))
        assert all(answers) or not any(answers), "a batch is done or not"
        failures += not all(answers)
    assert failures > 3, failures
    allow(resource.RLIM_INFINITY)
    assert all(await asyncio.gather(*(charge(n) for n in range(400))))
    (state,) = await ledger.state(ALICE, limits=[MANY])
    assert state.spent == 400, state.spent
    await ledger.close()

asyncio.run(main())
"""


def test_a_log_that_can_not_grow_fails_whole_batches_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    child = subprocess.run(
        [sys.executable, "-c", CRAMPED, str(path)], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert "Traceback" not in child.stderr
    db = apsw.Connection(str(path))
    assert db.pragma("integrity_check") == "ok"
    assert db.execute("SELECT spent FROM account").get == 400
    db.close()
