"""The ledger against a plain model of it, in step: whatever is asked, the same
answers and the same sums."""

from __future__ import annotations

import asyncio
import itertools
import math
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from pdp.budget.sqlite import SqliteLedger
from pdp.budget.windows import window_bounds
from pdp.storage import Durability

T = TypeVar("T")
Place = tuple[str, str, str, str, Scope, str, Window, int]
Answer = Receipt | str
"""A receipt, or the reason code of an error."""

START = 1_795_564_790
"""Ten seconds before the end of a day."""


@dataclass
class Hold:
    tenant: str
    actor: str
    expires_at: int
    parts: list[tuple[Charge, list[Place]]]
    state: str = "open"


class Model:
    """What the port says, in the fewest words: sums are taken anew each time."""

    def __init__(self) -> None:
        self.now: float = 0
        self.spent: dict[Place, int] = {}
        self.holds: dict[str, Hold] = {}
        self.answers: dict[tuple[str, str, str, str], tuple[str, Receipt]] = {}
        self._ids = itertools.count()

    def tick(self, now: float) -> None:
        self.now = max(now, math.floor(self.now))

    def live(self, place: Place) -> list[tuple[int, int]]:
        """(expires_at, amount) of what is held there."""
        return [
            (hold.expires_at, charge.amount)
            for hold in self.holds.values()
            if hold.state == "open" and hold.expires_at > self.now
            for charge, places in hold.parts
            if place in places
        ]

    def place(self, account: Account, limit: Limit) -> Place:
        value = {Scope.TENANT: "", Scope.ACTOR: account.actor, Scope.TOOL: account.tool}
        starts_at = window_bounds(limit.window, self.now).starts_at
        return (
            account.tenant,
            limit.id,
            limit.budget,
            limit.unit,
            limit.scope,
            value[limit.scope],
            limit.window,
            starts_at,
        )

    def state(self, account: Account, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        return tuple(
            LimitState(
                limit=limit,
                spent=self.spent.get(self.place(account, limit), 0),
                held=sum(amount for _, amount in self.live(self.place(account, limit))),
                resets_at=window_bounds(limit.window, self.now).ends_at,
            )
            for limit in limits
            if limit.scope is not Scope.TOOL or account.tool
        )

    def once(self, account: Account, key: IdempotencyKey, answer: Callable[[], Answer]) -> Answer:
        name = (account.tenant, account.actor, key.operation, key.key)
        if name in self.answers:
            content, first = self.answers[name]
            if content != key.content_sha256:
                return "idempotency_key_reused"
            return replace(first, replayed=True, limits=())
        given = answer()
        if isinstance(given, Receipt):
            self.answers[name] = (key.content_sha256, given)
        return given

    def take(
        self,
        account: Account,
        note: str,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
    ) -> Answer:
        amounts = {(charge.budget, charge.unit): charge.amount for charge in charges}
        applied = [
            state
            for state in self.state(account, limits)
            if (state.limit.budget, state.limit.unit) in amounts
        ]
        if amounts.keys() - {(state.limit.budget, state.limit.unit) for state in applied}:
            return "budget_unlimited"
        if not charges:
            return Receipt(replayed=False, note=note)
        for state in applied:
            amount = amounts[state.limit.budget, state.limit.unit]
            if amount > state.remaining:
                waits = []
                if state.resets_at is not None and amount <= state.limit.limit:
                    waits.append(state.resets_at)
                live = self.live(self.place(account, state.limit))
                if live and state.spent + amount <= state.limit.limit:
                    waits.append(min(live)[0])
                return Receipt(
                    replayed=False,
                    note=note,
                    limits=tuple(applied),
                    refused_by=state,
                    retry_after_seconds=math.ceil(min(waits) - self.now) if waits else None,
                )
        parts = [
            (
                charge,
                [
                    self.place(account, state.limit)
                    for state in applied
                    if (state.limit.budget, state.limit.unit) == (charge.budget, charge.unit)
                ],
            )
            for charge in charges
        ]
        name, expires_at = f"id-{next(self._ids)}", 0
        if ttl_seconds is None:
            self.post(parts)
        else:
            expires_at = math.ceil(self.now + ttl_seconds)
            self.holds[name] = Hold(account.tenant, account.actor, expires_at, parts)
        return Receipt(
            replayed=False,
            note=note,
            id=name,
            expires_at=expires_at,
            charges=tuple(charges),
            limits=self.state(account, [state.limit for state in applied]),
        )

    def post(self, parts: Sequence[tuple[Charge, list[Place]]]) -> None:
        for charge, places in parts:
            for place in places:
                self.spent[place] = self.spent.get(place, 0) + charge.amount

    def end(
        self, account: Account, note: str, hold_id: str, charges: Sequence[Charge] | None
    ) -> Answer:
        """Settle a hold."""
        hold = self.own(account, hold_id)
        if isinstance(hold, str):
            return hold
        places = {(charge.budget, charge.unit): places for charge, places in hold.parts}
        held = {(charge.budget, charge.unit): charge.amount for charge, _ in hold.parts}
        spent = [charge for charge, _ in hold.parts] if charges is None else charges
        if {(charge.budget, charge.unit) for charge in spent} - held.keys():
            return "charge_not_held"
        self.post([(charge, places[charge.budget, charge.unit]) for charge in spent])
        hold.state = "settled"
        return Receipt(
            replayed=False,
            note=note,
            id=hold_id,
            charges=tuple(spent),
            over_hold=any(each.amount > held[each.budget, each.unit] for each in spent),
            late=hold.expires_at <= self.now,
        )

    def release(self, account: Account, note: str, hold_id: str) -> Answer:
        hold = self.own(account, hold_id)
        if isinstance(hold, str):
            return hold
        if hold.expires_at <= self.now:
            return "hold_expired"
        hold.state = "released"
        held = tuple(charge for charge, _ in hold.parts)
        return Receipt(replayed=False, note=note, id=hold_id, charges=held)

    def own(self, account: Account, hold_id: str) -> Hold | str:
        hold = self.holds.get(hold_id)
        if hold is None or (hold.tenant, hold.actor) != (account.tenant, account.actor):
            return "hold_not_found"
        return hold if hold.state == "open" else f"hold_already_{hold.state}"


ACCOUNTS = st.builds(
    Account,
    tenant=st.sampled_from(("acme", "globex")),
    actor=st.sampled_from(("alice", "bob")),
    tool=st.sampled_from(("", "mail.send")),
)
PAIRS = st.sampled_from((("tools", "calls"), ("tools", "usd_micros"), ("mail", "calls")))


def charges_of(least: int) -> st.SearchStrategy[list[Charge]]:
    return st.lists(
        st.builds(
            lambda pair, amount: Charge(budget=pair[0], unit=pair[1], amount=amount),
            PAIRS,
            st.integers(least, 7),
        ),
        max_size=3,
        unique_by=lambda charge: (charge.budget, charge.unit),
    )


LIMITS = st.lists(
    st.builds(
        lambda name, pair, window, most, scope: Limit(
            id=name, budget=pair[0], unit=pair[1], window=window, limit=most, scope=scope
        ),
        st.sampled_from(("one", "two")),
        PAIRS,
        st.sampled_from(Window),
        st.integers(0, 20),
        st.sampled_from(Scope),
    ),
    max_size=8,
    unique_by=lambda each: (each.id, each.budget, each.unit, each.window, each.scope),
)
CONTENTS = st.sampled_from(("a" * 64, "b" * 64))


class LedgerAndModel(RuleBasedStateMachine):
    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.clock: float = START
        self.model = Model()
        self.ids = itertools.count()
        self.keys = itertools.count()
        self.calls: list[Callable[[], None]] = []
        self.open_ledger()

    def open_ledger(self) -> None:
        self.ledger = SqliteLedger(
            Path(self.directory.name) / "ledger.sqlite",
            durability=Durability.PROCESS,
            clock=lambda: self.clock,
            new_id=lambda: f"id-{next(self.ids)}",
            retention_seconds=10**9,
        )

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.ask(self.ledger.close())
            self.runner.close()
            self.directory.cleanup()

    def ask(self, answer: Awaitable[T]) -> T:
        async def wait() -> T:
            return await answer

        return self.runner.run(wait())

    def both(
        self,
        account: Account,
        key: IdempotencyKey,
        ask: Callable[[], Awaitable[Receipt]],
        expect: Callable[[], Answer],
    ) -> None:
        """Ask both, now and whenever the call is tried again."""

        def call() -> None:
            given: Answer
            try:
                given = self.ask(ask())
            except LedgerError as error:
                given = error.reason_code
            before = self.model.now
            if self.is_new(account, key):
                self.model.tick(self.clock)
            expected = self.model.once(account, key, expect)
            if isinstance(expected, str):
                self.model.now = before  # an error leaves no trace, of the time neither
            assert given == expected

        self.calls.append(call)
        call()

    def is_new(self, account: Account, key: IdempotencyKey) -> bool:
        return (account.tenant, account.actor, key.operation, key.key) not in self.model.answers

    def new_key(self, operation: str, content: str) -> IdempotencyKey:
        name = f"key-{next(self.keys)}"
        return IdempotencyKey(operation=operation, key=name, content_sha256=content, note=name)

    def old_key(self, operation: str, content: str, number: int) -> IdempotencyKey:
        return IdempotencyKey(
            operation=operation, key=f"key-{number}", content_sha256=content, note="again"
        )

    @rule(
        account=ACCOUNTS,
        charges=charges_of(1),
        limits=LIMITS,
        ttl_seconds=st.sampled_from((1, 30, 60, 3600)),
        content=CONTENTS,
    )
    def reserve(
        self,
        account: Account,
        charges: list[Charge],
        limits: list[Limit],
        ttl_seconds: int,
        content: str,
    ) -> None:
        key = self.new_key("reserve", content)
        self.both(
            account,
            key,
            lambda: self.ledger.reserve(
                account, key, charges=charges, limits=limits, ttl_seconds=ttl_seconds
            ),
            lambda: self.model.take(account, key.note, charges, limits, ttl_seconds),
        )

    @rule(account=ACCOUNTS, charges=charges_of(1), limits=LIMITS, content=CONTENTS)
    def charge(
        self, account: Account, charges: list[Charge], limits: list[Limit], content: str
    ) -> None:
        key = self.new_key("charge", content)
        self.both(
            account,
            key,
            lambda: self.ledger.charge(account, key, charges=charges, limits=limits),
            lambda: self.model.take(account, key.note, charges, limits, None),
        )

    @rule(data=st.data(), content=CONTENTS, account=ACCOUNTS, own=st.integers(0, 9))
    def settle(self, data: st.DataObject, content: str, account: Account, own: int) -> None:
        hold_id, hold = self.some_hold(data)
        if hold is not None and own:
            account = Account(tenant=hold.tenant, actor=hold.actor)
        charges = data.draw(st.one_of(st.none(), charges_of(0)))
        if charges is not None and hold is not None and own > 3:
            charges = [replace(charge, amount=own % 7) for charge, _ in hold.parts]
        key = self.new_key("settle", content)
        self.both(
            account,
            key,
            lambda: self.ledger.settle(account, key, hold_id=hold_id, charges=charges),
            lambda: self.model.end(account, key.note, hold_id, charges),
        )

    @rule(data=st.data(), content=CONTENTS, account=ACCOUNTS, own=st.booleans())
    def release(self, data: st.DataObject, content: str, account: Account, *, own: bool) -> None:
        hold_id, hold = self.some_hold(data)
        if hold is not None and own:
            account = Account(tenant=hold.tenant, actor=hold.actor)
        key = self.new_key("release", content)
        self.both(
            account,
            key,
            lambda: self.ledger.release(account, key, hold_id=hold_id),
            lambda: self.model.release(account, key.note, hold_id),
        )

    def some_hold(self, data: st.DataObject) -> tuple[str, Hold | None]:
        hold_id = data.draw(st.sampled_from([*self.model.holds, "id-none"]))
        return hold_id, self.model.holds.get(hold_id)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def try_again(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.calls))()

    @rule(account=ACCOUNTS, content=CONTENTS, number=st.integers(0, 20))
    def use_an_old_key(self, account: Account, content: str, number: int) -> None:
        key = self.old_key("charge", content, number)
        charges = [Charge("tools", "calls", 1)]
        limits = [
            Limit(
                id="one",
                budget="tools",
                unit="calls",
                window=Window.DAY,
                limit=5,
                scope=Scope.TENANT,
            )
        ]
        self.both(
            account,
            key,
            lambda: self.ledger.charge(account, key, charges=charges, limits=limits),
            lambda: self.model.take(account, key.note, charges, limits, None),
        )

    @rule(account=ACCOUNTS, limits=LIMITS)
    def look(self, account: Account, limits: list[Limit]) -> None:
        self.model.tick(self.clock)
        assert self.ask(self.ledger.state(account, limits=limits)) == self.model.state(
            account, limits
        )

    @rule(account=ACCOUNTS, limits=LIMITS, amounts=st.lists(st.integers(1, 5), max_size=6))
    def charge_at_once(self, account: Account, limits: list[Limit], amounts: list[int]) -> None:
        """Many calls in one transaction of the store, in the order in which they came."""
        keys = [self.new_key("charge", "a" * 64) for _ in amounts]

        async def burst() -> list[Receipt | BaseException]:
            return await asyncio.gather(
                *(
                    self.ledger.charge(
                        account, key, charges=[Charge("tools", "calls", amount)], limits=limits
                    )
                    for key, amount in zip(keys, amounts, strict=True)
                ),
                return_exceptions=True,
            )

        given = self.ask(burst())
        before = self.model.now
        self.model.tick(self.clock)
        for key, amount, answer in zip(keys, amounts, given, strict=True):
            expected = self.model.once(
                account,
                key,
                lambda key=key, amount=amount: self.model.take(  # type: ignore[misc]
                    account, key.note, [Charge("tools", "calls", amount)], limits, None
                ),
            )
            assert expected == (answer.reason_code if isinstance(answer, LedgerError) else answer)
        if not any(isinstance(answer, Receipt) for answer in given):
            self.model.now = before

    @rule(seconds=st.sampled_from((0.5, 1, 29.5, 60, 3600, 86_400, 40 * 86_400, -1, -90, -9e5)))
    def move_the_clock(self, seconds: float) -> None:
        self.clock += seconds

    @rule()
    def reopen(self) -> None:
        self.ask(self.ledger.close())
        self.open_ledger()

    @invariant()
    def what_is_held_is_the_sum_of_its_parts(self) -> None:
        wrong = self.ask(
            self.ledger._writer.run(
                lambda db: (
                    db.execute(
                        "SELECT count(*) FROM account WHERE held !="
                        " (SELECT coalesce(sum(amount), 0) FROM live_part WHERE account = account.id)"
                    ).get
                )
            )
        )
        assert wrong == 0


LedgerAndModel.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
test_the_ledger_and_its_model_agree = LedgerAndModel.TestCase
