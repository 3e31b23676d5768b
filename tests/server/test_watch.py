from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from pdp.api.v1 import authorization_pb2
from pdp.errors import PdpError
from pdp.identity.resolver import IdentityError
from pdp.policy.engine import ActivePolicy
from pdp.reason import ReasonCode
from pdp.revocation.file import RevocationFile
from pdp.revocation.revocations import Kind, Revocation, Target
from pdp.revocation.revocations import Revocations as LiveRevocations
from pdp.server.watch import MAX_WATCHERS_PER_TENANT, Watchers
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle
from pdp.testing.caller import Refusal, refusal_of


class Policy:
    """In force until it is told otherwise."""

    def __init__(self) -> None:
        self.revision = "1"
        self._changed = asyncio.Event()

    def change(self, revision: str) -> None:
        self.revision = revision
        self._changed.set()

    async def changed_from(self, revision: str) -> str:
        while self.revision == revision:
            self._changed.clear()
            await self._changed.wait()
        return self.revision


class Revocations:
    """None, until it is told otherwise."""

    def __init__(self) -> None:
        self.generation = 0
        self._changed = asyncio.Event()

    def revoke(self) -> None:
        self.generation += 1
        self._changed.set()

    async def changed_from(self, generation: int) -> int:
        while self.generation == generation:
            self._changed.clear()
            await self._changed.wait()
        return self.generation


@dataclass
class Scene:
    """Everybody who watches, and what they watch."""

    seconds: float = 60
    policy: Policy = field(default_factory=Policy)
    revocations: Revocations = field(default_factory=Revocations)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    refusal: Exception | None = None
    checks: int = 0

    def __post_init__(self) -> None:
        self.watchers = Watchers(
            cast("ActivePolicy", self.policy),
            cast("LiveRevocations", self.revocations),
            draining=self.draining,
            seconds=self.seconds,
        )

    def events(
        self, tenant: str = "acme", *, since: int = 0
    ) -> AsyncGenerator[authorization_pb2.WatchResponse]:
        return self.watchers.events(tenant, since=since, check=self._check)

    async def _check(self) -> None:
        self.checks += 1
        if self.refusal is not None:
            raise self.refusal


def test_each_revision_is_told_and_then_the_end() -> None:
    async def run() -> None:
        scene = Scene()
        events = scene.events()
        assert (await anext(events)).policy.revision == "1"
        scene.policy.change("2")
        assert (await anext(events)).policy.revision == "2"
        scene.draining.set()
        assert (await anext(events)).HasField("draining")
        assert [event async for event in events] == []

    asyncio.run(run())


def test_a_watch_ends_after_its_time() -> None:
    async def run() -> None:
        assert len([event async for event in Scene(seconds=0.01).events()]) == 1

    asyncio.run(run())


def test_one_tenant_can_not_take_all_the_places() -> None:
    async def run() -> None:
        everybody = Scene()
        watching = [everybody.events() for _ in range(MAX_WATCHERS_PER_TENANT)]
        for events in watching:
            await anext(events)
        with pytest.raises(PdpError) as refused:
            await anext(everybody.events())
        assert refused.value.reason_code == "rate_limited"
        other = everybody.events("globex")
        assert (await anext(other)).policy.revision == "1"
        # A client that goes makes room.
        await watching.pop().aclose()
        again = everybody.events()
        assert (await anext(again)).policy.revision == "1"
        for events in (*watching, other, again):
            await events.aclose()

    asyncio.run(run())


def test_that_something_was_revoked_is_told_to_whoever_may_still_ask() -> None:
    async def run() -> None:
        scene = Scene()
        events = scene.events()
        await anext(events)
        scene.revocations.revoke()
        assert (await anext(events)).HasField("revoked")
        scene.refusal = IdentityError(ReasonCode.ACTOR_REVOKED, "The actor may not act any more.")
        scene.revocations.revoke()
        with pytest.raises(IdentityError):
            await anext(events)
        assert [event async for event in events] == []
        assert scene.checks == 2

    asyncio.run(run())


def test_what_was_revoked_while_the_watcher_was_identified_is_told() -> None:
    async def run() -> None:
        scene = Scene()
        scene.revocations.revoke()
        events = scene.events(since=0)
        assert (await anext(events)).HasField("policy")
        assert (await anext(events)).HasField("revoked")
        await events.aclose()

    asyncio.run(run())


def test_what_happens_while_a_watcher_is_slow_becomes_one_event_of_each_kind() -> None:
    async def run() -> None:
        scene = Scene()
        slow, quick = scene.events(), scene.events()
        for events in (slow, quick):
            await anext(events)
        for number in range(100):
            scene.revocations.revoke()
            scene.policy.change(f"{number}")
            assert (await anext(quick)).HasField("revoked")
            assert (await anext(quick)).policy.revision == f"{number}"
        assert (await anext(slow)).HasField("revoked")
        assert (await anext(slow)).policy.revision == "99"
        scene.draining.set()
        assert (await anext(slow)).HasField("draining")
        for events in (slow, quick):
            await events.aclose()

    asyncio.run(run())


# A real sidecar

ROOT = Path(__file__).parents[2]
OPA = ROOT / ".tools/opa"
ISSUER = TokenIssuer()


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("watch")
    bundle = build_bundle(
        ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle) as process:
        yield process


def revoke(sidecar: SidecarProcess, kind: Kind, tenant: str, name: str = "") -> None:
    target = Target(kind=kind, tenant=tenant, name=name)
    revocation = Revocation(target=target, by="test", reason="", at=int(time.time()))
    asyncio.run(RevocationFile(sidecar.state / "revocations.json").add(revocation))


def watching(caller: Caller) -> Any:
    """A Watch whose first event has come."""
    events = caller.authorization.Watch(authorization_pb2.WatchRequest())
    assert next(events).HasField("policy")
    return events


def ended(events: Any) -> Refusal:
    """How a Watch ends that must end with an error."""
    return refusal_of(lambda: list(events))


@pytest.mark.parametrize(
    ("kind", "code"),
    (
        (Kind.TENANT, "tenant_suspended"),
        (Kind.ACTOR, "actor_revoked"),
        (Kind.TOKEN, "token_revoked"),
    ),
)
def test_the_watch_of_who_is_revoked_ends_and_everybody_else_s_says_so(
    sidecar: SidecarProcess, kind: Kind, code: str
) -> None:
    tenant, token_id = f"tenant_{uuid.uuid4().hex[:12]}", str(uuid.uuid4())
    name = {Kind.TENANT: "", Kind.ACTOR: "user-7", Kind.TOKEN: token_id}[kind]
    with (
        Caller(sidecar.target, token=ISSUER.token(tenant, "user-7", jti=token_id)) as revoked,
        Caller(sidecar.target, token=ISSUER.token("tenant_globex", "user-7")) as other,
    ):
        his, hers = watching(revoked), watching(other)
        revoke(sidecar, kind, tenant, name)
        assert next(hers).HasField("revoked")
        # It is in force for whoever was told of it.
        asked = refusal_of(revoked.authorize, "orders.read")
        assert asked.reason_code == code
        assert ended(his) == asked
        hers.cancel()


def test_an_event_does_not_say_who_was_revoked(sidecar: SidecarProcess) -> None:
    with Caller(sidecar.target, token=ISSUER.token("tenant_globex", "user-7")) as other:
        events = watching(other)
        revoke(sidecar, Kind.TENANT, f"tenant_{uuid.uuid4().hex[:12]}")
        assert next(events) == authorization_pb2.WatchResponse(revoked=authorization_pb2.Revoked())
        events.cancel()


@pytest.mark.slow  # it is believed for ten seconds
def test_an_organisation_that_becomes_another_tenant_is_told(tmp_path: Path) -> None:
    organisations = tmp_path / "organisations.json"
    organisations.write_text('{"org-1": "tenant_acme"}', encoding="utf-8")
    issuer = {
        "issuer": ISSUER.issuer,
        "audiences": [ISSUER.audience],
        "jwks_file": str(ISSUER.write_jwks(tmp_path / "keys.json")),
        "tenant": {"claim": "org", "organisations_file": str(organisations)},
    }
    bundle = build_bundle(ROOT / "tests/server/policy", tmp_path / "b.tar.gz", opa=OPA)
    config = {"identity": {"mode": "jwt", "issuers": [issuer]}}
    token = ISSUER.token(None, "user-7", org="org-1")
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=config) as process,
        Caller(process.target, token=token) as caller,
    ):
        events = watching(caller)
        beside = tmp_path / "beside.json"
        beside.write_text('{"org-1": "tenant_globex"}', encoding="utf-8")
        beside.replace(organisations)
        assert next(events).HasField("revoked")
        assert caller.authorize("orders.read").tenant_id == "tenant_globex"
        events.cancel()


def test_where_it_can_not_be_told_who_is_revoked_every_watch_ends(tmp_path: Path) -> None:
    bundle = build_bundle(
        ROOT / "tests/server/policy", tmp_path / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle) as own,
        Caller(own.target, token=ISSUER.token("tenant_acme", "user-7")) as caller,
    ):
        events = watching(caller)
        (own.state / "revocations.json").write_text("nonsense")
        end = ended(events)
        assert (end.status, end.reason_code) == (
            grpc.StatusCode.UNAVAILABLE, "revocations_unavailable",
        )  # fmt: skip


def test_a_watcher_who_does_not_read_holds_up_nobody(sidecar: SidecarProcess) -> None:
    with (
        Caller(sidecar.target, token=ISSUER.token("tenant_globex", "user-7")) as idle,
        Caller(sidecar.target, token=ISSUER.token("tenant_globex", "user-8")) as other,
    ):
        unread, read = watching(idle), watching(other)
        for _ in range(3):
            revoke(sidecar, Kind.TENANT, f"tenant_{uuid.uuid4().hex[:12]}")
            assert next(read).HasField("revoked")
        assert next(unread).HasField("revoked")
        for events in (unread, read):
            events.cancel()
