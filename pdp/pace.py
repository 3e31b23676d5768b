"""How often to ask for what lies elsewhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from pdp.errors import FetchError

FIRST_RETRY_SECONDS: Final = 1.0
MAX_RETRY_AFTER_SECONDS: Final = 600.0
"""Longest wait that a server can ask for: what is here grows stale meanwhile."""


class Pace:
    """When to ask again: regularly, moved a little so that sidecars spread, and after a
    failure soon, then less and less often. The first time it is anywhere within a regular
    wait: sidecars that have started together do not ask together.
    """

    def __init__(self, poll_seconds: float, *, draw: Callable[[], float] = random.random) -> None:
        self._poll_seconds = poll_seconds
        self._draw = draw
        self._is_first = True
        self._failures = 0
        self._asked_for = 0.0

    def went_well(self) -> None:
        """It came, or there is nothing new."""
        self._failures, self._asked_for = 0, 0.0

    def failed(self, error: Exception) -> None:
        """Neither; the server may have said how long to leave it alone."""
        asked_for = error.retry_after_seconds if isinstance(error, FetchError) else None
        self._failures += 1
        self._asked_for = min(asked_for or 0.0, MAX_RETRY_AFTER_SECONDS)

    def seconds(self, *, regular: float | None = None) -> float:
        """How long to wait now; ``regular`` goes before poll_seconds where all is well."""
        if self._failures:
            # Two to the sixteenth seconds is past any poll_seconds; more would overflow.
            longest = FIRST_RETRY_SECONDS * 2.0 ** min(self._failures - 1, 16)
            back_off = self._between(0.5, 1.0) * min(longest, self._poll_seconds)
            return max(back_off, self._between(1.0, 1.1) * self._asked_for)
        if regular is not None:
            return regular
        share = self._between(0.0 if self._is_first else 0.9, 1.0 if self._is_first else 1.1)
        self._is_first = False
        return share * self._poll_seconds

    def _between(self, least: float, most: float) -> float:
        return least + (most - least) * self._draw()
