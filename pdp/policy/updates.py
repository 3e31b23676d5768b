"""Takes up what the sources come to hold while the sidecar serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, Protocol

from pdp.errors import PdpError
from pdp.policy.archive import Files
from pdp.policy.bundle_state import BundleState, Wanted, accept, received_from
from pdp.policy.contract import check_contract
from pdp.policy.engine import BundleError, PolicyEngine
from pdp.policy.first_load import FirstLoad
from pdp.policy.last_good import LastGood
from pdp.policy.live import LivePolicy
from pdp.policy.preparation import Prepared, Received, Rules, prepare_apart
from pdp.policy.sources.source import Fetched, SourceError
from pdp.private_files import NotPrivateError
from pdp.reason import ReasonCode

MAX_DELTAS: Final = 64
"""Delta bundles upon one whole bundle; after that many the whole is fetched again."""
CONFIRM_SECONDS: Final = 60.0
"""How often it is noted on disk that a source was reached."""
_DELTA: Final = "patch.json"
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

    async def refused(self, bundle: str, error: PdpError) -> None:
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
        self._states = dict(first.states)
        self._policy = policy
        self._rules = rules
        self._last_good = last_good
        self._build_engine = build_engine
        self._events = events
        self._allow_rollback = allow_rollback
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()

    @property
    def states(self) -> Sequence[BundleState]:
        """What is known of each bundle, in the order of the configuration."""
        return [self._states[name] for name in self._wanted]

    async def begin(self) -> None:
        """Keep on disk what was loaded first, and tell what of it was refused."""
        await asyncio.to_thread(self._keep, self.states)
        for state in self.states:
            if state.pending is not None and state.error is not None:
                await self._events.refused(
                    state.name, BundleError(ReasonCode.POLICY_UNAVAILABLE, state.error)
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
        while True:
            await one.source.wait()
            try:
                await self._look(one)
            except Exception as error:  # noqa: BLE001 - the next look may go well
                _log.exception("policy bundle %s: %s", one.name, type(error).__name__)
                state = self._states[one.name]
                state.error = "The sidecar failed to take it up; its log says where."
                state.seen_tag = None  # so that it is fetched, and tried, again

    async def _look(self, one: Wanted) -> None:
        """Ask the source once, and take up what it holds if that is new."""
        state = self._states[one.name]
        # Upon a chain that is long no further delta is taken.
        tag = state.seen_tag if len(state.kept.chain) <= MAX_DELTAS else None
        state.attempted_at = self._clock()
        try:
            fetched = await one.source.fetch(tag)
        except SourceError as error:
            state.error = error.message
            self._events.unreachable(one.name)
            _log.warning("policy bundle %s: %s", one.name, error.message)
            return
        except BundleError as error:
            await self._refuse(one.name, error)
            return
        async with self._one_at_a_time:
            await self._compare(self._states[one.name], fetched)

    async def _compare(self, state: BundleState, fetched: Fetched | None) -> None:
        if fetched is None:
            self._unchanged(state)
        elif _DELTA in fetched.files:
            if state.kept.tag == state.seen_tag:
                state.seen_tag, state.pending = fetched.tag, fetched.files
                await self._take_up(state.name)
            else:
                state.seen_tag = None  # upon what was refused: the whole is asked for next
        elif fetched.tag == state.kept.tag and len(state.kept.chain) == 1:
            state.seen_tag, state.pending = fetched.tag, None
            self._unchanged(state)
        else:
            state.seen_tag, state.pending = fetched.tag, fetched.files
            await self._take_up(state.name)

    def _unchanged(self, state: BundleState) -> None:
        """The source still holds what it held."""
        if state.pending is not None:
            return
        state.error = None
        confirmed, now = state.kept.checked_at, self._clock()
        state.kept = replace(state.kept, checked_at=now)
        if now - confirmed >= CONFIRM_SECONDS:
            with contextlib.suppress(OSError):
                self._last_good.confirm(state.name, now)
        self._policy.checked_at = self._checked_at()

    def _checked_at(self) -> float:
        return min(state.kept.checked_at for state in self._states.values())

    async def _take_up(self, newest: str) -> None:
        """Put in force what is pending: all of it or, if that can not be, one of it."""
        pending = [name for name, state in self._states.items() if state.pending is not None]
        attempts = [pending]
        if len(pending) > 1:
            attempts += [[newest], *([name] for name in pending if name != newest)]
        for names in attempts:
            try:
                await self._activate(names)
            except BundleError as error:
                if names == [newest]:
                    await self._refuse(newest, error)
            else:
                return

    async def _activate(self, names: Sequence[str]) -> None:
        """Put these bundles' pending content in force. Raises BundleError."""
        chains = {name: self._chain(state, name in names) for name, state in self._states.items()}
        prepared = await self._prepare(
            [received_from(one, chains[name]) for name, one in self._wanted.items()], self._rules
        )
        now = self._clock()
        accepted = {}
        for name in names:
            state = self._states[name]
            kept = accept(
                self._wanted[name], prepared, chains[name], state.seen_tag or "", state.kept, now,
                allow_rollback=self._allow_rollback,
            )  # fmt: skip
            accepted[name] = replace(
                state, kept=kept, pending=None, error=None, activated_at=now,
                revision=prepared.revisions[name],
            )  # fmt: skip
        engine = await self._build_engine(prepared)
        try:
            await check_contract(engine)
            await asyncio.to_thread(self._keep, list(accepted.values()))
        except BaseException:
            await engine.close()
            raise
        self._states |= accepted
        self._policy.activate(engine)
        self._policy.checked_at = self._checked_at()
        _log.info("policy %s is in force", engine.revision)
        await self._events.activated(engine.revision)

    def _chain(self, state: BundleState, take_pending: bool) -> tuple[Files, ...]:  # noqa: FBT001 - private
        if not take_pending or state.pending is None:
            return state.kept.chain
        if _DELTA in state.pending:
            return (*state.kept.chain, state.pending)
        return (state.pending,)

    def _keep(self, states: Sequence[BundleState]) -> None:
        """Write to disk what is to be in force. A disk that is full does not keep a policy
        from being taken up; a restart then begins with an older one.
        """
        for state in states:
            try:
                self._last_good.write(state.name, state.kept)
            except (OSError, NotPrivateError) as error:
                _log.error("policy bundle %s can not be kept on disk: %s", state.name, error)

    async def _refuse(self, name: str, error: PdpError) -> None:
        state = self._states[name]
        if state.error == error.message:
            return  # said before
        state.error = error.message
        _log.error("policy bundle %s refused: %s", name, error.message)
        await self._events.refused(name, error)
