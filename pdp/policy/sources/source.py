"""The port of a place that bundles come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pdp.errors import FetchError
from pdp.reason import ReasonCode


class SourceError(FetchError):
    """A source can not be read now: reason code policy_unavailable."""


def fault_of(place: str, what: str) -> SourceError:
    """The error for a place; ``what`` follows its name."""
    return SourceError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {place} {what}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """What a source holds, not yet verified."""

    files: Mapping[str, bytes] = field(repr=False)
    """The bundle's files by their path, within the bounds of :mod:`pdp.policy.archive`."""
    tag: str
    """Names this content at its source: an ETag, a digest."""


class BundleSource(Protocol):
    """One place that one bundle comes from."""

    @property
    def place(self) -> str:
        """The path or URL, for operators, without credentials."""
        ...

    async def fetch(self, tag: str | None) -> Fetched | None:
        """What the source holds now, or None when it still holds what ``tag`` names.

        May wait for a change for as long as the source is configured to (long
        polling). With a tag, the answer may be a delta bundle upon that content.
        Raises SourceError, and BundleError when what it got is no bundle.
        """
        ...

    async def wait(self) -> None:
        """Return when it is time to fetch again."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...
