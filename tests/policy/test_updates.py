from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pdp.errors import PdpError
from pdp.policy.archive import Files, read_archive
from pdp.policy.bundle_state import BundleState, Wanted
from pdp.policy.engine import BundleError, Entrypoint, PolicyEngine
from pdp.policy.first_load import FirstLoad, first_load
from pdp.policy.last_good import LastGood
from pdp.policy.live import LivePolicy
from pdp.policy.preparation import Prepared, Received, Rules, prepare, prepare_apart
from pdp.policy.sources.source import Fetched, SourceError
from pdp.policy.updates import CONFIRM_SECONDS, RETRY_SECONDS, PolicyUpdates
from pdp.policy.wasm import WasmEngine
from pdp.reason import ReasonCode

RULES = Rules(embedded=True, opa=None, run_tests=False)
STARTER = read_archive(Path("policies/bundle.tar.gz").read_bytes(), place="starter")


def bundle(
    revision: str,
    *,
    roles: Sequence[str] = ("viewer",),
    sequence: int | None = None,
    roots: Sequence[str] = ("pdp", "tenants", "tools", "workloads"),
    data: Mapping[str, Any] | None = None,
    rules: bool = True,
) -> Files:
    """The starter bundle at a revision, whose one tenant has these roles."""
    manifest = json.loads(STARTER[".manifest"])
    manifest |= {"revision": revision, "roots": list(roots)}
    if sequence is not None:
        manifest["metadata"] = {"pdp": {"sequence": sequence}}
    if data is None:
        tenant = {
            "status": "active",
            "scopes": ["orders:read"],
            "allowlist": ["orders.read"],
            "roles": {role: {"tools": ["orders.read"]} for role in roles},
            "limits": [],
        }
        data = {
            "tenants": {"acme": tenant},
            "tools": json.loads(STARTER["data.json"])["tools"],
            "workloads": {},
        }
    files = {"data.json": json.dumps(data).encode()}
    if rules:
        files = {**STARTER, **files}
    else:
        manifest.pop("wasm", None)
    return {**files, ".manifest": json.dumps(manifest).encode()}


class Shelf:
    """A source whose content the test changes."""

    place = "the shelf"

    def __init__(self, files: Files | None = None, tag: str = "1") -> None:
        self.files = files
        self.tag = tag
        self.error: PdpError | None = None
        self.failure: Exception | None = None
        """Raised once, where it is waited for the next look."""
        self.asked_with: list[str | None] = []
        self._look = asyncio.Event()

    def put(self, files: Files, tag: str) -> None:
        self.files, self.tag = files, tag

    def look(self) -> None:
        """Have it asked once."""
        self._look.set()

    async def fetch(self, tag: str | None) -> Fetched | None:
        self.asked_with.append(tag)
        if self.error is not None:
            raise self.error
        if self.files is None:
            raise SourceError(ReasonCode.POLICY_UNAVAILABLE, "The shelf is empty.")
        return None if tag == self.tag else Fetched(files=self.files, tag=self.tag)

    async def wait(self) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        await self._look.wait()
        self._look.clear()

    async def close(self) -> None: ...


class Events:
    """What was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self._more = asyncio.Event()

    async def activated(self, revision: str) -> None:
        self._tell("activated", revision)

    async def refused(self, bundle: str, error: PdpError) -> None:
        self._tell("refused", f"{bundle}: {error.message}")

    def unreachable(self, bundle: str) -> None:
        self._tell("unreachable", bundle)

    def _tell(self, kind: str, what: str) -> None:
        self.told.append((kind, what))
        self._more.set()

    async def next(self) -> tuple[str, str]:
        """What is told next."""
        while not self.told:
            self._more.clear()
            await self._more.wait()
        return self.told.pop(0)


class Scene:
    """Sources that are followed, and the policy that follows from them."""

    def __init__(self, directory: Path, **shelves: Shelf) -> None:
        self.shelves = shelves
        self.events = Events()
        self.last_good = LastGood(directory)
        self.now = 1_000.0
        self.allow_rollback = False
        self.first: FirstLoad
        self.policy: LivePolicy
        self.updates: PolicyUpdates

    @property
    def wanted(self) -> list[Wanted]:
        return [
            Wanted(name=name, source=shelf, verifier=None) for name, shelf in self.shelves.items()
        ]

    async def load(self) -> FirstLoad:
        return await first_load(
            self.wanted,
            RULES,
            self.last_good,
            allow_rollback=self.allow_rollback,
            clock=lambda: self.now,
        )

    async def run(
        self,
        play: Callable[[], Coroutine[Any, Any, None]],
        *,
        prepared: Callable[..., Any] | None = None,
    ) -> None:
        """Load, follow, and play."""

        async def in_thread(received: Sequence[Received], rules: Rules) -> Prepared:
            return await asyncio.to_thread(prepare, received, rules)

        self.first = first = await self.load()
        self.policy = LivePolicy(
            await build_engine(first.prepared),
            checked_at=first.checked_at,
            max_age_seconds=3600,
            clock=lambda: self.now,
        )
        self.updates = PolicyUpdates(
            first,
            self.wanted,
            self.policy,
            rules=RULES,
            last_good=self.last_good,
            build_engine=build_engine,
            events=self.events,
            allow_rollback=self.allow_rollback,
            prepare=prepared or in_thread,
            clock=lambda: self.now,
        )
        await self.updates.begin()
        task = asyncio.create_task(self.updates.run())
        try:
            await play()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await self.policy.close()

    async def asked(self, name: str = "main") -> None:
        """Have a source asked, of which nothing is to be told."""
        shelf = self.shelves[name]
        before = len(shelf.asked_with)
        shelf.look()
        await until(lambda: len(shelf.asked_with) > before)
        # What follows from it is done once the source is asked again.
        shelf.look()
        await until(lambda: len(shelf.asked_with) > before + 1)

    async def looked(self, name: str = "main") -> tuple[str, str]:
        """Have a source asked; what came of it."""
        self.shelves[name].look()
        return await self.events.next()

    def state(self, name: str = "main") -> BundleState:
        return self.first.states[name]

    async def allows(self, role: str) -> bool:
        """Whether acme's actor with this role may read an order."""
        document: Any = {
            "subject": {
                "type": "user",
                "id": "ann",
                "properties": {"tenant": "acme", "roles": [role], "scopes": ["orders:read"]},
            },
            "action": {"name": "orders.read", "properties": {"arguments": {"order_id": "1"}}},
            "context": {"time": "2026-01-01T00:00:00Z", "request_id": "1", "client": {}},
            "tool": "orders.read",
        }
        with self.policy.pin() as engine:
            answer: Any = await engine.evaluate(Entrypoint.AUTHZ_DECISION, document)
        return answer["allow"] is True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - of what has no event
            await asyncio.sleep(0.001)


async def build_engine(prepared: Prepared) -> PolicyEngine:
    return await asyncio.to_thread(
        WasmEngine,
        prepared.bundle,
        deadline_ms=1000,
        workers=1,
        memory_max_mib=64,
        compiled=prepared.compiled,
    )


def test_what_a_source_comes_to_hold_is_put_in_force(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        assert scene.policy.revision == "r1"
        assert (await scene.allows("viewer"), await scene.allows("editor")) == (True, False)
        scene.shelves["main"].put(bundle("r2", roles=("editor",)), "2")
        assert await scene.looked() == ("activated", "r2")
        assert scene.policy.revision == "r2"
        assert (await scene.allows("viewer"), await scene.allows("editor")) == (False, True)
        assert scene.shelves["main"].asked_with == [None, "1"]

    asyncio.run(scene.run(play))


def test_a_bundle_is_prepared_in_a_process_of_its_own(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        scene.shelves["main"].put(bundle("r2", roles=("editor",)), "2")
        assert await scene.looked() == ("activated", "r2")
        assert await scene.allows("editor")
        scene.shelves["main"].put({**bundle("r3"), "policy.wasm": b"\0asm"}, "3")
        kind, message = await scene.looked()
        assert kind == "refused"
        assert message.startswith("main: The policy bundle")
        assert scene.policy.revision == "r2"

    asyncio.run(scene.run(play, prepared=prepare_apart))


def test_what_can_not_be_used_is_refused_once_and_what_is_in_force_stays(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        shelf = scene.shelves["main"]
        shelf.put({**bundle("r2"), "data.json": b"{"}, "2")
        kind, message = await scene.looked()
        assert (kind, scene.policy.revision) == ("refused", "r1")
        assert scene.state().error == message.removeprefix("main: ")
        assert await scene.allows("viewer")
        # The same content is not tried again.
        shelf.look()
        await until(lambda: shelf.asked_with[-2:] == ["1", "2"])
        assert scene.state().error is not None
        shelf.put(bundle("r1"), "1")
        shelf.look()
        await until(lambda: scene.state().error is None)
        assert scene.events.told == []

    asyncio.run(scene.run(play))


def test_a_bundle_that_lacks_an_entrypoints_form_is_not_put_in_force(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        tenants = {"pdp-probe": {"status": "active", "limits": ["unlimited"]}}
        data = {"tenants": tenants, "tools": {}}
        scene.shelves["main"].put(bundle("r2", data=data), "2")
        kind, message = await scene.looked()
        assert kind == "refused"
        assert "does not do what pdp/budget/limits is there for" in message

    asyncio.run(scene.run(play))


def test_a_source_out_of_reach_leaves_the_policy_to_grow_old(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        shelf = scene.shelves["main"]
        shelf.error = SourceError(ReasonCode.POLICY_UNAVAILABLE, "No way there.")
        scene.now += 4_000
        assert await scene.looked() == ("unreachable", "main")
        assert scene.state().error == "No way there."
        assert scene.policy.stale
        shelf.error = None
        shelf.look()
        await until(lambda: not scene.policy.stale)
        assert scene.state().error is None

    asyncio.run(scene.run(play))


def test_a_refused_bundle_does_not_renew_the_policys_age(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        scene.shelves["main"].put({**bundle("r2"), "data.json": b"{"}, "2")
        scene.now += 4_000
        assert (await scene.looked())[0] == "refused"
        asked = len(scene.shelves["main"].asked_with)
        scene.shelves["main"].look()
        await until(lambda: len(scene.shelves["main"].asked_with) > asked)
        assert scene.policy.stale

    asyncio.run(scene.run(play))


def test_a_sidecar_starts_without_its_source(tmp_path: Path) -> None:
    async def play() -> None:
        pass

    scene = Scene(tmp_path, main=Shelf(bundle("r1")))
    asyncio.run(scene.run(play))
    later = Scene(tmp_path, main=Shelf(None))
    later.now = 5_000

    async def offline() -> None:
        assert later.policy.revision == "r1"
        assert later.policy.checked_at == 1_000
        assert later.state().error == "The shelf is empty."
        assert later.policy.stale

    asyncio.run(later.run(offline))


def test_a_start_writes_what_is_on_disk_already_no_more_but_when_it_was_seen(
    tmp_path: Path,
) -> None:
    def archives() -> dict[str, int]:
        return {file.name: file.stat().st_ino for file in tmp_path.glob("main/*.tar.gz")}

    async def play() -> None:
        pass

    async def run(content: Files, tag: str) -> None:
        scene = Scene(tmp_path, main=Shelf(content, tag))
        scene.now = now
        await scene.run(play)
        kept = scene.last_good.read("main")
        assert kept is not None
        assert (kept.checked_at, kept.tag) == (now, tag)

    now = 1_000.0
    asyncio.run(run(bundle("r1"), "1"))
    first = archives()
    now = 2_000.0
    asyncio.run(run(bundle("r1"), "1"))
    assert archives() == first
    asyncio.run(run(bundle("r1"), "2"))
    again = archives()
    assert again.keys() != first.keys(), "its tag is new"
    asyncio.run(run(bundle("r2"), "2"))
    assert archives().keys() != again.keys(), "its content is new"


def test_a_sidecar_with_neither_source_nor_earlier_bundle_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="The shelf is empty"):
        asyncio.run(Scene(tmp_path, main=Shelf(None)).load())


def test_a_bad_bundle_at_the_start_leaves_the_one_that_was_in_force(tmp_path: Path) -> None:
    async def play() -> None:
        pass

    asyncio.run(Scene(tmp_path, main=Shelf(bundle("r1"))).run(play))
    later = Scene(tmp_path, main=Shelf({**bundle("r2"), "data.json": b"{"}, "2"))

    async def told() -> None:
        assert later.policy.revision == "r1"
        assert (await later.events.next())[0] == "refused"

    asyncio.run(later.run(told))


@pytest.mark.parametrize(
    ("first", "second", "third"),
    (
        (bundle("r1", sequence=5), bundle("r2", sequence=6), bundle("r1", sequence=5)),
        (bundle("r1", sequence=5), bundle("r2", sequence=6), bundle("r3")),
    ),
)
@pytest.mark.parametrize("restarted", (False, True))
def test_an_older_bundle_is_refused_unless_it_is_allowed(
    tmp_path: Path, first: Files, second: Files, third: Files, *, restarted: bool
) -> None:
    scene = Scene(tmp_path, main=Shelf(first))

    async def play() -> None:
        scene.shelves["main"].put(second, "2")
        assert await scene.looked() == ("activated", "r2")
        if not restarted:
            scene.shelves["main"].put(third, "3")
            kind, message = await scene.looked()
            assert kind == "refused"
            assert "is older than one that was taken before" in message
            assert "policy.allow_rollback" in message
            assert scene.policy.revision == "r2"

    asyncio.run(scene.run(play))
    again = Scene(tmp_path, main=Shelf(third, "3"))

    async def offered_at_the_start() -> None:
        assert again.policy.revision == "r2"
        assert (await again.events.next())[0] == "refused"

    asyncio.run(again.run(offered_at_the_start))
    allowed = Scene(tmp_path, main=Shelf(third, "3"))
    allowed.allow_rollback = True

    async def is_allowed() -> None:
        assert allowed.policy.revision != "r2"

    asyncio.run(allowed.run(is_allowed))


PLATFORM = bundle("p1", roots=("pdp", "tools"), data={"tools": {}})


def of_tenants(revision: str, tools: bool = False) -> Files:  # noqa: FBT001, FBT002 - a test's
    data = {"tenants": {"acme": {"status": "active", "limits": []}}}
    roots = ["tenants"]
    if tools:
        data["tools"] = {}
        roots.append("tools")
    return bundle(revision, roots=roots, data=data, rules=False)


def test_bundles_that_fit_only_together_are_put_in_force_together(tmp_path: Path) -> None:
    """A root moves from one bundle to the other; whichever is fetched first must wait."""
    scene = Scene(tmp_path, platform=Shelf(PLATFORM), tenants=Shelf(of_tenants("t1")))

    async def play() -> None:
        assert scene.policy.revision == "platform=p1,tenants=t1"
        scene.shelves["tenants"].put(of_tenants("t2", tools=True), "2")
        kind, message = await scene.looked("tenants")
        assert kind == "refused"
        assert "tools" in message
        assert scene.policy.revision == "platform=p1,tenants=t1"
        scene.shelves["platform"].put(bundle("p2", roots=("pdp",), data={}), "2")
        assert await scene.looked("platform") == ("activated", "platform=p2,tenants=t2")
        assert scene.state("tenants").error is None

    asyncio.run(scene.run(play))


def test_a_bundle_is_taken_up_while_another_is_refused(tmp_path: Path) -> None:
    scene = Scene(tmp_path, platform=Shelf(PLATFORM), tenants=Shelf(of_tenants("t1")))

    async def play() -> None:
        scene.shelves["platform"].put({**PLATFORM, "data.json": b"["}, "2")
        assert (await scene.looked("platform"))[0] == "refused"
        scene.shelves["tenants"].put(of_tenants("t2"), "2")
        assert await scene.looked("tenants") == ("activated", "platform=p1,tenants=t2")
        assert scene.state("platform").error is not None
        assert scene.state("tenants").error is None

    asyncio.run(scene.run(play))


def test_a_failure_of_the_sidecar_itself_is_tried_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))
    failures = [OSError("no process to be had")]

    async def prepared(received: Sequence[Received], rules: Rules) -> Prepared:
        if failures:
            raise failures.pop()
        return await asyncio.to_thread(prepare, received, rules)

    async def play() -> None:
        scene.shelves["main"].put(bundle("r2"), "2")
        scene.shelves["main"].look()
        await until(lambda: scene.state().error is not None)
        assert scene.policy.revision == "r1"
        scene.now += RETRY_SECONDS
        assert await scene.looked() == ("activated", "r2")

    asyncio.run(scene.run(play, prepared=prepared))


def delta(revision: str, *, role: str, sequence: int | None = None) -> Files:
    manifest: dict[str, Any] = {
        "revision": revision,
        "roots": ["pdp", "tenants", "tools", "workloads"],
    }
    if sequence is not None:
        manifest["metadata"] = {"pdp": {"sequence": sequence}}
    patch = {
        "op": "upsert",
        "path": f"/tenants/acme/roles/{role}",
        "value": {"tools": ["orders.read"]},
    }
    return {
        ".manifest": json.dumps(manifest).encode(),
        "patch.json": json.dumps({"data": [patch]}).encode(),
    }


def test_delta_bundles_are_laid_upon_what_is_in_force_and_outlive_a_restart(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        scene.shelves["main"].put(delta("r2", role="editor"), "2")
        assert await scene.looked() == ("activated", "r2")
        scene.shelves["main"].put(delta("r3", role="auditor"), "3")
        assert await scene.looked() == ("activated", "r3")
        assert [await scene.allows(role) for role in ("viewer", "editor", "auditor")] == [True] * 3

    asyncio.run(scene.run(play))
    later = Scene(tmp_path, main=Shelf(None))

    async def offline() -> None:
        assert later.policy.revision == "r3"
        assert await later.allows("auditor")

    asyncio.run(later.run(offline))


def test_a_delta_upon_what_was_refused_is_left_and_the_whole_is_fetched(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        shelf = scene.shelves["main"]
        shelf.put({**bundle("r2"), "data.json": b"{"}, "2")
        assert (await scene.looked())[0] == "refused"
        shelf.put(delta("r3", role="editor"), "3")
        shelf.look()
        await until(lambda: shelf.asked_with[-1] == "2")
        shelf.put(bundle("r4"), "4")
        assert await scene.looked() == ("activated", "r4")
        assert shelf.asked_with[-1] is None

    asyncio.run(scene.run(play))


def test_a_source_that_fails_where_it_waits_is_followed_on(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        shelf = scene.shelves["main"]
        shelf.failure = ValueError("of its own")
        await scene.asked()
        shelf.put(bundle("r2"), "2")
        assert await scene.looked() == ("activated", "r2")

    asyncio.run(scene.run(play))


def test_it_is_noted_on_disk_that_a_source_was_reached_however_often_it_is_asked(
    tmp_path: Path,
) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        for _ in range(10):
            scene.now += CONFIRM_SECONDS / 4
            await scene.asked()
        kept = scene.last_good.read("main")
        assert kept is not None
        assert scene.now - kept.checked_at <= CONFIRM_SECONDS
        # Nor does a clock that was set back end that.
        scene.now -= 10_000
        await scene.asked()
        kept = scene.last_good.read("main")
        assert kept is not None
        assert kept.checked_at == scene.now

    asyncio.run(scene.run(play))


def test_a_delta_that_was_not_asked_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a server could have them pile up without end."""
    monkeypatch.setattr("pdp.policy.updates.MAX_DELTAS", 1)
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        shelf = scene.shelves["main"]
        shelf.put(delta("r2", role="editor"), "2")
        assert await scene.looked() == ("activated", "r2")
        shelf.put(delta("r3", role="auditor"), "3")
        kind, message = await scene.looked()
        assert shelf.asked_with[-1] is None
        assert kind == "refused"
        assert "is a delta bundle where the whole was asked for" in message
        shelf.put(bundle("r4"), "4")
        assert await scene.looked() == ("activated", "r4")

    asyncio.run(scene.run(play))


def test_deltas_that_hold_much_are_followed_by_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdp.policy.updates.MAX_DELTA_BYTES", 10)
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        scene.shelves["main"].put(delta("r2", role="editor"), "2")
        assert await scene.looked() == ("activated", "r2")
        scene.shelves["main"].put(bundle("r3"), "3")
        assert await scene.looked() == ("activated", "r3")
        assert scene.shelves["main"].asked_with == [None, "1", None]

    asyncio.run(scene.run(play))


def test_what_was_refused_is_tried_again_after_a_while(tmp_path: Path) -> None:
    """The machine may have had no memory for it."""
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))
    tries: list[float] = []

    async def prepared(received: Sequence[Received], rules: Rules) -> Prepared:
        tries.append(scene.now)
        if len(tries) < 3:
            raise BundleError(ReasonCode.POLICY_UNAVAILABLE, "The process ended with -9.")
        return await asyncio.to_thread(prepare, received, rules)

    async def play() -> None:
        scene.shelves["main"].put(bundle("r2"), "2")
        assert (await scene.looked())[0] == "refused"
        await scene.asked()
        assert len(tries) == 1
        scene.now += RETRY_SECONDS
        await scene.asked()
        assert len(tries) == 2
        scene.now += RETRY_SECONDS
        assert await scene.looked() == ("activated", "r2")  # and not "refused" once more
        assert scene.state().error is None

    asyncio.run(scene.run(play, prepared=prepared))


def test_why_a_bundle_was_refused_is_still_said_when_its_source_is_back(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        shelf = scene.shelves["main"]
        shelf.put({**bundle("r2"), "data.json": b"{"}, "2")
        assert (await scene.looked())[0] == "refused"
        why = scene.state().error
        shelf.error = SourceError(ReasonCode.POLICY_UNAVAILABLE, "No way there.")
        assert (await scene.looked())[0] == "unreachable"
        assert scene.state().error == "No way there."
        shelf.error = None
        await scene.asked()
        assert scene.state().error == why
        assert scene.events.told == []

    asyncio.run(scene.run(play))


def test_a_bundle_that_its_source_holds_no_more_is_not_put_in_force(tmp_path: Path) -> None:
    scene = Scene(tmp_path, platform=Shelf(PLATFORM), tenants=Shelf(of_tenants("t1")))

    async def play() -> None:
        tenants = scene.shelves["tenants"]
        tenants.put(of_tenants("t2", tools=True), "2")
        assert (await scene.looked("tenants"))[0] == "refused"
        tenants.error = BundleError(ReasonCode.POLICY_UNAVAILABLE, "It is no .tar.gz.")
        assert await scene.looked("tenants") == ("refused", "tenants: It is no .tar.gz.")
        scene.shelves["platform"].put(bundle("p2", roots=("pdp",), data={}), "2")
        assert await scene.looked("platform") == ("activated", "platform=p2,tenants=t1")
        tenants.error = None
        assert await scene.looked("tenants") == ("activated", "platform=p2,tenants=t2")

    asyncio.run(scene.run(play))


def test_what_fits_once_another_is_in_force_follows_it_at_once(tmp_path: Path) -> None:
    """A third bundle that fits nowhere does not hold the two up."""
    third = bundle("x1", roots=("other",), data={}, rules=False)
    scene = Scene(
        tmp_path, platform=Shelf(PLATFORM), tenants=Shelf(of_tenants("t1")), third=Shelf(third)
    )

    async def play() -> None:
        scene.shelves["third"].put({**third, "data.json": b"["}, "2")
        assert (await scene.looked("third"))[0] == "refused"
        scene.shelves["tenants"].put(of_tenants("t2", tools=True), "2")
        assert (await scene.looked("tenants"))[0] == "refused"
        scene.shelves["platform"].put(bundle("p2", roots=("pdp",), data={}), "2")
        assert await scene.looked("platform") == ("activated", "platform=p2,tenants=t1,third=x1")
        assert await scene.events.next() == ("activated", "platform=p2,tenants=t2,third=x1")

    asyncio.run(scene.run(play))


def test_the_same_content_under_another_tag_is_not_taken_up_again(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        activated_at = scene.policy.activated_at
        scene.now += 5
        scene.shelves["main"].put(bundle("r1"), "2")
        await scene.asked()
        assert scene.shelves["main"].asked_with[-2:] == ["1", "2"]
        assert (scene.policy.activated_at, scene.policy.checked_at) == (activated_at, scene.now)
        scene.shelves["main"].put(delta("r2", role="editor"), "3")
        assert await scene.looked() == ("activated", "r2")

    asyncio.run(scene.run(play))


def test_other_content_under_the_tag_in_force_is_seen(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))

    async def play() -> None:
        shelf = scene.shelves["main"]
        shelf.put({**bundle("r2"), "data.json": b"{"}, "2")
        assert (await scene.looked())[0] == "refused"
        shelf.put(bundle("r3"), "1")
        assert await scene.looked() == ("activated", "r3")

    asyncio.run(scene.run(play))


def test_a_disk_that_takes_nothing_keeps_no_policy_from_being_taken_up(tmp_path: Path) -> None:
    scene = Scene(tmp_path, main=Shelf(bundle("r1")))
    in_the_way = tmp_path / "main/state.json.new"

    async def play() -> None:
        in_the_way.mkdir()
        for number in range(2, 6):
            scene.shelves["main"].put(bundle(f"r{number}"), str(number))
            assert await scene.looked() == ("activated", f"r{number}")
        # Nothing piles up, and what was kept is there still.
        assert len(list((tmp_path / "main").glob("*.tar.gz"))) == 2
        kept = scene.last_good.read("main")
        assert kept is not None
        assert kept.revisions == ("r1",)
        # That the source holds what is in force does not confirm the older one on disk.
        in_the_way.rmdir()
        scene.now += CONFIRM_SECONDS
        await scene.asked()
        kept = scene.last_good.read("main")
        assert kept is not None
        assert kept.revisions[-1] == "r5"
        assert kept.checked_at == scene.now
        assert len(list((tmp_path / "main").iterdir())) == 2

    asyncio.run(scene.run(play))
