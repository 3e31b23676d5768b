"""For whom the running code acts, and under which permit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from pdp.canonical import JsonObject
from pdp.client.errors import PermitDenied
from pdp.permit.claims import Permit
from pdp.reason import ReasonCode


@dataclass(slots=True, eq=False)
class _Acting:
    token: str = field(repr=False)
    context: JsonObject = field(repr=False)
    traceparent: str
    ended: bool = False


class Identity:
    """The identity of the code that runs now: a context variable, so it belongs to
    one thread or task, and to the tasks that are started inside it.

    A new thread has none. A task that outlives the ``with`` it was started in
    keeps no identity: what it carries has ended.
    """

    def __init__(self) -> None:
        self._acting: ContextVar[_Acting | None] = ContextVar("pdp_acting", default=None)

    @contextlib.contextmanager
    def acting_for(
        self, token: str, *, context: JsonObject | None, traceparent: str
    ) -> Iterator[None]:
        """Act for the bearer of ``token`` inside the ``with``."""
        acting = _Acting(token, context or {}, traceparent)
        before = self._acting.set(acting)
        try:
            yield
        finally:
            acting.ended = True
            self._acting.reset(before)

    def current(self, tool: str) -> _Acting:
        """Raises PermitDenied: identity_missing, identity_ended."""
        acting = self._acting.get()
        if acting is None or not acting.token:
            raise PermitDenied(
                ReasonCode.IDENTITY_MISSING, "call it inside guard.acting_for(token)", tool=tool
            )
        if acting.ended:
            raise PermitDenied(
                ReasonCode.IDENTITY_ENDED, "its guard.acting_for(token) has ended", tool=tool
            )
        return acting


_permit: ContextVar[Permit | None] = ContextVar("pdp_permit", default=None)


def current_permit() -> Permit:
    """The permit under which the calling tool runs: its tenant, namespace and
    token, to pass on to a tool server. Raises LookupError outside a guarded tool.
    """
    permit = _permit.get()
    if permit is None:
        raise LookupError("current_permit() was called outside a guarded tool")
    return permit


@contextlib.contextmanager
def running_under(permit: Permit) -> Iterator[None]:
    """Make ``permit`` the current one while its tool runs."""
    before = _permit.set(permit)
    try:
        yield
    finally:
        _permit.reset(before)
