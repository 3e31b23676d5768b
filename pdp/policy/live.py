"""The policy in force: replaced in one step, while calls are under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from pdp.policy.engine import PolicyEngine, PolicyError, Supervised
from pdp.reason import ReasonCode


class LivePolicy:
    """Hands each call the engine of one revision, and takes up new ones.

    A call keeps the engine that it was given to its end; an engine that was replaced
    is closed when the last call that has it is done. All of it happens on one event
    loop, so that no call can see half of a change.
    """

    def __init__(
        self,
        engine: PolicyEngine,
        *,
        max_age_seconds: int | None = None,
        deny_when_stale: bool = True,
        checked_at: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._current = _Pinned(engine)
        self._max_age_seconds = max_age_seconds
        self._deny_when_stale = deny_when_stale
        self._changed = asyncio.Event()
        self._closing: Final[set[asyncio.Task[None]]] = set()
        self.activated_at = clock()
        """When the revision in force was taken up: Unix seconds."""
        self.checked_at = self.activated_at if checked_at is None else checked_at
        """When every source last said that this is what it holds: Unix seconds."""

    @property
    def revision(self) -> str:
        """The revision that the next call gets."""
        return self._current.engine.revision

    @property
    def stale(self) -> bool:
        """Whether the sources could not be reached for longer than is allowed."""
        # A time that is yet to come was noted while the clock was wrong.
        age = abs(self._clock() - self.checked_at)
        return self._max_age_seconds is not None and age > self._max_age_seconds

    @property
    def answers(self) -> bool:
        """Whether calls get this policy's answer, and not policy_stale."""
        return not (self._deny_when_stale and self.stale)

    @contextmanager
    def pin(self) -> Iterator[PolicyEngine]:
        """One revision for all the questions of one call. Raises PolicyError (policy_stale)."""
        if not self.answers:
            raise PolicyError(
                ReasonCode.POLICY_STALE,
                "The policy could not be renewed for longer than is allowed.",
            )
        pinned = self._current
        pinned.calls += 1
        try:
            yield pinned.engine
        finally:
            pinned.calls -= 1
            self._close_if_done(pinned)

    async def healthy(self) -> bool:
        """Whether calls get this policy's answer, and its engine can give one."""
        if not self.answers:
            return False
        with self.pin() as engine:  # or it could be closed meanwhile
            return not isinstance(engine, Supervised) or await engine.healthy()

    def activate(self, engine: PolicyEngine) -> None:
        """From here on every call gets this engine."""
        replaced, self._current = self._current, _Pinned(engine)
        self.activated_at = self._clock()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self._close_if_done(replaced)

    async def changed_from(self, revision: str) -> str:
        """The revision in force, as soon as it is another than ``revision``."""
        while self.revision == revision:
            await self._changed.wait()
        return self.revision

    async def close(self) -> None:
        """Close every engine. No call may be under way."""
        await self._current.engine.close()
        await asyncio.gather(*self._closing)

    def _close_if_done(self, pinned: _Pinned) -> None:
        if pinned is not self._current and not pinned.calls:
            task = asyncio.get_running_loop().create_task(pinned.engine.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class _Pinned:
    """An engine, and how many calls are using it."""

    __slots__ = ("calls", "engine")

    def __init__(self, engine: PolicyEngine) -> None:
        self.engine = engine
        self.calls = 0
