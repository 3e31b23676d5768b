"""What every ledger checks before it begins, whichever its store.

Callers have checked all of this against their own contract; what arrives here
out of bounds is a bug in the caller and raises ValueError. Messages name the
field and never show its value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from pdp.budget.ledger import (
    MAX_AMOUNT,
    MAX_BUCKET,
    Account,
    Charge,
    IdempotencyKey,
    Limit,
    OnExpiry,
    Scope,
    Window,
)
from pdp.budget.windows import is_timezone

MAX_CHARGES: Final = 16
"""Charges in one operation."""

MAX_LIMITS: Final = 64
"""Limits that are given to one operation."""

MAX_HOLD_SECONDS: Final = 3600
"""How long a hold may live."""

MAX_NOTE_BYTES: Final = 16 * 1024

MAX_MEMO_BYTES: Final = 1024
MAX_WARNINGS: Final = 8
"""Thresholds of one limit."""

MAX_RATE_SECONDS: Final = 31 * 86_400
"""The longest time of a rate."""

ENDED_BY: Final = {
    "settle": "reserve",
    "release": "reserve",
    "outcome": "authorize",
    "lease_settle": "lease",
}
"""Which operation finds the holds of which."""

OPERATIONS: Final = frozenset(
    {*ENDED_BY, *ENDED_BY.values(), "charge", "refund", "grant", "expire", "delegate"}
)

_SHA256_HEX: Final = re.compile(r"[0-9a-f]{64}")


def check_account(account: Account) -> None:
    """Tenant and actor are there; the rest may be empty."""
    _check_text("tenant", account.tenant, 128)
    _check_text("actor", account.actor, 255)
    for name, text, longest in (
        ("tool", account.tool, 128),
        ("organisation", account.organisation, 128),
        ("team", account.team, 128),
        ("session", account.session, 255),
    ):
        if text != "":
            _check_text(name, text, longest)


def check_key(key: IdempotencyKey) -> None:
    """The key is a key of the port, its digest a digest, its note not too long."""
    if type(key.operation) is not str or key.operation not in OPERATIONS:
        raise ValueError("operation is not one of the port's")
    _check_text("idempotency key", key.key, 255)
    if type(key.content_sha256) is not str or not _SHA256_HEX.fullmatch(key.content_sha256):
        raise ValueError("content_sha256 is not 64 lower-case hexadecimal digits")
    if type(key.note) is not str or len(key.note.encode()) > MAX_NOTE_BYTES:
        raise ValueError(f"note is not text of at most {MAX_NOTE_BYTES} bytes")


def check_charges(charges: Sequence[Charge], *, least: int) -> None:
    """Amounts from ``least`` up, each pair of budget and unit at most once."""
    if len(charges) > MAX_CHARGES:
        raise ValueError(f"more than {MAX_CHARGES} charges")
    for charge in charges:
        _check_text("budget", charge.budget, 64)
        _check_text("unit", charge.unit, 64)
        _check_int("amount", charge.amount, least, MAX_AMOUNT)
    if len({(charge.budget, charge.unit) for charge in charges}) != len(charges):
        raise ValueError("a pair of budget and unit stands twice in charges")


def check_limits(limits: Sequence[Limit]) -> None:
    """Limits are whole, and no two of them count in the same account."""
    if len(limits) > MAX_LIMITS:
        raise ValueError(f"more than {MAX_LIMITS} limits")
    for limit in limits:
        _check_text("limit id", limit.id, 128)
        _check_text("budget", limit.budget, 64)
        _check_text("unit", limit.unit, 64)
        _check_int("limit", limit.limit, 0, MAX_AMOUNT)
        if (
            type(limit.window) is not Window
            or type(limit.scope) is not Scope
            or type(limit.on_expiry) is not OnExpiry
            or type(limit.enforced) is not bool
        ):
            raise ValueError("window, scope, on_expiry or enforced is not one of the port's")
        if not is_timezone(limit.timezone):
            raise ValueError("timezone is not one of the IANA database")
        _check_warn_at(limit.warn_at)
        _check_rate(limit)
        _check_int("until", limit.until, 0, MAX_AMOUNT)
        if limit.until and limit.window is not Window.LIFETIME:
            raise ValueError("until is for lifetimes")
    accounts = {(each.id, each.budget, each.unit, each.window, each.scope) for each in limits}
    if len(accounts) != len(limits):
        raise ValueError("a limit stands twice in limits")


def _check_warn_at(warn_at: tuple[int, ...]) -> None:
    if len(warn_at) > MAX_WARNINGS or list(warn_at) != sorted(set(warn_at)):
        raise ValueError(f"warn_at is not at most {MAX_WARNINGS} percentages, ascending")
    for percent in warn_at:
        _check_int("warn_at", percent, 1, 100)


def _check_rate(limit: Limit) -> None:
    if limit.window is Window.ROLLING:
        _check_int("limit", limit.limit, 1, MAX_AMOUNT)
        _check_int("seconds", limit.seconds, 1, MAX_RATE_SECONDS)
        _check_int("burst", limit.burst, 1, MAX_BUCKET // limit.seconds)
    elif (limit.seconds, limit.burst) != (0, 0):
        raise ValueError("seconds and burst are for rates")
    if not limit.window.is_calendar and limit.on_expiry is not OnExpiry.RELEASE:
        raise ValueError("on_expiry is for limits that count spend")


def check_ttl(ttl_seconds: int) -> None:
    """A hold lives for a second at least."""
    _check_int("ttl_seconds", ttl_seconds, 1, MAX_HOLD_SECONDS)


def check_memo(memo: str) -> None:
    """A memo is not too long."""
    if type(memo) is not str or len(memo.encode()) > MAX_MEMO_BYTES:
        raise ValueError(f"memo is not text of at most {MAX_MEMO_BYTES} bytes")


def check_most(most: int, *, highest: int = 1000) -> None:
    """How much is listed."""
    _check_int("most", most, 1, highest)


def check_grant(amount: int) -> None:
    """A grant is given or taken back."""
    _check_int("amount", amount, -MAX_AMOUNT, MAX_AMOUNT)
    if amount == 0:
        raise ValueError("a grant is not 0")


def check_hold_id(hold_id: str) -> None:
    """It could be an id; whether there is such a hold is for the store to say."""
    _check_text("hold id", hold_id, 255)


def _check_text(name: str, text: str, longest: int) -> None:
    if type(text) is not str or not 1 <= len(text) <= longest or not text.isprintable():
        raise ValueError(f"{name} is not 1 to {longest} printable characters")


def _check_int(name: str, value: int, least: int, most: int) -> None:
    # bool is an int to Python, and no amount.
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is not a whole number from {least} to {most}")
