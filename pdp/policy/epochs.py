"""The clock behind the deadlines of evaluations."""

from __future__ import annotations

import threading
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
    about one per cent of a core.
    """

    def __init__(self, engine: wasmtime.Engine) -> None:
        self._engine = engine
        self._changed = threading.Condition()
        self._running = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="policy-epochs", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        with self._changed:
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

    def _run(self) -> None:
        idle_ticks = 0
        while not self._closed.wait(TICK_SECONDS):
            self._engine.increment_epoch()
            idle_ticks = 0 if self._running else idle_ticks + 1
            # It stays awake for a while, since to be woken costs the next evaluation more.
            if idle_ticks * TICK_SECONDS > REST_AFTER_SECONDS:
                with self._changed:
                    self._changed.wait_for(lambda: self._running or self._closed.is_set())
