"""Takes up what the sources come to hold while the sidecar serves."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final, Protocol

from pdp.canonical import JsonError
from pdp.policy.archive import Files
from pdp.policy.bundle_state import BundleState, Wanted, accept, received_from
from pdp.policy.contract import check_contract
from pdp.policy.engine import BundleError, PolicyEngine
from pdp.policy.first_load import FirstLoad
from pdp.policy.last_good import Kept, LastGood
from pdp.policy.live import LivePolicy
from pdp.policy.part import PATCH
from pdp.policy.preparation import Prepared, Received, Rules, prepare_apart
from pdp.policy.sources.source import Fetched, SourceError
from pdp.private_files import NotPrivateError
from pdp.reason import ReasonCode

MAX_DELTAS: Final = 64
"""Delta bundles upon one whole bundle; after that many the whole is fetched again."""
MAX_DELTA_BYTES: Final = 16 * 1024 * 1024
"""What they may hold together before the whole is fetched again."""
CONFIRM_SECONDS: Final = 60.0
"""How often it is noted on disk that a source was reached."""
RETRY_SECONDS: Final = 60.0
"""How often what was refused is tried again: the cause may have been this machine, which
had no memory or no disk for it.
"""
AFTER_FAILURE_SECONDS: Final = 1.0
"""Rest after a failure of the sidecar itself."""
_log: Final = logging.getLogger(__name__)

BuildEngine = Callable[[Prepared], Awaitable[PolicyEngine]]
"""Makes an engine. Raises BundleError."""
Prepare = Callable[[Sequence[Received], Rules], Awaitable[Prepared]]
"""Makes of bundles what an engine is made of. Raises BundleError."""


class Events(Protocol):
    """Is told what becomes of bundles."""

    async def activated(self, revision: str) -> None:
        """A revision is in force now."""
        ...

    async def refused(self, bundle: str, error: BundleError) -> None:
        """A source held what may not be used, which is not asked for again."""
        ...

    def unreachable(self, bundle: str) -> None:
        """A source could not be read."""
        ...


class PolicyUpdates:
    """Watches the sources of a policy, and activates what they come to hold.

    What can not be used is refused whole, and what is in force stays in force.
    """

    def __init__(
        self,
        first: FirstLoad,
        wanted: Sequence[Wanted],
        policy: LivePolicy,
        *,
        rules: Rules,
        last_good: LastGood,
        build_engine: BuildEngine,
        events: Events,
        allow_rollback: bool = False,
        prepare: Prepare = prepare_apart,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._prepare = prepare
        self._wanted = {one.name: one for one in wanted}
        self._states = first.states
        self._policy = policy
        self._rules = rules
        self._last_good = last_good
        self._build_engine = build_engine
        self._events = events
        self._allow_rollback = allow_rollback
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()
        self._on_disk: dict[str, tuple[Files, ...]] = {
            name: first.states[name].kept.chain for name in first.on_disk
        }
        """By the bundle's name, what is there; nothing where it could not be written."""
        self._noted_at: dict[str, float] = {}
        """By the bundle's name, when it was written last, or when that was tried."""

    async def begin(self) -> None:
        """Keep on disk what was loaded first, and tell what of it was refused."""
        states = self._states.values()
        await asyncio.to_thread(self._keep, {state.name: state.kept for state in states})
        for state in states:
            if state.refused is not None:
                await self._events.refused(
                    state.name, BundleError(ReasonCode.POLICY_UNAVAILABLE, state.refused)
                )

    async def run(self) -> None:
        """Look after every source until cancelled."""
        async with asyncio.TaskGroup() as group:
            for one in self._wanted.values():
                group.create_task(self._follow(one))

    async def close(self) -> None:
        """Let go of the sources."""
        for one in self._wanted.values():
            await one.source.close()

    async def _follow(self, one: Wanted) -> None:
        state = self._states[one.name]
        while True:
            try:
                await one.source.wait()
                await self._look(one)
            except Exception as error:  # noqa: BLE001 - the next look may go well
                # The error's own text may quote what a bundle holds.
                places = "".join(traceback.format_tb(error.__traceback__))
                _log.error("policy bundle %s: %s\n%s", one.name, type(error).__name__, places)
                state.refused = "The sidecar failed to take it up; its log says where."
                await asyncio.sleep(AFTER_FAILURE_SECONDS)

    async def _look(self, one: Wanted) -> None:
        """Ask the source once, and take up what it holds if that is new."""
        state = self._states[one.name]
        tag = state.seen_tag if _may_grow(state.kept.chain) else None
        state.attempted_at = self._clock()
        try:
            fetched = await one.source.fetch(tag)
        except SourceError as error:
            state.unreachable = error.message
            self._events.unreachable(one.name)
            _log.warning("policy bundle %s: %s", one.name, error.message)
            return
        except BundleError as error:
            async with self._one_at_a_time:
                state.unreachable = None
                # What it held before may not be put in force any more, with whatever else.
                state.seen_tag, state.pending = state.kept.tag, None
                await self._refuse(state, error)
            return
        async with self._one_at_a_time:
            state.unreachable = None
            await self._compare(state, tag, fetched)

    async def _compare(
        self, state: BundleState, asked_with: str | None, fetched: Fetched | None
    ) -> None:
        if fetched is None:
            if state.pending is None:
                await self._unchanged(state)
            elif abs(self._clock() - state.tried_at) >= RETRY_SECONDS:
                await self._take_up(state)
        elif PATCH in fetched.files and asked_with is None:
            await self._refuse(state, _not_asked_for(state))
        elif PATCH in fetched.files and asked_with != state.kept.tag:
            state.seen_tag = None  # upon what was refused: the whole is asked for next
        elif state.kept.chain == (fetched.files,):
            state.seen_tag, state.pending = fetched.tag, None
            state.kept = replace(state.kept, tag=fetched.tag)
            await self._unchanged(state)
        else:
            state.seen_tag, state.pending = fetched.tag, fetched.files
            await self._take_up(state)

    async def _unchanged(self, state: BundleState) -> None:
        """The source holds what is in force."""
        now = self._clock()
        state.refused = None
        state.kept = replace(state.kept, checked_at=now)
        self._policy.checked_at = self._checked_at()
        if abs(now - self._noted_at[state.name]) >= CONFIRM_SECONDS:
            await asyncio.to_thread(self._keep, {state.name: state.kept})

    def _checked_at(self) -> float:
        return min(state.kept.checked_at for state in self._states.values())

    async def _take_up(self, newest: BundleState) -> None:
        """Put in force what is pending: all of it or, if that can not be, one by one."""
        pending = [state for state in self._states.values() if state.pending is not None]
        attempts = [pending]
        if len(pending) > 1:
            attempts += [[newest], *([state] for state in pending if state is not newest)]
        for states in attempts:
            try:
                await self._activate(states)
            except BundleError as error:
                if states == [newest]:
                    await self._refuse(newest, error)
            else:
                if states is pending:
                    return
            finally:
                for state in states:
                    state.tried_at = self._clock()

    async def _activate(self, states: Sequence[BundleState]) -> None:
        """Put these bundles' pending content in force. Raises BundleError."""
        chains = {state.name: state.kept.chain for state in self._states.values()}
        chains |= {state.name: state.pending_chain for state in states}
        prepared = await self._prepare(
            [received_from(one, chains[name]) for name, one in self._wanted.items()], self._rules
        )
        now = self._clock()
        accepted = {
            state.name: accept(
                self._wanted[state.name], prepared, chains[state.name], state.seen_tag or "",
                state.kept, now, allow_rollback=self._allow_rollback,
            )
            for state in states
        }  # fmt: skip
        engine = await self._build_engine(prepared)
        try:
            await check_contract(engine)
            await asyncio.to_thread(self._keep, accepted)
        except BaseException:
            await engine.close()
            raise
        for state in states:
            state.kept = accepted[state.name]
            state.revision = prepared.revisions[state.name]
            state.activated_at = now
            state.pending = state.refused = None
        self._policy.activate(engine)
        self._policy.checked_at = self._checked_at()
        _log.info("policy %s is in force", engine.revision)
        await self._events.activated(engine.revision)

    def _keep(self, kept: Mapping[str, Kept]) -> None:
        """Write to disk what is to be in force. A disk that is full does not keep a policy
        from being taken up; a restart then begins with an older one.
        """
        for name, one in kept.items():
            self._noted_at[name] = one.checked_at
            try:
                if self._on_disk.pop(name, None) is one.chain:
                    self._last_good.confirm(name, one.checked_at)
                else:
                    self._last_good.write(name, one)
            except (OSError, NotPrivateError, JsonError, BundleError) as error:
                _log.error("policy bundle %s can not be kept on disk: %s", name, error)
            else:
                self._on_disk[name] = one.chain

    async def _refuse(self, state: BundleState, error: BundleError) -> None:
        if state.refused == error.message:
            return  # said before
        state.refused = error.message
        _log.error("policy bundle %s refused: %s", state.name, error.message)
        await self._events.refused(state.name, error)


def _may_grow(chain: tuple[Files, ...]) -> bool:
    """Whether another delta bundle may be laid upon these."""
    deltas = chain[1:]
    held = sum(len(content) for files in deltas for content in files.values())
    return len(deltas) < MAX_DELTAS and held < MAX_DELTA_BYTES


def _not_asked_for(state: BundleState) -> BundleError:
    return BundleError(
        ReasonCode.POLICY_UNAVAILABLE,
        f"The policy bundle {state.place} is a delta bundle where the whole was asked for"
        " (Prefer: modes=snapshot).",
    )
