"""Kinds of limits, and what becomes of holds, held against every store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    Limit,
    LimitState,
    OnExpiry,
    PartState,
    Receipt,
    Scope,
    Warned,
    Window,
)
from tests.budget.teller import (
    ALICE,
    BOB,
    DAY,
    MALLORY,
    NOON,
    TEN,
    Teller,
    calls,
    limit,
    money,
    rate,
    refused,
)

# Windows in a time zone


def test_a_day_ends_at_the_tenants_midnight(teller: Teller) -> None:
    tokyo = limit(1, timezone="Asia/Tokyo")
    teller.now = NOON + 3 * 3600 - 1  # a second before midnight in Tokyo
    refusal_at = teller.charge(calls(1), limits=[tokyo])
    assert refusal_at.limits[0].resets_at == NOON + 3 * 3600
    assert teller.charge(calls(1), limits=[tokyo]).retry_after_seconds == 1
    teller.now += 1
    assert teller.charge(calls(1), limits=[tokyo]).id
    assert teller.state(tokyo)[0].resets_at == NOON + 3 * 3600 + DAY


# Rates


def test_a_rate_lets_its_burst_in_at_once_and_then_what_drains(teller: Teller) -> None:
    six_a_minute = rate(6, burst=3)
    for _ in range(3):
        assert teller.reserve(calls(1), limits=[six_a_minute, TEN]).id
    refusal = teller.reserve(calls(1), limits=[six_a_minute, TEN])
    assert refusal.refused_by is not None
    assert refusal.refused_by.limit == six_a_minute
    assert refusal.refused_by.remaining == 0
    assert refusal.retry_after_seconds == 10
    teller.now += 9.999
    assert teller.reserve(calls(1), limits=[six_a_minute, TEN]).retry_after_seconds == 1
    teller.now += 0.001
    assert teller.reserve(calls(1), limits=[six_a_minute, TEN]).id
    assert not teller.reserve(calls(1), limits=[six_a_minute, TEN]).id


def test_a_rate_shows_what_has_not_drained_and_when_it_will_have(teller: Teller) -> None:
    six_a_minute = rate(6)
    assert teller.state(six_a_minute) == (
        LimitState(limit=six_a_minute, spent=0, held=0, resets_at=None),
    )
    taken = teller.charge(calls(4), limits=[six_a_minute])
    assert taken.limits == (LimitState(limit=six_a_minute, spent=4, held=0, resets_at=NOON + 40),)
    teller.now += 15
    assert teller.state(six_a_minute)[0].spent == 3  # two and a half, rounded up
    teller.now += 25
    assert teller.state(six_a_minute)[0].spent == 0


def test_more_than_a_rates_burst_can_not_be_waited_for(teller: Teller) -> None:
    assert teller.charge(calls(4), limits=[rate(60, burst=3)]).retry_after_seconds is None


def test_a_rate_keeps_what_was_reserved_whatever_becomes_of_it(teller: Teller) -> None:
    two = rate(2)
    held = teller.reserve(calls(1), limits=[two, TEN])
    teller.release(held.id)
    settled = teller.reserve(calls(1), limits=[two, TEN])
    teller.settle(settled.id, calls(5))
    teller.refund(settled.id)
    assert teller.state(two)[0].spent == 2
    assert teller.counts(TEN) == [(0, 0)]


def test_a_rate_is_exact_where_it_does_not_divide(teller: Teller) -> None:
    seven_in_three = rate(7, seconds=3)
    taken = 0
    for _ in range(300):
        while teller.charge(calls(1), limits=[seven_in_three]).id:
            taken += 1
        teller.now += 0.1
    assert taken == 7 + 69  # 29.9 seconds at 7 in 3


def test_a_rate_counts_in_the_largest_numbers(teller: Teller) -> None:
    most = (MAX_AMOUNT // 1000) // 86_400
    large = rate(most, seconds=86_400)
    assert teller.charge(calls(most), limits=[large]).id
    assert teller.charge(calls(1), limits=[large]).retry_after_seconds == 1
    teller.now += DAY / 2
    assert teller.charge(calls(most // 2), limits=[large]).id
    assert not teller.charge(calls(2), limits=[large]).id
    teller.now += 400 * DAY
    assert teller.state(large)[0].spent == 0


def test_a_changed_rate_drains_as_fast_as_it_says_now(teller: Teller) -> None:
    assert teller.charge(calls(6), limits=[rate(6)]).id
    assert teller.charge(calls(1), limits=[rate(60)]).id
    teller.now += 1
    assert teller.state(rate(60))[0].spent == 6


# Concurrency


def test_concurrency_counts_what_is_held_and_nothing_that_was_spent(teller: Teller) -> None:
    two_at_once = limit(2, name="at-once", window=Window.CONCURRENT)
    first = teller.reserve(calls(1), limits=[two_at_once, TEN])
    teller.reserve(calls(1), limits=[two_at_once, TEN], account=BOB)
    refusal = teller.reserve(calls(1), limits=[two_at_once, TEN])
    assert refusal.refused_by == LimitState(limit=two_at_once, spent=0, held=2, resets_at=None)
    assert refusal.retry_after_seconds == 1
    assert teller.reserve(calls(3), limits=[two_at_once]).retry_after_seconds is None
    assert not teller.charge(calls(1), limits=[two_at_once, TEN]).id
    teller.settle(first.id)
    assert teller.charge(calls(1), limits=[two_at_once, TEN]).id
    assert teller.counts(two_at_once, TEN) == [(0, 1), (2, 1)]
    teller.now += 60
    assert teller.counts(two_at_once) == [(0, 0)]


def test_a_part_that_is_settled_leaves_its_place(teller: Teller) -> None:
    at_once = limit(5, name="at-once", window=Window.CONCURRENT)
    hold = teller.reserve(calls(5), limits=[at_once, TEN])
    teller.settle(hold.id, calls(2), final=False)
    assert teller.counts(at_once, TEN) == [(0, 3), (2, 3)]


# Scopes


@pytest.mark.parametrize(
    ("scope", "same", "other"),
    (
        (Scope.TEAM, {"team": "sales"}, {"team": "support"}),
        (Scope.SESSION, {"session": "s-1"}, {"session": "s-2"}),
        (Scope.TEAM, {}, {"team": "sales"}),
        (Scope.SESSION, {}, {"session": "s-1"}),
    ),
)
def test_teams_and_sessions_count_apart_and_those_without_one_together(
    teller: Teller, scope: Scope, same: dict[str, str], other: dict[str, str]
) -> None:
    one = limit(1, scope=scope)
    alice, bob = (Account(tenant="acme", actor=name, **same) for name in ("alice", "bob"))
    assert teller.charge(calls(1), limits=[one], account=alice).id
    assert not teller.charge(calls(1), limits=[one], account=bob).id
    elsewhere = Account(tenant="acme", actor="alice", **other)
    assert teller.charge(calls(1), limits=[one], account=elsewhere).id
    assert teller.charge(calls(1), limits=[one], account=replace(alice, tenant="globex")).id


def test_an_organisations_limit_counts_across_its_tenants_alone(teller: Teller) -> None:
    one = limit(1, name="org", scope=Scope.ORGANISATION)
    north = Account(tenant="acme-north", actor="alice", organisation="acme")
    south = Account(tenant="acme-south", actor="bob", organisation="acme")
    # A tenant that is called like the organisation is not of it.
    for stranger in (
        Account(tenant="acme", actor="mallory"),
        Account(tenant="acme", actor="mallory", organisation="globex"),
        Account(tenant="acme-north", actor="mallory", organisation="globex-2"),
        Account(tenant="acme-north", actor="alice"),
    ):
        assert teller.charge(calls(1), limits=[one], account=stranger).id
    held = teller.reserve(calls(1), limits=[one, TEN], account=north)
    assert held.id
    assert teller.charge(calls(1), limits=[one, TEN], account=south).refused_by
    # Whoever ends the hold need not say of which organisation it is.
    teller.release(held.id, account=Account(tenant="acme-north", actor="alice"))
    assert teller.charge(calls(1), limits=[one, TEN], account=south).id
    assert teller.charge(calls(1), limits=[one, TEN], account=north).refused_by


def test_all_scopes_apply_at_once_and_the_one_that_refused_is_named(teller: Teller) -> None:
    account = Account(
        tenant="acme", actor="alice", tool="t", organisation="o", team="team", session="s"
    )
    limits = [limit(9, name=scope.value, scope=scope) for scope in Scope]
    for tight in limits:
        among = [replace(each, limit=0) if each is tight else each for each in limits]
        refusal = teller.reserve(calls(1), limits=among, account=account)
        assert refusal.refused_by is not None
        assert refusal.refused_by.limit.id == tight.id
        assert [state.remaining for state in refusal.limits] == [
            0 if each is tight else 9 for each in limits
        ]


# Shadow limits


def test_a_shadow_limit_counts_and_reports_and_refuses_nothing(teller: Teller) -> None:
    shadow = limit(3, name="shadow", enforced=False)
    assert teller.charge(calls(3), limits=[shadow, TEN]).shadow_refusals == ()
    taken = teller.charge(calls(2), limits=[shadow, TEN])
    assert taken.refused_by is None
    assert taken.shadow_refusals == (
        LimitState(limit=shadow, spent=3, held=0, resets_at=NOON + DAY // 2),
    )
    assert [state.remaining for state in taken.limits] == [-2, 5]
    refusal = teller.charge(calls(6), limits=[shadow, TEN])
    assert refusal.refused_by is not None
    assert refusal.refused_by.limit == TEN
    assert refusal.shadow_refusals == ()


def test_a_shadow_limit_alone_bounds_nothing(teller: Teller) -> None:
    refused("budget_unlimited", lambda: teller.charge(calls(1), limits=[limit(3, enforced=False)]))


def test_a_sum_that_no_ledger_can_count_is_refused(teller: Teller) -> None:
    shadow = limit(3, name="shadow", enforced=False)
    by_actor = limit(MAX_AMOUNT, name="wide", scope=Scope.ACTOR)
    teller.charge(calls(MAX_AMOUNT), limits=[shadow, by_actor])
    refused(
        "budget_unavailable",
        lambda: teller.charge(calls(1), limits=[shadow, by_actor], account=BOB),
    )


# Warnings


def test_a_threshold_warns_once_in_a_window(teller: Teller) -> None:
    warning = limit(10, warn_at=(50, 80, 95))
    assert teller.reserve(calls(4), limits=[warning]).warnings == ()
    crossed = teller.reserve(calls(1), limits=[warning])
    assert crossed.warnings == (Warned(limit_id="calls-a-day", percent=50),)
    teller.release(crossed.id)
    assert teller.reserve(calls(1), limits=[warning]).warnings == ()
    last = teller.charge(calls(5), limits=[warning])
    assert [each.percent for each in last.warnings] == [80, 95]
    teller.now += DAY
    assert [each.percent for each in teller.charge(calls(5), limits=[warning]).warnings] == [50]


def test_an_answer_that_is_given_again_warns_of_nothing(teller: Teller) -> None:
    key = teller.key("charge")
    warning = limit(10, warn_at=(50,))
    assert teller.charge(calls(9), limits=[warning], key=key).warnings
    again = teller.charge(calls(9), limits=[warning], key=key)
    assert (again.replayed, again.warnings) == (True, ())


def test_a_refusal_warns_of_nothing_and_leaves_the_warning_to_come(teller: Teller) -> None:
    warning = limit(10, warn_at=(50,))
    assert teller.charge(calls(11), limits=[warning]).warnings == ()
    assert teller.charge(calls(5), limits=[warning]).warnings


# Parts


def test_a_settlement_in_parts_leaves_the_rest_held(teller: Teller) -> None:
    hold = teller.reserve(calls(8))
    part = teller.settle(hold.id, calls(3), final=False)
    assert part == Receipt(replayed=False, note="", id=hold.id, charges=(calls(3),))
    assert teller.counts() == [(3, 5)]
    teller.settle(hold.id, calls(1), final=False)
    assert teller.counts() == [(4, 4)]
    end = teller.settle(hold.id)
    assert end.charges == (calls(4),)
    assert not end.over_hold
    assert teller.counts() == [(8, 0)]
    refused("hold_already_settled", lambda: teller.settle(hold.id, calls(1), final=False))


def test_the_last_part_lets_the_rest_go(teller: Teller) -> None:
    hold = teller.reserve(calls(8))
    teller.settle(hold.id, calls(3), final=False)
    teller.settle(hold.id, calls(1))
    assert teller.counts() == [(4, 0)]


def test_parts_that_are_more_than_the_hold_together_are_recorded_in_full(teller: Teller) -> None:
    hold = teller.reserve(calls(4))
    assert not teller.settle(hold.id, calls(3), final=False).over_hold
    assert teller.settle(hold.id, calls(3), final=False).over_hold
    assert teller.counts() == [(6, 0)]
    assert teller.settle(hold.id, calls(9)).over_hold
    assert teller.counts() == [(15, 0)]
    # What was spent beyond the limit blocks whatever comes next.
    assert teller.reserve(calls(1)).refused_by == teller.state()[0]
    assert teller.state()[0].remaining == -5


def test_a_release_after_parts_returns_only_the_rest(teller: Teller) -> None:
    limits = (TEN, limit(1000, name="money", unit="usd_micros"))
    hold = teller.reserve(calls(1), money(600), limits=limits)
    teller.settle(hold.id, calls(1), money(200), final=False)
    released = teller.release(hold.id)
    assert released.charges == (money(400),)
    assert teller.counts(*limits) == [(1, 0), (200, 0)]


def test_a_part_is_posted_once_however_often_it_is_sent(teller: Teller) -> None:
    hold = teller.reserve(calls(8))
    key = teller.key("settle")
    teller.settle(hold.id, calls(3), key=key, final=False)
    assert teller.settle(hold.id, calls(3), key=key, final=False).replayed
    assert teller.counts() == [(3, 5)]


def test_a_part_that_comes_after_expiry_is_late(teller: Teller) -> None:
    hold = teller.reserve(calls(8))
    teller.now += 60
    assert teller.settle(hold.id, calls(3), final=False).late
    assert teller.counts() == [(3, 0)]
    assert teller.settle(hold.id, calls(2)).late
    assert teller.counts() == [(5, 0)]


# Expiry that charges


CHARGING = limit(10, on_expiry=OnExpiry.CHARGE)


def test_a_hold_can_count_as_spent_once_it_expires(teller: Teller) -> None:
    both = (CHARGING, limit(10, name="other"))
    teller.reserve(calls(4), limits=both)
    teller.now += 59
    assert teller.counts(*both) == [(0, 4), (0, 4)]
    teller.now += 1
    assert teller.counts(*both) == [(4, 0), (0, 0)]
    assert teller.reserve(calls(7), limits=both).refused_by == teller.state(CHARGING)[0]


def test_a_late_settlement_puts_right_what_was_charged_on_expiry(teller: Teller) -> None:
    both = (CHARGING, limit(10, name="other"))
    hold = teller.reserve(calls(6), limits=both)
    teller.settle(hold.id, calls(1), final=False)
    teller.now += 60
    assert teller.counts(*both) == [(6, 0), (1, 0)]
    part = teller.settle(hold.id, calls(2), final=False)
    assert (part.late, part.over_hold) == (True, False)
    assert teller.counts(*both) == [(6, 0), (3, 0)]
    assert teller.settle(hold.id, calls(1)).late
    assert teller.counts(*both) == [(4, 0), (4, 0)]


def test_the_first_to_look_after_expiry_may_be_the_late_settlement(teller: Teller) -> None:
    hold = teller.reserve(calls(6), limits=[CHARGING])
    teller.now += 60
    teller.settle(hold.id, calls(9))
    assert teller.counts(CHARGING) == [(9, 0)]


def test_what_is_charged_on_expiry_does_not_come_back_by_waiting_for_it(teller: Teller) -> None:
    teller.reserve(calls(6), limits=[CHARGING])
    refusal = teller.reserve(calls(6), limits=[CHARGING])
    assert refusal.retry_after_seconds == DAY // 2


def test_what_was_agreed_when_the_hold_was_made_counts(teller: Teller) -> None:
    teller.reserve(calls(6), limits=[TEN])
    teller.reserve(calls(2), limits=[CHARGING])
    teller.now += 60
    assert teller.counts(TEN) == [(2, 0)]


# Refunds


def test_a_refund_takes_back_what_was_spent(teller: Teller) -> None:
    charge = teller.charge(calls(6))
    back = teller.refund(charge.id, calls(2))
    assert back == Receipt(replayed=False, note="", id=charge.id, charges=(calls(2),))
    assert teller.counts() == [(4, 0)]
    assert teller.refund(charge.id).charges == (calls(4),)
    assert teller.counts() == [(0, 0)]
    refused("refund_exceeds_spend", lambda: teller.refund(charge.id))
    refused("refund_exceeds_spend", lambda: teller.refund(charge.id, calls(1)))


def test_no_more_is_refunded_than_was_settled(teller: Teller) -> None:
    teller.charge(calls(5))
    hold = teller.reserve(calls(5))
    refused("refund_exceeds_spend", lambda: teller.refund(hold.id, calls(1)))
    teller.settle(hold.id, calls(2), final=False)
    refused("refund_exceeds_spend", lambda: teller.refund(hold.id, calls(3)))
    assert teller.refund(hold.id).charges == (calls(2),)
    assert teller.counts() == [(5, 3)]
    refused("charge_not_held", lambda: teller.refund(hold.id, money(1)))


def test_a_refund_counts_in_the_window_of_the_spend(teller: Teller) -> None:
    charge = teller.charge(calls(6))
    teller.now += DAY
    teller.charge(calls(3))
    assert teller.refund(charge.id).charges == (calls(6),)
    assert teller.counts() == [(3, 0)]


def test_a_refund_is_given_once_however_often_it_is_asked_for(teller: Teller) -> None:
    charge = teller.charge(calls(6))
    key = teller.key("refund")
    teller.refund(charge.id, calls(2), key=key)
    assert teller.refund(charge.id, calls(2), key=key).replayed
    assert teller.counts() == [(4, 0)]


def test_another_of_the_tenant_may_refund_and_no_other_tenant(teller: Teller) -> None:
    charge = teller.charge(calls(6))
    refused("hold_not_found", lambda: teller.refund(charge.id, account=MALLORY))
    assert teller.refund(charge.id, calls(1), account=BOB).id == charge.id


# Grants


def test_a_grant_lets_more_be_spent_until_the_window_ends(teller: Teller) -> None:
    teller.charge(calls(10))
    granted = teller.grant("calls-a-day", 5)
    assert granted.limits == (
        LimitState(limit=TEN, spent=10, held=0, resets_at=NOON + DAY // 2, granted=5),
    )
    assert teller.state()[0].remaining == 5
    assert teller.charge(calls(5)).id
    refusal = teller.charge(calls(1))
    assert refusal.refused_by == teller.state()[0]
    teller.now += DAY
    assert teller.state()[0].remaining == 10


def test_a_grant_can_be_taken_back(teller: Teller) -> None:
    teller.charge(calls(8))
    teller.grant("calls-a-day", 5)
    assert teller.grant("calls-a-day", -2).limits[0].granted == 3
    assert teller.grant("calls-a-day", -9).limits[0].granted == 0
    assert not teller.charge(calls(3)).id


def test_a_grant_is_given_once_however_often_it_is_asked_for(teller: Teller) -> None:
    teller.charge(calls(8))
    key = teller.key("grant")
    teller.grant("calls-a-day", 5, key=key)
    assert teller.grant("calls-a-day", 5, key=key).replayed
    assert teller.state()[0].granted == 5


def test_only_an_account_of_the_tenant_that_counts_spend_now_takes_a_grant(teller: Teller) -> None:
    org = Account(tenant="acme", actor="alice", organisation="o")
    limits = [
        TEN,
        rate(9),
        limit(9, name="at-once", window=Window.CONCURRENT),
        limit(9, name="org", scope=Scope.ORGANISATION),
    ]
    teller.reserve(calls(1), limits=limits, account=org)
    by_id = {each.limit.id: each for each in teller.accounts()}
    assert by_id.keys() == {"calls-a-day", "rate", "at-once"}
    for limit_id in ("rate", "at-once"):
        refused("account_not_found", partial(teller.grant, limit_id, 1))

    def grant(account: Account, account_id: str) -> Callable[[], object]:
        key = teller.key("grant")
        return lambda: teller.do(teller.ledger.grant(account, key, account_id=account_id, amount=1))

    refused("account_not_found", grant(MALLORY, by_id["calls-a-day"].id))
    refused("account_not_found", grant(ALICE, "none"))
    teller.now += DAY
    refused("account_not_found", grant(ALICE, by_id["calls-a-day"].id))


# What operators see and do


def test_accounts_show_what_counts_under_each_limit(teller: Teller) -> None:
    by_actor = limit(5, name="by-actor", scope=Scope.ACTOR)
    teller.charge(calls(2), limits=[TEN, by_actor])
    teller.reserve(calls(1), limits=[TEN, by_actor], account=BOB)
    teller.charge(calls(1), account=MALLORY)
    teller.charge(calls(1), limits=[replace(TEN, limit=12)])
    shown = [
        (each.limit.id, each.limit.limit, each.counts_for, each.spent, each.held, each.resets_at)
        for each in teller.accounts()
    ]
    midnight = NOON + DAY // 2
    assert shown == [
        ("by-actor", 5, "alice", 2, 0, midnight),
        ("by-actor", 5, "bob", 0, 1, midnight),
        ("calls-a-day", 12, "", 3, 1, midnight),
    ]
    assert {each.starts_at for each in teller.accounts()} == {midnight - DAY}
    assert teller.do(teller.ledger.accounts("acme", most=2)) == teller.accounts()[:2]
    teller.now += DAY
    assert teller.accounts() == ()


def test_open_holds_are_listed_the_earliest_to_expire_first(teller: Teller) -> None:
    late = teller.reserve(calls(2), ttl_seconds=90, memo="gpt-x")
    early = teller.reserve(calls(1), key=teller.key("authorize"), account=BOB)
    for end in (teller.settle, teller.release):
        end(teller.reserve(calls(1)).id)
    teller.reserve(calls(1), account=MALLORY)
    teller.settle(late.id, calls(1), final=False)
    first, second = teller.holds()
    assert (first.id, first.operation, first.actor) == (early.id, "authorize", "bob")
    assert (second.id, second.memo, second.tool) == (late.id, "gpt-x", "orders.update")
    assert (second.made_at, second.expires_at, second.state) == (NOON, NOON + 90, "open")
    assert second.parts == (PartState(charge=calls(2), settled=1, refunded=0),)
    assert teller.do(teller.ledger.holds("acme", most=1)) == (first,)
    teller.now += 60
    assert [each.id for each in teller.holds()] == [late.id]


def test_a_hold_or_charge_can_be_looked_at_by_its_own_tenant(teller: Teller) -> None:
    charge = teller.charge(calls(3))
    teller.refund(charge.id, calls(1), account=BOB)
    shown = teller.do(teller.ledger.hold("acme", charge.id))
    assert shown is not None
    assert (shown.operation, shown.state, shown.expires_at) == ("charge", "settled", 0)
    assert shown.parts == (PartState(charge=calls(3), settled=3, refunded=1),)
    assert teller.do(teller.ledger.hold("globex", charge.id)) is None
    assert teller.do(teller.ledger.hold("acme", "none")) is None


def test_tenants_are_listed_by_name(teller: Teller) -> None:
    assert teller.do(teller.ledger.tenants(most=10)) == ()
    teller.charge(calls(1), account=MALLORY)
    teller.charge(calls(1))
    assert teller.do(teller.ledger.tenants(most=10)) == ("acme", "globex")
    assert teller.do(teller.ledger.tenants(most=1)) == ("acme",)


@pytest.mark.parametrize("how", (TEN, CHARGING))
def test_an_operator_lets_a_hold_expire_and_loses_nothing(teller: Teller, how: Limit) -> None:
    hold = teller.reserve(calls(6), limits=[how], key=teller.key("authorize"))
    released = teller.expire(hold.id, account=Account(tenant="acme", actor="operator:eve"))
    assert released.charges == (calls(6),)
    assert teller.counts() == [(0, 0)]
    assert teller.holds() == ()
    refused("hold_expired", lambda: teller.expire(hold.id))
    refused("hold_expired", lambda: teller.release(hold.id, key=teller.key("outcome")))
    late = teller.settle(hold.id, calls(4), key=teller.key("outcome"))
    assert late.late
    assert teller.counts() == [(4, 0)]
    refused("hold_already_settled", lambda: teller.expire(hold.id))


def test_no_operator_of_another_tenant_finds_a_hold(teller: Teller) -> None:
    hold = teller.reserve(calls(6))
    refused("hold_not_found", lambda: teller.expire(hold.id, account=MALLORY))
    assert teller.counts() == [(0, 6)]


# Leases


def test_a_lease_is_found_by_no_other_operation(teller: Teller) -> None:
    lease = teller.reserve(calls(6), key=teller.key("lease"))
    refused("hold_not_found", lambda: teller.settle(lease.id))
    refused("hold_not_found", lambda: teller.settle(lease.id, key=teller.key("outcome")))
    refused("hold_not_found", lambda: teller.release(lease.id))
    hold = teller.reserve(calls(1))
    refused("hold_not_found", lambda: teller.settle(hold.id, key=teller.key("lease_settle")))


def test_a_settled_lease_takes_what_comes_late(teller: Teller) -> None:
    lease = teller.reserve(calls(6), limits=[CHARGING], key=teller.key("lease"))
    teller.settle(lease.id, calls(2), key=teller.key("lease_settle"))
    assert teller.counts(CHARGING) == [(2, 0)]
    late = teller.settle(lease.id, calls(3), key=teller.key("lease_settle"))
    assert (late.late, late.over_hold) == (True, False)
    assert teller.counts(CHARGING) == [(5, 0)]
    teller.now += 120
    teller.settle(lease.id, calls(1), key=teller.key("lease_settle"))
    assert teller.counts(CHARGING) == [(6, 0)]


# Lifetimes that end


def ending(most: int) -> Limit:
    return replace(limit(most, window=Window.LIFETIME), until=NOON + DAY)


def test_a_lifetime_that_ends_counts_until_then_and_never_again(teller: Teller) -> None:
    three = ending(3)
    held = teller.reserve(calls(1), limits=[three])
    assert teller.charge(calls(2), limits=[three]).limits[0].resets_at == NOON + DAY
    assert teller.charge(calls(1), limits=[three]).refused_by is not None
    teller.now = NOON + DAY - 1
    teller.settle(held.id, calls(1))
    assert teller.charge(calls(1), limits=[three]).refused_by is not None
    teller.now = NOON + DAY
    refused("account_not_found", lambda: teller.charge(calls(1), limits=[three]))
    refused("account_not_found", lambda: teller.reserve(calls(1), limits=[three, TEN]))
    refused("account_not_found", lambda: teller.state(three))
    assert teller.counts(TEN) == [(0, 0)]


def test_a_lifetime_that_ended_is_not_kept_for_ever(teller: Teller) -> None:
    teller.charge(calls(2), limits=[ending(3)])
    [account] = teller.accounts()
    assert (account.limit, account.spent, account.resets_at) == (ending(3), 2, NOON + DAY)
    teller.now = NOON + DAY
    assert teller.accounts() == ()
