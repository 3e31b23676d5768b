"""One bundle that is wanted, what is known of it, and when a new one is taken for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pdp.canonical import JsonObject
from pdp.policy.archive import Files
from pdp.policy.engine import BundleError
from pdp.policy.last_good import MAX_REVISIONS, Kept
from pdp.policy.part import PATCH
from pdp.policy.preparation import Prepared, Received
from pdp.policy.signature import Verifier
from pdp.policy.sources.source import BundleSource
from pdp.reason import ReasonCode


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """One bundle that the configuration names."""

    name: str
    source: BundleSource
    verifier: Verifier | None


@dataclass(slots=True, kw_only=True)
class BundleState:
    """What is known of one bundle."""

    name: str
    place: str
    kept: Kept
    """What is in force."""
    revision: str
    """Its own, which is part of the policy's."""
    seen_tag: str | None
    """What the source held last, be it in force or refused."""
    pending: Files | None = field(default=None, repr=False)
    """What the source holds and was refused: it may fit once another bundle changes."""
    tried_at: float
    """When that was tried last: Unix seconds."""
    attempted_at: float
    """When the source was asked last: Unix seconds."""
    activated_at: float
    """When this bundle last changed: Unix seconds."""
    refused: str | None = None
    """Why the source's content is not in force; None when it is."""
    unreachable: str | None = None
    """Why the source could not be read when it was asked last; None when it could."""

    @property
    def error(self) -> str | None:
        """What is not as it should be; None when all is."""
        return self.unreachable or self.refused

    @property
    def pending_chain(self) -> tuple[Files, ...]:
        """What there will be to keep once what is pending is in force."""
        if self.pending is None:
            return self.kept.chain
        return (*self.kept.chain, self.pending) if PATCH in self.pending else (self.pending,)

    def as_json(self) -> JsonObject:
        """For `pdp status`."""
        return {
            "name": self.name,
            "place": self.place,
            "revision": self.revision,
            "sequence": self.kept.sequence,
            "activated_at": self.activated_at,
            "checked_at": self.kept.checked_at,
            "attempted_at": self.attempted_at,
            "error": self.error,
        }


def received_from(one: Wanted, chain: tuple[Files, ...]) -> Received:
    """What is to be prepared of a bundle."""
    return Received(name=one.name, place=one.source.place, chain=chain, verifier=one.verifier)


def accept(
    one: Wanted,
    prepared: Prepared,
    chain: tuple[Files, ...],
    tag: str,
    earlier: Kept | None,
    now: float,
    *,
    allow_rollback: bool,
) -> Kept:
    """The bundle as it is to be kept.

    Raises BundleError for a rollback: a lower sequence than was accepted before or, where
    none was ever given, a signed bundle that was replaced. Whoever may offer unsigned ones
    may offer anything, and to undo an edit in a directory is no rollback.
    """
    name = one.name
    sequence, revision = prepared.sequences[name], prepared.revisions[name]
    revisions = earlier.revisions if earlier else ()
    if earlier is not None and not allow_rollback:
        if earlier.sequence is not None:
            if sequence is None or sequence < earlier.sequence:
                shown = "none" if sequence is None else str(sequence)
                raise _rollback(
                    name, revision, f"its sequence is {shown}, and {earlier.sequence} was in force"
                )
        elif one.verifier is not None and revision in revisions[:-1]:
            raise _rollback(name, revision, "it was in force before, and was replaced")
    if not revisions or revisions[-1] != revision:
        revisions = (*revisions, revision)
    return Kept(
        chain=chain,
        tag=tag,
        sequence=sequence,
        revisions=revisions[-MAX_REVISIONS:],
        checked_at=now,
    )


def _rollback(name: str, revision: str, why: str) -> BundleError:
    return BundleError(
        ReasonCode.POLICY_UNAVAILABLE,
        f"The policy bundle {name} at revision {revision} is older than one that was taken"
        f" before: {why}. Release it anew with a higher sequence, or set policy.allow_rollback.",
    )
