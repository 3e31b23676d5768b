"""time.*: moments are Unix nanoseconds, zones those of the package tzdata."""

from __future__ import annotations

import math
import re
from calendar import monthrange
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta, tzinfo
from decimal import Decimal
from functools import lru_cache
from importlib.resources import files
from typing import Final
from zoneinfo import ZoneInfo

from pdp.policy.builtins.faults import UndefinedError, too_large
from pdp.policy.builtins.layouts import SECOND_NS, LocalTime, format_time, parse_time, unix_seconds
from pdp.policy.builtins.operands import int64, string, whole_number
from pdp.policy.builtins.values import Value, number

_RFC3339: Final = "2006-01-02T15:04:05Z07:00"
_RFC3339_NANO: Final = "2006-01-02T15:04:05.999999999Z07:00"
_LAYOUTS: Final[Mapping[str, str]] = {
    "ANSIC": "Mon Jan _2 15:04:05 2006",
    "UnixDate": "Mon Jan _2 15:04:05 MST 2006",
    "RubyDate": "Mon Jan 02 15:04:05 -0700 2006",
    "RFC822": "02 Jan 06 15:04 MST",
    "RFC822Z": "02 Jan 06 15:04 -0700",
    "RFC850": "Monday, 02-Jan-06 15:04:05 MST",
    "RFC1123": "Mon, 02 Jan 2006 15:04:05 MST",
    "RFC1123Z": "Mon, 02 Jan 2006 15:04:05 -0700",
    "RFC3339": _RFC3339,
    "RFC3339Nano": _RFC3339_NANO,
}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_INT64: Final = 2**63 - 1
_YEARS: Final = range(1677, 2263)
"""Those that nanoseconds since 1970 reach."""
_MAX_ADDED: Final = 10**12
"""Years, months or days; Go's time wraps around for still more."""


def parse_ns(layout: Value, value: Value) -> Value:
    """time.parse_ns."""
    given = string(layout)
    return _within_range(parse_time(_LAYOUTS.get(given, given), string(value)))


def parse_rfc3339_ns(value: Value) -> Value:
    """time.parse_rfc3339_ns."""
    return _within_range(parse_time(_RFC3339, string(value)))


def format_(moment: Value) -> Value:
    """time.format."""
    layout = string(moment[2]) if isinstance(moment, tuple) and len(moment) > 2 else ""  # noqa: PLR2004 - the third
    return format_time(_local(moment), _LAYOUTS.get(layout, layout) or _RFC3339_NANO)


def date_(moment: Value) -> Value:
    """time.date."""
    day = _local(moment).date
    return number(day.year), number(day.month), number(day.day)


def clock(moment: Value) -> Value:
    """time.clock."""
    return tuple(map(number, _local(moment).clock))


def weekday(moment: Value) -> Value:
    """time.weekday."""
    return _local(moment).weekday


def add_date(moment: Value, years: Value, months: Value, days: Value) -> Value:
    """time.add_date: what is past the end of a month counts into the next."""
    zone = _zone(moment)
    start = _local(moment)
    added = (int64(years), int64(months), int64(days))
    if any(abs(count) > _MAX_ADDED for count in added):
        raise too_large("a distance in time")
    month = start.date.month - 1 + added[1]
    year = start.date.year + added[0] + month // 12
    past_first = start.date.day - 1 + added[2]
    try:
        first = date(year, month % 12 + 1, 1)
        day = first + timedelta(days=past_first)
    except (ValueError, OverflowError):
        raise UndefinedError from None
    if day.year not in _YEARS:
        raise UndefinedError
    as_utc = unix_seconds(day, *start.clock)
    # As Go's time.Date finds the offset of a moment that it knows by the clock.
    offset = _offset(zone, as_utc)
    if offset:
        offset = _offset(zone, as_utc - offset)
    return _within_range((as_utc - offset) * SECOND_NS + start.nanoseconds)


def diff(one: Value, other: Value) -> Value:
    """time.diff: years, months, days, hours, minutes, seconds."""
    zone = _zone(one)
    _zone(other)
    early, late = sorted((_nanoseconds(one), _nanoseconds(other)))
    first, last = _local_in(zone, early), _local_in(zone, late)
    parts = [
        after - before
        for before, after in zip(
            (first.date.year, first.date.month, first.date.day, *first.clock),
            (last.date.year, last.date.month, last.date.day, *last.clock),
            strict=True,
        )
    ]
    month_days = monthrange(first.date.year, first.date.month)[1]
    for index, whole in ((5, 60), (4, 60), (3, 24), (2, month_days), (1, 12)):
        if parts[index] < 0:
            parts[index] += whole
            parts[index - 1] -= 1
    return tuple(map(number, parts))


def parse_duration_ns(duration: Value) -> Value:
    """time.parse_duration_ns: Go's durations, and days, weeks and years of fixed length."""
    text = string(duration)
    if re.search("[dwy]", text):
        text = _without_days(text)
    sign = -1 if text.startswith("-") else 1
    rest = text[1:] if text[:1] in ("-", "+") else text
    if rest == "0":
        return number(0)
    total, end = 0, 0
    while end < len(rest):
        found = _SEGMENT.match(rest, end)
        if found is None or not (found["whole"] or found["fraction"]):
            raise UndefinedError
        total += _segment_ns(found["whole"], found["fraction"] or "", found["unit"])
        end = found.end()
    if not rest or total > _MAX_INT64 + (sign < 0):
        raise UndefinedError
    return number(sign * total)


_SEGMENT: Final = re.compile(r"(?P<whole>[0-9]*)(?:\.(?P<fraction>[0-9]*))?(?P<unit>[^.0-9]+)")
_EXTENDED: Final = re.compile("(?P<digits>[0-9.]+)(?P<unit>ms|us|µs|ns|[a-z])")
_UNITS_NS: Final[Mapping[str, int]] = {
    "ns": 1,
    "us": 1_000,
    "\u00b5s": 1_000,
    "\u03bcs": 1_000,
    "ms": 1_000_000,
    "s": SECOND_NS,
    "m": 60 * SECOND_NS,
    "h": 3600 * SECOND_NS,
}
_UNIT_HOURS: Final[Mapping[str, int]] = {"d": 24, "w": 7 * 24, "y": 365 * 24}
_MAX_UINT63: Final = 2**63


def _segment_ns(whole: str, fraction: str, unit: str) -> int:
    unit_ns = _UNITS_NS.get(unit)
    if unit_ns is None or len(whole.lstrip("0")) > 19:  # noqa: PLR2004 - digits of 2**63
        raise UndefinedError
    total = int(whole.lstrip("0") or "0")
    if total > _MAX_UINT63 // unit_ns:
        raise UndefinedError
    total *= unit_ns
    numerator, scale = _leading_fraction(fraction)
    if numerator:
        total += int(float(numerator) * (unit_ns / scale))
    if total > _MAX_UINT63:
        raise UndefinedError
    return total


def _leading_fraction(digits: str) -> tuple[int, float]:
    """The digits that Go takes into account, and the power of ten below them."""
    numerator, scale = 0, 1.0
    for digit in digits[:19]:
        longer = numerator * 10 + int(digit)
        if numerator > _MAX_INT64 // 10 or longer > _MAX_UINT63:
            break
        numerator, scale = longer, scale * 10
    return numerator, scale


def _without_days(text: str) -> str:
    """The same duration, with days, weeks and years in hours. Raises UndefinedError."""
    sign = text[:1] if text[:1] in ("-", "+") else ""
    parts = [sign]
    end = len(sign)
    while end < len(text):
        found = _EXTENDED.match(text, end)
        if found is None:
            raise UndefinedError
        hours = _UNIT_HOURS.get(found["unit"])
        parts.append(found.group() if hours is None else f"{_hours(found['digits'], hours)}h")
        end = found.end()
    return "".join(parts)


def _hours(digits: str, unit_hours: int) -> str:
    try:
        hours = float(digits) * unit_hours
    except ValueError:
        raise UndefinedError from None
    if math.isinf(hours):
        raise UndefinedError
    return f"{Decimal(repr(hours)):f}"


def _within_range(nanoseconds: int) -> Value:
    if not -_MAX_INT64 - 1 <= nanoseconds <= _MAX_INT64:
        raise UndefinedError
    return number(nanoseconds)


def _nanoseconds(moment: Value) -> int:
    """Of a number, or of the first of an array."""
    if isinstance(moment, tuple):
        if not moment:
            raise UndefinedError
        moment = moment[0]
    value = whole_number(moment)
    if not -_MAX_INT64 - 1 <= value <= _MAX_INT64:
        raise UndefinedError
    return value


def _zone(moment: Value) -> tzinfo:
    """The zone that stands second in an array; UTC where none does.

    "Local" is the machine's zone to OPA. Decisions do not depend on the machine: it is UTC.
    """
    name, *_ = [*map(string, moment[1:3] if isinstance(moment, tuple) else ()), "UTC"]
    return UTC if name in ("", "UTC", "Local") else _zone_named(name)


@lru_cache(maxsize=1024)
def _zone_named(name: str) -> tzinfo:
    # Not by ZoneInfo(name): that takes the machine's data before those of tzdata.
    if name not in _zone_names():
        raise UndefinedError
    with files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


@lru_cache(maxsize=1)
def _zone_names() -> frozenset[str]:
    return frozenset(files("tzdata").joinpath("zones").read_text().split())


def _local(moment: Value) -> LocalTime:
    return _local_in(_zone(moment), _nanoseconds(moment))


def _local_in(zone: tzinfo, unix_ns: int) -> LocalTime:
    seconds, nanoseconds = divmod(unix_ns, SECOND_NS)
    there = (_EPOCH + timedelta(seconds=seconds)).astimezone(zone)
    offset = there.utcoffset()
    return LocalTime(
        unix_seconds=seconds,
        nanoseconds=nanoseconds,
        offset_seconds=offset // timedelta(seconds=1) if offset else 0,
        zone=there.tzname() or "",
    )


def _offset(zone: tzinfo, seconds: int) -> int:
    return _local_in(zone, seconds * SECOND_NS).offset_seconds


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "time.add_date": add_date,
    "time.clock": clock,
    "time.date": date_,
    "time.diff": diff,
    "time.format": format_,
    "time.parse_duration_ns": parse_duration_ns,
    "time.parse_ns": parse_ns,
    "time.parse_rfc3339_ns": parse_rfc3339_ns,
    "time.weekday": weekday,
}
