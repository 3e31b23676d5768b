"""What the port promises, held against every store."""

from __future__ import annotations

import asyncio

import pytest

from pdp.budget.bounds import MAX_HOLD_SECONDS
from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    Charge,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
    Scope,
    Window,
)
from tests.budget.stores import Store
from tests.budget.teller import (
    ALICE,
    BOB,
    DAY,
    MALLORY,
    NOON,
    OTHER,
    SAME,
    TEN,
    Teller,
    calls,
    limit,
    money,
    refused,
)

# Reserve


def test_a_hold_counts_against_the_limit_and_apart_from_spend(teller: Teller) -> None:
    receipt = teller.reserve(calls(4))
    assert receipt.id
    assert not receipt.replayed
    assert receipt.refused_by is None
    assert receipt.charges == (calls(4),)
    assert receipt.expires_at == NOON + 60
    assert receipt.limits == (LimitState(limit=TEN, spent=0, held=4, resets_at=NOON + DAY // 2),)
    assert teller.state() == receipt.limits


def test_what_would_pass_the_limit_is_refused_whole(teller: Teller) -> None:
    teller.reserve(calls(4))
    refusal = teller.reserve(calls(7))
    assert refusal.id == ""
    assert refusal.charges == ()
    assert refusal.expires_at == 0
    assert refusal.refused_by == teller.state()[0]
    assert teller.counts() == [(0, 4)]
    assert teller.reserve(calls(6)).id


def test_a_limit_of_nothing_refuses_everything(teller: Teller) -> None:
    none = limit(0)
    assert teller.reserve(calls(1), limits=[none]).refused_by == teller.state(none)[0]


def test_a_reserve_without_charges_remembers_only_its_key_and_note(teller: Teller) -> None:
    key = teller.key("authorize", note="permit 7")
    first = teller.reserve(limits=[], key=key)
    assert first == Receipt(replayed=False, note="permit 7")
    assert teller.reserve(limits=[], key=key) == Receipt(replayed=True, note="permit 7")


def test_a_charge_without_a_limit_is_refused(teller: Teller) -> None:
    refused("budget_unlimited", lambda: teller.reserve(calls(1), limits=[]))
    refused("budget_unlimited", lambda: teller.reserve(calls(1), money(1)))
    refused("budget_unlimited", lambda: teller.charge(money(1)))
    assert teller.counts() == [(0, 0)]


def test_several_charges_and_limits_are_taken_together_or_not_at_all(teller: Teller) -> None:
    limits = [
        limit(10),
        limit(3, name="calls-an-hour", window=Window.HOUR),
        limit(1000, name="money", unit="usd_micros"),
    ]
    taken = teller.reserve(calls(2), money(600), limits=limits)
    assert [(each.spent, each.held) for each in taken.limits] == [(0, 2), (0, 2), (0, 600)]
    assert teller.reserve(calls(1), money(600), limits=limits).refused_by == taken.limits[2]
    assert teller.reserve(calls(2), money(1), limits=limits).refused_by == taken.limits[1]
    assert teller.state(*limits) == taken.limits


def test_the_first_limit_in_the_order_given_is_named(teller: Teller) -> None:
    hour, day = limit(3, name="hour", window=Window.HOUR), limit(2, name="day")
    for limits in ([hour, day], [day, hour]):
        refused_by = teller.reserve(calls(4), limits=limits).refused_by
        assert refused_by is not None
        assert refused_by.limit == limits[0]


def test_a_limit_applies_where_budget_and_unit_are_equal(teller: Teller) -> None:
    other_unit = limit(0, name="money", unit="usd_micros")
    other_budget = Limit(
        id="mail", budget="mail", unit="calls", window=Window.DAY, limit=0, scope=Scope.TENANT
    )
    receipt = teller.reserve(calls(1), limits=[other_unit, TEN, other_budget])
    assert [each.limit for each in receipt.limits] == [TEN]


def test_limits_of_scope_tool_apply_only_where_there_is_a_tool(teller: Teller) -> None:
    by_tool = limit(1, name="by-tool", scope=Scope.TOOL)
    no_tool = Account(tenant="acme", actor="alice")
    assert teller.reserve(calls(1), limits=[by_tool]).id
    assert teller.reserve(calls(1), limits=[by_tool]).refused_by
    assert len(teller.reserve(calls(1), limits=[by_tool, TEN], account=no_tool).limits) == 1
    refused("budget_unlimited", lambda: teller.reserve(calls(1), limits=[by_tool], account=no_tool))
    assert teller.state(by_tool, account=no_tool) == ()


def test_a_scope_says_who_shares_an_account(teller: Teller) -> None:
    limits = [
        limit(10, name=name, scope=scope)
        for name, scope in (("t", Scope.TENANT), ("a", Scope.ACTOR), ("o", Scope.TOOL))
    ]
    other_tool = Account(tenant="acme", actor="alice", tool="mail.send")
    teller.charge(calls(1), limits=limits)
    assert teller.counts(*limits, account=BOB) == [(1, 0), (0, 0), (1, 0)]
    assert teller.counts(*limits, account=other_tool) == [(1, 0), (1, 0), (0, 0)]
    assert teller.counts(*limits, account=MALLORY) == [(0, 0), (0, 0), (0, 0)]


def test_accounts_of_the_same_name_in_different_scopes_do_not_meet(teller: Teller) -> None:
    twin = Account(tenant="acme", actor="orders.update", tool="orders.update")
    by_actor, by_tool = limit(5, scope=Scope.ACTOR), limit(5, scope=Scope.TOOL)
    teller.charge(calls(3), limits=[by_actor], account=twin)
    assert teller.counts(by_actor, by_tool, account=twin) == [(3, 0), (0, 0)]


def test_limits_of_different_ids_do_not_meet(teller: Teller) -> None:
    teller.charge(calls(3), limits=[TEN])
    assert teller.counts(TEN, limit(10, name="other")) == [(3, 0), (0, 0)]


def test_windows_that_begin_together_do_not_meet(teller: Teller) -> None:
    minute, hour = limit(10, window=Window.MINUTE), limit(10, window=Window.HOUR)
    teller.charge(calls(3), limits=[minute])
    assert teller.counts(minute, hour) == [(3, 0), (0, 0)]


def test_raising_and_lowering_a_limit_applies_at_once(teller: Teller) -> None:
    teller.charge(calls(8))
    assert teller.charge(calls(5)).refused_by
    assert teller.charge(calls(5), limits=[limit(13)]).id
    (lowered,) = teller.state(TEN)
    assert lowered.remaining == -3
    assert teller.charge(calls(1)).refused_by == lowered


# Charge


def test_a_charge_is_spent_at_once(teller: Teller) -> None:
    receipt = teller.charge(calls(4))
    assert receipt.id
    assert receipt.expires_at == 0
    assert receipt.charges == (calls(4),)
    assert receipt.limits == teller.state()
    assert teller.counts() == [(4, 0)]
    assert teller.charge(calls(7)).refused_by
    assert teller.counts() == [(4, 0)]


def test_a_charge_can_not_spend_what_is_held(teller: Teller) -> None:
    teller.reserve(calls(8))
    assert teller.charge(calls(3)).refused_by
    assert teller.charge(calls(2)).id


# Settle and release


def test_settling_posts_what_was_spent_and_lets_the_rest_go(teller: Teller) -> None:
    hold = teller.reserve(calls(8))
    receipt = teller.settle(hold.id, calls(3))
    assert receipt == Receipt(replayed=False, note="", id=hold.id, charges=(calls(3),))
    assert teller.counts() == [(3, 0)]


def test_settling_without_charges_settles_all_that_is_held(teller: Teller) -> None:
    limits = [TEN, limit(1000, name="money", unit="usd_micros")]
    hold = teller.reserve(calls(2), money(600), limits=limits)
    assert teller.settle(hold.id).charges == (calls(2), money(600))
    assert teller.counts(*limits) == [(2, 0), (600, 0)]


def test_a_charge_left_out_or_zero_was_not_spent(teller: Teller) -> None:
    limits = [TEN, limit(1000, name="money", unit="usd_micros")]
    hold = teller.reserve(calls(2), money(600), limits=limits)
    teller.settle(hold.id, calls(0))
    assert teller.counts(*limits) == [(0, 0), (0, 0)]


def test_more_than_held_is_recorded_in_full_and_the_next_reserve_is_refused(
    teller: Teller,
) -> None:
    hold = teller.reserve(calls(8))
    assert teller.settle(hold.id, calls(13)).over_hold
    assert teller.counts() == [(13, 0)]
    refused_by = teller.reserve(calls(1)).refused_by
    assert refused_by is not None
    assert refused_by.remaining == -3


def test_one_charge_of_several_above_its_hold_is_over_the_hold(teller: Teller) -> None:
    limits = [TEN, limit(1000, name="money", unit="usd_micros")]
    for spent in ((calls(3), money(1)), (money(601), calls(2))):
        hold = teller.reserve(calls(2), money(600), limits=limits)
        assert teller.settle(hold.id, *spent).over_hold


def test_what_is_not_held_can_not_be_settled(teller: Teller) -> None:
    hold = teller.reserve(calls(2))
    refused("charge_not_held", lambda: teller.settle(hold.id, calls(1), money(1)))
    assert teller.counts() == [(0, 2)]
    assert teller.settle(hold.id, calls(1)).id == hold.id


def test_releasing_a_hold_spends_nothing(teller: Teller) -> None:
    hold = teller.reserve(calls(8))
    receipt = teller.release(hold.id)
    assert receipt == Receipt(replayed=False, note="", id=hold.id, charges=(calls(8),))
    assert teller.counts() == [(0, 0)]


def test_a_hold_is_resolved_at_most_once(teller: Teller) -> None:
    settled, released = teller.reserve(calls(1)), teller.reserve(calls(1))
    teller.settle(settled.id)
    teller.release(released.id)
    refused("hold_already_settled", lambda: teller.settle(settled.id))
    refused("hold_already_settled", lambda: teller.release(settled.id))
    refused("hold_already_released", lambda: teller.settle(released.id))
    refused("hold_already_released", lambda: teller.release(released.id))
    assert teller.counts() == [(1, 0)]


@pytest.mark.parametrize("stranger", (BOB, MALLORY))
def test_the_hold_of_another_actor_or_tenant_is_not_found(
    teller: Teller, stranger: Account
) -> None:
    hold = teller.reserve(calls(1))
    refused("hold_not_found", lambda: teller.settle(hold.id, account=stranger))
    refused("hold_not_found", lambda: teller.release(hold.id, account=stranger))
    refused("hold_not_found", lambda: teller.settle("no-such-hold"))
    assert teller.counts() == [(0, 1)]


def test_a_charge_is_no_hold(teller: Teller) -> None:
    charge = teller.charge(calls(1))
    refused("hold_not_found", lambda: teller.release(charge.id))


# Expiry


def test_an_expired_hold_returns_its_amounts(teller: Teller) -> None:
    hold = teller.reserve(calls(10), ttl_seconds=60)
    teller.now = NOON + 59.9
    assert teller.counts() == [(0, 10)]
    teller.now = NOON + 60
    assert teller.reserve(calls(10)).id
    refused("hold_expired", lambda: teller.release(hold.id))


def test_a_hold_lives_no_shorter_than_was_asked(teller: Teller) -> None:
    teller.now = NOON + 0.9
    hold = teller.reserve(calls(10), ttl_seconds=1)
    assert hold.expires_at == NOON + 2
    teller.now = NOON + 1.9
    assert teller.counts() == [(0, 10)]


@pytest.mark.parametrize("seen", (False, True))
def test_a_late_settlement_is_recorded_and_says_so(teller: Teller, *, seen: bool) -> None:
    hold = teller.reserve(calls(10), ttl_seconds=60)
    teller.now = NOON + 60
    if seen:
        assert teller.counts() == [(0, 0)]
    receipt = teller.settle(hold.id)
    assert receipt.late
    assert not receipt.over_hold
    assert teller.counts() == [(10, 0)]
    refused("hold_already_settled", lambda: teller.settle(hold.id))


def test_a_late_settlement_counts_even_where_others_took_the_room(teller: Teller) -> None:
    hold = teller.reserve(calls(10), ttl_seconds=60)
    teller.now = NOON + 60
    teller.charge(calls(10))
    assert teller.settle(hold.id).late
    assert teller.counts() == [(20, 0)]
    assert teller.charge(calls(1)).refused_by


def test_a_hold_that_expires_counts_no_more_under_any_of_its_limits(teller: Teller) -> None:
    limits = [TEN, limit(10, name="actor", scope=Scope.ACTOR)]
    teller.reserve(calls(4), limits=limits)
    teller.now = NOON + 60
    assert teller.counts(TEN) == [(0, 0)]
    assert teller.counts(limits[1]) == [(0, 0)]


def test_the_clock_of_the_store_never_runs_backwards(teller: Teller) -> None:
    hold = teller.reserve(calls(10), ttl_seconds=60)
    teller.now = NOON + 60
    assert teller.counts() == [(0, 0)]
    teller.now = NOON
    refused("hold_expired", lambda: teller.release(hold.id))
    teller.reopen()
    refused("hold_expired", lambda: teller.release(hold.id))
    assert teller.reserve(calls(1), ttl_seconds=60).expires_at == NOON + 120


def test_a_clock_that_jumped_back_does_not_reopen_a_spent_window(teller: Teller) -> None:
    minute = limit(1, window=Window.MINUTE)
    teller.charge(calls(1), limits=[minute])
    teller.now = NOON + 60
    teller.charge(calls(1), limits=[minute])
    teller.now = NOON - 3600
    assert teller.charge(calls(1), limits=[minute]).refused_by


# Windows


def test_a_window_starts_again_with_nothing_spent(teller: Teller) -> None:
    minute = limit(1, window=Window.MINUTE)
    assert teller.charge(calls(1), limits=[minute]).id
    teller.now = NOON + 59.9
    refusal = teller.charge(calls(1), limits=[minute])
    assert refusal.refused_by
    assert refusal.retry_after_seconds == 1
    teller.now = NOON + 60
    assert teller.charge(calls(1), limits=[minute]).id


def test_a_hold_across_the_edge_counts_where_it_was_made(teller: Teller) -> None:
    minute = limit(10, window=Window.MINUTE)
    lifetime = limit(100, name="ever", window=Window.LIFETIME)
    limits = [minute, lifetime]
    teller.now = NOON + 50
    hold = teller.reserve(calls(10), limits=limits, ttl_seconds=60)
    teller.now = NOON + 65
    assert teller.counts(*limits) == [(0, 0), (0, 10)]
    assert teller.reserve(calls(10), limits=limits).id
    teller.settle(hold.id, calls(12))
    assert teller.counts(*limits) == [(0, 10), (12, 10)]
    teller.now = NOON + 120
    teller.release(teller.reserve(calls(1), limits=limits).id)
    assert teller.counts(*limits) == [(0, 0), (12, 10)]


# When to ask again


def test_retry_after_is_the_end_of_the_window_or_the_first_hold_to_expire(
    teller: Teller,
) -> None:
    hour = limit(10, window=Window.HOUR)
    teller.now = NOON + 1800
    teller.reserve(calls(3), limits=[hour], ttl_seconds=600)
    teller.reserve(calls(3), limits=[hour], ttl_seconds=60)
    assert teller.reserve(calls(5), limits=[hour]).retry_after_seconds == 60
    teller.charge(calls(4), limits=[hour])
    # Not even without the holds would there be room: only the next window helps.
    assert teller.reserve(calls(7), limits=[hour]).retry_after_seconds == 1800


def test_retry_after_is_whichever_comes_first(teller: Teller) -> None:
    minute = limit(10, window=Window.MINUTE)
    teller.now = NOON + 30
    teller.reserve(calls(10), limits=[minute], ttl_seconds=60)
    assert teller.reserve(calls(5), limits=[minute]).retry_after_seconds == 30
    teller.now = NOON + 60
    teller.reserve(calls(1), limits=[minute], ttl_seconds=10)
    teller.reserve(calls(9), limits=[minute], ttl_seconds=30)
    assert teller.reserve(calls(5), limits=[minute]).retry_after_seconds == 10
    teller.now = NOON + 70  # one has expired this very second, and is no reason to come back
    assert teller.reserve(calls(5), limits=[minute]).retry_after_seconds == 20


def test_there_is_no_retry_after_where_waiting_can_not_help(teller: Teller) -> None:
    assert teller.reserve(calls(11)).retry_after_seconds is None
    ever = limit(10, window=Window.LIFETIME)
    teller.charge(calls(4), limits=[ever])
    hold = teller.reserve(calls(6), limits=[ever], ttl_seconds=60)
    assert teller.reserve(calls(6), limits=[ever]).retry_after_seconds == 60
    assert teller.reserve(calls(7), limits=[ever]).retry_after_seconds is None
    teller.settle(hold.id)
    assert teller.reserve(calls(1), limits=[ever]).retry_after_seconds is None


# Trying again


def test_the_same_reserve_again_gets_the_first_answer_and_holds_once(teller: Teller) -> None:
    key = teller.key("reserve", note="decision 1")
    first = teller.reserve(calls(4), key=key)
    later = teller.key("reserve", key.key, note="decision 2")
    again = teller.reserve(calls(4), key=later)
    assert again == Receipt(
        replayed=True,
        note="decision 1",
        id=first.id,
        expires_at=first.expires_at,
        charges=first.charges,
    )
    assert teller.counts() == [(0, 4)]


def test_the_same_charge_again_is_charged_once_also_after_a_restart(teller: Teller) -> None:
    key = teller.key("charge")
    first = teller.charge(calls(4), key=key)
    teller.reopen()
    teller.now = NOON + DAY
    again = teller.charge(calls(4), key=key)
    assert (again.replayed, again.id, again.charges) == (True, first.id, first.charges)
    teller.now = NOON
    assert teller.counts() == [(4, 0)]


def test_a_refusal_is_the_first_answer_too(teller: Teller) -> None:
    key = teller.key("reserve", note="denied")
    hold = teller.reserve(calls(10))
    first = teller.reserve(calls(1), key=key)
    teller.release(hold.id)
    again = teller.reserve(calls(1), key=key)
    assert again.replayed
    assert again.note == "denied"
    assert again.id == ""
    assert again.refused_by == first.refused_by
    assert again.retry_after_seconds == first.retry_after_seconds == 60
    assert teller.counts() == [(0, 0)]


def test_the_same_settlement_again_is_posted_once(teller: Teller) -> None:
    hold = teller.reserve(calls(4), ttl_seconds=60)
    teller.now = NOON + 60
    key = teller.key("settle")
    teller.settle(hold.id, calls(7), key=key)
    again = teller.settle(hold.id, calls(7), key=key)
    assert again == Receipt(
        replayed=True, note="", id=hold.id, charges=(calls(7),), over_hold=True, late=True
    )
    assert teller.counts() == [(7, 0)]


def test_the_same_release_again_gets_the_first_answer(teller: Teller) -> None:
    hold = teller.reserve(calls(4))
    key = teller.key("release")
    teller.release(hold.id, key=key)
    assert teller.release(hold.id, key=key).replayed


def test_a_key_with_other_content_is_refused(teller: Teller) -> None:
    hold = teller.reserve(calls(1), key=teller.key("reserve", "k"))
    teller.charge(calls(1), key=teller.key("charge", "k"))
    teller.settle(hold.id, key=teller.key("settle", "k"))
    released = teller.reserve(calls(1))
    teller.release(released.id, key=teller.key("release", "k"))
    for call in (
        lambda: teller.reserve(calls(2), key=teller.key("reserve", "k", OTHER)),
        lambda: teller.charge(calls(2), key=teller.key("charge", "k", OTHER)),
        lambda: teller.settle(hold.id, key=teller.key("settle", "k", OTHER)),
        lambda: teller.release(released.id, key=teller.key("release", "k", OTHER)),
    ):
        refused("idempotency_key_reused", call)
    assert teller.counts() == [(2, 0)]


def test_keys_of_different_tenants_actors_and_operations_do_not_meet(teller: Teller) -> None:
    receipts = [
        teller.charge(calls(1), account=account, key=teller.key(operation, "k", content))
        for account, operation, content in (
            (ALICE, "charge", SAME),
            (BOB, "charge", OTHER),
            (MALLORY, "charge", OTHER),
            (ALICE, "authorize", OTHER),
        )
    ]
    assert not any(receipt.replayed for receipt in receipts)
    assert len({receipt.id for receipt in receipts}) == 4


def test_the_tool_is_no_part_of_the_key(teller: Teller) -> None:
    other_tool = Account(tenant="acme", actor="alice", tool="mail.send")
    teller.charge(calls(1), key=teller.key("charge", "k"))
    refused(
        "idempotency_key_reused",
        lambda: teller.charge(calls(1), account=other_tool, key=teller.key("charge", "k", OTHER)),
    )


def test_an_error_leaves_no_trace_under_its_key(teller: Teller) -> None:
    key = teller.key("charge")
    refused("budget_unlimited", lambda: teller.charge(calls(1), limits=[], key=key))
    other = teller.key("charge", key.key, OTHER)
    assert not teller.charge(calls(1), key=other).replayed

    hold = teller.reserve(calls(1))
    settle = teller.key("settle")
    refused("charge_not_held", lambda: teller.settle(hold.id, money(1), key=settle))
    assert not teller.settle(hold.id, calls(1), key=settle).replayed


def test_a_first_answer_is_kept_for_a_day_and_then_cleared_away(teller: Teller) -> None:
    key = teller.key("reserve")
    hold = teller.reserve(calls(1), key=key)
    teller.now = NOON + DAY + 60
    teller.charge(calls(1))
    assert teller.reserve(calls(1), key=key).replayed
    assert teller.settle(hold.id, account=ALICE).late
    teller.now = NOON + DAY + MAX_HOLD_SECONDS
    teller.charge(calls(1))
    assert not teller.reserve(calls(1), key=key).replayed
    refused("hold_not_found", lambda: teller.release(hold.id))


# Amounts


def test_sums_never_pass_what_can_be_counted(teller: Teller) -> None:
    most = limit(MAX_AMOUNT, window=Window.LIFETIME)
    hold = teller.reserve(calls(1), limits=[most])
    teller.charge(calls(MAX_AMOUNT - 1), limits=[most])
    assert teller.charge(calls(1), limits=[most]).refused_by
    for amount in (2, 3, 2**52, MAX_AMOUNT):
        with pytest.raises(LedgerError, match=r"2\^53 - 1") as caught:
            teller.settle(hold.id, calls(amount))
        assert caught.value.reason_code == "budget_unavailable"
    assert teller.counts(most) == [(MAX_AMOUNT - 1, 1)]
    assert teller.settle(hold.id, calls(1)).id
    assert teller.counts(most) == [(MAX_AMOUNT, 0)]


@pytest.mark.parametrize("amount", (0, -1, MAX_AMOUNT + 1, 2**63, True, 1.0, "1", None))
def test_only_whole_positive_amounts_are_taken(teller: Teller, amount: int) -> None:
    for take in (teller.reserve, teller.charge):
        with pytest.raises(ValueError, match="amount is not a whole number"):
            take(calls(amount))
    assert teller.counts() == [(0, 0)]


@pytest.mark.parametrize("amount", (-1, MAX_AMOUNT + 1, False, 0.0))
def test_a_settlement_takes_whole_amounts_from_nothing_up(teller: Teller, amount: int) -> None:
    hold = teller.reserve(calls(1))
    with pytest.raises(ValueError, match="amount is not a whole number"):
        teller.settle(hold.id, calls(amount))
    assert teller.counts() == [(0, 1)]


# Concurrency


def test_a_thousand_concurrent_reserves_against_a_limit_for_fifty_admit_fifty(
    teller: Teller,
) -> None:
    fifty = limit(50, scope=Scope.TENANT)

    async def burst() -> list[Receipt]:
        return await asyncio.gather(
            *(
                teller.ledger.reserve(
                    Account(tenant="acme", actor=f"actor-{number % 7}"),
                    teller.key("reserve"),
                    charges=[calls(1)],
                    limits=[fifty],
                    ttl_seconds=60,
                )
                for number in range(1000)
            )
        )

    receipts = teller.do(burst())
    assert len({receipt.id for receipt in receipts if receipt.id}) == 50
    assert sum(receipt.refused_by is not None for receipt in receipts) == 950
    assert teller.counts(fifty) == [(0, 50)]


def test_the_same_call_made_many_times_at_once_is_done_once(teller: Teller) -> None:
    key = teller.key("charge")

    async def burst() -> list[Receipt]:
        return await asyncio.gather(
            *(
                teller.ledger.charge(ALICE, key, charges=[calls(1)], limits=[TEN])
                for _ in range(100)
            )
        )

    receipts = teller.do(burst())
    assert sum(not receipt.replayed for receipt in receipts) == 1
    assert len({receipt.id for receipt in receipts}) == 1
    assert teller.counts() == [(1, 0)]


def test_a_hold_settled_and_released_at_once_ends_once(teller: Teller) -> None:
    hold = teller.reserve(calls(4))

    async def burst() -> list[Receipt | BaseException]:
        return await asyncio.gather(
            *(
                teller.ledger.settle(ALICE, teller.key("settle"), hold_id=hold.id, charges=None)
                for _ in range(20)
            ),
            *(
                teller.ledger.release(ALICE, teller.key("release"), hold_id=hold.id)
                for _ in range(20)
            ),
            return_exceptions=True,
        )

    answers = teller.do(burst())
    assert sum(isinstance(answer, Receipt) for answer in answers) == 1
    assert teller.counts() == [(4, 0)]


def test_a_cancelled_call_completes_and_its_retry_gets_the_answer(teller: Teller) -> None:
    key = teller.key("charge")

    async def cancel() -> None:
        task = asyncio.ensure_future(
            teller.ledger.charge(ALICE, key, charges=[calls(1)], limits=[TEN])
        )
        await asyncio.sleep(0)  # it has begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    teller.do(cancel())
    assert teller.charge(calls(1), key=key).replayed
    assert teller.counts() == [(1, 0)]


# The store


def test_a_closed_ledger_refuses(store: Store) -> None:
    async def scenario() -> None:
        ledger = await store.open(lambda: NOON)
        await ledger.close()
        await ledger.close()
        with pytest.raises(LedgerError) as caught:
            await ledger.state(ALICE, limits=[TEN])
        assert caught.value.reason_code == "budget_unavailable"

    asyncio.run(scenario())


def test_errors_show_no_names(teller: Teller) -> None:
    secret = Account(tenant="acme", actor="s3cret")
    with pytest.raises(LedgerError) as caught:
        teller.settle("hold-s3cret", account=secret)
    assert "s3cret" not in str(caught.value) + repr(caught.value)
    with pytest.raises(ValueError, match="amount") as invalid:
        teller.charge(Charge("s3cret", "calls", -5))
    assert "s3cret" not in str(invalid.value)


# What LiteLLM's users met (research note A2), each under the number of its issue


def test_litellm_26672_a_concurrent_burst_does_not_pass_the_check_together(
    teller: Teller,
) -> None:
    async def burst() -> list[Receipt]:
        return await asyncio.gather(
            *(
                teller.ledger.charge(ALICE, teller.key("charge"), charges=[calls(3)], limits=[TEN])
                for _ in range(20)
            )
        )

    assert sum(receipt.refused_by is None for receipt in teller.do(burst())) == 3
    assert teller.counts() == [(9, 0)]


def test_litellm_34732_the_first_request_of_an_unknown_actor_is_limited(
    teller: Teller,
) -> None:
    by_actor = limit(10, scope=Scope.ACTOR)
    unknown = Account(tenant="acme", actor="never-seen-before")
    assert teller.charge(calls(11), limits=[by_actor], account=unknown).refused_by


def test_litellm_40095_the_first_requests_of_an_unknown_actor_share_one_account(
    teller: Teller,
) -> None:
    by_actor = limit(1, scope=Scope.ACTOR)
    unknown = Account(tenant="acme", actor="never-seen-before")

    async def burst() -> list[Receipt]:
        return await asyncio.gather(
            *(
                teller.ledger.charge(
                    unknown, teller.key("charge"), charges=[calls(1)], limits=[by_actor]
                )
                for _ in range(10)
            )
        )

    assert sum(receipt.refused_by is None for receipt in teller.do(burst())) == 1


def test_litellm_27639_a_hold_that_nobody_ends_is_no_phantom_spend(teller: Teller) -> None:
    teller.reserve(calls(10), ttl_seconds=60)
    teller.reopen()
    teller.now = NOON + 60
    assert teller.counts() == [(0, 0)]
    assert teller.reserve(calls(10)).id


def test_litellm_30330_a_window_that_ends_in_mid_flight_makes_nothing_negative(
    teller: Teller,
) -> None:
    minute = limit(10, window=Window.MINUTE)
    hold = teller.reserve(calls(10), limits=[minute], ttl_seconds=120)
    teller.now = NOON + 60
    teller.release(hold.id)
    assert teller.counts(minute) == [(0, 0)]
    assert teller.reserve(calls(11), limits=[minute]).refused_by


def test_litellm_35569_a_settlement_that_is_retried_is_neither_doubled_nor_lost(
    teller: Teller,
) -> None:
    hold = teller.reserve(calls(5))
    key = teller.key("settle")
    for _ in range(5):
        teller.settle(hold.id, calls(4), key=key)
        teller.reopen()
    assert teller.counts() == [(4, 0)]


def test_litellm_35752_what_a_broken_stream_has_cost_is_settled(teller: Teller) -> None:
    hold = teller.reserve(calls(10))
    teller.settle(hold.id, calls(6))
    assert teller.counts() == [(6, 0)]
    assert teller.reserve(calls(5)).refused_by


def test_litellm_40002_calls_held_at_their_bound_never_spend_more_than_the_limit(
    teller: Teller,
) -> None:
    cap = limit(450_000, name="money", unit="usd_micros")
    holds = [teller.reserve(money(150_000), limits=[cap]) for _ in range(5)]
    admitted = [hold.id for hold in holds if hold.id]
    assert len(admitted) == 3
    for hold_id in admitted:
        teller.settle(hold_id)
    assert teller.counts(cap) == [(450_000, 0)]


def test_litellm_26845_an_estimate_above_the_headroom_is_refused_not_cut(
    teller: Teller,
) -> None:
    teller.charge(calls(7))
    refusal = teller.reserve(calls(4))
    assert refusal.refused_by
    assert refusal.charges == ()
    assert teller.counts() == [(7, 0)]


def test_litellm_30684_a_store_that_is_gone_denies(teller: Teller) -> None:
    teller.do(teller.ledger.close())
    refused("budget_unavailable", lambda: teller.reserve(calls(1)))
    refused("budget_unavailable", lambda: teller.charge(calls(1)))


def test_litellm_27735_what_is_reported_is_what_decides(teller: Teller) -> None:
    for amount in (3, 4, 3, 1):
        (before,) = teller.state()
        receipt = teller.charge(calls(amount))
        assert (receipt.refused_by is None) == (amount <= before.remaining)
        assert receipt.limits == teller.state()


def test_only_the_outcome_ends_a_hold_that_backs_a_permit(teller: Teller) -> None:
    hold = teller.reserve(calls(4), key=teller.key("authorize"))
    for attempt in (teller.settle, teller.release):
        with pytest.raises(LedgerError) as caught:
            attempt(hold.id)
        assert caught.value.reason_code == "hold_not_found"
    assert teller.settle(hold.id, key=teller.key("outcome")).charges == (calls(4),)


def test_an_outcome_ends_no_other_hold(teller: Teller) -> None:
    hold = teller.reserve(calls(4), key=teller.key("reserve"))
    with pytest.raises(LedgerError) as caught:
        teller.settle(hold.id, key=teller.key("outcome"))
    assert caught.value.reason_code == "hold_not_found"
