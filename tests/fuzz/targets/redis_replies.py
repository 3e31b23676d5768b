"""What a shared store answers, broken or in the hands of a liar: as RESP, through redis-py, to
budgets, permits and revocations.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from redis.asyncio.connection import AbstractConnection, ConnectionPool

from pdp.budget.bounds import MAX_CHARGES, MAX_LIMITS
from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    AccountState,
    Charge,
    HoldState,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
    Scope,
    Window,
)
from pdp.budget.redis_ledger import RedisLedger
from pdp.canonical import JsonValue
from pdp.config import RedisSettings
from pdp.permit.claims import PermitError
from pdp.permit.redis_uses import RedisPermitUses
from pdp.permit.uses import Use
from pdp.redis_store import RedisStore, _PoolSender
from pdp.revocation.redis import RedisRevocations
from pdp.revocation.revocations import Kind, Revocation, RevocationError, Target
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.contract import SECRET, skipping_time
from tests.fuzz.targets import permit, revocation_list

NOW: Final = 1_800_000_000
HOLD: Final = "4f7c0a8e-0000-4000-8000-000000000001"
ACCOUNT: Final = Account(tenant="tenant_acme", actor="user-7", tool="orders.update")
ACCOUNT_ID: Final = "daily:llm:calls:tenant::day:1799971200"
CHARGES: Final = [Charge("llm", "calls", 6)]
LIMITS: Final = [
    Limit(id="daily", budget="llm", unit="calls", window=Window.DAY, limit=10, scope=Scope.TENANT),
    Limit(
        id="rate", budget="llm", unit="calls", window=Window.ROLLING, limit=100,
        scope=Scope.ACTOR, seconds=60, burst=100,
    ),
]  # fmt: skip
DAILY: Final = '["daily","llm","calls","day",10,"tenant","UTC",0,0,[50,80,95],true,"release"]'
PARTS: Final = f'[["llm","calls",6,[["r","{ACCOUNT_ID}"]]]]'
HELD: Final = [
    str(NOW), "reserve", "user-7", "orders.update", str(NOW + 60), "open", SECRET, PARTS, "",
]  # fmt: skip
STATES: Final = "0 6 1800057600 0 6 0 1800000004 0"
LIST: Final = json.dumps(revocation_list.LIST)
TARGET: Final = Target(kind=Kind.ACTOR, tenant="tenant_acme", name="user-7")
REVOCATION: Final = Revocation(target=TARGET, by="sre", reason="", at=1, until=2)


class Asked:
    """What is asked of the store, and what one in good order answers, in turn."""

    def __init__(
        self,
        ask: Callable[[RedisStore], Awaitable[object]],
        replies: Sequence[JsonValue],
        refusal: type[Exception],
    ) -> None:
        self.ask = ask
        self.replies = replies
        self.refusal = refusal


def _of_ledger(ask: Callable[[RedisLedger], Awaitable[object]], *replies: JsonValue) -> Asked:
    def asked(store: RedisStore) -> Awaitable[object]:
        return ask(RedisLedger(store, clock=lambda: float(NOW), new_id=lambda: HOLD))

    return Asked(asked, replies, LedgerError)


def _of_uses(ask: Callable[[RedisPermitUses], Awaitable[object]], *replies: JsonValue) -> Asked:
    return Asked(lambda store: ask(RedisPermitUses(store)), replies, PermitError)


def _of_revocations(
    ask: Callable[[RedisRevocations], Awaitable[object]], *replies: JsonValue
) -> Asked:
    return Asked(lambda store: ask(RedisRevocations(store)), replies, RevocationError)


def _key(operation: str) -> IdempotencyKey:
    return IdempotencyKey(operation=operation, key="k-1", content_sha256="0" * 64, note="n")


ATTEMPT: Final = "ATTEMPT"
"""Stands in a reply for what the script was told to repeat."""
TAKEN: Final = f"1800000060 0 0 0 -|{STATES}||1 50"
IS_CLOSED: Final = _of_uses(lambda uses: uses.is_closed(permit.USUAL), [ATTEMPT, "0"])
said: Final[list[bytes]] = []
"""What the store has replied to the question."""
QUESTIONS: Final[Sequence[Asked]] = [
    _of_ledger(
        lambda ledger: ledger.reserve(
            ACCOUNT, _key("reserve"), charges=CHARGES, limits=LIMITS, ttl_seconds=60
        ),
        [ATTEMPT, "time", str(NOW)],
        [ATTEMPT, "done", TAKEN, ""],
    ),
    _of_ledger(
        lambda ledger: ledger.reserve(
            ACCOUNT, _key("reserve"), charges=CHARGES, limits=LIMITS, ttl_seconds=60
        ),
        [ATTEMPT, "first", "0", "n", f'["{HOLD}",[["llm","calls",6]]]', "", TAKEN],
    ),
    _of_ledger(
        lambda ledger: ledger.charge(ACCOUNT, _key("charge"), charges=CHARGES, limits=LIMITS),
        [ATTEMPT, "done", f"0 0 0 1 60|{STATES}|2 6 0 1800000004 0|", DAILY],
    ),
    _of_ledger(
        lambda ledger: ledger.settle(ACCOUNT, _key("settle"), hold_id=HOLD, charges=None),
        [ATTEMPT, "parts", PARTS],
        [ATTEMPT, "done", "0 1 0 0 -|6", ""],
    ),
    _of_ledger(
        lambda ledger: ledger.refund(ACCOUNT, _key("refund"), hold_id=HOLD, charges=CHARGES),
        [ATTEMPT, "parts", PARTS],
        [ATTEMPT, "done", "0 0 0 0 -|-", ""],
    ),
    _of_ledger(
        lambda ledger: ledger.grant(ACCOUNT, _key("grant"), account_id=ACCOUNT_ID, amount=5),
        [ATTEMPT, "done", "0 0 0 0 -|0 0 1800057600 5", DAILY],
    ),
    _of_ledger(
        lambda ledger: ledger.state(ACCOUNT, limits=LIMITS), [ATTEMPT, "done", STATES]
    ),
    _of_ledger(lambda ledger: ledger.hold("tenant_acme", HOLD), [ATTEMPT, "done", *HELD]),
    _of_ledger(
        lambda ledger: ledger.holds("tenant_acme", most=10),
        [ATTEMPT, "done", f"pdp:{{t:tenant_acme}}:hold:{HOLD}", str(NOW + 60)],
        [ATTEMPT, "done", *HELD],
    ),
    _of_ledger(
        lambda ledger: ledger.accounts("tenant_acme", most=10),
        [ATTEMPT, "done", f"pdp:{{t:tenant_acme}}:sum:{ACCOUNT_ID}", "1800057600"],
        [ATTEMPT, "done", DAILY, "0 6 1800057600 0"],
    ),
    _of_ledger(
        lambda ledger: ledger.tenants(most=10), ["0", ["pdp:{t:tenant_acme}:clock"]]
    ),
    _of_uses(lambda uses: uses.redeem(permit.USUAL, key="k-1"), [ATTEMPT, "redeemed", "1"]),
    _of_uses(lambda uses: uses.close_permit(permit.USUAL), [ATTEMPT, "closed", "1"]),
    IS_CLOSED,
    _of_revocations(lambda kept: kept.version(), "7"),
    _of_revocations(lambda kept: kept.read(), [LIST]),
    _of_revocations(lambda kept: kept.add(REVOCATION), 1, 1, 8),
    _of_revocations(lambda kept: kept.lift(TARGET), 1, 8),
]  # fmt: skip
OTHER_REPLIES: Final = (
    b"-ERR no\r\n", b"-MOVED 1 x\r\n", b"-READONLY x\r\n", b"-NOSCRIPT x\r\n", b"+OK\r\n", b":1\r\n",
    b"$-1\r\n", b"*-1\r\n", b"*0\r\n", b"$999999999999\r\n", b"*999999999\r\n", b"*1\r\n" * 900,
    b":x\r\n", b"%1\r\n+a\r\n+b\r\n", b"_\r\n", b"#t\r\n", b",inf\r\n", b"!5\r\nERR a\r\n", b"",
    b"-\r\n", b"-MOVED\r\n", b"-ASK a b\r\n", b"*2\r\n-ERR a\r\n:1\r\n", b"$3\r\n\xff\xff\xff\r\n",
)  # fmt: skip


def samples() -> Iterable[bytes]:
    for number in range(len(QUESTIONS)):
        yield bytes([number])


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    asked = choices.pick(QUESTIONS)
    replies = [(reply, choices.number(4), choices.take(16)) for reply in asked.replies]
    logged = _Logged()
    logging.getLogger("pdp.redis_store").addHandler(logged)
    said.clear()
    try:
        answer = skipping_time(_answer(asked, replies))
    except asked.refusal as error:
        assert SECRET not in f"{error} {error!r} {error.__cause__!r}"  # noqa: PT017 - what it shows
        return False
    finally:
        logging.getLogger("pdp.redis_store").removeHandler(logged)
        assert SECRET not in str(logged.lines)
    _check(answer)
    if isinstance(answer, Use):
        assert any(f"\r\n{word}\r\n".encode() in said[-1] for word in ("redeemed", "again"))
    if asked is IS_CLOSED:
        assert b"\r\n%d\r\n" % bool(answer) in said[-1]
    return True


class _Logged(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


async def _answer(asked: Asked, replies: Sequence[tuple[JsonValue, int, bytes]]) -> object:
    pending = [functools.partial(_resp, *reply) for reply in replies]
    pool = ConnectionPool(_Answering, protocol=2, pending=pending, socket_timeout=None)
    settings = RedisSettings(addresses=["localhost:6379"], tls=False)
    store = RedisStore(settings, _PoolSender(pool))
    try:
        return await asked.ask(store)
    finally:
        await store.close()


class _Answering(AbstractConnection):
    """A connection to nowhere, which has its replies with it."""

    def __init__(self, *, pending: list[Callable[[str], bytes]], **options: Any) -> None:
        super().__init__(**options)
        self._pending = pending

    async def _connect(self) -> None:
        self._reader = asyncio.StreamReader()
        self._writer = self  # type: ignore[assignment]

    def _host_error(self) -> str:
        return "nowhere"

    def repr_pieces(self) -> Any:
        return []

    async def on_connect_check_health(self, check_health: bool = True) -> None:  # noqa: FBT001, FBT002 - the base's
        """Nobody is greeted."""
        self._parser.on_connect(self)  # type: ignore[no-untyped-call]

    async def send_packed_command(self, command: Any, *_: Any, **__: Any) -> None:
        """What is asked for is answered at once."""
        words = command.split(b"\r\n")[2::2]
        attempt = words[3 + int(words[2])].decode() if words[0] in {b"EVAL", b"EVALSHA"} else ""
        reader = self._reader
        assert reader is not None
        if self._pending:
            said.append(self._pending.pop(0)(attempt))
            reader.feed_data(said[-1])
        if not self._pending:
            reader.feed_eof()

    def close(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    async def wait_closed(self) -> None:
        pass


def _resp(reply: JsonValue, how: int, changes: bytes, attempt: str) -> bytes:
    choices = Choices(changes)
    match how:
        case 0:
            return _encoded(reply, attempt)
        case 1:
            return _encoded(edited(reply, choices), attempt)
        case 2:
            return edited_bytes(_encoded(reply, attempt), choices)
        case _:
            return choices.pick(OTHER_REPLIES)


def _encoded(value: JsonValue, attempt: str) -> bytes:
    match value:
        case None:
            return b"$-1\r\n"
        case bool() | int():
            return b":%d\r\n" % value
        case list():
            return b"*%d\r\n" % len(value) + b"".join(_encoded(each, attempt) for each in value)
        case dict():
            return _encoded([part for pair in value.items() for part in pair], attempt)
        case _:
            text = attempt if value == ATTEMPT else str(value)
            content = text.encode("utf-8", "surrogatepass")
            return b"$%d\r\n%b\r\n" % (len(content), content)


def _check(answer: object) -> None:
    """What comes of it is of the types that it is said to be, so that nobody fails by it later."""
    match answer:
        case Receipt():
            _check_receipt(answer)
        case HoldState():
            _check_hold(answer)
        case AccountState():
            _check_limit(answer.limit)
            _check_texts(answer.id, answer.counts_for)
            _check_numbers(
                answer.starts_at, answer.spent, answer.held, answer.granted, answer.resets_at
            )
        case LimitState():
            _check_state(answer)
        case Use():
            _check_flags(answer.replayed)
            _check_numbers(answer.uses_left)
        case tuple():
            for each in answer:
                _check(each)
        case Mapping():
            assert all(isinstance(each, Revocation) for each in answer.values())
        case _:
            assert answer is None or type(answer) in {str, bool, int}, type(answer)


def _check_receipt(receipt: Receipt) -> None:
    _check_texts(receipt.id, receipt.note)
    _check_flags(receipt.replayed, receipt.late, receipt.over_hold)
    _check_numbers(receipt.expires_at, receipt.retry_after_seconds)
    _check_charges(receipt.charges)
    refused = [receipt.refused_by] if receipt.refused_by is not None else []
    for state in [*receipt.limits, *receipt.shadow_refusals, *refused]:
        _check_state(state)


def _check_hold(hold: HoldState) -> None:
    _check_texts(hold.id, hold.operation, hold.actor, hold.tool, hold.state, hold.memo)
    _check_numbers(hold.made_at, hold.expires_at)
    _check_charges([part.charge for part in hold.parts])
    for part in hold.parts:
        _check_numbers(part.settled, part.refunded)


def _check_state(state: LimitState) -> None:
    _check_limit(state.limit)
    _check_numbers(state.spent, state.held, state.granted, state.resets_at)


def _check_limit(limit: Limit) -> None:
    _check_texts(limit.id, limit.budget, limit.unit, limit.timezone)
    _check_numbers(limit.limit, limit.seconds, limit.burst, limit.until, *limit.warn_at)
    _check_flags(limit.enforced)


def _check_charges(charges: Sequence[Charge]) -> None:
    assert len(charges) <= MAX_CHARGES
    for charge in charges:
        _check_texts(charge.budget, charge.unit)
        _check_numbers(charge.amount)
        assert charge.amount >= 0


def _check_texts(*texts: object) -> None:
    assert all(type(text) is str for text in texts), texts


def _check_flags(*flags: object) -> None:
    assert all(type(flag) is bool for flag in flags), flags


def _check_numbers(*numbers: object) -> None:
    assert all(
        number is None or (type(number) is int and abs(number) <= MAX_AMOUNT * MAX_LIMITS)
        for number in numbers
    ), numbers
