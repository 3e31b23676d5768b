"""Go's time layouts: "2006-01-02T15:04:05Z07:00" and the like, read and written.

As Go 1.26's ``time/format.go`` does both, where the machine's zone is UTC.
"""

from __future__ import annotations

import re
from calendar import isleap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Final

from pdp.policy.builtins.faults import UndefinedError

SECOND_NS: Final = 1_000_000_000
_DAY_SECONDS: Final = 86_400
_EPOCH: Final = date(1970, 1, 1).toordinal()
_MONTHS: Final = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_WEEKDAYS: Final = (
    *("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
)
_ELEMENT: Final = re.compile(
    r"January|Jan(?![a-z])|Monday|Mon(?![a-z])|MST|0[1-6]|002|15|1|2006|2|_2(?!006)|__2"
    r"|[345]|PM|pm|-070000|-07:00:00|-0700|-07:00|-07|Z070000|Z07:00:00|Z0700|Z07:00|Z07"
    r"|[.,](?:0+|9+)(?![0-9])"
)
_MAX_FRACTION_DIGITS: Final = 0xFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTime:
    """A moment, as clocks of a zone show it."""

    unix_seconds: int
    nanoseconds: int
    """Of the second."""
    offset_seconds: int
    """East of UTC."""
    zone: str
    """Its abbreviation, such as CEST."""

    @property
    def date(self) -> date:
        """The day there."""
        local = self.unix_seconds + self.offset_seconds
        return date.fromordinal(_EPOCH + local // _DAY_SECONDS)

    @property
    def clock(self) -> tuple[int, int, int]:
        """Hour, minute and second there."""
        rest = (self.unix_seconds + self.offset_seconds) % _DAY_SECONDS
        return rest // 3600, rest // 60 % 60, rest % 60

    @property
    def weekday(self) -> str:
        """The English name of the day."""
        return _WEEKDAYS[self.date.weekday()]


def unix_seconds(day: date, hour: int, minute: int, second: int) -> int:
    """Seconds since the epoch of a moment in UTC."""
    days = day.toordinal() - _EPOCH
    return days * _DAY_SECONDS + hour * 3600 + minute * 60 + second


def format_time(moment: LocalTime, layout: str) -> str:
    """A moment, written like the reference time in a layout."""
    written: dict[str, str] = {}

    def write(found: re.Match[str]) -> str:
        element = found.group()
        if element not in written:
            written[element] = _write(element, moment)
        return written[element]

    return _ELEMENT.sub(write, layout)


def _write(element: str, moment: LocalTime) -> str:
    if element[0] in ".,":
        return _write_fraction(element, moment.nanoseconds)
    if element[:3] in ("-07", "Z07"):
        return _write_offset(element, moment.offset_seconds)
    return _WRITERS[element](moment)


def _write_fraction(element: str, nanoseconds: int) -> str:
    digits = f"{nanoseconds:09}"[: len(element) - 1 & _MAX_FRACTION_DIGITS]
    if element[1] == "0":
        return element[0] + digits
    digits = digits.rstrip("0")
    return element[0] + digits if digits else ""


def _write_offset(element: str, offset: int) -> str:
    if element[0] == "Z" and offset == 0:
        return "Z"
    # Go cuts to minutes towards zero before it looks at the sign.
    minutes = abs(offset) // 60
    text = "-" if offset <= -60 else "+"  # noqa: PLR2004 - a minute
    text += f"{minutes // 60:02}"
    colon = ":" if ":" in element else ""
    if len(element) > len("-07"):
        text += f"{colon}{minutes % 60:02}"
    if len(element) >= len("-070000"):
        text += f"{colon}{abs(offset) % 60:02}"
    return text


def _half_day(moment: LocalTime) -> int:
    return moment.clock[0] % 12 or 12


_WRITERS: Final[Mapping[str, Callable[[LocalTime], str]]] = {
    "January": lambda moment: _MONTHS[moment.date.month - 1],
    "Jan": lambda moment: _MONTHS[moment.date.month - 1][:3],
    "1": lambda moment: str(moment.date.month),
    "01": lambda moment: f"{moment.date.month:02}",
    "Monday": lambda moment: moment.weekday,
    "Mon": lambda moment: moment.weekday[:3],
    "2": lambda moment: str(moment.date.day),
    "_2": lambda moment: f"{moment.date.day:2}",
    "02": lambda moment: f"{moment.date.day:02}",
    "__2": lambda moment: f"{moment.date.timetuple().tm_yday:3}",
    "002": lambda moment: f"{moment.date.timetuple().tm_yday:03}",
    "15": lambda moment: f"{moment.clock[0]:02}",
    "3": lambda moment: str(_half_day(moment)),
    "03": lambda moment: f"{_half_day(moment):02}",
    "4": lambda moment: str(moment.clock[1]),
    "04": lambda moment: f"{moment.clock[1]:02}",
    "5": lambda moment: str(moment.clock[2]),
    "05": lambda moment: f"{moment.clock[2]:02}",
    "2006": lambda moment: f"{moment.date.year:04}",
    "06": lambda moment: f"{moment.date.year % 100:02}",
    "PM": lambda moment: "PM" if moment.clock[0] >= 12 else "AM",  # noqa: PLR2004 - noon
    "pm": lambda moment: "pm" if moment.clock[0] >= 12 else "am",  # noqa: PLR2004 - noon
    "MST": lambda moment: moment.zone,
}


def parse_time(layout: str, value: str) -> int:
    """Unix nanoseconds of the moment that a text shows. Raises UndefinedError."""
    elements = list(_ELEMENT.finditer(layout))
    reader = _Reader(value)
    start = 0
    for index, element in enumerate(elements):
        reader.skip(layout[start : element.start()])
        start = element.end()
        following = elements[index + 1].group() if index + 1 < len(elements) else ""
        reader.read(element.group(), following)
    reader.skip(layout[start:])
    return reader.unix_ns()


class _Reader:
    """Reads one text, element by element."""

    def __init__(self, value: str) -> None:
        self._value = value
        self._at = 0
        self._numbers: dict[str, int] = {}
        self._half: str | None = None
        self._offset_seconds = 0
        self._is_utc = False

    def skip(self, literal: str) -> None:
        """Go past what stands between two elements; any spaces match any others."""
        at = 0
        while at < len(literal):
            if literal[at] == " ":
                if self._at < len(self._value) and self._value[self._at] != " ":
                    raise UndefinedError
                at += len(literal) - at - len(literal[at:].lstrip(" "))
                self._take(_SPACES)
            elif self._value[self._at : self._at + 1] == literal[at]:
                at += 1
                self._at += 1
            else:
                raise UndefinedError

    def read(self, element: str, following: str) -> None:
        """Take one element; ``following`` is the next one, wherever it stands."""
        if element[0] in ".,":
            self._read_fraction(element)
        elif element[:3] in ("-07", "Z07"):
            self._read_offset(element)
        elif element == "MST":
            self._read_zone()
        elif element in ("PM", "pm"):
            self._half = self._take(_HALVES[element]).lower()
        elif element in _NAMES:
            self._read_name(element)
        else:
            self._read_number(element)
            if element in ("5", "05") and following[:1] not in (".", ","):
                self._read_unasked_fraction()

    def unix_ns(self) -> int:
        """What was read, at the end of the text."""
        if self._at != len(self._value):
            raise UndefinedError
        day = self._day()
        hour = self._numbers.get("hour", 0)
        if self._half == "pm" and hour < 12:  # noqa: PLR2004 - noon
            hour += 12
        elif self._half == "am" and hour == 12:  # noqa: PLR2004 - noon
            hour = 0
        minute, second = self._numbers.get("minute", 0), self._numbers.get("second", 0)
        seconds = unix_seconds(day, hour, minute, second)
        # Go keeps -1 for "none was read", so an offset of minus one second is none.
        if not self._is_utc and self._offset_seconds != -1:
            seconds -= self._offset_seconds
        return seconds * SECOND_NS + self._numbers.get("nanoseconds", 0)

    def _day(self) -> date:
        year = self._numbers.get("year", 0)
        if year < 1:
            # Python's years begin at 1; nanoseconds since 1970 do not reach back so far.
            raise UndefinedError
        month, day = self._numbers.get("month"), self._numbers.get("day")
        if (yearday := self._numbers.get("yearday")) is not None:
            if not 1 <= yearday <= 365 + isleap(year):
                raise UndefinedError
            found = date.fromordinal(date(year, 1, 1).toordinal() + yearday - 1)
            if month not in (None, found.month) or day not in (None, found.day):
                raise UndefinedError
            return found
        try:
            return date(year, 1 if month is None else month, 1 if day is None else day)
        except ValueError:
            raise UndefinedError from None

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._value, self._at)
        if found is None:
            raise UndefinedError
        self._at = found.end()
        return found.group()

    def _read_number(self, element: str) -> None:
        field, pattern, least, most = _NUMBERS[element]
        value = int(self._take(pattern).lstrip(" "))
        if not least <= value <= most:
            raise UndefinedError
        if element == "06":
            value += 1900 if value >= 69 else 2000  # noqa: PLR2004 - as Unix has it
        self._numbers[field] = value

    def _read_name(self, element: str) -> None:
        names = _NAMES[element]
        found = self._take(names.pattern).capitalize()
        if names.are_months:
            index = [name[: len(found)] for name in _MONTHS].index(found)
            self._numbers["month"] = index + 1

    def _read_fraction(self, element: str) -> None:
        if element[1] == "9":
            if _FRACTION.match(self._value, self._at):
                self._numbers["nanoseconds"] = _nanoseconds(self._take(_FRACTION))
            return
        length = 1 + (len(element) - 1 & _MAX_FRACTION_DIGITS)
        text = self._value[self._at : self._at + length]
        if len(text) < length or text[0] not in ".,":
            raise UndefinedError
        self._at += length
        self._numbers["nanoseconds"] = _nanoseconds(text)

    def _read_unasked_fraction(self) -> None:
        if _FRACTION.match(self._value, self._at):
            self._numbers["nanoseconds"] = _nanoseconds(self._take(_FRACTION))

    def _read_offset(self, element: str) -> None:
        if element[0] == "Z" and self._value[self._at : self._at + 1] == "Z":
            self._at += 1
            self._is_utc = True
            return
        text = self._take(_OFFSETS[element[1:]])
        hours, minutes, seconds = (
            int(digits or "0") for digits in (*re.findall("[0-9]{2}", text), "", "")[:3]
        )
        if hours > 24 or minutes > 60 or seconds > 60:  # noqa: PLR2004 - what Go lets pass
            raise UndefinedError
        offset = (hours * 60 + minutes) * 60 + seconds
        self._offset_seconds = -offset if text[0] == "-" else offset

    def _read_zone(self) -> None:
        # Where the machine's zone is UTC, Go knows no other by its name and takes it for
        # UTC too, even "GMT+3".
        if self._value.startswith("UTC", self._at):
            self._at += 3
            self._is_utc = True
        elif len(self._value) - self._at < 3:  # noqa: PLR2004 - the shortest name
            raise UndefinedError
        else:
            self._take(_ZONE)


@dataclass(frozen=True, slots=True)
class _Names:
    pattern: re.Pattern[str]
    are_months: bool


def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(names), re.IGNORECASE | re.ASCII)


_SPACES: Final = re.compile(" *")
_HALVES: Final = {"PM": re.compile("AM|PM"), "pm": re.compile("am|pm")}
_NAMES: Final = {
    "January": _Names(_any_of(_MONTHS), are_months=True),
    "Jan": _Names(_any_of(tuple(name[:3] for name in _MONTHS)), are_months=True),
    "Monday": _Names(_any_of(_WEEKDAYS), are_months=False),
    "Mon": _Names(_any_of(tuple(name[:3] for name in _WEEKDAYS)), are_months=False),
}
_ONE_OR_TWO: Final = re.compile("[0-9]{1,2}")
_TWO: Final = re.compile("[0-9]{2}")
_NUMBERS: Final[Mapping[str, tuple[str, re.Pattern[str], int, int]]] = {
    "2006": ("year", re.compile("[0-9]{4}"), 0, 9999),
    "06": ("year", re.compile("[0-9]{2}|[+-][0-9]"), -9, 99),
    "1": ("month", _ONE_OR_TWO, 1, 12),
    "01": ("month", _TWO, 1, 12),
    "2": ("day", _ONE_OR_TWO, 0, 99),
    "_2": ("day", re.compile(" ?[0-9]{1,2}"), 0, 99),
    "02": ("day", _TWO, 0, 99),
    "__2": ("yearday", re.compile(" {0,2}[0-9]{1,3}"), 0, 999),
    "002": ("yearday", re.compile("[0-9]{3}"), 0, 999),
    "15": ("hour", _ONE_OR_TWO, 0, 23),
    "3": ("hour", _ONE_OR_TWO, 0, 12),
    "03": ("hour", _TWO, 0, 12),
    "4": ("minute", _ONE_OR_TWO, 0, 59),
    "04": ("minute", _TWO, 0, 59),
    "5": ("second", _ONE_OR_TWO, 0, 59),
    "05": ("second", _TWO, 0, 59),
}
"""Of an element: what it is of the time, how it is written, its least and its greatest."""
_FRACTION: Final = re.compile("[.,][0-9]+")
_EXACT_FRACTION: Final = re.compile("[.,]([+]?[0-9]*|-0*)")
_OFFSETS: Final = {
    "07": re.compile("[+-][0-9]{2}"),
    "0700": re.compile("[+-][0-9]{4}"),
    "07:00": re.compile("[+-][0-9]{2}:[0-9]{2}"),
    "070000": re.compile("[+-][0-9]{6}"),
    "07:00:00": re.compile("[+-][0-9]{2}:[0-9]{2}:[0-9]{2}"),
}
_HOURS: Final = "[+-]0*(?:2[0-3]|1?[0-9])(?![0-9])"
_ZONE: Final = re.compile(
    f"ChST|MeST|GMT(?:{_HOURS})?|{_HOURS}|(?:[A-Z]{{4}}T|[A-Z]{{3}}T|WITA|[A-Z]{{3}})(?![A-Z])"
)


def _nanoseconds(fraction: str) -> int:
    """Of a fraction with its point. What comes after nine characters is not looked at."""
    text = fraction[:10]
    found = _EXACT_FRACTION.fullmatch(text)
    if found is None:
        raise UndefinedError
    return int(found[1] + "0" * (10 - len(text)))
