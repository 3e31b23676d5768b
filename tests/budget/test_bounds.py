from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pdp.budget.bounds import (
    MAX_CHARGES,
    MAX_HOLD_SECONDS,
    MAX_LIMITS,
    MAX_MEMO_BYTES,
    MAX_NOTE_BYTES,
    MAX_RATE_SECONDS,
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

ACCOUNT = Account(tenant="acme", actor="alice@example.com", tool="orders.update")
KEY = IdempotencyKey(operation="reserve", key="k", content_sha256="0" * 64)
CHARGE = Charge("tools", "calls", 1)
LIMIT = Limit(
    id="calls", budget="tools", unit="calls", window=Window.DAY, limit=1, scope=Scope.TENANT
)
RATE = replace(LIMIT, window=Window.ROLLING, seconds=60, burst=1)
TEXTS = ("", "x" * 256, "line\nbreak", "null\0", "\ud800", None, 7, b"bytes")
"""No names: empty, too long, control characters, lone surrogates, other types."""


def test_what_is_within_bounds_passes() -> None:
    check_account(ACCOUNT)
    check_account(replace(ACCOUNT, tool=""))
    check_account(replace(ACCOUNT, tenant="t" * 128, actor="ä" * 255, tool="o" * 128))
    check_key(replace(KEY, key="k" * 255, note="ä" * (MAX_NOTE_BYTES // 2)))
    check_charges([replace(CHARGE, amount=MAX_AMOUNT)], least=1)
    check_charges([replace(CHARGE, amount=0)], least=0)
    check_charges([replace(CHARGE, unit=f"u{n}") for n in range(MAX_CHARGES)], least=1)
    check_limits([replace(LIMIT, id=f"l{n}", limit=0) for n in range(MAX_LIMITS)])
    check_limits([LIMIT, replace(LIMIT, window=Window.HOUR), replace(LIMIT, scope=Scope.TOOL)])
    check_limits([replace(RATE, seconds=MAX_RATE_SECONDS, burst=MAX_BUCKET // MAX_RATE_SECONDS)])
    check_limits([replace(LIMIT, timezone="Europe/Berlin", warn_at=(), enforced=False)])
    check_limits([replace(LIMIT, warn_at=(1, 2, 3, 4, 5, 6, 99, 100))])
    check_ttl(1)
    check_ttl(MAX_HOLD_SECONDS)
    check_hold_id("h" * 255)
    check_memo("ä" * (MAX_MEMO_BYTES // 2))
    check_most(1000)
    check_grant(-MAX_AMOUNT)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "check",
    (
        lambda text: check_account(replace(ACCOUNT, tenant=text)),
        lambda text: check_account(replace(ACCOUNT, actor=text)),
        lambda text: check_key(replace(KEY, key=text)),
        lambda text: check_key(replace(KEY, operation=text)),
        lambda text: check_key(replace(KEY, content_sha256=text)),
        lambda text: check_charges([replace(CHARGE, budget=text)], least=1),
        lambda text: check_charges([replace(CHARGE, unit=text)], least=1),
        lambda text: check_limits([replace(LIMIT, id=text)]),
        lambda text: check_limits([replace(LIMIT, budget=text)]),
        lambda text: check_limits([replace(LIMIT, unit=text)]),
        check_hold_id,
    ),
)
def test_names_are_short_and_printable(check: Callable[[object], None], text: object) -> None:
    with pytest.raises(ValueError, match=r" is not "):
        check(text)


@pytest.mark.parametrize("name", (None, "x" * 256, "line\nbreak"))
@pytest.mark.parametrize(
    "check",
    (
        lambda name: check_account(replace(ACCOUNT, tool=name)),
        lambda name: check_account(replace(ACCOUNT, organisation=name)),
        lambda name: check_account(replace(ACCOUNT, team=name)),
        lambda name: check_account(replace(ACCOUNT, session=name)),
    ),
)
def test_what_may_be_empty_is_a_name_else(check: Callable[[object], None], name: object) -> None:
    with pytest.raises(ValueError, match=r" is not "):
        check(name)


@pytest.mark.parametrize(
    "wrong",
    (
        replace(RATE, limit=0),
        replace(RATE, seconds=0),
        replace(RATE, seconds=MAX_RATE_SECONDS + 1),
        replace(RATE, burst=0),
        replace(RATE, burst=MAX_BUCKET // 60 + 1),
        replace(RATE, burst=True),
        replace(LIMIT, seconds=1),
        replace(LIMIT, burst=1),
        replace(RATE, on_expiry=OnExpiry.CHARGE),
        replace(LIMIT, window=Window.CONCURRENT, on_expiry=OnExpiry.CHARGE),
        replace(LIMIT, timezone="Europe/Atlantis"),
        replace(LIMIT, timezone=""),
        replace(LIMIT, warn_at=(50, 50)),
        replace(LIMIT, warn_at=(80, 50)),
        replace(LIMIT, warn_at=(0,)),
        replace(LIMIT, warn_at=(101,)),
        replace(LIMIT, warn_at=tuple(range(1, 10))),
        replace(LIMIT, enforced=1),  # type: ignore[arg-type]
        replace(LIMIT, on_expiry="charge"),  # type: ignore[arg-type]
    ),
)
def test_a_limit_out_of_bounds_is_refused(wrong: Limit) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own message
        check_limits([wrong])


def test_listings_grants_and_memos_are_bounded() -> None:
    for most in (0, 1001, True):
        with pytest.raises(ValueError, match="most is not"):
            check_most(most)
    for amount in (0, MAX_AMOUNT + 1, 1.5):
        with pytest.raises(ValueError, match=r"grant|amount"):
            check_grant(amount)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memo is not"):
        check_memo("x" * (MAX_MEMO_BYTES + 1))


@pytest.mark.parametrize("digest", ("0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n"))
def test_a_content_digest_is_sixty_four_lower_case_digits(digest: str) -> None:
    with pytest.raises(ValueError, match="content_sha256 is not"):
        check_key(replace(KEY, content_sha256=digest))


@pytest.mark.parametrize("note", ("x" * (MAX_NOTE_BYTES + 1), "ä" * MAX_NOTE_BYTES, None, b""))
def test_a_note_is_text_of_bounded_length(note: str) -> None:
    with pytest.raises(ValueError, match="note is not"):
        check_key(replace(KEY, note=note))


@pytest.mark.parametrize("amount", (-1, MAX_AMOUNT + 1, True, 1.5, "1", None))
def test_limits_are_whole_numbers(amount: int) -> None:
    with pytest.raises(ValueError, match="limit is not a whole number"):
        check_limits([replace(LIMIT, limit=amount)])


@pytest.mark.parametrize("seconds", (0, -1, MAX_HOLD_SECONDS + 1, True, 1.5))
def test_a_hold_lives_for_a_bounded_time(seconds: int) -> None:
    with pytest.raises(ValueError, match="ttl_seconds is not a whole number"):
        check_ttl(seconds)


@pytest.mark.parametrize("change", ({"window": "day"}, {"scope": "tenant"}))
def test_windows_and_scopes_are_those_of_the_port(change: dict[str, str]) -> None:
    wrong = Limit(
        id="calls",
        budget="tools",
        unit="calls",
        window=change.get("window", Window.DAY),  # type: ignore[arg-type]
        limit=1,
        scope=change.get("scope", Scope.TENANT),  # type: ignore[arg-type]
    )
    with pytest.raises(ValueError, match="window, scope"):
        check_limits([wrong])


def test_nothing_stands_twice() -> None:
    with pytest.raises(ValueError, match="twice in charges"):
        check_charges([CHARGE, replace(CHARGE, amount=2)], least=1)
    with pytest.raises(ValueError, match="twice in limits"):
        check_limits([LIMIT, replace(LIMIT, limit=2)])


def test_one_operation_is_of_bounded_size() -> None:
    with pytest.raises(ValueError, match="more than 16 charges"):
        check_charges([replace(CHARGE, unit=f"u{n}") for n in range(MAX_CHARGES + 1)], least=1)
    with pytest.raises(ValueError, match="more than 64 limits"):
        check_limits([replace(LIMIT, id=f"l{n}") for n in range(MAX_LIMITS + 1)])


LENGTHS: tuple[tuple[str, int, Callable[[str], None]], ...] = (
    ("tenant", 128, lambda text: check_account(replace(ACCOUNT, tenant=text))),
    ("actor", 255, lambda text: check_account(replace(ACCOUNT, actor=text))),
    ("tool", 128, lambda text: check_account(replace(ACCOUNT, tool=text))),
    ("organisation", 128, lambda text: check_account(replace(ACCOUNT, organisation=text))),
    ("team", 128, lambda text: check_account(replace(ACCOUNT, team=text))),
    ("session", 255, lambda text: check_account(replace(ACCOUNT, session=text))),
    ("idempotency key", 255, lambda text: check_key(replace(KEY, key=text))),
    ("budget", 64, lambda text: check_charges([replace(CHARGE, budget=text)], least=1)),
    ("unit", 64, lambda text: check_charges([replace(CHARGE, unit=text)], least=1)),
    ("limit id", 128, lambda text: check_limits([replace(LIMIT, id=text)])),
    ("budget", 64, lambda text: check_limits([replace(LIMIT, budget=text)])),
    ("unit", 64, lambda text: check_limits([replace(LIMIT, unit=text)])),
    ("hold id", 255, check_hold_id),
)


@pytest.mark.parametrize(("name", "longest", "check"), LENGTHS)
def test_a_name_is_refused_by_its_own_name_from_the_first_character_too_many(
    name: str, longest: int, check: Callable[[str], None]
) -> None:
    check("x")
    check("x" * longest)
    with pytest.raises(ValueError, match=rf"^{name} is not 1 to {longest} printable characters$"):
        check("x" * (longest + 1))


AMOUNTS: tuple[tuple[str, int, int, Callable[[int], None]], ...] = (
    ("amount", 1, MAX_AMOUNT, lambda n: check_charges([replace(CHARGE, amount=n)], least=1)),
    ("limit", 0, MAX_AMOUNT, lambda n: check_limits([replace(LIMIT, limit=n)])),
    ("seconds", 1, MAX_RATE_SECONDS, lambda n: check_limits([replace(RATE, seconds=n)])),
    ("burst", 1, MAX_BUCKET // 7, lambda n: check_limits([replace(RATE, seconds=7, burst=n)])),
    ("warn_at", 1, 100, lambda n: check_limits([replace(LIMIT, warn_at=(n,))])),
    (
        "until", 0, MAX_AMOUNT,
        lambda n: check_limits([replace(LIMIT, window=Window.LIFETIME, until=n)]),
    ),
    ("ttl_seconds", 1, MAX_HOLD_SECONDS, check_ttl),
    ("most", 1, 1000, check_most),
    ("amount", -MAX_AMOUNT, MAX_AMOUNT, check_grant),
)  # fmt: skip


@pytest.mark.parametrize(("name", "least", "most", "check"), AMOUNTS)
def test_a_number_is_refused_by_its_name_from_the_first_beyond_its_bounds(
    name: str, least: int, most: int, check: Callable[[int], None]
) -> None:
    check(least)
    check(most)
    for beyond in (least - 1, most + 1):
        with pytest.raises(
            ValueError, match=rf"^{name} is not a whole number from {least} to {most}$"
        ):
            check(beyond)


def test_an_end_is_for_lifetimes_alone() -> None:
    for window in Window:
        changed = replace(LIMIT, window=window, until=7)
        if window is Window.ROLLING:
            changed = replace(RATE, until=7)
        if window is Window.LIFETIME:
            check_limits([changed])
        else:
            with pytest.raises(ValueError, match=r"^until is for lifetimes$"):
                check_limits([changed])


def test_a_rate_of_nothing_is_none() -> None:
    check_limits([replace(RATE, limit=1)])
    with pytest.raises(ValueError, match=rf"^limit is not a whole number from 1 to {MAX_AMOUNT}$"):
        check_limits([replace(RATE, limit=0)])


def test_what_is_wrong_is_said_in_words() -> None:
    for wrong, said in (
        (replace(LIMIT, seconds=1), "seconds and burst are for rates"),
        (replace(RATE, on_expiry=OnExpiry.CHARGE), "on_expiry is for limits that count spend"),
        (replace(LIMIT, timezone="Nowhere"), "timezone is not one of the IANA database"),
        (replace(LIMIT, warn_at=(2, 1)), "warn_at is not at most 8 percentages, ascending"),
    ):
        with pytest.raises(ValueError, match=rf"^{said}$"):
            check_limits([wrong])
