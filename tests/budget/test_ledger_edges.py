"""Ledgers at their edges: what a receipt says, and the last moment at which something counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pdp.budget.ledger import MAX_AMOUNT, OnExpiry, Receipt, Scope, Window
from tests.budget.teller import ALICE, DAY, NOON, TEN, Teller, calls, limit, rate, refused


def told(receipt: Receipt) -> tuple[bool, str]:
    return (receipt.replayed, receipt.note)


def test_every_receipt_says_that_it_is_the_first_and_what_was_noted(teller: Teller) -> None:
    hold = teller.reserve(calls(1), key=teller.key("reserve", "r", note="one"))
    assert told(hold) == (False, "one")
    charge = teller.charge(calls(1), key=teller.key("charge", "c", note="two"))
    assert told(charge) == (False, "two")
    settled = teller.settle(hold.id, calls(1), key=teller.key("settle", "s", note="three"))
    assert told(settled) == (False, "three")
    granted = teller.grant("calls-a-day", 1, key=teller.key("grant", "g", note="four"))
    assert told(granted) == (False, "four")
    refunded = teller.refund(charge.id, key=teller.key("refund", "f", note="five"))
    assert told(refunded) == (False, "five")
    gone = teller.reserve(calls(2))
    expired = teller.expire(gone.id, key=teller.key("expire", "e", note="six"))
    assert told(expired) == (False, "six")
    assert (expired.id, expired.charges) == (gone.id, (calls(2),))
    denied = teller.reserve(calls(100), key=teller.key("reserve", "d", note="seven"))
    assert told(denied) == (False, "seven")
    for key, receipt in (
        (teller.key("reserve", "r", note="later"), hold),
        (teller.key("reserve", "d", note="later"), denied),
    ):
        amount = 100 if receipt is denied else 1
        again = teller.reserve(calls(amount), key=key)
        # How limits stand is not said again: they may have moved on since.
        assert again == replace(receipt, replayed=True, limits=())


def test_a_refund_takes_back_no_more_of_each_than_was_spent_of_it(teller: Teller) -> None:
    money = limit(10, name="money", unit="usd_micros")
    pair = (calls(2), replace(calls(3), unit="usd_micros"))
    charge = teller.charge(*pair, limits=[TEN, money])
    refused("refund_exceeds_spend", lambda: teller.refund(charge.id, calls(3)))
    assert teller.refund(charge.id, calls(1)).charges == (calls(1),)
    assert (teller.counts(TEN), teller.counts(money)) == ([(1, 0)], [(3, 0)])
    teller.refund(charge.id)
    assert (teller.counts(TEN), teller.counts(money)) == ([(0, 0)], [(0, 0)])


def test_a_warning_is_told_at_the_very_amount_that_reaches_it(teller: Teller) -> None:
    warned = limit(7, warn_at=(50, 100))  # half of seven is reached with the fourth
    assert teller.charge(calls(3), limits=[warned]).warnings == ()
    assert [each.percent for each in teller.charge(calls(1), limits=[warned]).warnings] == [50]
    assert teller.charge(calls(2), limits=[warned]).warnings == ()
    assert [each.percent for each in teller.charge(calls(1), limits=[warned]).warnings] == [100]


def test_a_limit_of_one_warns_and_one_of_nothing_does_not(teller: Teller) -> None:
    one = limit(1, name="one", warn_at=(100,))
    assert [each.percent for each in teller.charge(calls(1), limits=[one]).warnings] == [100]
    nothing = limit(0, name="nothing", warn_at=(50,), enforced=False)
    assert teller.charge(calls(1), limits=[TEN, nothing]).warnings == ()


def test_a_hold_counts_to_its_last_second_and_not_in_the_next(teller: Teller) -> None:
    for ttl in (1, 60):
        teller.reserve(calls(10), ttl_seconds=ttl)
        teller.now += ttl - 1
        assert teller.counts() == [(0, 10)]
        assert teller.reserve(calls(1)).refused_by
        teller.now += 1
        assert teller.counts() == [(0, 0)]
        hold = teller.reserve(calls(1))
        teller.release(hold.id)


def test_what_expires_under_a_limit_that_keeps_it_is_spent(teller: Teller) -> None:
    keeps = limit(10, name="keeps", on_expiry=OnExpiry.CHARGE)
    teller.reserve(calls(4), limits=[keeps], ttl_seconds=5)
    hold = teller.reserve(calls(2), limits=[keeps], ttl_seconds=60)
    teller.now += 5
    assert teller.counts(keeps) == [(4, 2)]
    gone = teller.expire(hold.id)
    assert gone.charges == (calls(2),)
    assert teller.counts(keeps)[0][1] == 0


def test_how_long_to_wait_is_until_there_is_room_and_never_for_what_never_fits(
    teller: Teller,
) -> None:
    at_once = limit(3, name="at-once", window=Window.CONCURRENT)
    teller.reserve(calls(3), limits=[at_once])
    assert teller.reserve(calls(3), limits=[at_once]).retry_after_seconds == 1
    assert teller.reserve(calls(4), limits=[at_once]).retry_after_seconds is None
    steady = rate(60, seconds=60, burst=5)  # one a second
    teller.charge(calls(5), limits=[steady])
    for amount in (1, 3, 5):
        assert teller.charge(calls(amount), limits=[steady]).retry_after_seconds == amount
    assert teller.charge(calls(6), limits=[steady]).retry_after_seconds is None


def test_a_grant_is_room_that_the_wait_knows_of(teller: Teller) -> None:
    lasting = limit(10, name="lasting", window=Window.LIFETIME)
    teller.charge(calls(8), limits=[lasting])
    teller.grant("lasting", 5)
    teller.reserve(calls(7), limits=[lasting], ttl_seconds=30)
    # Seven come back in half a minute; with the five that were granted six fit then.
    assert teller.charge(calls(6), limits=[lasting]).retry_after_seconds == 30
    assert teller.charge(calls(8), limits=[lasting]).retry_after_seconds is None


def test_a_grant_is_taken_in_the_last_second_of_a_window_and_not_after(teller: Teller) -> None:
    minute = limit(10, name="minute", window=Window.MINUTE)
    teller.charge(calls(1), limits=[minute])
    (account,) = teller.accounts()
    teller.now = NOON + 59
    teller.grant("minute", 1)
    teller.now = NOON + 60
    refused(
        "account_not_found",
        lambda: teller.do(
            teller.ledger.grant(ALICE, teller.key("grant"), account_id=account.id, amount=1)
        ),
    )


@pytest.mark.parametrize("window", (Window.LIFETIME, Window.DAY))
def test_sums_are_countable_to_the_last_number(teller: Teller, window: Window) -> None:
    most = limit(MAX_AMOUNT, name="most", window=window, enforced=False)
    both = [limit(MAX_AMOUNT, name="at-once", window=Window.CONCURRENT), most]
    teller.charge(calls(MAX_AMOUNT - 3), limits=both)
    teller.reserve(calls(1), limits=both)
    refused("budget_unavailable", lambda: teller.charge(calls(3), limits=both))
    teller.charge(calls(2), limits=both)
    refused("budget_unavailable", lambda: teller.charge(calls(1), limits=both))
    assert teller.counts(most) == [(MAX_AMOUNT - 1, 1)]


def test_accounts_show_rates_as_they_have_drained(teller: Teller) -> None:
    steady = rate(60, seconds=60, burst=10)
    teller.charge(calls(10), limits=[steady])
    teller.now += 4
    (account,) = teller.accounts()
    assert (account.spent, account.held) == (6, 0)


def test_an_account_is_shown_without_what_has_expired_there(teller: Teller) -> None:
    teller.reserve(calls(4), ttl_seconds=5)
    teller.now += 5
    (account,) = teller.accounts()
    assert (account.spent, account.held) == (0, 0)


def test_tenants_are_listed_up_to_their_bound(teller: Teller) -> None:
    for name in ("acme", "globex", "initech"):
        teller.charge(calls(1), account=replace(ALICE, tenant=name))
    assert set(teller.do(teller.ledger.tenants(most=10_000))) == {"acme", "globex", "initech"}
    with pytest.raises(ValueError, match="most is not a whole number from 1 to 10000"):
        teller.do(teller.ledger.tenants(most=10_001))


def test_what_was_refunded_is_known_after_whatever_else_becomes_of_the_hold(
    teller: Teller,
) -> None:
    hold = teller.reserve(calls(10))
    teller.settle(hold.id, calls(4), final=False)
    teller.refund(hold.id, calls(1))
    assert teller.counts() == [(3, 6)]
    teller.settle(hold.id, calls(2), final=False)
    teller.expire(hold.id)
    assert teller.counts() == [(5, 0)]
    refused("refund_exceeds_spend", lambda: teller.refund(hold.id, calls(6)))
    teller.refund(hold.id, calls(5))
    assert teller.counts() == [(0, 0)]
    teller.settle(hold.id, calls(1))
    assert teller.counts() == [(1, 0)]


def test_what_is_refunded_in_one_unit_is_no_refund_of_another(teller: Teller) -> None:
    money = limit(10, name="money", unit="usd_micros")
    charge = teller.charge(calls(2), replace(calls(3), unit="usd_micros"), limits=[TEN, money])
    teller.refund(charge.id, replace(calls(3), unit="usd_micros"))
    teller.refund(charge.id, calls(1))
    assert (teller.counts(TEN), teller.counts(money)) == ([(1, 0)], [(0, 0)])


def test_what_is_settled_after_an_operator_s_end_is_nothing_that_is_held(teller: Teller) -> None:
    at_once = limit(3, name="at-once", window=Window.CONCURRENT)
    hold = teller.reserve(calls(3), limits=[TEN, at_once])
    teller.expire(hold.id)
    teller.settle(hold.id, calls(2))
    assert (teller.counts(TEN), teller.counts(at_once)) == ([(2, 0)], [(0, 0)])
    assert teller.reserve(calls(3), limits=[TEN, at_once]).id


def test_a_hold_that_an_operator_ended_is_cleared_away_like_any_other(teller: Teller) -> None:
    hold = teller.reserve(calls(1))
    teller.expire(hold.id)
    teller.now += 2 * DAY
    for _ in range(4):
        teller.charge(calls(1))
        teller.now += 2
    assert teller.counts() == [(4, 0)]
    refused("hold_not_found", lambda: teller.settle(hold.id))


def test_a_rate_that_drains_for_days_is_not_forgotten_meanwhile(teller: Teller) -> None:
    slow = rate(10, seconds=4 * DAY, burst=10)
    teller.charge(calls(10), limits=[slow])
    teller.now += DAY + DAY // 4  # when what is over is cleared away
    for _ in range(3):  # each a little
        teller.charge(calls(1))
        teller.now += 2
    assert teller.charge(calls(5), limits=[slow]).refused_by
    assert teller.charge(calls(2), limits=[slow]).id


def test_a_rate_of_another_time_is_another_rate(teller: Teller) -> None:
    teller.charge(calls(5), limits=[rate(5, seconds=60)])
    assert teller.charge(calls(1), limits=[rate(5, seconds=60)]).refused_by
    assert teller.charge(calls(5), limits=[rate(5, seconds=3_600)]).id


def test_the_wait_for_a_slow_rate_is_told_to_the_second(teller: Teller) -> None:
    slow = rate(1, seconds=DAY)
    teller.charge(calls(1), limits=[slow])
    assert teller.charge(calls(1), limits=[slow]).retry_after_seconds == DAY


def test_a_clock_that_is_set_back_stays_at_the_last_second_that_was_seen(teller: Teller) -> None:
    for later in (1, 2):
        unseen = limit(10, name=f"unseen-{later}")
        teller.reserve(calls(1), limits=[unseen], ttl_seconds=1)
        teller.now += 1
        teller.charge(calls(1))  # elsewhere
        teller.now -= 100
        assert teller.counts(unseen) == [(0, 0)]
        teller.reopen()
        assert teller.counts(unseen) == [(0, 0)]
        teller.now += 100


def test_every_tenant_is_listed_however_its_name_begins(teller: Teller) -> None:
    for name in ("0", "Acme", "ZZZZ", "acme"):
        teller.charge(calls(1), account=replace(ALICE, tenant=name))
    assert set(teller.do(teller.ledger.tenants(most=10))) == {"0", "Acme", "ZZZZ", "acme"}


def test_a_hold_without_a_memo_has_none(teller: Teller) -> None:
    reserved = teller.ledger.reserve(
        ALICE, teller.key("reserve"), charges=[calls(1)], limits=[TEN], ttl_seconds=60
    )
    teller.do(reserved)
    assert [hold.memo for hold in teller.holds()] == [""]


def test_a_threshold_is_the_next_whole_amount_however_large() -> None:
    assert limit(7, warn_at=(1, 50, 100)).warnings_at() == ((1, 1), (50, 4), (100, 7))
    assert limit(1_000, warn_at=(50,)).warnings_at() == ((50, 500),)
    reached_at = -(-MAX_AMOUNT * 99 // 100)
    ((_, told_at),) = limit(MAX_AMOUNT, warn_at=(99,)).warnings_at()
    assert (told_at, type(told_at)) == (reached_at, int)


def test_what_organisations_share_is_no_tenant_s() -> None:
    shared = limit(1, scope=Scope.ORGANISATION)
    assert shared.shared_by(replace(ALICE, organisation="acme-inc")) == ""
    assert shared.shared_by(ALICE) == TEN.shared_by(ALICE) == "acme"
