from __future__ import annotations

import zoneinfo
from dataclasses import replace
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdp.budget.ledger import LedgerError, Limit, Scope, Window
from pdp.budget.windows import is_timezone, window_bounds

ZONES = sorted(zoneinfo.available_timezones() - {"localtime"})


def at(text: str, timezone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(timezone)).timestamp())


def limit(window: Window, timezone: str = "UTC") -> Limit:
    seconds = 60 if window is Window.ROLLING else 0
    return Limit(
        id="one",
        budget="tools",
        unit="calls",
        window=window,
        limit=5,
        scope=Scope.TENANT,
        timezone=timezone,
        seconds=seconds,
        burst=5 if seconds else 0,
    )


@pytest.mark.parametrize(
    ("window", "now", "starts_at", "ends_at"),
    (
        (Window.MINUTE, "2026-11-24T10:30:59", "2026-11-24T10:30:00", "2026-11-24T10:31:00"),
        (Window.MINUTE, "2026-11-24T10:31:00", "2026-11-24T10:31:00", "2026-11-24T10:32:00"),
        (Window.HOUR, "2026-11-24T10:30:59", "2026-11-24T10:00:00", "2026-11-24T11:00:00"),
        (Window.DAY, "2026-11-24T23:59:59", "2026-11-24T00:00:00", "2026-11-25T00:00:00"),
        # The day on which clocks change in Europe still has 24 hours in UTC.
        (Window.DAY, "2026-03-29T02:30:00", "2026-03-29T00:00:00", "2026-03-30T00:00:00"),
        (Window.MONTH, "2026-11-24T10:30:59", "2026-11-01T00:00:00", "2026-12-01T00:00:00"),
        (Window.MONTH, "2026-12-31T23:59:59", "2026-12-01T00:00:00", "2027-01-01T00:00:00"),
        (Window.MONTH, "2028-02-29T12:00:00", "2028-02-01T00:00:00", "2028-03-01T00:00:00"),
        (Window.MONTH, "2028-03-01T00:00:00", "2028-03-01T00:00:00", "2028-04-01T00:00:00"),
    ),
)
def test_a_window_starts_and_ends_with_the_calendar_in_utc(
    window: Window, now: str, starts_at: str, ends_at: str
) -> None:
    assert window_bounds(limit(window), at(now)) == (at(starts_at), at(ends_at))


@pytest.mark.parametrize(
    ("day", "after", "hours", "timezone"),
    (
        ("2026-03-29", "2026-03-30", 23, "Europe/Berlin"),
        ("2026-10-25", "2026-10-26", 25, "Europe/Berlin"),
        ("2026-11-24", "2026-11-25", 24, "Europe/Berlin"),
        ("2026-03-08", "2026-03-09", 23, "America/New_York"),
        ("2026-11-01", "2026-11-02", 25, "America/New_York"),
        # Clocks jump over midnight, and the day begins at one.
        ("2024-04-26", "2024-04-27", 23, "Africa/Cairo"),
        # Clocks show the last hour of the day twice.
        ("2024-10-31", "2024-11-01", 25, "Africa/Cairo"),
        ("2026-04-05", "2026-04-06", 24.5, "Australia/Lord_Howe"),
        ("2026-11-24", "2026-11-25", 24, "Asia/Kathmandu"),
    ),
)
def test_a_day_is_as_long_as_the_tenants_clocks_make_it(
    day: str, after: str, hours: float, timezone: str
) -> None:
    noon = at(f"{day}T12:00:00", timezone)
    starts_at, ends_at = window_bounds(limit(Window.DAY, timezone), noon)
    assert ends_at is not None
    assert ends_at - starts_at == hours * 3600
    zone = ZoneInfo(timezone)
    assert datetime.fromtimestamp(starts_at, zone).date().isoformat() == day
    assert datetime.fromtimestamp(starts_at - 1, zone).date().isoformat() < day
    assert datetime.fromtimestamp(ends_at, zone).date().isoformat() == after
    assert datetime.fromtimestamp(ends_at - 1, zone).date().isoformat() == day


def test_a_month_begins_at_the_tenants_midnight() -> None:
    bounds = window_bounds(limit(Window.MONTH, "Asia/Tokyo"), at("2026-11-30T16:00:00"))
    assert bounds == (at("2026-11-30T15:00:00"), at("2026-12-31T15:00:00"))


def test_an_hour_begins_where_the_tenants_clocks_show_a_full_one() -> None:
    bounds = window_bounds(limit(Window.HOUR, "Asia/Kathmandu"), at("2026-11-24T10:30:00"))
    assert bounds == (at("2026-11-24T10:15:00"), at("2026-11-24T11:15:00"))


@pytest.mark.parametrize("window", (Window.LIFETIME, Window.ROLLING, Window.CONCURRENT))
def test_what_is_no_calendar_window_never_ends(window: Window) -> None:
    assert window_bounds(limit(window), at("2026-11-24T10:30:59")) == (0, None)


def test_a_lifetime_that_ends_is_one_window_until_then_and_none_after() -> None:
    ends_at = at("2026-11-24T10:30:00")
    lifetime = replace(limit(Window.LIFETIME), until=ends_at)
    assert window_bounds(lifetime, ends_at - 0.001) == (0, ends_at)
    for now in (ends_at, ends_at + 1):
        with pytest.raises(LedgerError) as caught:
            window_bounds(lifetime, now)
        assert caught.value.reason_code == "account_not_found"


def test_the_last_instant_of_a_day_is_of_that_day() -> None:
    day = limit(Window.DAY, "Europe/Berlin")
    midnight = 2_051_222_400.0  # as UTC has it
    starts_at, ends_at = window_bounds(day, midnight - 3_600.0000005)
    assert ends_at == midnight - 3_600
    assert starts_at == midnight - 3_600 - 86_400


@given(
    window=st.sampled_from([each for each in Window if each.is_calendar]),
    timezone=st.sampled_from(ZONES),
    now=st.floats(min_value=at("2000-01-01T00:00:00"), max_value=at("2100-01-01T00:00:00")),
)
@settings(max_examples=500)
def test_each_moment_is_in_one_window_and_the_next_begins_where_it_ends(
    window: Window, timezone: str, now: float
) -> None:
    where = limit(window, timezone)
    starts_at, ends_at = window_bounds(where, now)
    if ends_at is None:
        assert window is Window.LIFETIME
        return
    assert starts_at <= now < ends_at
    assert window_bounds(where, starts_at) == (starts_at, ends_at)
    if window is not Window.HOUR:
        assert window_bounds(where, ends_at).starts_at == ends_at


@pytest.mark.parametrize("name", ("", "Europe/Atlantis", "../../etc/passwd", "/etc/passwd", "a\0b"))
def test_what_is_no_time_zone_is_told_from_one(name: str) -> None:
    assert not is_timezone(name)
    assert is_timezone("Europe/Berlin")
