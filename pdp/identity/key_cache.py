"""Keys that are kept here and asked for anew: in time, and not too often."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Final, Literal

from pdp.identity.key_source import KeyFetcher, KeySourceError, fault_of
from pdp.identity.keys import IssuerKey
from pdp.pace import Pace

COOLDOWN_SECONDS: Final = 10.0
"""Least time between two fetches for the sake of keys that are not known: whoever makes up
key ids can not make the sidecar ask more often."""
RETRY_SECONDS: Final = 30.0
"""Longest time between two fetches that fail, unless the source asks for more."""
WAIT_SECONDS: Final = 2.0
"""How long a call waits for a fetch. The fetch goes on without it."""
MAX_WAITING: Final = 128
"""Calls that wait for one place's fetch. One more is answered at once: whoever makes up key ids
while the place hangs is not to take the room that others' calls need.
"""
_log: Final = logging.getLogger(__name__)

Result = Literal["ok", "failed"]


class KeyCache:
    """The keys of one place, as they were when it was last asked.

    They are used for as long as the place has answered within ``max_age_seconds``, and
    then not at all. Every ``poll_seconds`` it is asked again, moved by up to a tenth; so
    that is how long a key lasts that was taken out of a place that answers. A key that is
    not known is asked for at once. However many ask, one fetch is under way at a time.
    """

    def __init__(
        self,
        fetcher: KeyFetcher,
        *,
        poll_seconds: float,
        max_age_seconds: float,
        keys: Mapping[str, IssuerKey] | None = None,
        fetched: Callable[[Result], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """``keys`` are those that were fetched just now, if any; ``fetched`` is told how
        each fetch ended.
        """
        self._fetcher = fetcher
        self._poll_seconds = poll_seconds
        self._max_age_seconds = max_age_seconds
        self._fetched = fetched
        self._clock = clock
        self._pace = Pace(min(poll_seconds, RETRY_SECONDS), draw=draw)
        self._draw = draw
        self._keys: Mapping[str, IssuerKey] = keys or {}
        self._answered_at: float | None = None if keys is None else clock()
        self.error: str | None = None
        """Why the last fetch failed, for operators."""
        self._fetching: asyncio.Task[None] | None = None
        self._waiting = 0
        self._may_ask_at = self._poll_at = clock()
        if keys is not None:
            # Anywhere within it: sidecars that have started together do not ask together.
            self._poll_at += poll_seconds * draw()

    @property
    def place(self) -> str:
        """Where the keys are from, for operators."""
        return self._fetcher.place

    @property
    def age_seconds(self) -> float:
        """Since the place has last answered; infinite where it never has."""
        return float("inf") if self._answered_at is None else self._clock() - self._answered_at

    @property
    def usable(self) -> bool:
        """Whether there are keys, and not too old ones."""
        return bool(self._keys) and self._is_fresh

    async def find(self, kid: str) -> IssuerKey | None:
        """The key of that id, or None when the issuer has no such key. Raises
        KeySourceError when that can not be told.
        """
        key = self._keys.get(kid) if self._is_fresh else None
        if key is not None:
            return key
        await self._ask()
        key = self._keys.get(kid) if self._is_fresh else None
        if key is None and (not self._is_fresh or self.error or self._fetching is not None):
            raise fault_of(self.place, "can not be had now")
        return key

    async def look(self) -> None:
        """Ask now, and wait until it is over."""
        await asyncio.wait({self._begin()})

    async def keep_fresh(self) -> None:
        """Ask again in time, until cancelled."""
        while True:
            await asyncio.sleep(max(0.0, self._poll_at - self._clock()))
            if self._clock() >= self._poll_at:
                await self.look()

    async def close(self) -> None:
        """Stop asking."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})
        await self._fetcher.close()

    @property
    def _is_fresh(self) -> bool:
        return self.age_seconds <= self._max_age_seconds

    async def _ask(self) -> None:
        """Wait for the fetch that is under way, or for one that may begin now."""
        if self._fetching is None and self._clock() < self._may_ask_at:
            return
        fetching = self._begin()
        if self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.wait({fetching}, timeout=WAIT_SECONDS)
        finally:
            self._waiting -= 1

    def _begin(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._fetching = asyncio.create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        began_at = self._clock()
        try:
            self._keys = await self._fetcher.fetch()
        except KeySourceError as error:
            self._failed(error, error.message)
        except Exception as error:  # noqa: BLE001 - a source that can not be read has no keys
            self._failed(error, f"The key set {self.place} failed: {type(error).__name__}.")
        else:
            self._answered(began_at)
        finally:
            self._fetching = None

    def _answered(self, began_at: float) -> None:
        if self.error is not None:
            _log.info("the key set %s is there again", self.place)
        self.error, self._answered_at = None, began_at
        self._pace.went_well()
        now = self._clock()
        self._may_ask_at = now + min(COOLDOWN_SECONDS, self._poll_seconds)
        self._poll_at = now + self._poll_seconds * (0.9 + 0.2 * self._draw())
        self._fetched("ok")

    def _failed(self, error: Exception, message: str) -> None:
        if self.error != message:
            _log.error("%s", message)
        self.error = message
        self._pace.failed(error)
        self._may_ask_at = self._poll_at = self._clock() + self._pace.seconds()
        self._fetched("failed")
