"""What a sidecar that leases promises, whatever happens to it, its store and the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from pdp.budget.lease_pool import LeaseTerms
from pdp.budget.leased_ledger import open_leased
from pdp.budget.ledger import LedgerError, Limit, OnExpiry, Warned, Window
from pdp.budget.local_ledger import is_local
from pdp.config import OnOutage
from pdp.storage import Durability, StorageError
from tests.budget.leasing import Town
from tests.budget.teller import ALICE, BOB, MALLORY, OTHER, calls, limit, money, rate

MANY = limit(10_000)


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    town = Town(tmp_path)
    yield town
    town.close()


def test_after_a_few_calls_a_lease_covers_the_next(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    one.line.asked.clear()
    held = one.reserve(calls(2), limits=(MANY,))
    assert is_local(held.id)
    assert held.charges == (calls(2),)
    one.settle(held.id, calls(1))
    assert one.line.asked == []


def test_what_is_leased_is_held_on_the_shared_ledger(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, held = town.count(MANY)
    assert held == one.leases == 32
    one.charge(calls(5), limits=(MANY,))
    assert town.count(MANY) == (spent, held)


def test_closing_reports_what_was_spent_and_returns_the_rest(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    one.charge(calls(5), limits=(MANY,))
    held = one.reserve(calls(3), limits=(MANY,))
    one.settle(held.id, calls(2))
    one.close()
    assert town.count(MANY) == (spent + 7, 0)


def test_a_lease_that_has_ended_returns(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    one.charge(calls(5), limits=(MANY,))
    town.now += 30
    one.tend()
    assert town.count(MANY) == (spent + 5, 0)


def test_a_receipt_says_what_remains(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    receipt = one.reserve(calls(5), limits=(MANY,))
    [state] = receipt.limits
    assert state.limit == MANY
    assert state.remaining == 10_000 - spent - 5


def test_holds_under_a_lease_that_has_ended_stay_held(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    hold = one.reserve(calls(5), limits=(MANY,), ttl_seconds=60)
    town.now += 30
    one.tend()
    assert town.count(MANY) == (spent, 5)
    one.settle(hold.id, calls(4))
    one.tend()
    assert town.count(MANY) == (spent + 4, 0)


def test_a_hold_that_expires_under_a_lease_returns(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    one.reserve(calls(5), limits=(MANY,), ttl_seconds=60)
    town.now += 61
    one.tend()
    assert town.count(MANY) == (spent, 0)


def test_a_hold_that_is_charged_on_expiry_is_charged_under_a_lease(town: Town) -> None:
    one = town.sidecar()
    charging = replace(MANY, on_expiry=OnExpiry.CHARGE)
    one.warm_up(charging)
    spent, _ = town.count(charging)
    hold = one.reserve(calls(5), limits=(charging,), ttl_seconds=60)
    assert is_local(hold.id)
    town.now += 61
    one.tend()
    assert town.count(charging) == (spent + 5, 0)
    assert one.settle(hold.id, calls(2)).late
    one.tend()
    assert town.count(charging) == (spent + 2, 0)


def test_a_late_settlement_reaches_the_shared_ledger(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    hold = one.reserve(calls(5), limits=(MANY,), ttl_seconds=60)
    town.now += 61
    one.tend()
    assert one.settle(hold.id, calls(4)).late
    one.tend()
    assert town.count(MANY) == (spent + 4, 0)


def test_a_late_settlement_reaches_the_shared_ledger_after_a_crash(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    hold = one.reserve(calls(5), limits=(MANY,), ttl_seconds=60)
    town.now += 61
    one.tend()
    one.crash()
    assert one.settle(hold.id, calls(4)).late
    one.crash()
    one.tend()
    assert town.count(MANY) == (spent + 4, 0)


def test_more_than_was_held_is_recorded_in_full(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    hold = one.reserve(calls(5), limits=(MANY,))
    assert one.settle(hold.id, calls(500)).over_hold
    one.close()
    assert town.count(MANY) == (spent + 500, 0)


def test_parts_of_a_hold_are_settled_under_a_lease(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    hold = one.reserve(calls(5), limits=(MANY,))
    one.settle(hold.id, calls(2), final=False)
    town.now += 31
    one.tend()
    assert town.count(MANY) == (spent + 2, 3)
    one.settle(hold.id, calls(1))
    one.tend()
    assert town.count(MANY) == (spent + 3, 0)


def test_a_refund_under_a_lease_reaches_the_shared_ledger(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    charged = one.charge(calls(5), limits=(MANY,))
    one.refund(charged.id, calls(1))
    town.now += 31
    one.tend()
    assert town.count(MANY) == (spent + 4, 0)
    one.refund(charged.id, calls(3))
    one.tend()
    assert town.count(MANY) == (spent + 1, 0)


def test_several_charges_are_under_a_lease_each(town: Town) -> None:
    one = town.sidecar()
    both = (MANY, limit(10**9, name="money-a-day", unit="usd_micros"))
    for _ in range(4):
        one.charge(calls(1), money(1000), limits=both)
    one.line.asked.clear()
    hold = one.reserve(calls(1), money(700), limits=both)
    assert is_local(hold.id)
    assert [state.limit for state in hold.limits] == list(both)
    one.settle(hold.id, calls(1), money(600))
    assert one.line.asked == []
    one.close()
    assert town.count(both[0]) == (5, 0)
    assert town.count(both[1]) == (4600, 0)


def test_near_the_limit_every_unit_can_be_spent_and_no_more(town: Town) -> None:
    sidecars = [town.sidecar(name) for name in ("one", "two", "three")]
    low = limit(300)
    for number in range(600):
        sidecars[number % 3].charge(calls(1), limits=(low,))
        spent, held = town.count(low)
        assert spent + held <= 300
        town.now += 0.5
        sidecars[number % 3].tend()
    assert town.count(low) == (300, 0)


def test_a_refusal_comes_from_the_shared_ledger(town: Town) -> None:
    one = town.sidecar()
    low = limit(10)
    for _ in range(10):
        assert one.charge(calls(1), limits=(low,)).refused_by is None
    refused = one.charge(calls(1), limits=(low,))
    assert refused.refused_by is not None
    assert refused.refused_by.limit == low
    assert refused.retry_after_seconds == 43_200


@pytest.mark.parametrize(
    "bound",
    (
        (rate(10_000),),
        (MANY, rate(10_000)),
        (MANY, limit(10_000, name="at-once", window=Window.CONCURRENT)),
        (MANY, limit(5, name="shadow", enforced=False)),
        (MANY, limit(10_000, name="charging", on_expiry=OnExpiry.CHARGE)),
    ),
)
def test_what_can_not_be_leased_is_done_on_the_shared_ledger(
    town: Town, bound: tuple[Limit, ...]
) -> None:
    one = town.sidecar()
    for _ in range(20):
        assert not is_local(one.charge(calls(1), limits=bound).id)


def test_shadow_limits_are_reported_as_if_nothing_was_leased(town: Town) -> None:
    one = town.sidecar()
    shadow = limit(100, name="shadow", enforced=False)
    refused = 0
    for _ in range(150):
        receipt = one.charge(calls(1), limits=(MANY, shadow))
        refused += bool(receipt.shadow_refusals)
        town.now += 0.3
        one.tend()
    assert refused == 50


def test_holds_that_may_outlive_a_lease_are_made_on_the_shared_ledger(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    assert not is_local(one.reserve(calls(1), limits=(MANY,), ttl_seconds=121).id)


def test_accounts_share_leases_only_where_they_count_together(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    assert is_local(one.charge(calls(1), limits=(MANY,), account=BOB).id)
    other = one.charge(calls(1), limits=(MANY,), account=MALLORY)
    assert not is_local(other.id)


def test_no_lease_is_spent_past_the_end_of_its_window(town: Town) -> None:
    one = town.sidecar()
    town.now += 43_200 - 10
    one.warm_up(MANY)
    assert is_local(one.charge(calls(1), limits=(MANY,)).id)
    town.now += 9
    assert not is_local(one.charge(calls(1), limits=(MANY,)).id)
    town.now += 1
    one.charge(calls(1), limits=(MANY,))
    one.tend()
    assert town.count(MANY)[0] == 1


def test_a_lowered_limit_applies_at_once(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    assert one.charge(calls(1), limits=(limit(5),)).refused_by is not None
    town.now += 30
    one.tend()
    spent, held = town.count(MANY)
    assert (spent, held) == (3, 0)


def test_a_key_gets_its_first_answer_whatever_is_leased_by_then(town: Town) -> None:
    one = town.sidecar()
    early, late = one.key("charge", "early"), one.key("charge", "late")
    first = one.charge(calls(1), limits=(MANY,), key=early)
    one.warm_up(MANY)
    second = one.charge(calls(2), limits=(MANY,), key=late)
    assert is_local(second.id)
    for happens in ("nothing", "crash", "new lease"):
        if happens == "crash":
            one.crash()
        elif happens == "new lease":
            one.warm_up(MANY)
        again = one.charge(calls(1), limits=(MANY,), key=early)
        assert (again.id, again.replayed, again.note) == (first.id, True, '"early"')
        again = one.charge(calls(2), limits=(MANY,), key=late)
        assert (again.id, again.replayed, again.note) == (second.id, True, '"late"')
    for key in (early, late):
        with pytest.raises(LedgerError) as caught:
            one.charge(calls(1), limits=(MANY,), key=replace(key, content_sha256=OTHER))
        assert caught.value.reason_code == "idempotency_key_reused"


def test_a_refusal_is_the_answer_to_its_key_for_good(town: Town) -> None:
    one = town.sidecar()
    key = one.key("charge")
    low = limit(5)
    assert one.charge(calls(6), limits=(low,), key=key).refused_by is not None
    one.warm_up(MANY)
    again = one.charge(calls(6), limits=(MANY,), key=key)
    assert again.replayed
    assert again.refused_by is not None


def test_an_error_leaves_no_trace(town: Town) -> None:
    one = town.sidecar()
    key = one.key("charge")
    with pytest.raises(LedgerError) as caught:
        one.charge(money(6), limits=(MANY,), key=key)
    assert caught.value.reason_code == "budget_unlimited"
    other = replace(key, content_sha256=OTHER)
    assert not one.charge(calls(1), limits=(MANY,), key=other).replayed


def test_an_operation_whose_answer_was_lost_is_done_once(town: Town) -> None:
    one = town.sidecar()
    key = one.key("charge")
    one.line.loses_answers = True
    with pytest.raises(LedgerError):
        one.charge(calls(1), limits=(MANY,), key=key)
    one.line.loses_answers = False
    one.crash()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    assert one.charge(calls(1), limits=(MANY,), key=key).replayed
    assert town.count(MANY)[0] == spent


def test_after_a_crash_leases_are_reported_and_new_ones_are_drawn(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, _ = town.count(MANY)
    one.charge(calls(3), limits=(MANY,))
    hold = one.reserve(calls(2), limits=(MANY,))
    one.crash()
    one.tend()
    assert town.count(MANY) == (spent + 3, 2)
    assert not is_local(one.charge(calls(1), limits=(MANY,)).id)
    one.settle(hold.id)
    one.tend()
    assert town.count(MANY) == (spent + 6, 0)


def test_a_lease_whose_answer_was_lost_returns(town: Town) -> None:
    one = town.sidecar()
    for _ in range(2):
        one.charge(calls(1), limits=(MANY,))
    key = one.key("charge")
    one.town.do(one.ledger.charge(ALICE, key, charges=(calls(1),), limits=(MANY,)))
    one.crash()
    one.tend()
    assert town.count(MANY) == (3, 0)


def test_the_unreported_part_of_a_lost_node_counts_as_spent(town: Town) -> None:
    one, two = town.sidecar("one"), town.sidecar("two")
    one.warm_up(MANY)
    spent, held = town.count(MANY)
    one.charge(calls(3), limits=(MANY,))
    town.sidecars.remove(one)
    town.now += 30 + 120 + 10
    assert town.count(MANY) == (spent + held, 0)
    assert two.charge(calls(1), limits=(MANY,)).refused_by is None
    # Its journal is found after all.
    one.crash()
    one.tend()
    assert town.count(MANY) == (spent + 4, 0)
    town.sidecars.append(one)


def test_a_sidecar_that_stood_still_spends_nothing_under_its_old_lease(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    town.now += 1000
    assert not is_local(one.charge(calls(1), limits=(MANY,)).id)
    one.tend()
    assert town.count(MANY) == (4, 0)


@pytest.mark.parametrize("on_outage", OnOutage)
def test_while_the_store_is_away_leases_are_spent_where_that_is_wanted(
    town: Town, on_outage: OnOutage
) -> None:
    one = town.sidecar(terms=LeaseTerms(on_outage=on_outage))
    one.warm_up(MANY)
    one.line.cut = True
    with pytest.raises(LedgerError) as caught:
        one.charge(calls(1), limits=(limit(77),))
    assert caught.value.reason_code == "budget_unavailable"
    if on_outage is OnOutage.DENY:
        with pytest.raises(LedgerError) as caught:
            one.charge(calls(1), limits=(MANY,))
        assert caught.value.reason_code == "budget_unavailable"
    else:
        assert is_local(one.charge(calls(1), limits=(MANY,)).id)
        town.now += 30
        with pytest.raises(LedgerError) as caught:
            one.charge(calls(1), limits=(MANY,))
    one.line.cut = False
    assert one.charge(calls(1), limits=(MANY,)).refused_by is None


def test_what_could_not_be_reported_is_reported_later_and_once(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    spent, held = town.count(MANY)
    one.charge(calls(3), limits=(MANY,))
    town.now += 30
    one.line.cut = True
    one.tend()
    assert town.count(MANY) == (spent, held)
    one.line.cut = False
    one.line.loses_answers = True
    one.tend()
    one.crash()
    one.tend()
    one.line.loses_answers = False
    one.tend()
    one.tend()
    assert town.count(MANY) == (spent + 3, 0)


def test_a_report_that_is_never_taken_does_not_keep_the_others(town: Town) -> None:
    one = town.sidecar()
    many = [limit(2**53 - 1, name=f"limit-{number}") for number in range(6)]
    for each in many:
        one.warm_up(each)
    for each in many[:5]:
        hold = one.reserve(calls(1), limits=(each,))
        one.settle(hold.id, calls(2**53 - 1))
    town.now += 30
    one.tend()
    one.tend()
    assert town.count(many[5]) == (3, 0)


def test_a_store_that_has_lost_leases_is_charged_and_leased_from_no_more_for_a_while(
    town: Town,
) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    one.charge(calls(7), limits=(MANY,))
    town.shared.books.holds.clear()
    town.shared.books.spends.clear()
    town.shared.books.answers.clear()
    town.now += 30
    one.tend()
    assert town.count(MANY) == (7, 0)
    assert one.ledger.lost_leases == 1
    for _ in range(10):
        assert not is_local(one.charge(calls(1), limits=(MANY,)).id)
    town.now += 30
    one.warm_up(MANY)


def test_what_was_spent_under_a_lost_lease_counts_even_where_nothing_remains(town: Town) -> None:
    one = town.sidecar()
    low = limit(1000)
    one.warm_up(low)
    one.charge(calls(7), limits=(low,))
    town.shared.books.holds.clear()
    town.shared.books.spends.clear()
    town.shared.books.answers.clear()
    two = town.sidecar("two")
    two.charge(calls(1000), limits=(low,))
    town.now += 30
    one.tend()
    assert town.count(low) == (1007, 0)


def test_a_warning_is_given_once_and_to_the_next_who_asks(town: Town) -> None:
    one, two = town.sidecar("one"), town.sidecar("two")
    warning = limit(1000, warn_at=(50,))
    warned: list[Warned] = []
    for number in range(600):
        receipt = (one, two)[number % 2].charge(calls(1), limits=(warning,))
        warned += receipt.warnings
    assert [each.percent for each in warned] == [50]


def test_a_busy_sidecar_leases_more_at_once(town: Town) -> None:
    one = town.sidecar()
    plenty = limit(10**9)
    for _ in range(2000):
        one.charge(calls(1), limits=(plenty,))
    assert len(one.line.asked) < 30
    assert one.leases > 500


def test_one_lease_takes_only_a_share_of_what_remains(town: Town) -> None:
    one = town.sidecar()
    low = limit(100)
    one.warm_up(low)
    assert one.leases == 12


def test_an_operation_without_charges_needs_no_store(town: Town) -> None:
    one = town.sidecar()
    one.line.cut = True
    key = one.key("authorize")
    assert not one.reserve(limits=(), key=key).replayed
    one.crash()
    again = one.reserve(limits=(), key=key)
    assert again.replayed
    assert again.note == key.note


def test_an_outcome_of_a_hold_that_had_expired_is_remembered_where_the_hold_is(
    town: Town,
) -> None:
    one = town.sidecar()
    hold = one.reserve(calls(1), limits=(MANY,), key=one.key("authorize"), ttl_seconds=1)
    town.now += 2
    outcome = one.key("outcome")
    with pytest.raises(LedgerError):
        town.do(one.ledger.release(ALICE, outcome, hold_id=hold.id))
    one.reserve(limits=(), key=outcome)
    with pytest.raises(LedgerError) as caught:
        one.settle(hold.id, key=replace(outcome, content_sha256=OTHER))
    assert caught.value.reason_code == "idempotency_key_reused"


def test_holds_are_shown_as_they_were_made(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    hold = one.reserve(calls(1), limits=(MANY,), memo="for order 7")
    shown = town.do(one.ledger.hold("acme", hold.id))
    assert shown is not None
    assert shown.memo == "for order 7"
    local, lease = town.do(one.ledger.holds("acme", most=10))
    assert local == shown
    assert (lease.operation, lease.memo) == ("lease", "leased by one")


def test_an_operator_lets_a_hold_under_a_lease_expire(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    hold = one.reserve(calls(5), limits=(MANY,))
    town.do(one.ledger.expire(ALICE, one.key("expire"), hold_id=hold.id))
    one.close()
    assert town.count(MANY)[1] == 0


def test_nobody_else_ends_a_hold_under_a_lease(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    hold = one.reserve(calls(5), limits=(MANY,))
    for account in (BOB, MALLORY):
        with pytest.raises(LedgerError) as caught:
            one.settle(hold.id, account=account)
        assert caught.value.reason_code == "hold_not_found"


def test_old_leases_are_forgotten(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    town.now += 30
    one.tend()
    town.now += 26 * 3600
    one.tend()
    assert town.do(one.journal.asked_before(int(town.now), 10)) == []
    assert town.do(one.local.accounts("acme", most=10)) == ()


def test_a_journal_that_can_not_be_read_keeps_the_ledger_closed(town: Town) -> None:
    one = town.sidecar()
    one.warm_up(MANY)
    town.do(one.journal.close())
    town.do(one.local.close())
    with contextlib.closing(apsw.Connection(str(one.folder / "lease-journal.db"))) as journal:
        journal.execute("UPDATE lease SET charge = '[]'")
    opened = open_leased(
        town.shared, one.folder, durability=Durability.PROCESS, terms=one.terms, holder="again"
    )
    with pytest.raises(StorageError, match="A lease in lease-journal"):
        town.do(opened)
    one.folder = one.folder.with_name("another")
    one.folder.mkdir()
    one.open()
