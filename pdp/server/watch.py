"""Watch: tell clients what changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

from pdp.api.v1 import authorization_pb2
from pdp.errors import PdpError
from pdp.policy.engine import ActivePolicy
from pdp.reason import ReasonCode
from pdp.revocation.revocations import Revocations

MAX_WATCHERS: Final = 1_024
"""Clients that watch at the same time; one more is refused with rate_limited."""
MAX_WATCHERS_PER_TENANT: Final = 128
"""Of one tenant's, so that no tenant takes all the places."""
WATCH_SECONDS: Final = 3_600.0
"""How long one Watch lasts: a token that has ended is not believed for longer."""


class Watchers:
    """Everybody who watches."""

    def __init__(
        self,
        policy: ActivePolicy,
        revocations: Revocations,
        *,
        draining: asyncio.Event,
        seconds: float = WATCH_SECONDS,
    ) -> None:
        self._policy = policy
        self._revocations = revocations
        self._draining = draining
        self._seconds = seconds
        self._watching: Counter[str] = Counter()

    async def events(
        self, tenant: str, *, since: int, check: Callable[[], Awaitable[object]]
    ) -> AsyncGenerator[authorization_pb2.WatchResponse]:
        """The revision in force, each new one, that something was revoked, and the end.

        ``since`` is the generation of the revocations before the watcher was identified,
        and ``check`` raises where it may not ask any more. It is called whenever something
        was revoked, and what it raises ends the events. Whoever is slow misses none: those
        that come meanwhile become one.

        Raises PdpError (rate_limited).
        """
        if (
            self._watching.total() >= MAX_WATCHERS
            or self._watching[tenant] >= MAX_WATCHERS_PER_TENANT
        ):
            raise PdpError(ReasonCode.RATE_LIMITED, "Too many clients watch; try again later.")
        self._watching[tenant] += 1
        draining = asyncio.ensure_future(self._draining.wait())
        ends_at = asyncio.get_running_loop().time() + self._seconds
        revision, generation = self._policy.revision, since
        changed: asyncio.Future[str] | None = None
        revoked: asyncio.Future[int] | None = None
        try:
            yield _in_force(revision)
            while True:
                changed = changed or asyncio.ensure_future(self._policy.changed_from(revision))
                revoked = revoked or asyncio.ensure_future(
                    self._revocations.changed_from(generation)
                )
                left = ends_at - asyncio.get_running_loop().time()
                waiting: set[asyncio.Future[Any]] = {changed, revoked, draining}
                await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if draining.done():
                    yield authorization_pb2.WatchResponse(draining=authorization_pb2.Draining())
                    return
                if revoked.done():
                    generation, revoked = revoked.result(), None
                    await check()
                    yield authorization_pb2.WatchResponse(revoked=authorization_pb2.Revoked())
                elif changed.done():
                    revision, changed = changed.result(), None
                    yield _in_force(revision)
                else:
                    return
        finally:
            self._watching[tenant] -= 1
            self._watching += Counter()  # forgets who watches no more
            for each in (draining, changed, revoked):
                if each is not None:
                    each.cancel()


def _in_force(revision: str) -> authorization_pb2.WatchResponse:
    return authorization_pb2.WatchResponse(
        policy=authorization_pb2.PolicyInForce(revision=revision)
    )
