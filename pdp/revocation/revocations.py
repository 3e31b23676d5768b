"""Who may no longer act: tenants, actors, workloads and single tokens that were revoked.

Revocations are written to a store, which every sidecar on it looks at twice a second. What
is in force is in memory, so that asking costs nothing, and is asked for every call, those
under tokens that were verified before included.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from pdp.canonical import JsonError, JsonObject, JsonValue, parse_object
from pdp.errors import PdpError
from pdp.reason import ReasonCode

MAX_REVOCATIONS: Final = 10_000
MAX_BYTES: Final = 8 * 1024 * 1024
LOOK_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 2.0
"""Between two looks at a store that can not be read. A store that comes back is not met by
every sidecar at the same moment."""
STALE_SECONDS: Final = 10.0
"""For how long what was read last counts where the store can not be read."""
PATIENCE_SECONDS: Final = 2.0
"""How long a look may take before the store counts as one that can not be read."""

_log: Final = logging.getLogger(__name__)


class RevocationError(PdpError):
    """The store of revocations can not be read or written: reason code
    revocations_unavailable. The message is for operators.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ReasonCode.REVOCATIONS_UNAVAILABLE, message)


class Kind(StrEnum):
    """What is revoked."""

    TENANT = "tenant"
    ACTOR = "actor"
    WORKLOAD = "workload"
    TOKEN = "token"  # noqa: S105 - no password


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is revoked, within one tenant unless it is a workload."""

    kind: Kind
    tenant: str
    """Empty for a workload, which is revoked for all tenants."""
    name: str = ""
    """The actor, the workload, or the token's id (jti); empty for a tenant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """A target, and who revoked it, why and for how long."""

    target: Target
    by: str
    reason: str
    at: int
    """Unix seconds, as is until."""
    until: int = 0
    """When it ends by itself; 0: not before it is lifted."""


Known = Mapping[Target, Revocation]


class RevocationStore(Protocol):
    """Where revocations are kept. Every method raises RevocationError."""

    async def version(self) -> str:
        """Another text whenever something was revoked or lifted."""
        ...

    async def read(self) -> Known:
        """All of them."""
        ...

    async def add(self, revocation: Revocation) -> None:
        """Revoke, in place of what there is of the same target."""
        ...

    async def lift(self, target: Target) -> bool:
        """Take a revocation back. False when there is none."""
        ...


Heard = Callable[[Revocation, bool], Awaitable[None]]
"""Told of each revocation that came in force (True) or was lifted (False)."""


class Revocations:
    """What is revoked now, as one sidecar knows it."""

    def __init__(
        self,
        store: RevocationStore,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        stale_seconds: float = STALE_SECONDS,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._clock = clock
        self._monotonic = monotonic
        self._stale_seconds = stale_seconds
        self._draw = draw
        self._known: Known = {}
        self._version: str | None = None
        self._seen_at = 0.0
        self._failing = False
        self._news = asyncio.Event()
        self.generation = 0
        """Another number whenever something more may be revoked than before."""

    def find(
        self, *, tenant: str, actor: str, token_ids: Sequence[str] = (), workload: str = ""
    ) -> Revocation | None:
        """What forbids this actor to act, by this workload if there is one, the widest
        first. Raises RevocationError where what is known is too old to go by.
        """
        if self._stale:
            raise RevocationError("It can not be told who is revoked; try again later.")
        if not self._known:
            return None
        for target in (
            Target(kind=Kind.TENANT, tenant=tenant),
            *([Target(kind=Kind.WORKLOAD, tenant="", name=workload)] if workload else ()),
            Target(kind=Kind.ACTOR, tenant=tenant, name=actor),
            *(Target(kind=Kind.TOKEN, tenant=tenant, name=token_id) for token_id in token_ids),
        ):
            found = self._known.get(target)
            if found is not None and (not found.until or self._clock() < found.until):
                return found
        return None

    @property
    def _stale(self) -> bool:
        return self._failing and self._monotonic() - self._seen_at > self._stale_seconds

    async def changed_from(self, generation: int) -> int:
        """The generation, as soon as it is another one: what was revoked is then in force."""
        while self.generation == generation:
            await self._news.wait()
        return self.generation

    async def look(self, heard: Heard | None = None) -> None:
        """Take up what the store says, if it has changed. Raises RevocationError."""
        began_at = self._monotonic()
        version = await self._store.version()
        if version != self._version:
            before, self._known = self._known, await self._store.read()
            self._version = version
            revoked = [each for each in self._known.values() if before.get(each.target) != each]
            if revoked:
                # First of all: it is in force, whether or not it can be put on record.
                self.tell()
            if heard is not None:
                for target in before.keys() - self._known.keys():
                    await heard(before[target], False)
                for revocation in revoked:
                    await heard(revocation, True)
        self._seen_at = began_at
        if self._monotonic() - began_at > PATIENCE_SECONDS:
            return  # what it has read may be old by now: the next look tells
        if self._failing:
            _log.warning("revocations can be read again")
        self._failing = False

    def _pause(self) -> float:
        longer = (LONGEST_PAUSE_SECONDS - LOOK_SECONDS) * self._draw() if self._failing else 0.0
        return LOOK_SECONDS + longer

    async def keep_looking(self, heard: Heard | None = None) -> None:
        """Look twice a second, and less often while the store can not be read."""
        looking: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(self._pause())
                # A read that hangs may hold a thread: there is one at most.
                looking = looking or asyncio.create_task(self.look(heard))
                await asyncio.wait((looking,), timeout=PATIENCE_SECONDS)
                if not looking.done():
                    self._fail("the store takes too long")
                    continue
                error, looking = looking.exception(), None
                if error is not None:  # whatever it is, they grow stale
                    self._fail(
                        error.message if isinstance(error, PdpError) else type(error).__name__
                    )
        finally:
            if looking is not None:
                looking.cancel()

    def _fail(self, told: str) -> None:
        if not self._failing:
            _log.error("revocations can not be read: %s", told)
        self._failing = True
        if self._stale:
            self.tell()  # nobody is known not to be revoked

    def tell(self) -> None:
        """Have whoever waits look again who may still act."""
        self.generation += 1
        news, self._news = self._news, asyncio.Event()
        news.set()


def to_json(revocations: Iterable[Revocation]) -> bytes:
    """Revocations as they are kept."""
    return json.dumps({"revocations": [_fields(each) for each in revocations]}).encode("utf-8")


def from_json(text: bytes) -> Known:
    """Revocations again. Raises ValueError."""
    try:
        members = parse_object(text, max_bytes=MAX_BYTES).get("revocations")
    except JsonError as error:
        raise ValueError(str(error)) from None
    if not isinstance(members, list) or len(members) > MAX_REVOCATIONS:
        raise ValueError(f"needs a list of at most {MAX_REVOCATIONS} revocations")
    known = [_revocation(member) for member in members]
    return {each.target: each for each in known}


def _fields(revocation: Revocation) -> JsonObject:
    return {
        "kind": revocation.target.kind.value,
        "tenant": revocation.target.tenant,
        "name": revocation.target.name,
        "by": revocation.by,
        "reason": revocation.reason,
        "at": revocation.at,
        "until": revocation.until,
    }


def _revocation(member: JsonValue) -> Revocation:
    if not isinstance(member, dict) or member.keys() != _FIELDS.keys():
        raise ValueError(f"needs exactly {', '.join(_FIELDS)} of each revocation")
    for name, expected in _FIELDS.items():
        if type(member[name]) is not expected:
            raise ValueError(f"{name} must be {expected.__name__}")
    kind = str(member["kind"])
    if kind not in set(Kind):
        raise ValueError(f"kind must be one of {', '.join(Kind)}")
    if (kind == Kind.TENANT) is bool(member["name"]):
        raise ValueError("a name stands for an actor, a workload or a token, and not for a tenant")
    if (kind == Kind.WORKLOAD) is bool(member["tenant"]):
        raise ValueError("a tenant must be named, but not for a workload")
    at, until = member["at"], member["until"]
    assert isinstance(at, int)  # noqa: S101 - looked at above
    assert isinstance(until, int)  # noqa: S101 - as above
    target = Target(kind=Kind(kind), tenant=str(member["tenant"]), name=str(member["name"]))
    return Revocation(
        target=target, by=str(member["by"]), reason=str(member["reason"]), at=at, until=until
    )


_FIELDS: Final[Mapping[str, type]] = {
    "kind": str,
    "tenant": str,
    "name": str,
    "by": str,
    "reason": str,
    "at": int,
    "until": int,
}
