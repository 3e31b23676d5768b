"""Where the window of a limit begins and ends, by the calendar of a time zone."""

from __future__ import annotations

import functools
import math
import zoneinfo
from datetime import date, datetime, timedelta
from typing import Final, NamedTuple

from pdp.budget.ledger import LedgerError, Limit, Window
from pdp.reason import ReasonCode

KNOWN_ZONES: Final = 1024
"""Time zones that are kept at hand; there are some 600."""


class WindowBounds(NamedTuple):
    """Unix seconds: the window holds ``starts_at`` and everything before ``ends_at``."""

    starts_at: int
    ends_at: int | None
    """None for a window that does not end."""


def window_bounds(limit: Limit, now: float) -> WindowBounds:
    """The window of the limit that holds the Unix time ``now``.

    Days and months begin at midnight in the limit's time zone, or with the first moment
    of the date where its clocks jump over midnight: on the days on which clocks change
    they have 23 or 25 hours. Hours begin where clocks there show a full hour, minutes
    everywhere at once. Rates and concurrency know no windows. Raises LedgerError
    (account_not_found) for a limit that has ended.
    """
    window = limit.window
    if window is Window.MINUTE:
        return _even(now, 60, 0)
    if window is Window.HOUR:
        offset = 0 if limit.timezone == "UTC" else _zone(limit.timezone).offset_seconds(now)
        # Where an offset changes by less than an hour, so do the hours around it.
        return _even(now, 3600, offset % 3600)
    if window is Window.DAY:
        if limit.timezone == "UTC":
            return _even(now, 86_400, 0)
        return _zone(limit.timezone).day(now)
    if window is Window.MONTH:
        return _zone(limit.timezone).month(now)
    return _lifetime(limit, now) if limit.until else _ENDLESS


def _lifetime(limit: Limit, now: float) -> WindowBounds:
    if now >= limit.until:
        raise LedgerError(
            ReasonCode.ACCOUNT_NOT_FOUND, "A limit has ended, so nothing counts under it any more."
        )
    return WindowBounds(0, limit.until)


def is_timezone(name: str) -> bool:
    """Whether a limit can be in that time zone."""
    try:
        _zone(name)
    except (TypeError, ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        return False
    return True


def _even(now: float, length: int, offset: int) -> WindowBounds:
    """Windows of one length. Unix time leaves leap seconds out, so UTC's divide it."""
    starts_at = int((now + offset) // length) * length - offset
    return WindowBounds(starts_at, starts_at + length)


class _Zone:
    """One time zone, with the day and the month that were asked for last."""

    def __init__(self, name: str) -> None:
        self._zone = zoneinfo.ZoneInfo(name)
        self._day = self._month = WindowBounds(0, 0)

    def offset_seconds(self, now: float) -> int:
        return int((self._clock(now).utcoffset() or timedelta()).total_seconds())

    def day(self, now: float) -> WindowBounds:
        day = self._day
        if not _holds(day, now):
            today = self._date(now)
            day = self._day = self._between(today, today + timedelta(days=1))
        return day

    def month(self, now: float) -> WindowBounds:
        month = self._month
        if not _holds(month, now):
            first = self._date(now).replace(day=1)
            after = date(first.year + first.month // 12, first.month % 12 + 1, 1)
            month = self._month = self._between(first, after)
        return month

    def _date(self, now: float) -> date:
        return self._clock(now).date()

    def _clock(self, now: float) -> datetime:
        # Without its fraction, which would be rounded, into the next day too.
        return datetime.fromtimestamp(math.floor(now), self._zone)

    def _between(self, first: date, after: date) -> WindowBounds:
        return WindowBounds(self._begin(first), self._begin(after))

    def _begin(self, day: date) -> int:
        """The first moment of a date. Where clocks show midnight twice it is the first
        (fold=0), and where they jump over it, fold=0 names the moment of the jump.
        """
        midnight = datetime(day.year, day.month, day.day, tzinfo=self._zone)
        return math.ceil(midnight.timestamp())


def _holds(bounds: WindowBounds, now: float) -> bool:
    return bounds.starts_at <= now and bounds.ends_at is not None and now < bounds.ends_at


@functools.lru_cache(maxsize=KNOWN_ZONES)
def _zone(name: str) -> _Zone:
    return _Zone(name)


_ENDLESS: Final = WindowBounds(0, None)
