"""The clock behind the deadlines of evaluations."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

TICK_SECONDS: Final = 0.01
"""What deadlines are counted in."""
REST_AFTER_SECONDS: Final = 1.0


class Epochs:
    """Moves a wasmtime engine's epoch on while it is entered, and rests soon after.

    An evaluation is cut when enough epochs have passed since it began. A thread
    that merely ticks would cost an idle sidecar about one per cent of a core, and
    ticks late when other threads are busy, which stretches deadlines several times
    over. This one counts what time has passed, and there is no thread at rest.
    """

    def __init__(
        self, advance: Callable[[], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._advance = advance
        self._clock = clock
        self._counted_until = clock()
        self._lock = threading.Lock()
        self._running = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        with self._lock:
            # Up to date before a deadline is set, or it would pay for what went before.
            self._count()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="policy-epochs", daemon=True)
                thread.start()
                self._thread = thread
            self._running += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._running -= 1

    def _count(self) -> None:
        """Move the epoch on by the ticks that have passed since it was last moved."""
        if not self._running:
            # Nobody has a deadline.
            self._counted_until = self._clock()
            return
        ticks = int((self._clock() - self._counted_until) / TICK_SECONDS)
        for _ in range(ticks):
            self._advance()
        self._counted_until += ticks * TICK_SECONDS

    def _run(self) -> None:
        idle_ticks = 0
        # It stays for a while, since to start it costs the next evaluation more.
        while idle_ticks * TICK_SECONDS <= REST_AFTER_SECONDS:
            time.sleep(TICK_SECONDS)
            with self._lock:
                self._count()
                idle_ticks = 0 if self._running else idle_ticks + 1
                if idle_ticks * TICK_SECONDS > REST_AFTER_SECONDS:
                    self._thread = None
