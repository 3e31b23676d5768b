"""A process of callers of one ledger: ``python -m tests.faults.callers PLAN``.

They go on until standard input ends; then whatever has no answer is tried until it has
one, every hold is ended, and the ledger is closed. All that is asked and told is in the
process's file of the history, from which a process that comes after one that was killed
takes up its unanswered calls and its holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import OrderedDict
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from pdp.budget.lease_pool import LeaseTerms
from pdp.budget.leased_ledger import open_leased
from pdp.budget.ledger import Account, Charge, IdempotencyKey, Ledger, LedgerError, Receipt
from pdp.budget.redis_ledger import RedisLedger
from pdp.budget.sqlite import SqliteLedger
from pdp.config import OnOutage, RedisSettings
from pdp.redis_store import open_redis
from pdp.storage import Durability, StorageError
from tests.faults.history import STATE, Answer, Call, Event, Kind, read_events, readings
from tests.faults.world import World

LEASE_TERMS: Final = LeaseTerms(seconds=2, longest_hold_seconds=4, on_outage=OnOutage.SPEND_LEASE)
SETTLED_KEPT: Final = 200
OPEN_SECONDS: Final = 60
FINISH_SECONDS: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a process is told on its command line."""

    process: str
    run: int
    """How many there were before it."""
    seed: int
    store: str
    """sqlite, redis or leased."""
    address: str
    """Of the Redis; empty for SQLite."""
    folder: str
    callers: int = 6
    pause_seconds: float = 0.02
    """How long a caller waits between two calls at most."""

    @property
    def history(self) -> Path:
        return Path(self.folder) / f"{self.process}.history.jsonl"

    def text(self) -> str:
        return json.dumps(asdict(self))


async def open_ledger(store: str, address: str, folder: Path, process: str) -> Ledger:
    """As a sidecar opens it. Raises StorageError."""
    if store == "sqlite":
        return SqliteLedger(folder / "ledger.db", durability=Durability.PROCESS)
    settings = RedisSettings(addresses=[address], tls=False, timeout_ms=400)
    shared = RedisLedger(await open_redis(settings))
    if store == "redis":
        return shared
    return await open_leased(
        shared, folder, durability=Durability.PROCESS, terms=LEASE_TERMS, holder=process
    )


@dataclass(frozen=True, slots=True)
class Hold:
    """An open hold, for all that its makers know."""

    id: str
    call: Call
    expires_at: int


class Callers:
    """All of a process, with what they remember."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._world = World(leased=plan.store == "leased")
        self._dice = random.Random(f"{plan.seed}-{plan.process}-{plan.run}")  # noqa: S311 - to be done again alike
        self._file = os.open(plan.history, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._attempts = 0
        self._keys = 0
        self._unanswered: OrderedDict[tuple[str, ...], Call] = OrderedDict()
        self._answered: OrderedDict[tuple[str, ...], Call] = OrderedDict()
        self._holds: OrderedDict[str, Hold] = OrderedDict()
        self._ended: OrderedDict[str, Call] = OrderedDict()
        """Calls that made holds which were settled, or charges, by their ids."""
        self.stopping = False

    def remember(self) -> None:
        """What those before have left in the history."""
        calls: dict[str, Call] = {}
        begun: list[str] = []
        os.write(self._file, b"\n")  # ends half a line
        for event in read_events([self._plan.history]):
            if event.call is not None:
                calls[event.attempt] = event.call
                begun.append(event.attempt)
            elif event.kind is not Kind.INFO:
                self._learn(calls.pop(event.attempt), event)
        for attempt in begun:
            call = calls.get(attempt)
            if call is not None and call.key and _name(call) not in self._answered:
                self._unanswered[_name(call)] = call

    async def work(self, ledger: Ledger) -> None:
        """All of them, until they are told to stop; then finish."""
        await asyncio.gather(*(self._call_on(ledger) for _ in range(self._plan.callers)))
        deadline = time.monotonic() + FINISH_SECONDS
        while self._unanswered or self._holds:
            assert time.monotonic() < deadline, "the ledger does not answer"
            for call in list(self._unanswered.values()):
                await self._attempt(ledger, call)
            for hold in list(self._holds.values()):
                await self._attempt(ledger, self._end(hold, "settle"))
            await asyncio.sleep(0.02)

    async def _call_on(self, ledger: Ledger) -> None:
        while not self.stopping:
            dice = self._dice
            choice = dice.random()
            patience = dice.uniform(0.001, 0.02) if dice.random() < 0.03 else None
            calls = [self._choose(choice)]
            if choice < 0.02:
                calls *= 2  # at once, under one key
            await asyncio.gather(*(self._attempt(ledger, call, patience) for call in calls))
            await asyncio.sleep(dice.uniform(0, self._plan.pause_seconds))

    def _choose(self, choice: float) -> Call:
        dice = self._dice
        if choice < 0.04:
            return self._read()
        if choice < 0.10 and self._answered:
            return dice.choice(list(self._answered.values()))
        if choice < 0.20 and self._unanswered:
            return dice.choice(list(self._unanswered.values()))
        if choice < 0.55 and self._holds:
            return self._end_one()
        if choice < 0.62 and self._ended:
            made = dice.choice(list(self._ended))
            return self._refund(made, self._ended[made])
        return self._take("charge" if choice > 0.88 else "reserve")

    def _read(self) -> Call:
        account = self._world.account(self._dice, time.time())
        return Call(operation=STATE, account=account, limits=tuple(self._world.limits))

    def _take(self, operation: str) -> Call:
        charges = self._world.charges(self._dice)
        return self._with_key(
            Call(
                operation=operation,
                account=self._world.account(self._dice, time.time()),
                charges=charges,
                limits=self._world.limits_of(self._dice, charges),
                ttl_seconds=self._dice.choice((1, 2, 4)) if operation == "reserve" else 0,
            )
        )

    def _end_one(self) -> Call:
        dice = self._dice
        strict = [
            hold
            for hold in self._holds.values()
            if not self._world.may_overspend(hold.call.account)
        ]
        # The oldest first, but for some which are left to expire.
        hold = dice.choice(strict[:3] or list(self._holds.values())[:20])
        if dice.random() < 0.03:
            stranger = replace(hold.call.account, tenant="intruder")
            return self._end(replace(hold, call=replace(hold.call, account=stranger)), "settle")
        if dice.random() < 0.3:
            return self._end(hold, "release")
        factors = [0.0, 0.5, 1.0, 1.0]
        if self._world.may_overspend(hold.call.account):
            factors += [1.5, 3.0]
        charges = hold.call.charges or ()
        spent = tuple(
            replace(each, amount=int(each.amount * dice.choice(factors))) for each in charges
        )
        end = self._end(hold, "settle", dice.choice((None, spent[:1], spent, spent)))
        return replace(end, final=end.charges is None or dice.random() < 0.6)

    def _end(self, hold: Hold, operation: str, charges: tuple[Charge, ...] | None = None) -> Call:
        return self._with_key(
            Call(
                operation=operation,
                account=hold.call.account,
                charges=() if operation == "release" else charges,
                hold_id=hold.id,
            )
        )

    def _refund(self, made: str, call: Call) -> Call:
        charges = tuple(
            replace(each, amount=self._dice.randint(1, each.amount)) for each in call.charges or ()
        )
        return self._with_key(
            Call(
                operation="refund",
                account=call.account,
                hold_id=made,
                charges=self._dice.choice((None, charges)),
            )
        )

    def _with_key(self, call: Call) -> Call:
        self._keys += 1
        key = f"{self._plan.process}-{self._plan.run}-{self._keys}"
        note = json.dumps([call.account.tenant, call.operation, key])
        return replace(call, key=key, note=note)

    async def _attempt(self, ledger: Ledger, call: Call, patience: float | None = None) -> None:
        self._attempts += 1
        attempt = f"{self._plan.process}/{self._plan.run}/{self._attempts}"
        self._write(Kind.INVOKE, attempt, call=call)
        answer, kind, reason = None, Kind.OK, ""
        try:
            async with asyncio.timeout(patience):
                answer = await self._ask(ledger, call)
        except LedgerError as error:
            reason = str(error.reason_code)
            kind = Kind.INFO if reason == "budget_unavailable" else Kind.FAIL
        except TimeoutError:
            kind, reason = Kind.INFO, "the caller went away"
        event = self._write(kind, attempt, answer=answer, reason=reason)
        if kind is not Kind.INFO:
            self._learn(call, event)
        elif call.key:
            self._unanswered.setdefault(_name(call), call)

    async def _ask(self, ledger: Ledger, call: Call) -> Answer:
        if call.operation == STATE:
            limits = [self._world.limits[name] for name in call.limits]
            return Answer(limits=readings(await ledger.state(call.account, limits=limits)))
        return Answer.of(await self._mutate(ledger, call))

    def _mutate(self, ledger: Ledger, call: Call) -> Coroutine[Any, Any, Receipt]:
        account, charges = call.account, call.charges
        key = IdempotencyKey(
            operation=call.operation, key=call.key, content_sha256="a" * 64, note=call.note
        )
        limits = [self._world.limits[name] for name in call.limits]
        if call.operation == "reserve":
            return ledger.reserve(
                account,
                key,
                charges=charges or (),
                limits=limits,
                ttl_seconds=call.ttl_seconds,
            )
        if call.operation == "charge":
            return ledger.charge(account, key, charges=charges or (), limits=limits)
        if call.operation == "settle":
            return ledger.settle(
                account, key, hold_id=call.hold_id, charges=charges, final=call.final
            )
        if call.operation == "refund":
            return ledger.refund(account, key, hold_id=call.hold_id, charges=charges)
        return ledger.release(account, key, hold_id=call.hold_id)

    def _learn(self, call: Call, event: Event) -> None:
        if not call.key:
            return
        self._unanswered.pop(_name(call), None)
        answer = event.answer
        is_new = _name(call) not in self._answered
        if answer is not None:
            _keep(self._answered, _name(call), call)
        if call.operation in {"settle", "release"} and call.account.tenant != "intruder":
            if answer is None or call.final:
                self._holds.pop(call.hold_id, None)
        elif answer is not None and answer.id:
            if call.operation == "charge":
                _keep(self._ended, answer.id, call)
            elif call.operation == "reserve" and is_new:
                self._holds[answer.id] = Hold(answer.id, call, answer.expires_at)
                _keep(self._ended, answer.id, call)

    def _write(
        self,
        kind: Kind,
        attempt: str,
        *,
        call: Call | None = None,
        answer: Answer | None = None,
        reason: str = "",
    ) -> Event:
        """At once, so that a kill loses nothing of it but the half of a line."""
        event = Event(
            kind=kind,
            attempt=attempt,
            at=time.monotonic(),
            clock=time.time(),
            call=call,
            answer=answer,
            reason=reason,
        )
        os.write(self._file, event.line().encode() + b"\n")
        return event


def _keep(kept: OrderedDict[Any, Call], name: object, call: Call) -> None:
    kept[name] = call
    if len(kept) > SETTLED_KEPT:
        kept.popitem(last=False)


def _name(call: Call) -> tuple[str, ...]:
    account: Account = call.account
    return account.tenant, account.actor, call.operation, call.key


async def main(plan: Plan) -> None:
    """Work for the plan."""
    callers = Callers(plan)
    callers.remember()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        callers.stopping = True
        loop.remove_reader(sys.stdin.fileno())

    loop.add_reader(sys.stdin.fileno(), stop)
    folder = Path(plan.folder) / ("shared" if plan.store == "sqlite" else plan.process)
    folder.mkdir(exist_ok=True)
    deadline = time.monotonic() + OPEN_SECONDS
    while True:
        try:
            ledger = await open_ledger(plan.store, plan.address, folder, plan.process)
            break
        except StorageError:
            assert time.monotonic() < deadline, "the store can not be opened"
            await asyncio.sleep(0.1)
    try:
        await callers.work(ledger)
    finally:
        await ledger.close()


if __name__ == "__main__":
    asyncio.run(main(Plan(**json.loads(sys.argv[1]))))
