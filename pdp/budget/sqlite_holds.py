"""Holds in SQLite, and charges that were made at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import apsw

from pdp.budget.ledger import Charge, HoldState, PartState
from pdp.budget.sqlite_accounts import (
    CHARGED,
    HELD,
    RETURNS,
    let_expired_go,
    move,
)


@dataclass(frozen=True, slots=True)
class Part:
    """A charge of a hold, and what has become of it."""

    charge: Charge
    left: int
    """What is held of it, or was when the hold expired."""
    settled: int
    refunded: int
    accounts: list[tuple[int, str]]
    """(account id, mode) where it counts, but for rates: nothing changes these any more."""

    @property
    def pair(self) -> tuple[str, str]:
        """Its budget and unit."""
        return self.charge.budget, self.charge.unit

    @property
    def to_refund(self) -> int:
        """The most that can be refunded still."""
        return self.settled - self.refunded


@dataclass(frozen=True, slots=True)
class Hold:
    """As it is kept."""

    id: str
    actor: str
    tool: str
    operation: str
    made_at: int
    expires_at: int
    state: str
    memo: str
    parts: list[Part]

    def is_live(self, now: float) -> bool:
        """Whether what is left of its parts is held."""
        return self.state == "open" and self.expires_at > now

    def shown(self) -> HoldState:
        """As the port shows it."""
        return HoldState(
            id=self.id,
            operation=self.operation,
            actor=self.actor,
            tool=self.tool,
            made_at=self.made_at,
            expires_at=self.expires_at,
            state=self.state,
            parts=tuple(
                PartState(charge=part.charge, settled=part.settled, refunded=part.refunded)
                for part in self.parts
            ),
            memo=self.memo,
        )


def add_hold(db: apsw.Connection, tenant: str, hold: Hold) -> None:
    """Keep a new hold, and what it holds if it is open."""
    db.execute(
        _ADD_HOLD,
        (
            hold.id,
            tenant,
            hold.actor,
            hold.tool,
            hold.operation,
            hold.made_at,
            hold.expires_at,
            hold.state,
            hold.memo,
            _encode_parts(hold.parts),
        ),
    )
    if hold.state == "open":
        db.executemany(
            _ADD_LIVE_PART,
            [
                (account_id, hold.expires_at, hold.id, part.left, mode)
                for part in hold.parts
                for account_id, mode in part.accounts
            ],
        )


def find_hold(db: apsw.Connection, tenant: str, hold_id: str) -> Hold | None:
    """A hold of the tenant, whoever made it."""
    row = db.execute(_FIND_HOLD, (hold_id, tenant)).fetchone()
    return row and _hold(row)


def list_holds(db: apsw.Connection, tenant: str, most: int, now: float) -> tuple[HoldState, ...]:
    """See Ledger.holds."""
    rows = db.execute(_LIST_HOLDS, (tenant, int(now), most)).fetchall()
    return tuple(_hold(row).shown() for row in rows)


def post(
    db: apsw.Connection, hold: Hold, part: Part, now: float, *, spent: int, dropped: int
) -> Part:
    """Count what was spent of a part, and hold ``dropped`` less of it. Raises
    budget_unavailable.
    """
    is_live = hold.is_live(now)
    left = part.left - dropped
    for account_id, mode in part.accounts:
        # All that was left of what is charged on expiry was spent then.
        charged = dropped if mode == CHARGED and not is_live else 0
        move(db, account_id, now, spent=0 if mode == HELD else spent - charged)
    if is_live and dropped:
        places = [(account_id, hold.expires_at, hold.id) for account_id, _ in part.accounts]
        if left:
            db.executemany(_KEEP_LIVE_PART, [(*place, left) for place in places])
        else:
            db.executemany(_DROP_LIVE_PART, places)
    return Part(part.charge, left, part.settled + spent, part.refunded, part.accounts)


def take_back(db: apsw.Connection, part: Part, amount: int, now: float) -> Part:
    """Refund some of what was settled of a part."""
    for account_id, mode in part.accounts:
        if mode != HELD:
            move(db, account_id, now, spent=-amount)
    return Part(part.charge, part.left, part.settled, part.refunded + amount, part.accounts)


def save(db: apsw.Connection, hold: Hold, state: str, parts: Sequence[Part]) -> None:
    """Keep what has become of a hold."""
    db.execute(
        "UPDATE hold SET state = ?, parts = ? WHERE id = ?",
        (state, _encode_parts(parts), hold.id),
    )


def expire(db: apsw.Connection, hold: Hold, now: float) -> None:
    """Let a live hold expire now, and all that is left of it return."""
    for part in hold.parts:
        post(db, hold, part, now, spent=0, dropped=part.left)
    parts = [
        Part(
            part.charge,
            part.left,
            part.settled,
            part.refunded,
            [(account_id, HELD if mode == HELD else RETURNS) for account_id, mode in part.accounts],
        )
        for part in hold.parts
    ]
    db.execute(
        "UPDATE hold SET expires_at = ?, parts = ? WHERE id = ?",
        (int(now), _encode_parts(parts), hold.id),
    )


def forget(db: apsw.Connection, hold_id: str, now: float) -> None:
    """Clear a hold away. What is charged on its expiry has been, from then on."""
    state, parts = db.execute(
        "DELETE FROM hold WHERE id = ? RETURNING state, parts", (hold_id,)
    ).get
    if state == "open":
        for part in _decode_parts(parts):
            for account_id, _ in part.accounts:
                let_expired_go(db, account_id, now)


_ADD_LIVE_PART: Final = """
INSERT INTO live_part (account, expires_at, hold, amount, mode) VALUES (?, ?, ?, ?, ?)
"""
_KEEP_LIVE_PART: Final = """
UPDATE live_part SET amount = ?4 WHERE account = ?1 AND expires_at = ?2 AND hold = ?3
"""
_DROP_LIVE_PART: Final = """
DELETE FROM live_part WHERE account = ? AND expires_at = ? AND hold = ?
"""
_FIND_HOLD: Final = """
SELECT id, actor, tool, operation, made_at, expires_at, state, memo, parts FROM hold
WHERE id = ? AND tenant = ?
"""
_LIST_HOLDS: Final = """
SELECT id, actor, tool, operation, made_at, expires_at, state, memo, parts FROM hold
WHERE tenant = ? AND state = 'open' AND expires_at > ?
ORDER BY expires_at, id LIMIT ?
"""
_ADD_HOLD: Final = """
INSERT INTO hold
    (id, tenant, actor, tool, operation, made_at, expires_at, state, memo, parts)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""


def _hold(row: tuple[Any, ...]) -> Hold:
    hold_id, actor, tool, operation, made_at, expires_at, state, memo, parts = row
    return Hold(
        hold_id, actor, tool, operation, made_at, expires_at, state, memo, _decode_parts(parts)
    )


def _encode_parts(parts: Sequence[Part]) -> str:
    return _ENCODER.encode(
        [
            [
                part.charge.budget,
                part.charge.unit,
                part.charge.amount,
                part.left,
                part.settled,
                part.refunded,
                part.accounts,
            ]
            for part in parts
        ]
    )


def _decode_parts(text: str) -> list[Part]:
    return [
        Part(Charge(budget, unit, amount), left, settled, refunded, accounts)
        for budget, unit, amount, left, settled, refunded, accounts in json.loads(text)
    ]


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
