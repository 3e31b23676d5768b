"""The ledger in one SQLite file, for one sidecar.

An *account* is what one limit counts for one tenant, actor or tool in one
window. Spend stands on the account. What is held stands apart, in parts that
each have a deadline and know the account, and so the window, in which they were
reserved.
"""

from __future__ import annotations

import hmac
import json
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import apsw

from pdp.budget.bounds import (
    MAX_HOLD_SECONDS,
    check_account,
    check_charges,
    check_hold_id,
    check_key,
    check_limits,
    check_ttl,
)
from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
)
from pdp.budget.receipt_json import receipt_from_json, receipt_to_json
from pdp.budget.windows import window_bounds
from pdp.reason import ReasonCode
from pdp.storage import Durability, SqliteWriter, StorageError

T = TypeVar("T")

PRUNE_BATCH: Final = 8
"""Rows of each table that one operation clears away at most."""

_SCHEMA: Final = """
-- The highest time seen, so that the store's clock never runs backwards.
CREATE TABLE clock (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    highest INTEGER NOT NULL
) STRICT;
INSERT INTO clock VALUES (1, 0);

CREATE TABLE account (
    id INTEGER PRIMARY KEY,
    tenant TEXT NOT NULL,
    limit_id TEXT NOT NULL,
    budget TEXT NOT NULL,
    unit TEXT NOT NULL,
    scope TEXT NOT NULL,
    scope_value TEXT NOT NULL,
    window_kind TEXT NOT NULL,
    window_start INTEGER NOT NULL,
    window_end INTEGER,
    spent INTEGER NOT NULL DEFAULT 0 CHECK (spent BETWEEN 0 AND 9007199254740991),
    held INTEGER NOT NULL DEFAULT 0 CHECK (held BETWEEN 0 AND 9007199254740991),
    UNIQUE (tenant, limit_id, budget, unit, scope, scope_value, window_kind, window_start)
) STRICT;
CREATE INDEX account_by_end ON account (window_end) WHERE window_end IS NOT NULL;

CREATE TABLE hold (
    id TEXT PRIMARY KEY,
    tenant TEXT NOT NULL,
    actor TEXT NOT NULL,
    backs_permit INTEGER NOT NULL, -- 1: made by "authorize", and only "outcome" ends it
    expires_at INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'settled', 'released')),
    parts TEXT NOT NULL -- JSON: [[budget, unit, amount, [account id, ...]], ...]
) STRICT, WITHOUT ROWID;

-- What counts in account.held: parts of holds neither ended nor expired.
CREATE TABLE live_part (
    account INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    hold TEXT NOT NULL,
    amount INTEGER NOT NULL,
    PRIMARY KEY (account, expires_at, hold)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER live_part_added AFTER INSERT ON live_part BEGIN
    UPDATE account SET held = held + NEW.amount WHERE id = NEW.account;
END;
CREATE TRIGGER live_part_gone AFTER DELETE ON live_part BEGIN
    UPDATE account SET held = held - OLD.amount WHERE id = OLD.account;
END;

-- First answers, for those who try again. A hold is as old as its answer, and is
-- cleared away with it.
CREATE TABLE answer (
    sequence INTEGER PRIMARY KEY, -- in the order of the store's clock
    tenant TEXT NOT NULL,
    actor TEXT NOT NULL,
    operation TEXT NOT NULL,
    key TEXT NOT NULL,
    content_sha256 TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    note TEXT NOT NULL,
    receipt TEXT NOT NULL,
    hold TEXT,
    UNIQUE (tenant, actor, operation, key)
) STRICT;
"""


class SqliteLedger:
    """The Ledger port on one SQLite file, which it owns while it is open.

    ``retention_seconds``: for how long at least a first answer is given again,
    and an expired hold can still be settled. Raises StorageError when the file
    can not be opened.
    """

    def __init__(
        self,
        path: Path,
        *,
        durability: Durability,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        retention_seconds: int = 86_400,
    ) -> None:
        self._clock = clock
        self._new_id = new_id
        # A hold expires at most MAX_HOLD_SECONDS after it was made, so one age
        # will do for answers, for holds and for the windows that they count in.
        self._kept_seconds = retention_seconds + MAX_HOLD_SECONDS
        self._prune_at = 0.0
        self._writer = SqliteWriter(path, schema=_SCHEMA, durability=durability)

    async def reserve(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int,
    ) -> Receipt:
        """See Ledger.reserve."""
        check_account(account)
        check_key(key)
        check_charges(charges, least=1)
        check_limits(limits)
        check_ttl(ttl_seconds)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            entries = _match(db, account, charges, limits, now)
            if not entries:
                return Receipt(replayed=False, note=key.note)
            if refusal := _refuse(entries, key.note, now):
                return refusal
            hold_id = self._new_id()
            expires_at = math.ceil(now + ttl_seconds)
            parts = _parts(db, account, charges, entries)
            _add_hold(db, account, key, hold_id, expires_at, parts)
            return Receipt(
                replayed=False,
                note=key.note,
                id=hold_id,
                expires_at=expires_at,
                charges=tuple(charges),
                limits=tuple(entry.state(held=entry.amount) for entry in entries),
            )

        return await self._once(account, key, operation)

    async def charge(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
    ) -> Receipt:
        """See Ledger.charge."""
        check_account(account)
        check_key(key)
        check_charges(charges, least=1)
        check_limits(limits)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            entries = _match(db, account, charges, limits, now)
            if not entries:
                return Receipt(replayed=False, note=key.note)
            if refusal := _refuse(entries, key.note, now):
                return refusal
            for entry in entries:
                _spend(db, _account_id(db, account, entry), entry.amount)
            return Receipt(
                replayed=False,
                note=key.note,
                id=self._new_id(),
                charges=tuple(charges),
                limits=tuple(entry.state(spent=entry.amount) for entry in entries),
            )

        return await self._once(account, key, operation)

    async def settle(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        """See Ledger.settle."""
        check_account(account)
        check_key(key)
        check_hold_id(hold_id)
        if charges is not None:
            check_charges(charges, least=0)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            hold = _find_hold(db, account, key, hold_id)
            parts = {(part.charge.budget, part.charge.unit): part for part in hold.parts}
            spent = tuple(part.charge for part in hold.parts) if charges is None else charges
            if any((charge.budget, charge.unit) not in parts for charge in spent):
                raise LedgerError(
                    ReasonCode.CHARGE_NOT_HELD,
                    "The hold holds nothing of that budget and unit: settle only what is held.",
                )
            over_hold = False
            for charge in spent:
                part = parts[charge.budget, charge.unit]
                over_hold = over_hold or charge.amount > part.charge.amount
                for account_id in part.account_ids:
                    _spend(db, account_id, charge.amount)
            _end_hold(db, hold, "settled")
            return Receipt(
                replayed=False,
                note=key.note,
                id=hold_id,
                charges=tuple(spent),
                over_hold=over_hold,
                late=hold.expires_at <= now,
            )

        return await self._once(account, key, operation)

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.release."""
        check_account(account)
        check_key(key)
        check_hold_id(hold_id)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            hold = _find_hold(db, account, key, hold_id)
            if hold.expires_at <= now:
                raise LedgerError(
                    ReasonCode.HOLD_EXPIRED,
                    "The hold has expired and its amounts have returned: nothing is left to do.",
                )
            _end_hold(db, hold, "released")
            return Receipt(
                replayed=False,
                note=key.note,
                id=hold_id,
                charges=tuple(part.charge for part in hold.parts),
            )

        return await self._once(account, key, operation)

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """See Ledger.state."""
        check_account(account)
        check_limits(limits)

        def operation(db: apsw.Connection) -> tuple[LimitState, ...]:
            now = self._now(db)
            return tuple(
                _read_entry(db, account, limit, 0, now).state()
                for limit in limits
                if limit.applies_to(account)
            )

        return await self._run(operation)

    async def close(self) -> None:
        """See Ledger.close."""
        await self._writer.close()

    async def _once(
        self,
        account: Account,
        key: IdempotencyKey,
        operation: Callable[[apsw.Connection, float], Receipt],
    ) -> Receipt:
        """Do it and remember the answer, or give the first answer again."""
        names = (account.tenant, account.actor, key.operation, key.key)

        def once(db: apsw.Connection) -> Receipt:
            first = db.execute(_FIND_ANSWER, names).fetchone()
            if first is not None:
                content_sha256, note, receipt = first
                if not hmac.compare_digest(content_sha256, key.content_sha256):
                    raise LedgerError(
                        ReasonCode.IDEMPOTENCY_KEY_REUSED,
                        "The key was used before, with other content: make a new key.",
                    )
                return receipt_from_json(receipt, note)
            now = self._now(db)
            answer = operation(db, now)
            db.execute(
                _ADD_ANSWER,
                (
                    *names,
                    key.content_sha256,
                    int(now),
                    key.note,
                    receipt_to_json(answer),
                    answer.id if answer.expires_at else None,
                ),
            )
            self._prune(db, now)
            return answer

        return await self._run(once)

    async def _run(self, operation: Callable[[apsw.Connection], T]) -> T:
        try:
            return await self._writer.run(operation)
        except StorageError as error:
            raise LedgerError(ReasonCode.BUDGET_UNAVAILABLE, error.message) from error

    def _now(self, db: apsw.Connection) -> float:
        """The store's clock. Whole seconds decide everything, so only they are kept."""
        highest: int = db.execute("SELECT highest FROM clock").get
        now = max(self._clock(), highest)
        if now >= highest + 1:
            db.execute("UPDATE clock SET highest = ?", (int(now),))
        return now

    def _prune(self, db: apsw.Connection, now: float) -> None:
        """Clear away a little of what is out of retention, oldest first."""
        if now < self._prune_at:
            return
        due = (int(now) - self._kept_seconds, PRUNE_BATCH)
        holds: list[Any] = db.execute(_PRUNE_ANSWERS, due).fetchall()
        pruned = len(holds)
        for (hold_id,) in holds:
            if hold_id is not None:
                expires_at, parts = db.execute(
                    "DELETE FROM hold WHERE id = ? RETURNING expires_at, parts", (hold_id,)
                ).get
                _end_parts(db, _Hold(hold_id, expires_at, _decode_parts(parts)))
        if pruned < PRUNE_BATCH:
            # No hold is left that was made in one of these windows.
            db.execute(_PRUNE_ACCOUNTS, due)
            pruned += db.changes()
        if not pruned:
            self._prune_at = now + 1


_FIND_ANSWER: Final = """
SELECT content_sha256, note, receipt FROM answer
WHERE tenant = ? AND actor = ? AND operation = ? AND key = ?
"""
_ADD_ANSWER: Final = """
INSERT INTO answer
    (tenant, actor, operation, key, content_sha256, created_at, note, receipt, hold)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_FIND_ACCOUNT: Final = """
SELECT id, spent, held, (SELECT min(expires_at) FROM live_part WHERE account = account.id)
FROM account
WHERE tenant = ? AND limit_id = ? AND budget = ? AND unit = ? AND scope = ? AND scope_value = ?
    AND window_kind = ? AND window_start = ?
"""
_ADD_ACCOUNT: Final = """
INSERT INTO account
    (tenant, limit_id, budget, unit, scope, scope_value, window_kind, window_start, window_end)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_ADD_HOLD: Final = """
INSERT INTO hold (id, tenant, actor, backs_permit, expires_at, state, parts)
VALUES (?, ?, ?, ?, ?, 'open', ?)
"""
_PRUNE_ANSWERS: Final = """
DELETE FROM answer WHERE created_at <= ?
    AND sequence IN (SELECT sequence FROM answer ORDER BY sequence LIMIT ?)
RETURNING hold
"""
_PRUNE_ACCOUNTS: Final = """
DELETE FROM account WHERE id IN
    (SELECT id FROM account WHERE window_end <= ? ORDER BY window_end LIMIT ?)
"""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A limit, the amount that is asked of it, and the account where it counts."""

    limit: Limit
    amount: int
    starts_at: int
    ends_at: int | None
    account_id: int | None
    """None until something is held or spent there."""
    spent: int
    held: int
    first_expiry: int | None
    """When the earliest of the holds that count here expires."""

    def state(self, *, spent: int = 0, held: int = 0) -> LimitState:
        """The limit's state, with what was spent or held since this was read."""
        return LimitState(
            limit=self.limit,
            spent=self.spent + spent,
            held=self.held + held,
            resets_at=self.ends_at,
        )

    def retry_after_seconds(self, now: float) -> int | None:
        """How long until there could be room for the amount, by waiting alone."""
        times = []
        if self.ends_at is not None and self.amount <= self.limit.limit:
            times.append(self.ends_at)
        if self.first_expiry is not None and self.spent + self.amount <= self.limit.limit:
            times.append(self.first_expiry)
        return math.ceil(min(times) - now) if times else None


class _Part(NamedTuple):
    """A charge of a hold, and the accounts in which it counts."""

    charge: Charge
    account_ids: list[int]


class _Hold(NamedTuple):
    id: str
    expires_at: int
    parts: list[_Part]


def _match(
    db: apsw.Connection,
    account: Account,
    charges: Sequence[Charge],
    limits: Sequence[Limit],
    now: float,
) -> list[_Entry]:
    """The limits that apply to the charges, in their order. Raises budget_unlimited."""
    amounts = {(charge.budget, charge.unit): charge.amount for charge in charges}
    unlimited = set(amounts)
    entries = []
    for limit in limits:
        bounded = (limit.budget, limit.unit)
        if bounded in amounts and limit.applies_to(account):
            unlimited.discard(bounded)
            entries.append(_read_entry(db, account, limit, amounts[bounded], now))
    if unlimited:
        raise LedgerError(
            ReasonCode.BUDGET_UNLIMITED,
            "No limit applies to a charge: name one for its budget and unit in the policy.",
        )
    return entries


def _read_entry(
    db: apsw.Connection, account: Account, limit: Limit, amount: int, now: float
) -> _Entry:
    """Where a limit stands now; what has expired there is let go first."""
    starts_at, ends_at = window_bounds(limit.window, now)
    names = _account_names(account, limit, starts_at)
    row = db.execute(_FIND_ACCOUNT, names).fetchone()
    if row is not None and row[3] is not None and row[3] <= now:
        db.execute(
            "DELETE FROM live_part WHERE account = ? AND expires_at <= ?", (row[0], int(now))
        )
        row = db.execute(_FIND_ACCOUNT, names).fetchone()
    account_id, spent, held, first_expiry = row or (None, 0, 0, None)
    return _Entry(limit, amount, starts_at, ends_at, account_id, spent, held, first_expiry)


def _account_names(account: Account, limit: Limit, starts_at: int) -> tuple[str | int, ...]:
    return (
        account.tenant,
        limit.id,
        limit.budget,
        limit.unit,
        limit.scope.value,
        limit.counts_for(account),
        limit.window.value,
        starts_at,
    )


def _refuse(entries: Sequence[_Entry], note: str, now: float) -> Receipt | None:
    """A refusal by the first limit that would be passed, if there is one."""
    for entry in entries:
        if entry.spent + entry.held + entry.amount > entry.limit.limit:
            return Receipt(
                replayed=False,
                note=note,
                limits=tuple(each.state() for each in entries),
                refused_by=entry.state(),
                retry_after_seconds=entry.retry_after_seconds(now),
            )
    return None


def _account_id(db: apsw.Connection, account: Account, entry: _Entry) -> int:
    """The id of the entry's account, which is opened if need be."""
    if entry.account_id is not None:
        return entry.account_id
    names = _account_names(account, entry.limit, entry.starts_at)
    db.execute(_ADD_ACCOUNT, (*names, entry.ends_at))
    return db.last_insert_rowid()


def _spend(db: apsw.Connection, account_id: int, amount: int) -> None:
    db.execute(
        "UPDATE account SET spent = spent + ?1 WHERE id = ?2 AND spent <= ?3 - ?1",
        (amount, account_id, MAX_AMOUNT),
    )
    if not db.changes():
        raise LedgerError(
            ReasonCode.BUDGET_UNAVAILABLE,
            "The sum of what is spent would pass 2^53 - 1, which no ledger can count.",
        )


def _parts(
    db: apsw.Connection, account: Account, charges: Sequence[Charge], entries: Sequence[_Entry]
) -> list[_Part]:
    parts = {(charge.budget, charge.unit): _Part(charge, []) for charge in charges}
    for entry in entries:
        part = parts[entry.limit.budget, entry.limit.unit]
        part.account_ids.append(_account_id(db, account, entry))
    return list(parts.values())


def _add_hold(
    db: apsw.Connection,
    account: Account,
    key: IdempotencyKey,
    hold_id: str,
    expires_at: int,
    parts: Sequence[_Part],
) -> None:
    db.execute(
        _ADD_HOLD,
        (
            hold_id,
            account.tenant,
            account.actor,
            key.operation == "authorize",
            expires_at,
            _encode_parts(parts),
        ),
    )
    db.executemany(
        "INSERT INTO live_part (account, expires_at, hold, amount) VALUES (?, ?, ?, ?)",
        [
            (account_id, expires_at, hold_id, part.charge.amount)
            for part in parts
            for account_id in part.account_ids
        ],
    )


def _find_hold(db: apsw.Connection, account: Account, key: IdempotencyKey, hold_id: str) -> _Hold:
    """The open hold of that id, if it is this actor's own. Raises LedgerError."""
    row = db.execute(
        "SELECT expires_at, parts, state FROM hold WHERE id = ?"
        " AND tenant = ? AND actor = ? AND backs_permit = ?",
        (hold_id, account.tenant, account.actor, key.operation == "outcome"),
    ).fetchone()
    if row is None:
        raise LedgerError(
            ReasonCode.HOLD_NOT_FOUND, "There is no such hold of this actor: check its id."
        )
    expires_at, parts, state = row
    if state == "settled":
        raise LedgerError(
            ReasonCode.HOLD_ALREADY_SETTLED, "The hold was settled before: nothing is left to do."
        )
    if state == "released":
        raise LedgerError(
            ReasonCode.HOLD_ALREADY_RELEASED, "The hold was released before: make a new charge."
        )
    return _Hold(hold_id, expires_at, _decode_parts(parts))


def _end_hold(db: apsw.Connection, hold: _Hold, state: str) -> None:
    _end_parts(db, hold)
    db.execute("UPDATE hold SET state = ? WHERE id = ?", (state, hold.id))


def _end_parts(db: apsw.Connection, hold: _Hold) -> None:
    """What the hold holds counts no more. Parts that have expired are gone already."""
    db.executemany(
        "DELETE FROM live_part WHERE account = ? AND expires_at = ? AND hold = ?",
        [
            (account_id, hold.expires_at, hold.id)
            for part in hold.parts
            for account_id in part.account_ids
        ],
    )


def _encode_parts(parts: Sequence[_Part]) -> str:
    return _ENCODER.encode(
        [
            [part.charge.budget, part.charge.unit, part.charge.amount, part.account_ids]
            for part in parts
        ]
    )


def _decode_parts(text: str) -> list[_Part]:
    return [
        _Part(Charge(budget, unit, amount), account_ids)
        for budget, unit, amount, account_ids in json.loads(text)
    ]


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
