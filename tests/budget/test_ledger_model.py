"""Every store against a plain model, in step: whatever is asked, the same answers and
the same sums."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pdp.budget.bounds import ENDED_BY
from pdp.budget.ledger import (
    MAX_AMOUNT,
    MAX_BUCKET,
    Account,
    Charge,
    IdempotencyKey,
    Ledger,
    LedgerError,
    Limit,
    OnExpiry,
    Receipt,
    Scope,
    Window,
)
from pdp.budget.sqlite import SqliteLedger
from tests.budget.memory import Hold, MemoryLedger
from tests.budget.redis_server import RedisServer
from tests.budget.stores import RedisStoreOfTests, SqliteStore, Store

T = TypeVar("T")
Answer = Receipt | str
"""A receipt, or the reason code of an error."""
Call = Callable[[Ledger], Awaitable[Receipt]]

START = 1_795_564_790
"""Ten seconds before the end of a day."""
NEAR_THE_MOST = (2**52, MAX_AMOUNT - 7, MAX_AMOUNT)
"""Where doubles stop being exact."""
LONG = 10**9
"""Retention, in seconds: nothing is cleared away."""


ACCOUNTS = st.builds(
    Account,
    tenant=st.sampled_from(("acme", "globex")),
    actor=st.sampled_from(("alice", "bob")),
    tool=st.sampled_from(("", "mail.send")),
    organisation=st.sampled_from(("", "acme", "both")),
    team=st.sampled_from(("", "sales")),
    session=st.sampled_from(("", "s-1", "s-2")),
)
SETTLED_BY = {made: ending for ending, made in ENDED_BY.items() if ending != "release"}
PAIRS = st.sampled_from(
    (("tools", "calls"), ("tools", "calls"), ("tools", "usd_micros"), ("mail", "calls"))
)
"""One more often than the others, so that limits and holds meet."""


def charges_of(least: int) -> st.SearchStrategy[list[Charge]]:
    return st.lists(
        st.builds(
            lambda pair, amount: Charge(budget=pair[0], unit=pair[1], amount=amount),
            PAIRS,
            st.sampled_from((*range(least, 8), *NEAR_THE_MOST)),
        ),
        max_size=3,
        unique_by=lambda charge: (charge.budget, charge.unit),
    )


@st.composite
def limits(draw: st.DrawFn) -> Limit:
    budget, unit = draw(PAIRS)
    window = draw(st.sampled_from(Window))
    most = draw(st.sampled_from((*range(21), *NEAR_THE_MOST)))
    seconds = burst = 0
    if window is Window.ROLLING:
        seconds = draw(st.sampled_from((1, 7, 60, 86_400)))
        burst = draw(st.sampled_from((1, 3, 10, MAX_BUCKET // seconds)))
    return Limit(
        id=draw(st.sampled_from(("one", "two"))),
        budget=budget,
        unit=unit,
        window=window,
        limit=max(most, 1) if window is Window.ROLLING else most,
        scope=draw(st.sampled_from(Scope)),
        timezone=draw(st.sampled_from(("UTC", "UTC", "Asia/Tokyo", "America/New_York"))),
        seconds=seconds,
        burst=burst,
        warn_at=draw(st.sampled_from(((), (50, 80, 95), (1, 100)))),
        enforced=draw(st.sampled_from((True, True, True, False))),
        on_expiry=draw(st.sampled_from(OnExpiry)) if window.is_calendar else OnExpiry.RELEASE,
    )


LIMITS = st.lists(
    limits(),
    max_size=8,
    unique_by=lambda each: (each.id, each.budget, each.unit, each.window, each.scope),
)
CONTENTS = st.sampled_from(("a" * 64, "b" * 64))


class LedgerAndModel(RuleBasedStateMachine):
    """What is asked of the store is asked of the model next; what differs, fails."""

    def open_store(self, folder: Path) -> Store:
        raise NotImplementedError

    @initialize()
    def open(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.clock: float = START
        self.store = self.open_store(Path(self.directory.name))
        self.given_id = ""
        self.model = MemoryLedger(
            clock=lambda: self.clock,
            new_id=lambda: self.given_id,
            retention_seconds=LONG,
            clock_per_tenant=self.store.clock_per_tenant,
        )
        self.ids = itertools.count()
        self.keys = itertools.count()
        self.calls: list[Callable[[], None]] = []
        self.open_ledger()

    def open_ledger(self) -> None:
        self.ledger = self.ask(
            self.store.open(
                lambda: self.clock,
                new_id=lambda: f"id-{next(self.ids)}",
                retention_seconds=LONG,
            )
        )

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ask(self.ledger.close())
        if hasattr(self, "runner"):
            self.runner.close()
            self.directory.cleanup()

    def ask(self, answer: Awaitable[T]) -> T:
        async def wait() -> T:
            return await answer

        return self.runner.run(wait())

    def answer(self, ledger: Ledger, call: Call) -> Answer:
        try:
            return self.ask(call(ledger))
        except LedgerError as error:
            return error.reason_code

    def both(self, call: Call) -> None:
        """Ask both, now and whenever the call is tried again."""

        def ask_both() -> None:
            given = self.answer(self.ledger, call)
            self.expect(given, call)

        self.calls.append(ask_both)
        ask_both()

    def expect(self, given: Answer, call: Call) -> None:
        """The model gives its holds and charges the ids that the store gave them."""
        if isinstance(given, Receipt) and given.id and not given.replayed:
            self.given_id = given.id
        assert given == self.answer(self.model, call)

    def seen(self, account: Account) -> Account:
        """Where tenants have clocks of their own, no organisation joins two of them: with a
        server's one clock they never tell different times, as they do here.
        """
        return replace(account, organisation="") if self.store.clock_per_tenant else account

    def new_key(self, operation: str, content: str) -> IdempotencyKey:
        name = f"key-{next(self.keys)}"
        return IdempotencyKey(operation=operation, key=name, content_sha256=content, note=name)

    @rule(
        account=ACCOUNTS,
        charges=charges_of(1),
        limits=LIMITS,
        ttl_seconds=st.sampled_from((1, 30, 60, 3600)),
        content=CONTENTS,
        operation=st.sampled_from(("reserve", "reserve", "authorize", "lease")),
    )
    def reserve(
        self,
        account: Account,
        charges: list[Charge],
        limits: list[Limit],
        ttl_seconds: int,
        content: str,
        operation: str,
    ) -> None:
        account = self.seen(account)
        key = self.new_key(operation, content)
        self.both(
            lambda ledger: ledger.reserve(
                account, key, charges=charges, limits=limits, ttl_seconds=ttl_seconds
            )
        )

    @rule(account=ACCOUNTS, charges=charges_of(1), limits=LIMITS, content=CONTENTS)
    def charge(
        self, account: Account, charges: list[Charge], limits: list[Limit], content: str
    ) -> None:
        account = self.seen(account)
        key = self.new_key("charge", content)
        self.both(lambda ledger: ledger.charge(account, key, charges=charges, limits=limits))

    @rule(
        data=st.data(),
        content=CONTENTS,
        account=ACCOUNTS,
        own=st.integers(0, 9),
        operation=st.sampled_from(("settle", "outcome", "lease_settle")),
        final=st.booleans(),
    )
    def settle(
        self,
        data: st.DataObject,
        content: str,
        account: Account,
        own: int,
        operation: str,
        *,
        final: bool,
    ) -> None:
        hold_id, hold = self.some_hold(data)
        if hold is not None and own:
            account = Account(tenant=hold.tenant, actor=hold.actor)
            operation = SETTLED_BY.get(hold.operation, operation) if own > 1 else operation
        drawn = data.draw(st.one_of(st.none(), charges_of(0)))
        charges = drawn
        if drawn is not None and hold is not None and own > 3:
            charges = [replace(part.charge, amount=own % 7) for part in hold.parts]
        key = self.new_key(operation, content)
        self.both(
            lambda ledger: ledger.settle(
                account, key, hold_id=hold_id, charges=charges, final=final
            )
        )

    @rule(data=st.data(), account=ACCOUNTS, content=CONTENTS, own=st.integers(0, 3))
    def refund(self, data: st.DataObject, account: Account, content: str, own: int) -> None:
        hold_id, hold = self.some_hold(data)
        charges: list[Charge] | None = None
        if hold is not None and own:
            account = Account(tenant=hold.tenant, actor="someone")
            charges = [replace(part.charge, amount=own) for part in hold.parts]
        key = self.new_key("refund", content)
        self.both(lambda ledger: ledger.refund(account, key, hold_id=hold_id, charges=charges))

    @rule(data=st.data(), account=ACCOUNTS, content=CONTENTS, own=st.booleans())
    def expire(self, data: st.DataObject, account: Account, content: str, *, own: bool) -> None:
        hold_id, hold = self.some_hold(data)
        if hold is not None and own:
            account = Account(tenant=hold.tenant, actor="someone")
        key = self.new_key("expire", content)
        self.both(lambda ledger: ledger.expire(account, key, hold_id=hold_id))

    @rule(data=st.data(), account=ACCOUNTS, amount=st.sampled_from((1, 5, -2, *NEAR_THE_MOST)))
    def grant(self, data: st.DataObject, account: Account, amount: int) -> None:
        """The stores name their accounts each in its own way, and list them in one."""
        listed = self.ask(self.ledger.accounts(account.tenant, most=1000))
        given = {replace(each, id=""): each.id for each in listed}
        listed = self.ask(self.model.accounts(account.tenant, most=1000))
        known = {replace(each, id=""): each.id for each in listed}
        lasting = [each for each in known if each.limit.window.is_calendar]
        assert set(lasting) == {each for each in given if each.limit.window.is_calendar}
        if not lasting:
            return
        chosen = data.draw(st.sampled_from(lasting))
        key = self.new_key("grant", "a" * 64)
        own, model_own = given[chosen], known[chosen]
        self.both(
            lambda ledger: ledger.grant(
                account,
                key,
                account_id=model_own if ledger is self.model else own,
                amount=amount,
            )
        )

    @rule(data=st.data(), account=ACCOUNTS)
    def look_at_holds(self, data: st.DataObject, account: Account) -> None:
        for_tenant = account.tenant
        given = self.ask(self.ledger.holds(for_tenant, most=1000))
        assert given == self.ask(self.model.holds(for_tenant, most=1000))
        hold_id, _ = self.some_hold(data)
        one = self.ask(self.ledger.hold(for_tenant, hold_id))
        assert one == self.ask(self.model.hold(for_tenant, hold_id))

    @rule(data=st.data(), content=CONTENTS, account=ACCOUNTS, own=st.booleans())
    def release(self, data: st.DataObject, content: str, account: Account, *, own: bool) -> None:
        hold_id, hold = self.some_hold(data)
        operation = "release"
        if hold is not None and own:
            account = Account(tenant=hold.tenant, actor=hold.actor)
            operation = "outcome" if hold.operation == "authorize" else "release"
        key = self.new_key(operation, content)
        self.both(lambda ledger: ledger.release(account, key, hold_id=hold_id))

    def some_hold(self, data: st.DataObject) -> tuple[str, Hold | None]:
        holds = self.model.books.holds
        hold_id = data.draw(st.sampled_from([*holds, "id-none"]))
        return hold_id, holds.get(hold_id)

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def try_again(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.calls))()

    @rule(account=ACCOUNTS, content=CONTENTS, number=st.integers(0, 20))
    def use_an_old_key(self, account: Account, content: str, number: int) -> None:
        key = IdempotencyKey(
            operation="charge", key=f"key-{number}", content_sha256=content, note="again"
        )
        limit = Limit(
            id="one", budget="tools", unit="calls", window=Window.DAY, limit=5, scope=Scope.TENANT
        )
        self.both(
            lambda ledger: ledger.charge(
                account, key, charges=[Charge("tools", "calls", 1)], limits=[limit]
            )
        )

    @rule(account=ACCOUNTS, limits=LIMITS)
    def look(self, account: Account, limits: list[Limit]) -> None:
        account = self.seen(account)
        given = self.ask(self.ledger.state(account, limits=limits))
        assert given == self.ask(self.model.state(account, limits=limits))

    @rule(account=ACCOUNTS, limits=LIMITS, amounts=st.lists(st.integers(1, 5), max_size=6))
    def charge_at_once(self, account: Account, limits: list[Limit], amounts: list[int]) -> None:
        """Many calls at the same time, in the order in which they came."""
        account = self.seen(account)

        def call(key: IdempotencyKey, amount: int) -> Call:
            charges = [Charge("tools", "calls", amount)]
            return lambda ledger: ledger.charge(account, key, charges=charges, limits=limits)

        calls = [call(self.new_key("charge", "a" * 64), amount) for amount in amounts]

        async def burst() -> list[Receipt | BaseException]:
            return await asyncio.gather(
                *(call(self.ledger) for call in calls), return_exceptions=True
            )

        for each, given in zip(calls, self.ask(burst()), strict=True):
            assert isinstance(given, (Receipt, LedgerError))
            self.expect(given.reason_code if isinstance(given, LedgerError) else given, each)

    @rule(seconds=st.sampled_from((0.5, 1, 29.5, 60, 3600, 86_400, 40 * 86_400, -1, -90, -9e5)))
    def move_the_clock(self, seconds: float) -> None:
        self.clock += seconds

    @rule()
    def reopen(self) -> None:
        self.ask(self.ledger.close())
        self.open_ledger()


class SqliteAndModel(LedgerAndModel):
    def open_store(self, folder: Path) -> Store:
        return SqliteStore(folder)

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.check_sums()
        super().teardown()

    def check_sums(self) -> None:
        """What is held is the sum of its parts."""
        assert isinstance(self.ledger, SqliteLedger)
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


SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_sqlite_and_the_model_agree() -> None:
    run_state_machine_as_test(SqliteAndModel, settings=SETTINGS)


def test_redis_and_the_model_agree(redis_server: RedisServer) -> None:
    run_state_machine_as_test(_on(redis_server), settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_redis_and_the_model_agree_for_longer(redis_server: RedisServer) -> None:
    longer = settings(SETTINGS, max_examples=600)
    run_state_machine_as_test(_on(redis_server), settings=longer)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_redis_and_the_model_agree_across_crashes(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis", "appendfsync always")

    class CrashingRedisAndModel(_on(server)):  # type: ignore[misc]
        @rule()
        def crash(self) -> None:
            server.kill()
            server.start()

    server.start()
    try:
        run_state_machine_as_test(
            CrashingRedisAndModel, settings=settings(SETTINGS, max_examples=40)
        )
    finally:
        server.stop()


def _on(server: RedisServer) -> type[LedgerAndModel]:
    class RedisAndModel(LedgerAndModel):
        def open_store(self, folder: Path) -> Store:
            server.command("FLUSHALL")
            # One connection: calls are done in the order in which they came.
            return RedisStoreOfTests(server, connections=1)

    return RedisAndModel
