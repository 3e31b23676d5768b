from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdp.budget.ledger import Window
from pdp.budget.windows import window_bounds


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


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
    assert window_bounds(window, at(now)) == (at(starts_at), at(ends_at))


def test_a_lifetime_never_ends() -> None:
    assert window_bounds(Window.LIFETIME, at("2026-11-24T10:30:59")) == (0, None)


@given(
    window=st.sampled_from([each for each in Window if each is not Window.LIFETIME]),
    now=st.floats(min_value=0, max_value=at("9000-01-01T00:00:00")),
)
def test_each_moment_is_in_one_window_and_the_next_begins_where_it_ends(
    window: Window, now: float
) -> None:
    starts_at, ends_at = window_bounds(window, now)
    assert ends_at is not None
    assert starts_at <= now < ends_at
    assert window_bounds(window, starts_at) == (starts_at, ends_at)
    assert window_bounds(window, ends_at).starts_at == ends_at
