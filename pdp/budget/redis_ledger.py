"""The ledger in Redis or Valkey, for any number of sidecars.

Accounts, holds and answers are what they are in SQLite (pdp.budget.sqlite). Each
operation is one Lua script, which decides by the server's clock. What the scripts do
not do: they compute no windows, as calendars are not for Lua, and they name no keys.
The caller does both for the time, and for the parts of the hold, that it takes to be
true; a script that finds others says so, and the caller asks anew.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

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
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
    Scope,
    Window,
)
from pdp.budget.windows import WindowBounds, window_bounds
from pdp.reason import ReasonCode
from pdp.redis_store import RedisStore, Script, key_names, tenant_key
from pdp.storage import StorageError

T = TypeVar("T")

MAX_QUESTIONS: Final = 4
"""How often a script is asked anew at most: once for the time, once for the hold's
parts, and again where both change meanwhile."""
REMEMBERED_HOLDS: Final = 4096
"""Holds whose parts are remembered, so that settling them takes one script."""

KNOWN_TENANTS: Final = 10_000
"""Tenants of whom it is remembered that the store knows them."""

_log: Final = logging.getLogger(__name__)
_SCRIPTS: Final = Path(__file__).parent / "scripts"


def _script(name: str) -> Script:
    return Script(_SCRIPTS / "prelude.lua", _SCRIPTS / name)


_TAKE: Final = _script("take.lua")
_RESOLVE: Final = _script("resolve.lua")
_STATE: Final = _script("state.lua")

_MESSAGES: Final[dict[str, str]] = {
    ReasonCode.IDEMPOTENCY_KEY_REUSED: (
        "The key was used before, with other content: make a new key."
    ),
    ReasonCode.BUDGET_UNLIMITED: (
        "No limit applies to a charge: name one for its budget and unit in the policy."
    ),
    ReasonCode.HOLD_NOT_FOUND: "There is no such hold of this actor: check its id.",
    ReasonCode.HOLD_ALREADY_SETTLED: "The hold was settled before: nothing is left to do.",
    ReasonCode.HOLD_ALREADY_RELEASED: "The hold was released before: make a new charge.",
    ReasonCode.HOLD_EXPIRED: (
        "The hold has expired and its amounts have returned: nothing is left to do."
    ),
    ReasonCode.CHARGE_NOT_HELD: (
        "The hold holds nothing of that budget and unit: settle only what is held."
    ),
    ReasonCode.BUDGET_UNAVAILABLE: (
        "The sum of what is spent would pass 2^53 - 1, which no ledger can count."
    ),
}


class RedisLedger:
    """The Ledger port on a shared store, which it closes when it is closed.

    Time is the server's, and never runs backwards for a tenant. ``clock`` is for
    tests: with it, the caller's time takes the place of the server's.
    """

    def __init__(
        self,
        store: RedisStore,
        *,
        clock: Callable[[], float] | None = None,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        retention_seconds: int = 86_400,
    ) -> None:
        self._store = store
        self._clock = clock
        self._new_id = new_id
        self._kept_seconds = retention_seconds + MAX_HOLD_SECONDS
        self._ahead = 0.0
        """How far the store's clock was ahead when it last said so: only a guess."""
        self._parts: OrderedDict[str, str] = OrderedDict()
        self._tenants: OrderedDict[str, None] = OrderedDict()
        """Those that have a clock in the store, for all that this ledger has seen."""
        self._lost = False

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
        check_ttl(ttl_seconds)
        return await self._take(account, key, charges, limits, str(ttl_seconds))

    async def charge(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
    ) -> Receipt:
        """See Ledger.charge."""
        return await self._take(account, key, charges, limits, "")

    async def settle(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        """See Ledger.settle."""
        if charges is not None:
            check_charges(charges, least=0)
        return await self._resolve(account, key, hold_id, "settled", charges)

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.release."""
        return await self._resolve(account, key, hold_id, "released", None)

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """See Ledger.state."""
        check_account(account)
        check_limits(limits)
        applied = [limit for limit in limits if limit.applies_to(account)]

        async def operation() -> tuple[LimitState, ...]:
            attempt = _attempt()

            async def ask(now: float) -> list[str]:
                bounds = [window_bounds(limit.window, now) for limit in applied]
                keys = [_clock_key(account)]
                arguments = self._preamble(account, attempt)
                for limit, window in zip(applied, bounds, strict=True):
                    keys += _account_keys(account.tenant, _account_name(account, limit, window))
                    arguments += _edges(window)
                reply = await self._run(account, _STATE, keys, arguments)
                return [*reply, *(_optional(window.ends_at) for window in bounds)]

            _, sums, _, *ends = await self._until_timely(ask)
            counts = [int(each) for each in sums.split()]
            return tuple(
                LimitState(limit=limit, spent=spent, held=held, resets_at=_when(ends_at))
                for limit, spent, held, ends_at in zip(
                    applied, counts[::2], counts[1::2], ends, strict=True
                )
            )

        return await self._complete(operation)

    async def close(self) -> None:
        """See Ledger.close."""
        await self._store.close()

    async def _take(
        self,
        account: Account,
        key: IdempotencyKey,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        lasts: str,
    ) -> Receipt:
        check_account(account)
        check_key(key)
        check_charges(charges, least=1)
        check_limits(limits)
        amounts = {(charge.budget, charge.unit): charge.amount for charge in charges}
        applied = [
            limit
            for limit in limits
            if (limit.budget, limit.unit) in amounts and limit.applies_to(account)
        ]
        unlimited = amounts.keys() - {(limit.budget, limit.unit) for limit in applied}
        taken_id = self._new_id()
        asked = _asked_json(taken_id if charges else "", charges)

        async def operation() -> Receipt:
            attempt = _attempt()
            parts = ""

            async def ask(now: float) -> list[str]:
                nonlocal parts
                windows = [window_bounds(limit.window, now) for limit in applied]
                names = [
                    _account_name(account, limit, window)
                    for limit, window in zip(applied, windows, strict=True)
                ]
                parts = _parts_json(charges, applied, names)
                keys = [
                    _clock_key(account),
                    _answer_key(account, key),
                    _hold_key(account, taken_id),
                ]
                arguments = [
                    *self._preamble(account, attempt),
                    key.content_sha256,
                    key.note,
                    asked,
                    account.actor,
                    _flag(key.operation == "authorize"),
                    lasts,
                    parts,
                    _flag(bool(unlimited)),
                ]
                for limit, window, name in zip(applied, windows, names, strict=True):
                    keys += _account_keys(account.tenant, name)
                    amount = amounts[limit.budget, limit.unit]
                    arguments += [*_edges(window), str(limit.limit), str(amount)]
                    arguments.append(_limit_json(limit))
                return await self._run(account, _TAKE, keys, arguments)

            receipt = _receipt(await self._until_timely(ask), asked, key.note, applied)
            if receipt.expires_at and not receipt.replayed:
                self._remember_parts(receipt.id, parts)
            return receipt

        return await self._complete(operation)

    async def _resolve(
        self,
        account: Account,
        key: IdempotencyKey,
        hold_id: str,
        state: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        check_account(account)
        check_key(key)
        check_hold_id(hold_id)

        async def operation() -> Receipt:
            attempt = _attempt()
            parts_json = self._parts.pop(hold_id, "")
            for _ in range(MAX_QUESTIONS):
                parts = _decode_parts(parts_json)
                held = {(part.charge.budget, part.charge.unit): part for part in parts}
                shown = [part.charge for part in parts] if charges is None else charges
                posted = {} if state == "released" else _amounts(shown)
                keys = [
                    _clock_key(account),
                    _answer_key(account, key),
                    _hold_key(account, hold_id),
                ]
                asked = _asked_json(hold_id, shown)
                arguments = [
                    *self._preamble(account, attempt),
                    key.content_sha256,
                    key.note,
                    asked,
                    account.actor,
                    _flag(key.operation == "outcome"),
                    parts_json,
                    state,
                    "" if posted.keys() <= held.keys() else ReasonCode.CHARGE_NOT_HELD,
                    _flag(
                        any(
                            amount > held[pair].charge.amount
                            for pair, amount in posted.items()
                            if pair in held
                        )
                    ),
                ]
                for pair, part in held.items():
                    for name in part.accounts:
                        keys += _account_keys(account.tenant, name)
                        arguments += [str(posted.get(pair, 0)), str(part.charge.amount)]
                reply = await self._run(account, _RESOLVE, keys, arguments)
                if reply[0] != "parts":
                    return _receipt(reply, asked, key.note, ())
                parts_json = reply[1]
            raise StorageError("The hold did not stay the same while it was looked at.")

        return await self._complete(operation)

    async def _until_timely(self, ask: Callable[[float], Awaitable[list[str]]]) -> list[str]:
        """Ask with the windows of the time that the store says it is."""
        now = time.time() + self._ahead if self._clock is None else self._clock()
        for _ in range(MAX_QUESTIONS):
            reply = await ask(now)
            if reply[0] != "time":
                return reply
            now = float(reply[1])
            self._ahead = now - time.time()
        raise StorageError("The windows did not stay the same while they were looked at.")

    async def _complete(self, operation: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._store.complete(operation)
        except StorageError as error:
            raise LedgerError(ReasonCode.BUDGET_UNAVAILABLE, error.message) from error

    def _preamble(self, account: Account, attempt: str) -> list[str]:
        """The arguments that every script begins with."""
        strict = "s" if self._store.strict else ""
        known = "k" if account.tenant in self._tenants else ""
        return [
            attempt,
            "" if self._clock is None else repr(self._clock()),
            strict + known,
            str(self._kept_seconds),
        ]

    async def _run(
        self, account: Account, script: Script, keys: list[str], arguments: list[str]
    ) -> list[str]:
        """Run a script of a tenant. Raises StorageError where the store has lost what it
        had of the tenant: counting from zero would be wrong.
        """
        reply = await self._store.run(script, keys, arguments)
        if reply[0] == "lost":
            if not self._lost:
                _log.error(
                    "the shared store has lost budgets: restore it, or restart the sidecars to"
                    " begin with nothing spent"
                )
            self._lost = True
            raise StorageError("The store has lost what was spent: nothing can be decided.")
        if reply[0] == "done":
            self._tenants[account.tenant] = None
            self._tenants.move_to_end(account.tenant)
            if len(self._tenants) > KNOWN_TENANTS:
                self._tenants.popitem(last=False)
        return reply

    def _remember_parts(self, hold_id: str, parts: str) -> None:
        self._parts[hold_id] = parts
        if len(self._parts) > REMEMBERED_HOLDS:
            self._parts.popitem(last=False)


class _Part(NamedTuple):
    """A charge of a hold, and the names of the accounts in which it counts."""

    charge: Charge
    accounts: list[str]


def _attempt() -> str:
    """Names one operation of one caller: the same when its script is sent again."""
    return uuid.uuid4().hex


def _flag(value: bool) -> str:  # noqa: FBT001 - the flag itself
    return "1" if value else "0"


def _optional(value: int | None) -> str:
    return "" if value is None else str(value)


def _when(text: str) -> int | None:
    return int(text) if text not in {"", "-"} else None


def _edges(window: WindowBounds) -> list[str]:
    return [str(window.starts_at), _optional(window.ends_at)]


def _amounts(charges: Sequence[Charge]) -> dict[tuple[str, str], int]:
    return {(charge.budget, charge.unit): charge.amount for charge in charges}


# Keys


def _clock_key(account: Account) -> str:
    return tenant_key(account.tenant, "clock")


def _answer_key(account: Account, key: IdempotencyKey) -> str:
    return tenant_key(account.tenant, "answer", account.actor, key.operation, key.key)


def _hold_key(account: Account, hold_id: str) -> str:
    return tenant_key(account.tenant, "hold", hold_id)


def _account_name(account: Account, limit: Limit, window: WindowBounds) -> str:
    """Where a limit counts, among the accounts of a tenant."""
    return key_names(
        limit.id,
        limit.budget,
        limit.unit,
        limit.scope,
        limit.counts_for(account),
        limit.window,
        str(window.starts_at),
    )


def _account_keys(tenant: str, name: str) -> list[str]:
    return [f"{tenant_key(tenant, kind)}:{name}" for kind in ("sum", "expiry")]


# What the store keeps as text


def _compact(value: Any) -> str:  # noqa: ANN401 - any JSON
    return _ENCODER.encode(value)


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


def _asked_json(taken_id: str, charges: Sequence[Charge]) -> str:
    return _compact([taken_id, [[each.budget, each.unit, each.amount] for each in charges]])


def _limit_json(limit: Limit) -> str:
    return _compact([limit.id, limit.budget, limit.unit, limit.window, limit.limit, limit.scope])


def _limit(text: str) -> Limit:
    name, budget, unit, window, most, scope = json.loads(text)
    return Limit(
        id=name, budget=budget, unit=unit, window=Window(window), limit=most, scope=Scope(scope)
    )


def _parts_json(charges: Sequence[Charge], limits: Sequence[Limit], names: Sequence[str]) -> str:
    accounts: dict[tuple[str, str], list[str]] = {
        (charge.budget, charge.unit): [] for charge in charges
    }
    for limit, name in zip(limits, names, strict=True):
        accounts[limit.budget, limit.unit].append(name)
    return _compact(
        [
            [each.budget, each.unit, each.amount, accounts.get((each.budget, each.unit), [])]
            for each in charges
        ]
    )


def _decode_parts(text: str) -> list[_Part]:
    return [
        _Part(Charge(budget, unit, amount), accounts)
        for budget, unit, amount, accounts in json.loads(text or "[]")
    ]


def _receipt(reply: Sequence[str], asked: str, note: str, applied: Sequence[Limit]) -> Receipt:
    """What a script's reply says. Raises LedgerError."""
    kind, *rest = reply
    if kind == "error":
        raise LedgerError(rest[0], _MESSAGES[rest[0]])
    replayed = False
    if kind == "first":
        own, note, asked, shown, outcome = rest
        # An answer to this very operation, whose reply was lost, is no earlier one.
        replayed = own == "0"
    else:
        outcome, shown = rest
    expires_at, over_hold, late, refused, retry_after, *sums = outcome.split()
    taken_id, charges = json.loads(asked)
    states = [
        (int(spent), int(held), _when(ends_at))
        for spent, held, ends_at in zip(sums[::3], sums[1::3], sums[2::3], strict=True)
    ]
    refused_by = None
    if refused != "0":
        spent, held, resets_at = states[int(refused) - 1]
        refused_by = LimitState(limit=_limit(shown), spent=spent, held=held, resets_at=resets_at)
    return Receipt(
        replayed=replayed,
        note=note,
        id="" if refused_by else taken_id,
        expires_at=int(expires_at),
        charges=() if refused_by else tuple(Charge(*each) for each in charges),
        limits=()
        if replayed or not states
        else tuple(
            LimitState(limit=limit, spent=spent, held=held, resets_at=resets_at)
            for limit, (spent, held, resets_at) in zip(applied, states, strict=True)
        ),
        refused_by=refused_by,
        retry_after_seconds=_when(retry_after),
        over_hold=over_hold == "1",
        late=late == "1",
    )
