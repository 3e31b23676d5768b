"""Refusals of callers who are not known: on record, but not without end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pdp.errors import PdpError
from pdp.reason import ReasonCode

BURST: Final = 1_000
"""Refusals that go on record at once."""
PER_SECOND: Final = 50
"""And then so many a second: some 4 GB of audit log a day at the very worst."""


class Strangers:
    """Bounds what callers without a valid token or permit can have written.

    Whoever can reach the socket could otherwise fill the disk of the audit log, and
    with it stop everybody. What is not recorded one by one is counted, and the
    number stands in the next record.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left = float(BURST)
        self._filled_at = clock()
        self._unrecorded = 0

    def admit(self) -> int:
        """How many refusals went unrecorded before this one, which may be recorded.
        Raises PdpError (rate_limited) when it may not.
        """
        now = self._clock()
        self._left = min(BURST, self._left + (now - self._filled_at) * PER_SECOND)
        self._filled_at = now
        if self._left < 1:
            self._unrecorded += 1
            raise PdpError(
                ReasonCode.RATE_LIMITED, "Too many calls without valid credentials; try again."
            )
        self._left -= 1
        unrecorded, self._unrecorded = self._unrecorded, 0
        return unrecorded
