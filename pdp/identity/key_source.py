"""The port of a place that an issuer's keys come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from pdp.errors import FetchError
from pdp.identity.keys import IssuerKey
from pdp.reason import ReasonCode


class KeySourceError(FetchError):
    """The keys can not be had now: reason code keys_unavailable."""


def fault_of(place: str, what: str) -> KeySourceError:
    """The error for a place; ``what`` follows its name."""
    return KeySourceError(ReasonCode.KEYS_UNAVAILABLE, f"The key set {place} {what}.")


class KeySource(Protocol):
    """Keys of one issuer, for whoever verifies its tokens."""

    async def find(self, kid: str) -> IssuerKey | None:
        """The key of that id, or None when the issuer has no such key. Raises
        KeySourceError when that can not be told.
        """
        ...

    async def close(self) -> None:
        """Let go of what is open."""
        ...


class KeyFetcher(Protocol):
    """One place that holds a whole set of keys, to be asked again and again."""

    @property
    def place(self) -> str:
        """The path or URL, for operators, without credentials."""
        ...

    async def fetch(self) -> Mapping[str, IssuerKey]:
        """What the place holds now, by key id. Raises KeySourceError."""
        ...

    async def close(self) -> None:
        """Let go of what is open."""
        ...


@dataclass(frozen=True, slots=True)
class FixedKeys:
    """Keys that never change."""

    keys: Mapping[str, IssuerKey]

    async def find(self, kid: str) -> IssuerKey | None:
        """The key of that id, if it is one of these."""
        return self.keys.get(kid)

    async def close(self) -> None:
        """Nothing is open."""
