"""What a sidecar starts with: what the sources hold, or what was in force last."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from pdp.policy.archive import Files
from pdp.policy.bundle_state import BundleState, Wanted, accept, received_from
from pdp.policy.engine import BundleError
from pdp.policy.last_good import Kept, LastGood
from pdp.policy.preparation import Prepared, Rules, prepare
from pdp.policy.sources.source import Fetched, SourceError
from pdp.reason import ReasonCode

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstLoad:
    """A policy that can be put in force, unless no engine takes it."""

    prepared: Prepared
    states: Mapping[str, BundleState]
    """By the bundle's name, in the order of the configuration."""
    on_disk: frozenset[str]
    """Names of the bundles that are on disk as they are to be kept, but for checked_at."""
    instead: Callable[[BundleError], Awaitable[FirstLoad]] = field(repr=False)
    """What was in force last, for when this can not be, which the error says why. Raises
    the error where there is nothing else."""

    @property
    def checked_at(self) -> float:
        """When every source had last been reached: Unix seconds."""
        return min(state.kept.checked_at for state in self.states.values())


async def first_load(
    wanted: Sequence[Wanted],
    rules: Rules,
    last_good: LastGood,
    *,
    allow_rollback: bool = False,
    clock: Callable[[], float] = time.time,
) -> FirstLoad:
    """What the sources hold or, where that can not be used, what was in force last.

    Nothing is written. Raises BundleError when there is neither.
    """
    found = _Found(
        kept={one.name: await asyncio.to_thread(last_good.read, one.name) for one in wanted}
    )
    await asyncio.gather(*(_fetch(one, found) for one in wanted))

    async def load(fresh: Mapping[str, Fetched], instead: _Instead) -> FirstLoad:
        prepared, states = await _load(wanted, rules, found, fresh, allow_rollback, clock)
        on_disk = frozenset(
            name for name, state in states.items() if _is_the_same(state.kept, found.kept[name])
        )
        return FirstLoad(prepared=prepared, states=states, on_disk=on_disk, instead=instead)

    async def earlier(error: BundleError) -> FirstLoad:
        without = {name: got for name, got in found.held.items() if found.kept[name] is None}
        if len(without) == len(found.held):
            raise error
        # All of what is new is left: which of several does not fit is not always plain.
        left = found.held.keys() - without.keys()
        found.refused.update(dict.fromkeys(left, error.message))
        _log.error("the policy is the one that was in force last: %s", error.message)
        try:
            return await load(without, _nothing)
        except BundleError:
            raise error from None

    try:
        return await load(found.held, earlier)
    except BundleError as error:
        return await earlier(error)


_Instead = Callable[[BundleError], Awaitable[FirstLoad]]


async def _nothing(error: BundleError) -> FirstLoad:
    raise error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """By the bundle's name: what was in force last, what the source holds, what is wrong."""

    kept: dict[str, Kept | None]
    held: dict[str, Fetched] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unreachable: dict[str, str] = field(default_factory=dict)


async def _fetch(one: Wanted, found: _Found) -> None:
    try:
        fetched = await one.source.fetch(None)
    except (SourceError, BundleError) as error:
        _log.warning("policy bundle %s: %s", one.name, error.message)
        wrong = found.refused if isinstance(error, BundleError) else found.unreachable
        wrong[one.name] = error.message
        return
    if fetched is not None:
        found.held[one.name] = fetched


async def _load(
    wanted: Sequence[Wanted],
    rules: Rules,
    found: _Found,
    fresh: Mapping[str, Fetched],
    allow_rollback: bool,  # noqa: FBT001 - private
    clock: Callable[[], float],
) -> tuple[Prepared, dict[str, BundleState]]:
    chains = {one.name: _chain(one.name, found, fresh) for one in wanted}
    received = [received_from(one, chains[one.name]) for one in wanted]
    prepared = await asyncio.to_thread(prepare, received, rules)
    now = clock()
    states = {}
    for one in wanted:
        name, kept, held = one.name, found.kept[one.name], found.held.get(one.name)
        if kept is None or name in fresh:
            kept = accept(
                one, prepared, chains[name], fresh[name].tag, kept, now,
                allow_rollback=allow_rollback,
            )  # fmt: skip
        states[name] = BundleState(
            name=name,
            place=one.source.place,
            kept=kept,
            revision=prepared.revisions[name],
            seen_tag=held.tag if held else None,
            pending=held.files if held and name not in fresh else None,
            tried_at=now,
            attempted_at=now,
            activated_at=now,
            refused=found.refused.get(name),
            unreachable=found.unreachable.get(name),
        )
    return prepared, states


def _is_the_same(kept: Kept, found: Kept | None) -> bool:
    return found is not None and replace(kept, checked_at=found.checked_at) == found


def _chain(name: str, found: _Found, fresh: Mapping[str, Fetched]) -> tuple[Files, ...]:
    kept = found.kept[name]
    if name in fresh:
        return (fresh[name].files,)
    if kept is None:
        wrong = found.refused | found.unreachable
        raise BundleError(
            ReasonCode.POLICY_UNAVAILABLE,
            wrong.get(name, f"The policy bundle {name} can not be used."),
        )
    return kept.chain
