"""Where the window of a limit begins and ends. Calendar windows, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final, NamedTuple

from pdp.budget.ledger import Window


class WindowBounds(NamedTuple):
    """Unix seconds: the window holds ``starts_at`` and everything before ``ends_at``."""

    starts_at: int
    ends_at: int | None
    """None for a lifetime window."""


def window_bounds(window: Window, now: float) -> WindowBounds:
    """The window that holds the Unix time ``now``."""
    if window is Window.LIFETIME:
        return _LIFETIME
    if window is Window.MONTH:
        return _month(now)
    # Unix time leaves leap seconds out, so UTC minutes, hours and days divide it.
    length = _LENGTHS[window]
    starts_at = int(now // length) * length
    return WindowBounds(starts_at, starts_at + length)


def _month(now: float) -> WindowBounds:
    today = datetime.fromtimestamp(now, UTC)
    first = datetime(today.year, today.month, 1, tzinfo=UTC)
    after = datetime(today.year + today.month // 12, today.month % 12 + 1, 1, tzinfo=UTC)
    return WindowBounds(int(first.timestamp()), int(after.timestamp()))


_LIFETIME: Final = WindowBounds(0, None)
_LENGTHS: Final = {Window.MINUTE: 60, Window.HOUR: 3600, Window.DAY: 86_400}
