"""The clock behind the deadlines of evaluations."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import wasmtime
from opapywasm.runtime import EpochTicker

TICK_SECONDS: Final = EpochTicker.tick_seconds
"""What opapywasm counts deadlines in."""
REST_AFTER_SECONDS: Final = 1.0


class Epochs:
    """Moves a wasmtime engine's epoch on while it is entered, and rests soon after.

    An evaluation is cut when enough epochs have passed since it began. The thread
    that opapywasm brings for this ticks for ever, which costs an idle sidecar
    about one per cent of a core, and ticks late when other threads are busy, which
    stretches deadlines several times over. This one counts what time has passed.
    """

    def __init__(
        self, engine: wasmtime.Engine, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._counted_until = clock()
        self._changed = threading.Condition()
        self._running = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="policy-epochs", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        with self._changed:
            # Up to date before a deadline is set, or it would pay for what went before.
            self._count()
            self._running += 1
            self._changed.notify()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._running -= 1

    def close(self) -> None:
        """End the thread. No evaluation may be under way."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _count(self) -> None:
        """Move the epoch on by the ticks that have passed since it was last moved."""
        if not self._running:
            # Nobody has a deadline.
            self._counted_until = self._clock()
            return
        ticks = int((self._clock() - self._counted_until) / TICK_SECONDS)
        for _ in range(ticks):
            self._engine.increment_epoch()
        self._counted_until += ticks * TICK_SECONDS

    def _run(self) -> None:
        idle_ticks = 0
        while not self._closed.wait(TICK_SECONDS):
            with self._changed:
                self._count()
                idle_ticks = 0 if self._running else idle_ticks + 1
                # It stays awake for a while, since to be woken costs the next evaluation more.
                if idle_ticks * TICK_SECONDS > REST_AFTER_SECONDS:
                    self._changed.wait_for(lambda: self._running or self._closed.is_set())
