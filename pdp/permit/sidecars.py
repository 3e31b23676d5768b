"""Several sidecars of one trust domain, as a tool server that accepts permits of each."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pdp.closing import Closing
from pdp.permit import jws
from pdp.permit.claims import Permit, PermitError
from pdp.permit.keys import PermitKeySet
from pdp.permit.redeemer import PermitRedeemer
from pdp.reason import ReasonCode

MAX_SIDECARS: Final = 256
AT_ONCE: Final = 16
"""Sidecars that are asked at the same time."""
MAX_LEDGERS: Final = 1_024

_ELSEWHERE: Final = frozenset(
    {ReasonCode.PERMIT_INVALID, ReasonCode.PERMIT_MISMATCH, ReasonCode.PDP_UNAVAILABLE}
)
"""What a sidecar says to a permit that another one may take: its key or its ledger is not
known there, or it is gone and others share its store."""


@dataclass(frozen=True, slots=True)
class _Published:
    """What a sidecar said last."""

    keys: PermitKeySet
    said_at: float


class Sidecars(Closing):
    """Keys and redeemers of several sidecars, for a PermitVerifier and a PermitDoor.

    Follows their key rotations: a key id that is not known is asked for, at most once in
    ``cooldown_seconds`` however many come, and all keys are asked for again after
    ``refresh_seconds``. A sidecar that does not answer keeps its keys for
    ``keep_seconds``. Threads may share it, and it survives a fork.

    They are one trust domain: each is trusted for every tenant, whose permits it signs.
    """

    def __init__(
        self,
        redeemers: Sequence[PermitRedeemer],
        *,
        cooldown_seconds: float = 10.0,
        refresh_seconds: float = 60.0,
        keep_seconds: float = 3_600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Asks nobody yet, so that a tool server starts without its sidecars."""
        if not 1 <= len(redeemers) <= MAX_SIDECARS:
            raise ValueError(f"give 1 to {MAX_SIDECARS} sidecars")
        self._redeemers = tuple(redeemers)
        self._cooldown_seconds = cooldown_seconds
        self._refresh_seconds = refresh_seconds
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._locks: dict[int, threading.Lock] = {}
        self._asked_at = float("-inf")
        self._published: tuple[_Published | None, ...] = (None,) * len(self._redeemers)
        self._homes: dict[str, PermitRedeemer] = {}

    def find(self, kid: str) -> Ed25519PublicKey | None:
        """The key of that id, of whichever sidecar. Raises PermitError (pdp_unavailable) where
        none has it of those that could be asked, and not all could.
        """
        found = self._known(kid)
        if found is None:
            # Whoever waits here waits for keys that another thread is asking for.
            with self._asking():
                found = self._known(kid)
                if found is None and self._age() >= self._cooldown_seconds:
                    self._ask()
                    found = self._known(kid)
            if found is None and not all(map(self._counts, self._published)):
                raise PermitError(
                    ReasonCode.PDP_UNAVAILABLE,
                    "The permit's key is not known, and a sidecar could not be asked for its keys;"
                    " see that it runs, and listens where it is looked for.",
                )
        elif self._age() >= self._refresh_seconds:
            asking = self._asking()
            if asking.acquire(blocking=False):
                try:
                    self._ask()
                finally:
                    asking.release()
                found = self._known(kid)
        return found

    def redeem(self, permit: Permit) -> None:
        """Spend one use, at the sidecar whose permit it is. Raises PermitError."""
        home = self._homes.get(permit.ledger)
        answer: PermitError | None = None
        for redeemer in self._candidates(permit, home):
            try:
                redeemer.redeem(permit)
            except PermitError as error:
                if error.reason_code not in _ELSEWHERE:
                    raise
                # Of several that do not take it, the one that could not be asked tells most.
                if answer is None or error.reason_code == ReasonCode.PDP_UNAVAILABLE:
                    answer = error
            else:
                if redeemer is not home:
                    self._learn(permit.ledger, redeemer)
                return
        assert answer is not None  # noqa: S101 - there is at least one sidecar
        raise answer

    def close(self) -> None:
        """Close all connections; the next call opens them again."""
        for redeemer in self._redeemers:
            redeemer.close()

    def _candidates(self, permit: Permit, home: PermitRedeemer | None) -> Sequence[PermitRedeemer]:
        """Who may take it, the likeliest first: one that has taken a permit of the same
        ledger before, then those that publish its key.
        """
        kid = jws.key_id(permit.token)
        publishing = [
            redeemer
            for redeemer, said in zip(self._redeemers, self._published, strict=True)
            if said is not None and said.keys.find(kid) is not None
        ]
        first = [] if home is None else [home]
        return first + [one for one in publishing or self._redeemers if one is not home]

    def _learn(self, ledger: str, redeemer: PermitRedeemer) -> None:
        if len(self._homes) >= MAX_LEDGERS:
            self._homes = {}
        self._homes[ledger] = redeemer

    def _known(self, kid: str) -> Ed25519PublicKey | None:
        for said in self._published:
            found = said.keys.find(kid) if said is not None and self._counts(said) else None
            if found is not None:
                return found
        return None

    def _counts(self, said: _Published | None) -> bool:
        return said is not None and said.said_at >= self._clock() - self._keep_seconds

    def _asking(self) -> threading.Lock:
        """Held by whoever asks. By process: after a fork nobody would ever let go of a lock
        that a thread of the parent held.
        """
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def _age(self) -> float:
        return self._clock() - self._asked_at

    def _ask(self) -> None:
        """Ask each sidecar for its keys; one that does not answer keeps those it had."""
        from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415 - the stub needs none

        self._asked_at = self._clock()
        with ThreadPoolExecutor(min(AT_ONCE, len(self._redeemers))) as pool:
            answers = tuple(pool.map(self._keys_of, self._redeemers))
        self._published = tuple(
            answer or before for answer, before in zip(answers, self._published, strict=True)
        )

    def _keys_of(self, redeemer: PermitRedeemer) -> _Published | None:
        try:
            return _Published(redeemer.keys(), self._clock())
        except PermitError:
            return None
