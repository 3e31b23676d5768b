"""The ledger in one SQLite file, for one sidecar.

An *account* is what one limit counts together in one window: see sqlite_accounts.
A *hold* knows the accounts, and so the windows, in which it was made.
"""

from __future__ import annotations

import hmac
import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from pdp.budget.bounds import (
    ENDED_BY,
    MAX_HOLD_SECONDS,
    check_account,
    check_charges,
    check_grant,
    check_hold_id,
    check_key,
    check_limits,
    check_memo,
    check_most,
    check_ttl,
)
from pdp.budget.ledger import (
    Account,
    AccountState,
    Charge,
    HoldState,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
)
from pdp.budget.receipt_json import receipt_from_json, receipt_to_json
from pdp.budget.sqlite_accounts import Entry, accounts_of, grant, read_entry, take, uncountable
from pdp.budget.sqlite_holds import (
    Hold,
    Part,
    add_hold,
    expire,
    find_hold,
    forget,
    list_holds,
    post,
    save,
    take_back,
)
from pdp.budget.sqlite_schema import SCHEMA, SCHEMA_VERSION
from pdp.reason import ReasonCode
from pdp.storage import Durability, SqliteWriter, StorageError

T = TypeVar("T")

PRUNE_BATCH: Final = 8
"""Rows of each table that one operation clears away at most."""


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
        self._writer = SqliteWriter(
            path, schema=SCHEMA, schema_version=SCHEMA_VERSION, durability=durability
        )

    async def reserve(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int,
        memo: str = "",
    ) -> Receipt:
        """See Ledger.reserve."""
        check_ttl(ttl_seconds)
        return await self._take(account, key, charges, limits, ttl_seconds, memo)

    async def charge(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        memo: str = "",
    ) -> Receipt:
        """See Ledger.charge."""
        return await self._take(account, key, charges, limits, None, memo)

    async def _take(
        self,
        account: Account,
        key: IdempotencyKey,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
        memo: str,
    ) -> Receipt:
        """Hold the charges or, with no time to live, spend them."""
        check_account(account)
        check_key(key)
        check_charges(charges, least=1)
        check_limits(limits)
        check_memo(memo)
        is_held = ttl_seconds is not None

        def operation(db: apsw.Connection, now: float) -> Receipt:
            entries = _match(db, account, charges, limits, now)
            if not charges:
                return Receipt(replayed=False, note=key.note)
            over = [entry for entry in entries if not entry.has_room()]
            for entry in over:
                if entry.limit.enforced:
                    return Receipt(
                        replayed=False,
                        note=key.note,
                        limits=tuple(each.state for each in entries),
                        refused_by=entry.state,
                        retry_after_seconds=entry.retry_after_seconds(db, now),
                    )
            if not all(entry.can_be_counted() for entry in entries):
                raise uncountable()
            counted = [take(db, entry, now, is_held=is_held) for entry in entries]
            hold = Hold(
                id=self._new_id(),
                actor=account.actor,
                tool=account.tool,
                operation=key.operation,
                made_at=int(now),
                expires_at=0 if ttl_seconds is None else math.ceil(now + ttl_seconds),
                state="open" if is_held else "settled",
                memo=memo,
                parts=[
                    Part(
                        charge,
                        left=charge.amount if is_held else 0,
                        settled=0 if is_held else charge.amount,
                        refunded=0,
                        accounts=[
                            (taken.account_id, entry.mode)
                            for entry, taken in zip(entries, counted, strict=True)
                            if entry.mode is not None and entry.counts_charge(charge)
                        ],
                    )
                    for charge in charges
                ],
            )
            add_hold(db, account.tenant, hold)
            return Receipt(
                replayed=False,
                note=key.note,
                id=hold.id,
                expires_at=hold.expires_at,
                charges=tuple(charges),
                limits=tuple(taken.state for taken in counted),
                shadow_refusals=tuple(entry.state for entry in over),
                warnings=tuple(each for taken in counted for each in taken.warnings),
            )

        return await self._once(account, key, operation, makes_hold=True)

    async def settle(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
        final: bool = True,
    ) -> Receipt:
        """See Ledger.settle."""
        check_account(account)
        check_key(key)
        check_hold_id(hold_id)
        if charges is not None:
            check_charges(charges, least=0)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            hold = _own_hold(db, account, key, hold_id)
            if not (hold.state == "settled" and key.operation == "lease_settle"):
                _refuse_ended(hold)
            spent = charges
            if spent is None:
                spent = [replace(part.charge, amount=part.left) for part in hold.parts]
            amounts = _amounts(hold, spent)
            over_hold = False
            parts = []
            for part in hold.parts:
                amount = amounts.get(part.pair, 0)
                dropped = part.left if final else min(part.left, amount)
                after = post(db, hold, part, now, spent=amount, dropped=dropped)
                parts.append(after)
                if part.pair in amounts and after.settled > part.charge.amount:
                    over_hold = True
            save(db, hold, "settled" if final else hold.state, parts)
            return Receipt(
                replayed=False,
                note=key.note,
                id=hold_id,
                charges=tuple(spent),
                over_hold=over_hold,
                late=not hold.is_live(now),
            )

        return await self._once(account, key, operation)

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.release."""
        check_account(account)
        check_key(key)
        check_hold_id(hold_id)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            hold = _own_hold(db, account, key, hold_id)
            _refuse_ended(hold)
            _refuse_expired(hold, now)
            parts = [post(db, hold, part, now, spent=0, dropped=part.left) for part in hold.parts]
            save(db, hold, "released", parts)
            return Receipt(replayed=False, note=key.note, id=hold_id, charges=_left(hold))

        return await self._once(account, key, operation)

    async def refund(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        """See Ledger.refund."""
        check_account(account)
        check_key(key)
        check_hold_id(hold_id)
        if charges is not None:
            check_charges(charges, least=1)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            hold = _found(find_hold(db, account.tenant, hold_id))
            refunded = charges
            if refunded is None:
                refunded = [
                    replace(part.charge, amount=part.to_refund)
                    for part in hold.parts
                    if part.to_refund
                ]
            amounts = _amounts(hold, refunded)
            if not amounts or any(
                amounts.get(part.pair, 0) > part.to_refund for part in hold.parts
            ):
                raise LedgerError(
                    ReasonCode.REFUND_EXCEEDS_SPEND,
                    "No more can be refunded than was settled and not refunded before.",
                )
            parts = [take_back(db, part, amounts.get(part.pair, 0), now) for part in hold.parts]
            save(db, hold, hold.state, parts)
            return Receipt(replayed=False, note=key.note, id=hold_id, charges=tuple(refunded))

        return await self._once(account, key, operation)

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """See Ledger.state."""
        check_account(account)
        check_limits(limits)
        return await self._look(
            lambda db, now: tuple(
                read_entry(db, account, limit, 0, now).state
                for limit in limits
                if limit.applies_to(account)
            )
        )

    async def hold(self, tenant: str, hold_id: str) -> HoldState | None:
        """See Ledger.hold."""
        check_hold_id(hold_id)

        def operation(db: apsw.Connection, _now: float) -> HoldState | None:
            hold = find_hold(db, tenant, hold_id)
            return None if hold is None else hold.shown()

        return await self._look(operation)

    async def holds(self, tenant: str, *, most: int) -> tuple[HoldState, ...]:
        """See Ledger.holds."""
        check_most(most)
        return await self._look(lambda db, now: list_holds(db, tenant, most, now))

    async def accounts(self, tenant: str, *, most: int) -> tuple[AccountState, ...]:
        """See Ledger.accounts."""
        check_most(most)
        return await self._look(lambda db, now: accounts_of(db, tenant, most, now))

    async def tenants(self, *, most: int) -> tuple[str, ...]:
        """See Ledger.tenants."""
        check_most(most, highest=10_000)

        def operation(db: apsw.Connection) -> tuple[str, ...]:
            names: list[str] = []
            name = ""  # stands for no tenant, and sorts before all of them
            while len(names) < most:
                name = db.execute(_NEXT_TENANT, (name,)).get
                if name is None:
                    break
                names.append(name)
            return tuple(names)

        return await self._run(operation)

    async def grant(
        self, account: Account, key: IdempotencyKey, *, account_id: str, amount: int
    ) -> Receipt:
        """See Ledger.grant."""
        check_account(account)
        check_key(key)
        check_grant(amount)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            state = grant(db, account.tenant, account_id, amount, now)
            return Receipt(replayed=False, note=key.note, limits=(state,))

        return await self._once(account, key, operation)

    async def expire(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.expire."""
        check_account(account)
        check_key(key)
        check_hold_id(hold_id)

        def operation(db: apsw.Connection, now: float) -> Receipt:
            hold = _found(find_hold(db, account.tenant, hold_id))
            _refuse_ended(hold)
            _refuse_expired(hold, now)
            expire(db, hold, now)
            return Receipt(replayed=False, note=key.note, id=hold_id, charges=_left(hold))

        return await self._once(account, key, operation)

    async def close(self) -> None:
        """See Ledger.close."""
        await self._writer.close()

    async def _once(
        self,
        account: Account,
        key: IdempotencyKey,
        operation: Callable[[apsw.Connection, float], Receipt],
        *,
        makes_hold: bool = False,
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
                    (answer.id or None) if makes_hold else None,
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

    async def _look(self, operation: Callable[[apsw.Connection, float], T]) -> T:
        return await self._run(lambda db: operation(db, self._now(db)))

    def _prune(self, db: apsw.Connection, now: float) -> None:
        """Clear away a little of what is out of retention, oldest first."""
        if now < self._prune_at:
            return
        due = (int(now) - self._kept_seconds, PRUNE_BATCH)
        holds: list[Any] = db.execute(_PRUNE_ANSWERS, due).fetchall()
        pruned = len(holds)
        for (hold_id,) in holds:
            if hold_id is not None:
                forget(db, hold_id, now)
        if pruned < PRUNE_BATCH:
            # No hold is left that counts in one of these accounts.
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
_PRUNE_ANSWERS: Final = """
DELETE FROM answer WHERE created_at <= ?
    AND sequence IN (SELECT sequence FROM answer ORDER BY sequence LIMIT ?)
RETURNING hold
"""
_PRUNE_ACCOUNTS: Final = """
DELETE FROM account WHERE id IN
    (SELECT id FROM account WHERE over_at <= ? ORDER BY over_at LIMIT ?)
"""
# Every hold is the tenant's of an answer that is kept as long.
_NEXT_TENANT: Final = """
SELECT min(tenant) FROM (
    SELECT min(tenant) AS tenant FROM answer WHERE tenant > ?1
    UNION ALL
    SELECT min(tenant) FROM account WHERE tenant > ?1
)
"""


def _match(
    db: apsw.Connection,
    account: Account,
    charges: Sequence[Charge],
    limits: Sequence[Limit],
    now: float,
) -> list[Entry]:
    """The limits that apply to the charges, in their order. Raises budget_unlimited."""
    amounts = {(charge.budget, charge.unit): charge.amount for charge in charges}
    unlimited = set(amounts)
    entries = []
    for limit in limits:
        bounded = (limit.budget, limit.unit)
        if bounded in amounts and limit.applies_to(account):
            if limit.enforced:
                unlimited.discard(bounded)
            entries.append(read_entry(db, account, limit, amounts[bounded], now))
    if unlimited:
        raise LedgerError(
            ReasonCode.BUDGET_UNLIMITED,
            "No limit applies to a charge: name one for its budget and unit in the policy.",
        )
    return entries


def _amounts(hold: Hold, charges: Sequence[Charge]) -> dict[tuple[str, str], int]:
    """The charges by budget and unit, all of them of the hold. Raises charge_not_held."""
    amounts = {(charge.budget, charge.unit): charge.amount for charge in charges}
    if amounts.keys() - {part.pair for part in hold.parts}:
        raise LedgerError(
            ReasonCode.CHARGE_NOT_HELD,
            "The hold holds nothing of that budget and unit: name only what is held.",
        )
    return amounts


def _left(hold: Hold) -> tuple[Charge, ...]:
    return tuple(replace(part.charge, amount=part.left) for part in hold.parts if part.left)


def _own_hold(db: apsw.Connection, account: Account, key: IdempotencyKey, hold_id: str) -> Hold:
    """The actor's own hold of that id, which this operation may end. Raises hold_not_found."""
    hold = find_hold(db, account.tenant, hold_id)
    asked = (account.actor, ENDED_BY.get(key.operation))
    return _found(hold if hold and (hold.actor, hold.operation) == asked else None)


def _found(hold: Hold | None) -> Hold:
    if hold is None:
        raise LedgerError(
            ReasonCode.HOLD_NOT_FOUND, "There is no such hold for this caller: check its id."
        )
    return hold


def _refuse_ended(hold: Hold) -> None:
    if hold.state == "settled":
        raise LedgerError(
            ReasonCode.HOLD_ALREADY_SETTLED, "The hold was settled before: nothing is left to do."
        )
    if hold.state == "released":
        raise LedgerError(
            ReasonCode.HOLD_ALREADY_RELEASED, "The hold was released before: make a new charge."
        )


def _refuse_expired(hold: Hold, now: float) -> None:
    if hold.expires_at <= now:
        raise LedgerError(
            ReasonCode.HOLD_EXPIRED,
            "The hold has expired and nothing is held under it: nothing is left to do.",
        )
