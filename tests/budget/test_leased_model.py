"""Sidecars that lease, whatever happens to them: no limit is passed at any moment, a call
that is tried again gets its first answer, and in the end the sums are those of what was
answered.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pdp.budget.lease_pool import LeaseTerms
from pdp.budget.ledger import (
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    OnExpiry,
    Receipt,
    Scope,
    Window,
)
from pdp.config import OnOutage
from tests.budget.leasing import Sidecar, Town
from tests.budget.teller import ALICE, BOB, DAY, calls, limit

MOST = 1600
SECONDS = 30


@dataclass
class Made:
    """A hold or charge that was answered, and what is known to have become of it."""

    sidecar: Sidecar
    id: str
    account: Account
    amount: int
    is_open: bool
    settled: int = 0
    left: int = 0
    refunded: int = 0


@dataclass
class Asked:
    """A call that can be tried again."""

    ask: Callable[[], Receipt]
    note: Callable[[Receipt], None]
    moves: int = 0
    """What it may have added, or taken away, if its answer was lost."""
    first: Receipt | None = None


class LeasingSidecars(RuleBasedStateMachine):
    @initialize(
        on_expiry=st.sampled_from(OnExpiry),
        on_outage=st.sampled_from(OnOutage),
        share=st.sampled_from((1 / 8, 1 / 2)),
    )
    def open(self, on_expiry: OnExpiry, on_outage: OnOutage, share: float) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.town = Town(Path(self.directory.name))
        terms = LeaseTerms(
            seconds=SECONDS, share=share, longest_hold_seconds=60, on_outage=on_outage
        )
        self.sidecars = [self.town.sidecar(name, terms) for name in ("one", "two")]
        self.on_expiry = on_expiry
        self.made: list[Made] = []
        self.asked: list[Asked] = []
        self.beyond = 0
        """What may stand above a limit, as it was settled above a hold, or late."""
        for number in (0, 1):
            self.charge(number, ALICE, [1] * 4, MOST)

    def limits(self, most: int = MOST) -> tuple[Limit, ...]:
        """Those of the whole tenant and of the actor."""
        return (
            limit(most, name="tenant", window=Window.LIFETIME, on_expiry=self.on_expiry),
            limit(
                MOST // 2,
                name="actor",
                window=Window.LIFETIME,
                scope=Scope.ACTOR,
                on_expiry=self.on_expiry,
            ),
        )

    def try_to(self, asked: Asked) -> None:
        try:
            given = asked.ask()
        except LedgerError:
            # Whatever it was, it has had no effect, or will be answered later.
            return
        if asked.first is None:
            asked.first = given
            asked.note(given)
            return
        assert given.replayed
        assert (given.id, given.charges, given.refused_by, given.late, given.note) == (
            asked.first.id,
            asked.first.charges,
            asked.first.refused_by,
            asked.first.late,
            asked.first.note,
        )

    def first_try(
        self, ask: Callable[[], Receipt], note: Callable[[Receipt], None], *, moves: int = 0
    ) -> None:
        asked = Asked(ask, note, moves)
        self.asked.append(asked)
        self.try_to(asked)

    @rule(
        number=st.integers(0, 1),
        account=st.sampled_from((ALICE, ALICE, BOB)),
        amounts=st.lists(st.integers(1, 9) | st.just(60), min_size=1, max_size=12),
        lowered=st.sampled_from((*[MOST] * 9, MOST // 3)),
    )
    def charge(self, number: int, account: Account, amounts: list[int], lowered: int) -> None:
        sidecar, limits = self.sidecars[number], self.limits(lowered)
        for amount in amounts:
            key = sidecar.key("charge")

            def ask(key: IdempotencyKey = key, amount: int = amount) -> Receipt:
                return sidecar.charge(calls(amount), limits=limits, account=account, key=key)

            def note(given: Receipt, amount: int = amount) -> None:
                if given.id:
                    self.made.append(
                        Made(sidecar, given.id, account, amount, is_open=False, settled=amount)
                    )

            self.first_try(ask, note)

    @rule(
        number=st.integers(0, 1),
        account=st.sampled_from((ALICE, ALICE, BOB)),
        amounts=st.lists(st.integers(1, 9), min_size=4, max_size=8),
        ttl_seconds=st.sampled_from((5, 60, 61)),
    )
    def reserve(self, number: int, account: Account, amounts: list[int], ttl_seconds: int) -> None:
        sidecar, limits = self.sidecars[number], self.limits()
        for amount in amounts:
            key = sidecar.key("reserve")

            def ask(key: IdempotencyKey = key, amount: int = amount) -> Receipt:
                return sidecar.reserve(
                    calls(amount),
                    limits=limits,
                    account=account,
                    key=key,
                    ttl_seconds=ttl_seconds,
                )

            def note(given: Receipt, amount: int = amount) -> None:
                if given.id:
                    self.made.append(
                        Made(sidecar, given.id, account, amount, is_open=True, left=amount)
                    )

            self.first_try(ask, note)

    @precondition(lambda self: self.made)
    @rule(data=st.data(), amount=st.sampled_from((None, 0, 1, 3, 12)), final=st.booleans())
    def settle_some(self, data: st.DataObject, amount: int | None, *, final: bool) -> None:
        self.settle(data, amount, final=final)

    def settle(self, data: st.DataObject, amount: int | None, *, final: bool) -> None:
        still_open = [made for made in self.made if made.is_open]
        made = data.draw(st.sampled_from((still_open or self.made)[-12:]))
        key = made.sidecar.key("settle")
        charges = () if amount is None else (calls(amount),)

        def note(given: Receipt) -> None:
            [posted] = given.charges
            drop = made.left if final else min(made.left, posted.amount)
            self.beyond += max(0, posted.amount - drop) + (posted.amount if given.late else 0)
            made.left -= drop
            made.settled += posted.amount
            made.is_open = made.is_open and not final

        self.first_try(
            lambda: made.sidecar.settle(
                made.id, *charges, account=made.account, key=key, final=final
            ),
            note,
            moves=made.amount if amount is None else amount,
        )

    @precondition(lambda self: any(made.is_open for made in self.made))
    @rule(data=st.data(), amount=st.sampled_from((None, 0, 3)), crashes=st.booleans())
    def settle_late(self, data: st.DataObject, amount: int | None, *, crashes: bool) -> None:
        self.town.now += 61
        for sidecar in self.sidecars:
            sidecar.tend()
        self.settle(data, amount, final=True)
        if crashes:
            self.crash(0)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        made = data.draw(st.sampled_from(self.made))
        key = made.sidecar.key("release")

        def note(_given: Receipt) -> None:
            made.left, made.is_open = 0, False

        self.first_try(
            lambda: self.town.do(made.sidecar.ledger.release(made.account, key, hold_id=made.id)),
            note,
        )

    @precondition(lambda self: self.made)
    @rule(data=st.data(), amount=st.sampled_from((None, 1, 3)))
    def refund(self, data: st.DataObject, amount: int | None) -> None:
        made = data.draw(st.sampled_from(self.made))
        key = made.sidecar.key("refund")
        charges: tuple[Charge, ...] = () if amount is None else (calls(amount),)

        def note(given: Receipt) -> None:
            made.refunded += given.charges[0].amount

        self.first_try(
            lambda: made.sidecar.refund(made.id, *charges, key=key), note, moves=made.settled
        )

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def try_again(self, data: st.DataObject) -> None:
        self.try_to(data.draw(st.sampled_from(self.asked)))

    @rule(number=st.integers(0, 1), broken=st.sampled_from((*[""] * 6, "cut", "loses answers")))
    def change_the_line(self, number: int, broken: str) -> None:
        line = self.sidecars[number].line
        line.cut, line.loses_answers = broken == "cut", broken == "loses answers"

    @rule(number=st.integers(0, 1))
    def crash(self, number: int) -> None:
        self.sidecars[number].crash()

    @rule(numbers=st.sampled_from(((0,), (1,), (0, 1), (0, 0, 1, 1))))
    def tend(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            self.sidecars[number].tend()

    @rule(seconds=st.sampled_from((0.5, 1, 5, 16, 31, 61, 200)))
    def move_the_clock(self, seconds: float) -> None:
        self.town.now += seconds

    @property
    def uncertain(self) -> int:
        """What calls may have moved whose answers were lost."""
        return sum(asked.moves for asked in self.asked if asked.first is None)

    @invariant()
    def no_limit_is_passed(self) -> None:
        if not hasattr(self, "town"):
            return
        for account in (ALICE, BOB):
            for each in self.limits():
                spent, held = self.town.count(each, account)
                assert spent + held <= each.limit + self.beyond + self.uncertain

    @invariant()
    def what_was_answered_is_counted(self) -> None:
        """Spend and holds that were acknowledged stand in the shared ledger, as they are or
        as part of a lease. Late settlements and refunds are on their way there.
        """
        if not hasattr(self, "town"):
            return
        [tenants, _] = self.limits()
        spent, held = self.town.count(tenants)
        answered = sum(made.settled - made.refunded for made in self.made)
        assert answered <= spent + held + self.beyond + self.uncertain

    def teardown(self) -> None:
        if hasattr(self, "town"):
            self.end()
            self.town.close()
            self.directory.cleanup()

    def end(self) -> None:
        for sidecar in self.sidecars:
            sidecar.line.cut = sidecar.line.loses_answers = False
        for asked in self.asked:
            self.try_to(asked)
        self.town.now += DAY // 2
        for sidecar in self.sidecars:
            for _ in range(3):
                sidecar.tend()
            assert sidecar.ledger._reports.leases == []
        charged = self.on_expiry is OnExpiry.CHARGE
        for account in (None, ALICE, BOB):
            expected = sum(
                made.settled - made.refunded + (made.left if made.is_open and charged else 0)
                for made in self.made
                if account in {None, made.account}
            )
            tenants, actors = self.limits()
            counted = (
                self.town.count(tenants) if account is None else self.town.count(actors, account)
            )
            assert counted == (expected, 0)


SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_sidecars_that_lease_never_pass_a_limit_and_lose_nothing() -> None:
    run_state_machine_as_test(LeasingSidecars, settings=SETTINGS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sidecars_that_lease_never_pass_a_limit_for_longer() -> None:
    run_state_machine_as_test(LeasingSidecars, settings=settings(SETTINGS, max_examples=600))
