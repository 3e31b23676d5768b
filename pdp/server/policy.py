"""The policy room of a sidecar: what decides, kept up to date.

Loading it imports nothing else of the server: it begins on a thread of its own while
the rest is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pdp.canonical import JsonObject
from pdp.config import BundleSettings, Policy, Shadow, Verification
from pdp.policy.bundle_state import Wanted
from pdp.policy.compile import find_opa
from pdp.policy.contract import check_contract
from pdp.policy.engine import ActivePolicy, BundleError, PolicyEngine
from pdp.policy.first_load import FirstLoad, first_load
from pdp.policy.last_good import LastGood
from pdp.policy.live import LivePolicy
from pdp.policy.preparation import Prepared, Rules
from pdp.policy.shadow import Difference, ShadowedPolicy
from pdp.policy.signature import VerificationKey, Verifier
from pdp.policy.sources import open_source
from pdp.policy.updates import Events, PolicyUpdates
from pdp.reason import ReasonCode

if TYPE_CHECKING:
    from pdp.policy.opa.server import OpaEngine

POLICY_DIRECTORY: Final = "policy"
"""Below the state directory: the bundles that were in force last."""
SHADOW_DIRECTORY: Final = "shadow"
"""The candidate's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What was loaded at the start: nothing where an OPA server has its own bundles."""

    active: FirstLoad | None
    shadow: FirstLoad | None


def load_policy(policy: Policy, state_dir: Path) -> Loaded:
    """What the configuration names, ready to run; for a thread. Raises BundleError."""
    return asyncio.run(_load(policy, state_dir))


async def _load(policy: Policy, state_dir: Path) -> Loaded:
    if policy.external is not None:
        return Loaded(active=None, shadow=None)
    folder = state_dir / POLICY_DIRECTORY
    active = await _first_load(policy, policy, LastGood(folder))
    shadow = None
    if policy.shadow is not None:
        shadow = await _first_load(policy, policy.shadow, LastGood(state_dir / SHADOW_DIRECTORY))
    return Loaded(active=active, shadow=shadow)


async def _first_load(policy: Policy, named: Policy | Shadow, last_good: LastGood) -> FirstLoad:
    wanted = _wanted(named)
    try:
        return await first_load(
            wanted, _rules(policy), last_good, allow_rollback=policy.allow_rollback
        )
    finally:
        for one in wanted:
            await one.source.close()


def _wanted(named: Policy | Shadow) -> list[Wanted]:
    """The bundles that a section names. Raises BundleError for a key that can not be read."""
    bundles: Mapping[str, BundleSettings] = named.bundles or {
        "main": BundleSettings(path=named.bundle)
    }
    return [
        Wanted(
            name=name,
            source=open_source(settings),
            verifier=_verifier(settings.verification or named.verification),
        )
        for name, settings in bundles.items()
    ]


def _verifier(verification: Verification | None) -> Verifier | None:
    if verification is None:
        return None
    keys = {}
    for key_id, key in verification.keys.items():
        try:
            pem = key.public_key_file.read_bytes()
        except OSError as error:
            raise BundleError(
                ReasonCode.POLICY_UNAVAILABLE,
                f"The key {key.public_key_file} can not be read: {error.strerror}.",
            ) from None
        keys[key_id] = VerificationKey(pem=pem, algorithm=key.algorithm)
    return Verifier(keys=keys, scope=verification.scope)


def _rules(policy: Policy) -> Rules:
    return Rules(
        embedded=policy.engine == "embedded",
        opa=policy.opa_command,
        run_tests=policy.run_tests,
    )


def _build_engine(policy: Policy) -> Callable[[Prepared], Awaitable[PolicyEngine]]:
    async def embedded(prepared: Prepared) -> PolicyEngine:
        from pdp.policy.wasm import WasmEngine  # noqa: PLC0415 - wasmtime takes a while to import

        return await asyncio.to_thread(
            WasmEngine,
            prepared.bundle,
            deadline_ms=policy.evaluation_timeout_ms,
            workers=policy.workers,
            memory_max_mib=policy.max_memory_mib,
            compiled=prepared.compiled,
        )

    async def managed(prepared: Prepared) -> PolicyEngine:
        from pdp.policy.opa.managed import ManagedOpa  # noqa: PLC0415 - so does aiohttp

        return await ManagedOpa.start(
            prepared.bundle,
            opa=find_opa(policy.opa_command),
            deadline_ms=policy.evaluation_timeout_ms,
            workers=policy.workers,
        )

    return embedded if policy.engine == "embedded" else managed


async def _checked_engine(policy: Policy, prepared: Prepared) -> PolicyEngine:
    engine = await _build_engine(policy)(prepared)
    try:
        await check_contract(engine)
    except BaseException:
        await engine.close()
        raise
    return engine


class FollowedPolicy:
    """A policy whose bundles the sidecar looks after itself."""

    def __init__(
        self, policy: Policy, named: Policy | Shadow, first: FirstLoad, engine: PolicyEngine
    ) -> None:
        self._policy = policy
        self._named = named
        self._first = first
        # A candidate has no age: what it says is never obeyed.
        enforced = isinstance(named, Policy)
        self.live = LivePolicy(
            engine,
            max_age_seconds=policy.max_age_seconds if enforced else None,
            deny_when_stale=policy.when_stale == "deny",
            checked_at=first.checked_at,
        )

    @classmethod
    async def open(cls, policy: Policy, named: Policy | Shadow, first: FirstLoad) -> FollowedPolicy:
        """Put in force what was loaded first or, where no engine takes it, what was in
        force last. Raises BundleError.
        """
        try:
            engine = await _checked_engine(policy, first.prepared)
        except BundleError as error:
            first = await first.instead(error)
            engine = await _checked_engine(policy, first.prepared)
        return cls(policy, named, first, engine)

    async def begin(self, directory: Path, events: Events) -> PolicyUpdates:
        """Keep what was loaded first, and open the sources."""
        updates = PolicyUpdates(
            self._first,
            _wanted(self._named),
            self.live,
            rules=_rules(self._policy),
            last_good=LastGood(directory),
            build_engine=_build_engine(self._policy),
            events=events,
            allow_rollback=self._policy.allow_rollback,
        )
        try:
            await updates.begin()
        except BaseException:
            await updates.close()
            raise
        return updates

    def status(self) -> JsonObject:
        """What is in force, and how each source does."""
        return {
            "revision": self.live.revision,
            "activated_at": self.live.activated_at,
            "checked_at": self.live.checked_at,
            "stale": self.live.stale,
            "bundles": [state.as_json() for state in self._first.states.values()],
        }


class PolicyRoom:
    """The policy of one sidecar, from its start to its end."""

    def __init__(
        self,
        active: ActivePolicy,
        *,
        followed: FollowedPolicy | None = None,
        shadow: FollowedPolicy | None = None,
        external: OpaEngine | None = None,
    ) -> None:
        self.active = active
        """What calls are given."""
        self.live = followed.live if followed else None
        """Where the bundles are the sidecar's own matter."""
        self._followed = followed
        self._shadow = shadow
        self._external = external

    async def answers(self) -> bool:
        """Whether calls get an answer of the policy."""
        if self._external is not None:
            return await self._external.healthy()
        return self._followed is None or await self._followed.live.healthy()

    def status(self) -> JsonObject:
        """For `pdp status`."""
        if self._followed is None:
            return {"engine": "opa", "revision": self.active.revision, "bundles": []}
        status = self._followed.status()
        if self._shadow is not None:
            status["shadow"] = self._shadow.status()
        return status

    @contextlib.asynccontextmanager
    async def kept_up_to_date(
        self, state_dir: Path, *, events: Events, shadow_events: Events
    ) -> AsyncIterator[None]:
        """Follow the sources, and compare with the candidate, until the context ends."""
        async with contextlib.AsyncExitStack() as stack:
            followed = [(self._followed, POLICY_DIRECTORY, events)]
            followed += [(self._shadow, SHADOW_DIRECTORY, shadow_events)]
            for policy, directory, told in followed:
                if policy is not None:
                    updates = await policy.begin(state_dir / directory, told)
                    stack.push_async_callback(updates.close)
                    stack.push_async_callback(_end, asyncio.create_task(updates.run()))
            if isinstance(self.active, ShadowedPolicy):
                stack.push_async_callback(_end, asyncio.create_task(self.active.compare()))
            yield


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


@contextlib.asynccontextmanager
async def open_policy(
    policy: Policy,
    loaded: Loaded,
    *,
    counted: Callable[[str], None],
    differs: Callable[[Difference], Awaitable[None]],
) -> AsyncIterator[PolicyRoom]:
    """The policy that was loaded, ready to answer. Raises BundleError.

    ``counted`` and ``differs`` are told how the candidate's answers compare.
    """
    async with contextlib.AsyncExitStack() as stack:
        external = policy.external
        if external is not None:
            from pdp.policy.opa.server import OpaEngine  # noqa: PLC0415 - imports aiohttp

            engine = OpaEngine(
                external.url,
                token_file=external.token_file,
                deadline_ms=policy.evaluation_timeout_ms,
            )
            stack.push_async_callback(engine.close)
            yield PolicyRoom(engine, external=engine)
            return
        assert loaded.active is not None  # noqa: S101 - only an external server has none
        followed = await FollowedPolicy.open(policy, policy, loaded.active)
        stack.push_async_callback(followed.live.close)
        if policy.shadow is None or loaded.shadow is None:
            yield PolicyRoom(followed.live, followed=followed)
            return
        shadow = await FollowedPolicy.open(policy, policy.shadow, loaded.shadow)
        stack.push_async_callback(shadow.live.close)
        active = ShadowedPolicy(followed.live, shadow.live, differs=differs, counted=counted)
        yield PolicyRoom(active, followed=followed, shadow=shadow)
