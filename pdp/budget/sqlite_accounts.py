"""Accounts in SQLite: what counts together under one limit, in one window.

Spend stands on the account. What is held stands apart, in live parts of holds that
know the account and their deadline; triggers keep their sum on the account. Whoever
reads or changes an account first lets go what has expired there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import apsw

from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    AccountState,
    Charge,
    LedgerError,
    Limit,
    LimitState,
    OnExpiry,
    Warned,
    Window,
)
from pdp.budget.receipt_json import limit_from_json, limit_to_json
from pdp.budget.windows import window_bounds
from pdp.reason import ReasonCode

RETURNS: Final = "returns"
"""Of what is held in an account: on expiry nothing was spent."""
CHARGED: Final = "charged"
"""On expiry it is spent."""
HELD: Final = "held"
"""It counts while it is held, and is never spent."""

_named_as: Final = functools.lru_cache(maxsize=4096)(limit_to_json)


class Counts(NamedTuple):
    """What stands on an account."""

    spent: int
    held: int
    granted: int
    warned: int
    """The highest percent that was warned of."""
    level: int
    """Of a rate: what has not drained yet, times its milliseconds."""
    drained_at: int
    """Of a rate: since when that is so, milliseconds."""


_NOTHING: Final = Counts(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Entry:
    """A limit, the amount that is asked of it, and the account where it counts."""

    limit: Limit
    amount: int
    names: tuple[str | int, ...]
    ends_at: int | None
    account_id: int | None
    """None until something is held or spent there."""
    named_as: str | None
    """The limit as it was named last."""
    counts: Counts

    @property
    def state(self) -> LimitState:
        """The limit as it stands, before anything is taken."""
        return _limit_state(self.limit, self.ends_at, self.counts)

    @property
    def mode(self) -> str | None:
        """How what is held counts there; None where holding changes nothing."""
        window = self.limit.window
        if window is Window.ROLLING:
            return None
        if window is Window.CONCURRENT:
            return HELD
        return CHARGED if self.limit.on_expiry is OnExpiry.CHARGE else RETURNS

    def counts_charge(self, charge: Charge) -> bool:
        """Whether the amount is this charge's."""
        return (self.limit.budget, self.limit.unit) == (charge.budget, charge.unit)

    def has_room(self) -> bool:
        """Whether the limit allows the amount now."""
        limit, counts = self.limit, self.counts
        if limit.window is Window.ROLLING:
            return counts.level + self.amount * _period(limit) <= limit.burst * _period(limit)
        return counts.spent + counts.held + self.amount <= limit.limit + counts.granted

    def can_be_counted(self) -> bool:
        """Whether the sum stays a number that every ledger can count."""
        counts = self.counts
        return (
            self.limit.window is Window.ROLLING
            or counts.spent + counts.held + self.amount <= MAX_AMOUNT
        )

    def retry_after_seconds(self, db: apsw.Connection, now: float) -> int | None:
        """How long until there could be room for the amount, by waiting alone."""
        limit, counts = self.limit, self.counts
        if limit.window is Window.CONCURRENT:
            return 1 if self.amount <= limit.limit else None
        if limit.window is Window.ROLLING:
            if self.amount > limit.burst:
                return None
            above = counts.level + (self.amount - limit.burst) * _period(limit)
            return max(1, _rounded_up(_rounded_up(above, limit.limit), 1000))
        times = []
        if self.ends_at is not None and self.amount <= limit.limit:
            times.append(self.ends_at)
        if counts.spent + self.amount <= limit.limit + counts.granted:
            first_return = db.execute(_FIRST_RETURN, (self.account_id,)).get
            if first_return is not None:
                times.append(first_return)
        return max(1, math.ceil(min(times) - now)) if times else None


class Taken(NamedTuple):
    """What came of an entry: the account's id, its state, and the warnings."""

    account_id: int
    state: LimitState
    warnings: list[Warned]


def read_entry(
    db: apsw.Connection, account: Account, limit: Limit, amount: int, now: float
) -> Entry:
    """Where a limit stands now; what has expired there is let go first."""
    starts_at, ends_at = window_bounds(limit, now)
    window = limit.window.value
    if limit.window is Window.ROLLING:
        window = f"{window}:{limit.seconds}"
    names = (
        limit.shared_by(account),
        limit.id,
        limit.counts_for(account),
        starts_at,
        limit.budget,
        limit.unit,
        limit.scope.value,
        window,
    )
    row = db.execute(_FIND_ACCOUNT, names).fetchone()
    if row is not None and row[1] is not None and row[1] <= now:
        let_expired_go(db, row[0], now)
        row = db.execute(_FIND_ACCOUNT, names).fetchone()
    account_id, _, named_as, *numbers = row or (None, None, None, *_NOTHING)
    counts = Counts(*numbers)
    if limit.window is Window.ROLLING:
        counts = _drained(limit, counts, now)
    return Entry(limit, amount, names, ends_at, account_id, named_as, counts)


def take(db: apsw.Connection, entry: Entry, now: float, *, is_held: bool) -> Taken:
    """Count the entry's amount, for which there must be room, unless it is held: the hold
    that is added next does that.
    """
    limit, amount = entry.limit, entry.amount
    spent, held, granted, warned, level, drained_at = entry.counts
    if limit.window is Window.ROLLING:
        level = min(level + amount * _period(limit), MAX_AMOUNT)
    elif is_held:
        held += amount
    elif limit.window is not Window.CONCURRENT:
        spent += amount
    warnings = [
        Warned(limit_id=limit.id, percent=percent)
        for percent, reached_at in limit.warnings_at()
        if percent > warned and spent + held >= reached_at
    ]
    if warnings:
        warned = warnings[-1].percent
    counts = Counts(spent, held, granted, warned, level, drained_at)
    state = _limit_state(limit, entry.ends_at, counts)
    return Taken(_write(db, entry, counts, state, now), state, warnings)


def move(db: apsw.Connection, account_id: int, now: float, *, spent: int) -> None:
    """Add to what was spent in an account. Raises budget_unavailable."""
    if not spent:
        return
    change = (spent, account_id, MAX_AMOUNT, int(now))
    db.execute(_MOVE, change)
    if db.changes():
        return
    let_expired_go(db, account_id, now)
    db.execute(_MOVE, change)
    if not db.changes():
        raise uncountable()


def let_expired_go(db: apsw.Connection, account_id: int, now: float) -> None:
    """What has expired in an account is held no more; some of it is spent instead."""
    gone: list[Any] = db.execute(_LET_EXPIRED_GO, (account_id, int(now))).fetchall()
    charged = sum(amount for amount, mode in gone if mode == CHARGED)
    if charged:
        db.execute(
            "UPDATE account SET spent = min(spent + ?, ?) WHERE id = ?",
            (charged, MAX_AMOUNT, account_id),
        )


def grant(db: apsw.Connection, tenant: str, account_id: str, amount: int, now: float) -> LimitState:
    """Grant in an account of the tenant. Raises account_not_found."""
    is_id = account_id.isascii() and account_id.isdigit() and len(account_id) <= _LONGEST_ID
    found = _account_state(db, tenant, int(account_id), now) if is_id else None
    if (
        found is None
        or not found.limit.window.is_calendar
        or (found.resets_at is not None and found.resets_at <= now)
    ):
        raise LedgerError(
            ReasonCode.ACCOUNT_NOT_FOUND,
            "The tenant has no such account that takes a grant now: list its accounts again.",
        )
    granted = min(max(0, found.granted + amount), MAX_AMOUNT)
    db.execute("UPDATE account SET granted = ? WHERE id = ?", (granted, int(account_id)))
    return LimitState(
        limit=found.limit,
        spent=found.spent,
        held=found.held,
        resets_at=found.resets_at,
        granted=granted,
    )


def accounts_of(
    db: apsw.Connection, tenant: str, most: int, now: float
) -> tuple[AccountState, ...]:
    """See Ledger.accounts."""
    rows: list[Any] = db.execute(_LIST_ACCOUNTS, (tenant, int(now), most)).fetchall()
    states = (_account_state(db, tenant, account_id, now) for (account_id,) in rows)
    return tuple(state for state in states if state is not None)


def uncountable() -> LedgerError:
    """The refusal of a sum that passes MAX_AMOUNT."""
    return LedgerError(
        ReasonCode.BUDGET_UNAVAILABLE,
        "The sum of what is spent would pass 2^53 - 1, which no ledger can count.",
    )


_LONGEST_ID: Final = 18
"""Digits of an id that surely fits into 64 bits."""

_FIND_ACCOUNT: Final = """
SELECT id, (SELECT min(expires_at) FROM live_part WHERE account = account.id), named_as,
    spent, held, granted, warned, level, drained_at
FROM account
WHERE tenant = ? AND limit_id = ? AND counts_for = ? AND window_start = ?
    AND budget = ? AND unit = ? AND scope = ? AND window_kind = ?
"""
_ADD_ACCOUNT: Final = """
INSERT INTO account (
    tenant, limit_id, counts_for, window_start, budget, unit, scope, window_kind,
    window_end, over_at, named_as, spent, warned, level, drained_at
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
_COUNT_SPENT: Final = """
UPDATE account SET spent = ?, warned = ?, named_as = ? WHERE id = ?
"""
_COUNT_NOW: Final = """
UPDATE account SET level = ?, drained_at = ?, named_as = ?, over_at = ? WHERE id = ?
"""
_MOVE: Final = """
UPDATE account SET spent = max(0, spent + ?1) WHERE id = ?2 AND spent + ?1 <= ?3
    AND NOT EXISTS (SELECT 1 FROM live_part WHERE account = ?2 AND expires_at <= ?4)
"""
_LET_EXPIRED_GO: Final = """
DELETE FROM live_part WHERE account = ? AND expires_at <= ? RETURNING amount, mode
"""
_FIRST_RETURN: Final = """
SELECT min(expires_at) FROM live_part WHERE account = ? AND mode = 'returns'
"""
_SHOW_ACCOUNT: Final = """
SELECT named_as, counts_for, window_start, window_end,
    spent, held, granted, warned, level, drained_at
FROM account WHERE id = ? AND tenant = ?
"""
_LIST_ACCOUNTS: Final = """
SELECT id FROM account
WHERE tenant = ? AND (window_end IS NULL OR window_end > ?)
ORDER BY limit_id, counts_for, window_start, budget, unit, scope, window_kind LIMIT ?
"""


def _write(db: apsw.Connection, entry: Entry, counts: Counts, state: LimitState, now: float) -> int:
    """Keep what was counted, all but what is held. Returns the id of the account."""
    before, is_calendar = entry.counts, entry.limit.window.is_calendar
    named_as = _named_as(entry.limit)
    # Whatever is held somewhere is let go before an account goes: it outlives its end for
    # longer than any hold lasts.
    over_at = entry.ends_at if is_calendar else state.resets_at or math.ceil(now)
    if entry.account_id is None:
        numbers = (counts.spent, counts.warned, counts.level, counts.drained_at)
        db.execute(_ADD_ACCOUNT, (*entry.names, entry.ends_at, over_at, named_as, *numbers))
        return db.last_insert_rowid()
    if not is_calendar:
        db.execute(
            _COUNT_NOW, (counts.level, counts.drained_at, named_as, over_at, entry.account_id)
        )
    elif (counts.spent, counts.warned, named_as) != (before.spent, before.warned, entry.named_as):
        db.execute(_COUNT_SPENT, (counts.spent, counts.warned, named_as, entry.account_id))
    return entry.account_id


def _account_state(
    db: apsw.Connection, tenant: str, account_id: int, now: float
) -> AccountState | None:
    let_expired_go(db, account_id, now)
    row = db.execute(_SHOW_ACCOUNT, (account_id, tenant)).fetchone()
    if row is None:
        return None
    named_as, counts_for, starts_at, ends_at, *numbers = row
    limit, counts = limit_from_json(named_as), Counts(*numbers)
    if limit.window is Window.ROLLING:
        counts = _drained(limit, counts, now)
    state = _limit_state(limit, ends_at, counts)
    return AccountState(
        id=str(account_id),
        limit=limit,
        counts_for=counts_for,
        starts_at=starts_at,
        spent=state.spent,
        held=state.held,
        granted=state.granted,
        resets_at=state.resets_at,
    )


def _limit_state(limit: Limit, ends_at: int | None, counts: Counts) -> LimitState:
    spent = counts.spent
    if limit.window is Window.ROLLING:
        spent = _rounded_up(counts.level, _period(limit))
        if counts.level:
            empty_at = counts.drained_at + _rounded_up(counts.level, limit.limit)
            ends_at = _rounded_up(empty_at, 1000)
    return LimitState(
        limit=limit, spent=spent, held=counts.held, resets_at=ends_at, granted=counts.granted
    )


def _drained(limit: Limit, counts: Counts, now: float) -> Counts:
    """A rate's counts now. Its clock never runs backwards."""
    now_ms = max(counts.drained_at, math.floor(now * 1000))
    level = max(0, counts.level - limit.limit * (now_ms - counts.drained_at))
    return counts._replace(level=level, drained_at=now_ms)


def _period(limit: Limit) -> int:
    """The milliseconds of a rate, and how its bucket counts one unit."""
    return limit.seconds * 1000


def _rounded_up(value: int, by: int) -> int:
    return -(-value // by)
