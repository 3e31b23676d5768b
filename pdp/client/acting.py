"""For whom the running code acts, and under which permit."""

from __future__ import annotations

import inspect
import json
import re
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Final

from pdp.canonical import JsonError, JsonObject, check
from pdp.client.errors import IdentityLacking
from pdp.permit.claims import Permit
from pdp.reason import ReasonCode

_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750 2.1. Anything else can not travel as a bearer token."""
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]*)?")
_GENERATORS: Final = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


@dataclass(slots=True, eq=False)
class Acting:
    """One ``with guard.acting_for(token)``."""

    token: str = field(repr=False)
    context_json: bytes = field(repr=False)
    traceparent: str
    ended: bool = False
    outer: Acting | None = field(default=None, repr=False)
    """The one that it was opened inside."""
    generators: tuple[FrameType, ...] = field(default=(), repr=False)
    """The bodies of the generators in which it was opened."""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a message for the sidecar is sent with. Holds the token."""
        bearer = ("authorization", f"Bearer {self.token}")
        return (bearer, ("traceparent", self.traceparent)) if self.traceparent else (bearer,)

    def opened_on(self, frame: FrameType | None) -> None:
        """Remember the generators on the stack, from ``frame`` outwards.

        Python gives a generator no context of its own. While it is suspended inside
        its ``with``, what it opened shows in whatever runs next, and in the tasks
        and threads that are started there.
        """
        found = []
        while frame is not None:
            # contextlib drives a generator as the two halves of a ``with``: its
            # being suspended is the very time for which it opened something.
            if frame.f_code.co_flags & _GENERATORS and not _is_contextlib(frame.f_back):
                found.append(frame)
            frame = frame.f_back
        self.generators = tuple(found)

    def end(self) -> None:
        """Nobody acts under it any more, wherever it was carried."""
        self.ended = True
        self.generators = ()

    def shows_by_suspension(self) -> bool:
        """Whether the code that runs now is not inside the generators that opened it."""
        missing = set(self.generators)
        frame = inspect.currentframe() if missing else None
        while frame is not None and missing:
            missing.discard(frame)
            frame = frame.f_back
        return bool(missing)


def _is_contextlib(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "contextlib"


class Identity:
    """The identity of the code that runs now: a context variable, so it belongs to
    one thread or task, and to the tasks that are started inside it.

    A new thread has none. A task that outlives the ``with`` it was started in
    keeps no identity: what it carries has ended.
    """

    def __init__(self) -> None:
        self._acting: ContextVar[Acting | None] = ContextVar("pdp_acting", default=None)

    def acting_for(self, token: str, *, context: JsonObject | None, traceparent: str) -> ActingFor:
        """Act for the bearer of ``token`` inside the ``with``. A ``traceparent``
        that is malformed counts as none. Raises ValueError for a ``context`` that
        is not JSON.
        """
        try:
            check(context)
            if context is not None and type(context) is not dict:
                raise JsonError("must be a JSON object")
        except JsonError as error:
            raise ValueError(f"acting_for: context {error}") from None
        return ActingFor(
            self._acting,
            Acting(
                token,
                json.dumps(context).encode("utf-8") if context else b"",
                traceparent if _TRACEPARENT.fullmatch(traceparent) else "",
            ),
        )

    def in_force(self) -> Acting | None:
        """As :meth:`current`, but None in place of the error, and without a look at what
        kind of token it is.
        """
        acting = self._acting.get()
        if acting is None or acting.ended or (acting.generators and acting.shows_by_suspension()):
            return None
        return acting

    def current(self) -> Acting:
        """Raises IdentityLacking: identity_missing, identity_ended, token_invalid."""
        acting = self._acting.get()
        if acting is None:
            raise IdentityLacking(
                ReasonCode.IDENTITY_MISSING, "call it inside guard.acting_for(token)"
            )
        if not acting.token:
            raise IdentityLacking(
                ReasonCode.IDENTITY_MISSING, "its guard.acting_for was given no token"
            )
        if acting.ended:
            raise IdentityLacking(
                ReasonCode.IDENTITY_ENDED, "its guard.acting_for(token) has ended"
            )
        if acting.shows_by_suspension():
            raise IdentityLacking(
                ReasonCode.IDENTITY_MISSING,
                "the identity in force was opened inside a generator, and this is not the"
                " generator's own code: open acting_for outside of it, or anew in this task",
            )
        if not _TOKEN.fullmatch(acting.token):
            raise IdentityLacking(
                ReasonCode.TOKEN_INVALID,
                "what acting_for was given is no bearer token; pass the token alone, without"
                " the word Bearer",
            )
        return acting


class ActingFor:
    """The ``with`` of :meth:`Identity.acting_for`. It is entered once."""

    def __init__(self, variable: ContextVar[Acting | None], acting: Acting) -> None:
        self._variable = variable
        self._acting = acting
        self._entered = False

    def __enter__(self) -> None:
        if self._entered:
            raise RuntimeError("this acting_for was entered before; call acting_for again")
        self._entered = True
        self._acting.opened_on(inspect.currentframe())
        self._acting.outer = self._variable.get()
        self._variable.set(self._acting)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._acting.end()
        # Not on top: it is closed in another context than it was opened in, or out
        # of order, as generators are. Then whoever is on top stays.
        if self._variable.get() is self._acting:
            outer = self._acting.outer
            while outer is not None and outer.ended:
                outer = outer.outer
            self._variable.set(outer)


_permit: ContextVar[Permit | None] = ContextVar("pdp_permit", default=None)


def current_permit() -> Permit:
    """The permit under which the calling tool runs: its tenant, namespace and
    token, to pass on to a tool server. Raises LookupError outside a guarded tool.
    """
    permit = _permit.get()
    if permit is None:
        raise LookupError("current_permit() was called outside a guarded tool")
    return permit


class RunningUnder:
    """Makes ``permit`` the current one while its tool runs: a ``with``, entered once."""

    __slots__ = ("_before", "_permit")

    def __init__(self, permit: Permit) -> None:
        self._permit = permit

    def __enter__(self) -> None:
        self._before = _permit.set(self._permit)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _permit.reset(self._before)
