"""The ledger in Redis or Valkey, for any number of sidecars.

Accounts, holds and answers are what they are in SQLite (pdp.budget.sqlite). Each
operation is one Lua script, which decides by the server's clock. What the scripts do
not do: they compute no windows, as calendars are not for Lua, and they name no keys.
The caller does both for the time, and for the parts of the hold, that it takes to be
true; a script that finds others says so, and the caller asks anew.

All that belongs to a tenant lies in one slot, and what belongs to an organisation in
another: a script must still touch both at once. A single server and one behind sentinels
allow that. A cluster does not: there, an operation with a limit of scope organisation,
for an account that names its organisation, is refused with budget_unavailable.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from pdp.budget import redis_texts as texts
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
    Scope,
)
from pdp.budget.windows import window_bounds
from pdp.reason import ReasonCode
from pdp.redis_store import RedisStore, Script
from pdp.storage import StorageError

T = TypeVar("T")

MAX_QUESTIONS: Final = 4
"""How often a script is asked anew at most: once for the time, once for the hold's
parts, and again where both change meanwhile."""
REMEMBERED_HOLDS: Final = 4096
"""Holds whose parts are remembered, so that settling them takes one script."""

KNOWN_TENANTS: Final = 10_000
"""Tenants of whom it is remembered that the store knows them."""
LISTED_ACCOUNTS: Final = 10_000
"""Accounts of a tenant that are looked through for a list: the first to end."""
LISTED_TENANTS: Final = 100_000
"""Tenants that are looked through for a list, in no order."""
LIST_SECONDS: Final = 10.0
"""How long a list may take, however short other operations are."""

_log: Final = logging.getLogger(__name__)
_SCRIPTS: Final = Path(__file__).parent / "scripts"


def _script(*names: str) -> Script:
    return Script(_SCRIPTS / "prelude.lua", *(_SCRIPTS / name for name in names))


_TAKE: Final = _script("limits.lua", "take.lua")
_RESOLVE: Final = _script("parts.lua", "resolve.lua")
_REFUND: Final = _script("parts.lua", "refund.lua")
_GRANT: Final = _script("limits.lua", "grant.lua")
_STATE: Final = _script("limits.lua", "state.lua")
_ACCOUNTS: Final = _script("limits.lua", "accounts.lua")
_AHEAD: Final = _script("ahead.lua")
_HOLDS: Final = _script("holds.lua")


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
        self._is_split = False
        """Whether it was said that a cluster keeps no organisations."""

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
        return await self._take(account, key, charges, limits, str(ttl_seconds), memo)

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
        return await self._take(account, key, charges, limits, "", memo)

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
        check_charges(charges or (), least=0)
        verb = "settle" if final else "part"
        return await self._resolve(account, key, hold_id, verb, charges)

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.release."""
        return await self._resolve(account, key, hold_id, "release", None)

    async def expire(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        """See Ledger.expire."""
        return await self._resolve(account, key, hold_id, "expire", None)

    async def refund(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        """See Ledger.refund."""
        check_charges(charges or (), least=1)

        def question(asked: _AskedOfHold) -> tuple[list[str], list[str]]:
            keys: list[str] = []
            numbers: list[str] = []
            for number, place in asked.places():
                if place.counts_spend:
                    keys += place.keys(account.tenant)
                    numbers.append(str(number))
            return keys, [asked.parts_json, *asked.words(), *numbers]

        return await self._ask_of_hold(account, key, hold_id, charges, _REFUND, [], question)

    async def grant(
        self, account: Account, key: IdempotencyKey, *, account_id: str, amount: int
    ) -> Receipt:
        """See Ledger.grant."""
        check_account(account)
        check_key(key)
        check_grant(amount)
        asked = texts.asked_json("", ())

        async def operation() -> Receipt:
            keys = [
                texts.clock_key(account.tenant),
                texts.answer_key(account, key),
                *texts.account_keys(account.tenant, account_id),
                texts.accounts_key(account.tenant),
            ]
            arguments = [
                *self._preamble(account.tenant, _attempt()),
                *(key.content_sha256, key.note, asked, str(amount)),
                texts.flag(texts.counts_spend(account_id)),
            ]
            reply = await self._run(account.tenant, _GRANT, keys, arguments)
            return texts.granted_receipt(texts.decode_answer(reply, asked, key.note))

        return await self._complete(operation)

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        """See Ledger.state."""
        check_account(account)
        check_limits(limits)
        applied = [limit for limit in limits if limit.applies_to(account)]
        self._refuse_split(account, applied)

        async def operation() -> tuple[LimitState, ...]:
            attempt = _attempt()

            async def ask(now: float) -> list[str]:
                keys = [texts.clock_key(account.tenant)]
                arguments = self._preamble(account.tenant, attempt)
                for limit in applied:
                    window = window_bounds(limit, now)
                    place = texts.place_of(account, limit, window)
                    keys += place.keys(account.tenant)
                    arguments += texts.entry_words(place, limit, window)
                return await self._run(account.tenant, _STATE, keys, arguments)

            _, states = await self._until_timely(ask)
            return texts.decode_states(applied, states.split())

        return await self._complete(operation)

    async def hold(self, tenant: str, hold_id: str) -> HoldState | None:
        """See Ledger.hold."""
        check_hold_id(hold_id)

        async def operation() -> HoldState | None:
            (found,) = await self._read_holds(tenant, [texts.hold_key(tenant, hold_id)])
            return found

        return await self._complete(operation)

    async def holds(self, tenant: str, *, most: int) -> tuple[HoldState, ...]:
        """See Ledger.holds."""
        check_most(most)

        async def operation() -> tuple[HoldState, ...]:
            ahead = await self._read_ahead(tenant, texts.holds_key(tenant), most)
            found = await self._read_holds(tenant, [key for key, _ in ahead])
            return tuple(each for each in found if each is not None and each.state == "open")

        return await self._complete(operation, seconds=LIST_SECONDS)

    async def accounts(self, tenant: str, *, most: int) -> tuple[AccountState, ...]:
        """See Ledger.accounts."""
        check_most(most)
        prefix, _ = texts.account_keys(tenant, "")

        async def operation() -> tuple[AccountState, ...]:
            ahead = await self._read_ahead(tenant, texts.accounts_key(tenant), LISTED_ACCOUNTS)
            named = [(key.removeprefix(prefix), ends_at) for key, ends_at in ahead]
            named.sort(key=lambda each: texts.order_of_account(each[0]))
            del named[most:]
            keys = [texts.clock_key(tenant)]
            for name, _ in named:
                keys += texts.account_keys(tenant, name)
            ends = [texts.ends_at_of(name, ends_at) for name, ends_at in named]
            arguments = [*self._preamble(tenant, _attempt()), *ends]
            _, *rows = await self._run(tenant, _ACCOUNTS, keys, arguments)
            return tuple(
                texts.decode_account(name, limit_json, state)
                for (name, _), limit_json, state in zip(named, rows[::2], rows[1::2], strict=True)
                if limit_json
            )

        return await self._complete(operation, seconds=LIST_SECONDS)

    async def tenants(self, *, most: int) -> tuple[str, ...]:
        """See Ledger.tenants."""
        check_most(most, highest=10_000)

        async def operation() -> tuple[str, ...]:
            return tuple(sorted(await self._store.tenants("clock", most=LISTED_TENANTS))[:most])

        return await self._complete(operation, seconds=LIST_SECONDS)

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
        memo: str,
    ) -> Receipt:
        check_account(account)
        check_key(key)
        check_charges(charges, least=1)
        check_limits(limits)
        check_memo(memo)
        amounts = {(charge.budget, charge.unit): charge.amount for charge in charges}
        applied = [
            limit
            for limit in limits
            if (limit.budget, limit.unit) in amounts and limit.applies_to(account)
        ]
        self._refuse_split(account, applied)
        bounded = {(limit.budget, limit.unit) for limit in applied if limit.enforced}
        taken_id = self._new_id()
        asked = texts.asked_json(taken_id if charges else "", charges)
        tenant = account.tenant

        async def operation() -> Receipt:
            attempt = _attempt()
            parts = ""

            async def ask(now: float) -> list[str]:
                nonlocal parts
                windows = [window_bounds(limit, now) for limit in applied]
                places = [
                    texts.place_of(account, limit, window)
                    for limit, window in zip(applied, windows, strict=True)
                ]
                parts = texts.parts_json(charges, applied, places)
                keys = [
                    texts.clock_key(tenant),
                    texts.answer_key(account, key),
                    texts.hold_key(tenant, taken_id),
                    texts.holds_key(tenant),
                    texts.accounts_key(tenant),
                ]
                arguments = [
                    *self._preamble(tenant, attempt),
                    *(key.content_sha256, key.note, asked),
                    *(key.operation, account.actor, account.tool, memo),
                    *(lasts, parts, "" if lasts else texts.progress_of_charge(charges)),
                    texts.flag(bool(amounts.keys() - bounded)),
                ]
                for limit, window, place in zip(applied, windows, places, strict=True):
                    keys += place.keys(tenant)
                    arguments += texts.entry_words(place, limit, window)
                    arguments += texts.taken_words(place, limit, amounts[limit.budget, limit.unit])
                return await self._run(tenant, _TAKE, keys, arguments)

            reply = await self._until_timely(ask)
            receipt = texts.taken_receipt(texts.decode_answer(reply, asked, key.note), applied)
            if receipt.expires_at and not receipt.replayed:
                self._remember_parts(tenant, receipt.id, parts)
            return receipt

        return await self._complete(operation)

    async def _resolve(
        self,
        account: Account,
        key: IdempotencyKey,
        hold_id: str,
        verb: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        # An operator lets anyone's hold of the tenant expire.
        made_by = (
            ["", ""] if verb == "expire" else [ENDED_BY.get(key.operation, "-"), account.actor]
        )

        def question(asked: _AskedOfHold) -> tuple[list[str], list[str]]:
            keys: list[str] = []
            words: list[str] = []
            for number, place in asked.places():
                keys += place.keys(account.tenant)
                words += [str(number), place.kind]
            return keys, [*made_by, asked.parts_json, verb, *asked.words(), *words]

        indexes = [texts.holds_key(account.tenant)]
        return await self._ask_of_hold(account, key, hold_id, charges, _RESOLVE, indexes, question)

    async def _ask_of_hold(
        self,
        account: Account,
        key: IdempotencyKey,
        hold_id: str,
        charges: Sequence[Charge] | None,
        script: Script,
        indexes: Sequence[str],
        question: Callable[[_AskedOfHold], tuple[list[str], list[str]]],
    ) -> Receipt:
        """Ask what is to be done to a hold, for the parts that it has. ``question`` says
        with which keys and arguments besides those of every hold.
        """
        check_account(account)
        check_key(key)
        check_hold_id(hold_id)
        tenant = account.tenant

        async def operation() -> Receipt:
            attempt = _attempt()
            parts_json = self._parts.pop(f"{tenant} {hold_id}", "")
            for _ in range(MAX_QUESTIONS):
                asked_of = _AskedOfHold(parts_json, charges)
                asked = texts.asked_json(hold_id, asked_of.charges)
                more_keys, more_arguments = question(asked_of)
                keys = [
                    texts.clock_key(tenant),
                    texts.answer_key(account, key),
                    texts.hold_key(tenant, hold_id),
                    *indexes,
                    *more_keys,
                ]
                arguments = [
                    *self._preamble(tenant, attempt),
                    *(key.content_sha256, key.note, asked),
                    *more_arguments,
                ]
                reply = await self._run(tenant, script, keys, arguments)
                if reply[0] != "parts":
                    return texts.ended_receipt(texts.decode_answer(reply, asked, key.note))
                parts_json = reply[1]
            raise StorageError("The hold did not stay the same while it was looked at.")

        return await self._complete(operation)

    async def _read_ahead(self, tenant: str, index: str, most: int) -> list[tuple[str, str]]:
        """What of an index lies ahead, with its time; the nearest first."""
        keys = [texts.clock_key(tenant), index]
        arguments = [*self._preamble(tenant, _attempt()), str(most)]
        _, *found = await self._run(tenant, _AHEAD, keys, arguments)
        return list(zip(found[::2], found[1::2], strict=True))

    async def _read_holds(self, tenant: str, holds: Sequence[str]) -> list[HoldState | None]:
        keys = [texts.clock_key(tenant), *holds]
        arguments = self._preamble(tenant, _attempt())
        _, *fields = await self._run(tenant, _HOLDS, keys, arguments)
        size = texts.HOLD_FIELDS
        return [
            texts.decode_hold(key, fields[at : at + size])
            for key, at in zip(holds, range(0, len(fields), size), strict=True)
        ]

    def _refuse_split(self, account: Account, limits: Sequence[Limit]) -> None:
        """Raises LedgerError for what a cluster can not do in one step."""
        if (
            not self._store.is_cluster
            or not account.organisation
            or all(limit.scope is not Scope.ORGANISATION for limit in limits)
        ):
            return
        if not self._is_split:
            _log.error(
                "limits of scope organisation need a store that is no cluster: use a single"
                " server or sentinels, or name no such limit in the policy"
            )
        self._is_split = True
        raise LedgerError(
            ReasonCode.BUDGET_UNAVAILABLE,
            "The store is a cluster, which can not count for an organisation: nothing was done.",
        )

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

    async def _complete(
        self, operation: Callable[[], Awaitable[T]], *, seconds: float | None = None
    ) -> T:
        try:
            return await self._store.complete(operation, seconds=seconds)
        except StorageError as error:
            raise LedgerError(ReasonCode.BUDGET_UNAVAILABLE, error.message) from error

    def _preamble(self, tenant: str, attempt: str) -> list[str]:
        """The arguments that every script begins with."""
        strict = "s" if self._store.strict else ""
        known = "k" if tenant in self._tenants else ""
        return [
            attempt,
            "" if self._clock is None else repr(self._clock()),
            strict + known,
            str(self._kept_seconds),
        ]

    async def _run(
        self, tenant: str, script: Script, keys: list[str], arguments: list[str]
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
            self._tenants[tenant] = None
            self._tenants.move_to_end(tenant)
            if len(self._tenants) > KNOWN_TENANTS:
                self._tenants.popitem(last=False)
        return reply

    def _remember_parts(self, tenant: str, hold_id: str, parts: str) -> None:
        self._parts[f"{tenant} {hold_id}"] = parts
        if len(self._parts) > REMEMBERED_HOLDS:
            self._parts.popitem(last=False)


class _AskedOfHold:
    """What is asked of a hold that has these parts."""

    def __init__(self, parts_json: str, charges: Sequence[Charge] | None) -> None:
        self.parts_json = parts_json
        self._parts = texts.decode_parts(parts_json)
        self._amounts: dict[texts.Pair, str] | None = None
        self.charges: Sequence[Charge] = [part.charge for part in self._parts]
        """Those that are named, or all that are held."""
        if charges is not None:
            self.charges = charges
            self._amounts = {(each.budget, each.unit): str(each.amount) for each in charges}

    def places(self) -> list[tuple[int, texts.Place]]:
        """Where the parts count, each with the number of its part."""
        return [
            (number, place)
            for number, part in enumerate(self._parts, start=1)
            for place in part.places
        ]

    def words(self) -> list[str]:
        """What is wrong, how many parts there are, and of each what is asked."""
        amounts = self._amounts
        strange = set(amounts or ()) - {part.pair for part in self._parts}
        words = [ReasonCode.CHARGE_NOT_HELD if strange else "", str(len(self._parts))]
        for part in self._parts:
            words += [
                str(part.charge.amount),
                "*" if amounts is None else amounts.get(part.pair, ""),
            ]
        return words


def _attempt() -> str:
    """Names one operation of one caller: the same when its script is sent again."""
    return uuid.uuid4().hex
