"""Watch: tell clients what changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Final

from pdp.api.v1 import authorization_pb2
from pdp.errors import PdpError
from pdp.policy.engine import ActivePolicy
from pdp.reason import ReasonCode

MAX_WATCHERS: Final = 1_024
"""Clients that watch at the same time; one more is refused with rate_limited."""
MAX_WATCHERS_PER_TENANT: Final = 128
"""Of one tenant's, so that no tenant takes all the places."""
WATCH_SECONDS: Final = 3_600.0
"""How long one Watch lasts: a token that has ended is not believed for longer."""


class Watchers:
    """Everybody who watches."""

    def __init__(
        self, policy: ActivePolicy, *, draining: asyncio.Event, seconds: float = WATCH_SECONDS
    ) -> None:
        self._policy = policy
        self._draining = draining
        self._seconds = seconds
        self._watching: Counter[str] = Counter()

    async def events(self, tenant: str) -> AsyncGenerator[authorization_pb2.WatchResponse]:
        """The revision in force, each new one, and the end. Raises PdpError (rate_limited)."""
        if (
            self._watching.total() >= MAX_WATCHERS
            or self._watching[tenant] >= MAX_WATCHERS_PER_TENANT
        ):
            raise PdpError(ReasonCode.RATE_LIMITED, "Too many clients watch; try again later.")
        self._watching[tenant] += 1
        draining = asyncio.ensure_future(self._draining.wait())
        ends_at = asyncio.get_running_loop().time() + self._seconds
        revision = self._policy.revision
        changed: asyncio.Future[str] | None = None
        try:
            yield _in_force(revision)
            while True:
                changed = asyncio.ensure_future(self._policy.changed_from(revision))
                left = ends_at - asyncio.get_running_loop().time()
                await asyncio.wait(
                    {changed, draining}, timeout=left, return_when=asyncio.FIRST_COMPLETED
                )
                if draining.done():
                    yield authorization_pb2.WatchResponse(draining=authorization_pb2.Draining())
                    return
                if not changed.done():
                    return
                revision = changed.result()
                yield _in_force(revision)
        finally:
            self._watching[tenant] -= 1
            self._watching += Counter()  # forgets who watches no more
            draining.cancel()
            if changed is not None:
                changed.cancel()


def _in_force(revision: str) -> authorization_pb2.WatchResponse:
    return authorization_pb2.WatchResponse(
        policy=authorization_pb2.PolicyInForce(revision=revision)
    )
