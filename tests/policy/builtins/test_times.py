"""time.*, where OPA's own cases do not look."""

from __future__ import annotations

import pytest

from pdp.policy.builtins import BuiltinError
from tests.policy.builtins.asking import ask

NS = 1_700_000_000_123_456_789
"""2023-11-14T22:13:20.123456789Z"""


@pytest.mark.parametrize(
    ("layout", "text"),
    (
        ("", "2023-11-14T23:13:20.123456789+01:00"),
        ("RFC822", "14 Nov 23 23:13 CET"),
        ("Monday January 2 __2 002 3PM 15h 4 5", "Tuesday November 14 318 318 11PM 23h 13 20"),
        ("Januaryx Month Janx _2006", "Novemberx Month Janx _2023"),
        (".000 ,999999 .0001 .9999999999", ".123 ,123456 .0011 .123456789"),
        ("Z07 -07 Z0700 -07:00:00 Z070000", "+01 +01 +0100 +01:00:00 +010000"),
        ("pm 06 01 1 03 é", "pm 23 11 11 11 é"),
    ),
)
def test_a_layout_is_written_as_go_writes_it(layout: str, text: str) -> None:
    assert ask("time.format", [NS, "Europe/Berlin", layout]) == text


@pytest.mark.parametrize(
    ("layout", "value", "seconds"),
    (
        ("2006-01-02", "1970-01-02", 86_400),
        ("2006-002", "1972-366", 1096 * 86_400 - 86_400),
        ("Jan _2 2006 3:04PM", "jAN  2 1970 12:00AM", 86_400),
        ("2006-01-02 15:04:05 MST", "1970-01-01 00:00:05 GMT+3", 5),
        ("2006-01-02 15:04:05 MST", "1970-01-01 00:00:05 WITA", 5),
        ("2006-01-02T15:04:05Z07:00", "1970-01-01T01:00:05.5+01:00", 5.5),
        ("2006-01-02T15:04:05.000", "1970-01-01T00:00:00.250", 0.25),
        ("06-1-2  15", "70-1-1   9", 9 * 3600),
    ),
)
def test_a_text_is_read_as_go_reads_it(layout: str, value: str, seconds: float) -> None:
    assert ask("time.parse_ns", layout, value) == seconds * 1_000_000_000


@pytest.mark.parametrize(
    ("layout", "value"),
    (
        ("2006-01-02", "1970-02-30"),
        ("2006-01-02", "1970-01-02 "),
        ("2006-01-02", "1970-1-02"),
        ("15:04", "10:00"),
        ("2006-01-02 15", "1970-01-01 24"),
        ("2006-01-02 MST", "1970-01-01 ABCDE"),
        ("2006-002", "1971-366"),
        ("2006-01-02", "٢٠٠٦-01-02"),
        ("2006", "1600"),
        ("2006", "0000"),
    ),
)
def test_a_text_of_another_form_or_out_of_range_is_undefined(layout: str, value: str) -> None:
    assert ask("time.parse_ns", layout, value) is None


@pytest.mark.parametrize(
    ("duration", "nanoseconds"),
    (
        ("1h15m30.918273645s", 4_530_918_273_645),
        ("-1.5h", -5_400_000_000_000),
        ("1d2h", 93_600_000_000_000),
        ("0", 0),
        ("1us2µs3μs", 6_000),
        ("1y", 31_536_000_000_000_000),
        (".5s", 500_000_000),
        ("-9223372036854775808ns", -(2**63)),
    ),
)
def test_a_duration_is_read_as_go_reads_it(duration: str, nanoseconds: int) -> None:
    assert ask("time.parse_duration_ns", duration) == nanoseconds


@pytest.mark.parametrize(
    "duration", ("", "-", "1", "s", ".s", "1x", "9223372036854775808ns", "1 h", "300y", "1.1.1d")
)
def test_what_is_no_duration_is_undefined(duration: str) -> None:
    assert ask("time.parse_duration_ns", duration) is None


def test_a_day_is_added_on_the_clock_of_the_zone() -> None:
    before = ask("time.parse_rfc3339_ns", "2024-03-30T12:00:00+01:00")
    assert ask("time.add_date", [before, "Europe/Berlin"], 0, 0, 1) == ask(
        "time.parse_rfc3339_ns", "2024-03-31T12:00:00+02:00"
    )
    assert ask("time.add_date", before, 300, 0, 0) is None
    assert ask("time.add_date", before, 10**12, 0, 10**12) is None


@pytest.mark.parametrize("zone", ("../../etc/passwd", "/etc/passwd", "Nowhere", "europe/berlin"))
def test_a_zone_that_there_is_not_is_undefined(zone: str) -> None:
    assert ask("time.clock", [NS, zone]) is None


def test_the_zone_of_the_machine_is_taken_for_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert ask("time.clock", [NS, "Local"]) == [22, 13, 20]


@pytest.mark.parametrize("moment", ("a", [], [1.5], 2**63, [1, 2], [1, "UTC", 3]))
def test_what_is_no_moment_is_undefined(moment: object) -> None:
    assert ask("time.date", moment) is None


def test_a_difference_is_given_in_calendar_units() -> None:
    one = ask("time.parse_rfc3339_ns", "2024-01-31T00:00:00Z")
    other = ask("time.parse_rfc3339_ns", "2024-03-01T01:02:03Z")
    assert ask("time.diff", one, other) == [0, 1, 1, 1, 2, 3]
    assert ask("time.diff", other, one) == [0, 1, 1, 1, 2, 3]


def test_a_distance_at_which_the_time_of_go_wraps_around_ends_the_evaluation() -> None:
    with pytest.raises(BuiltinError):
        ask("time.add_date", 0, 0, 0, 2**63 - 1)
