from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pdp.config import RedisSettings
from pdp.redis_store import open_redis
from pdp.revocation.file import RevocationFile
from pdp.revocation.redis import RedisRevocations
from pdp.revocation.revocations import (
    Kind,
    Revocation,
    RevocationError,
    Revocations,
    RevocationStore,
    Target,
    from_json,
    to_json,
)
from tests.budget.redis_server import RedisServer

ALICE = Target(kind=Kind.ACTOR, tenant="acme", name="alice")
ACME = Target(kind=Kind.TENANT, tenant="acme")
TOKEN = Target(kind=Kind.TOKEN, tenant="acme", name="jti-1")
AGENT = Target(kind=Kind.WORKLOAD, tenant="", name="spiffe://example.org/agent")
Open = Callable[[], AbstractAsyncContextManager[RevocationStore]]


def revoked(target: Target, *, until: int = 0) -> Revocation:
    return Revocation(target=target, by="eve", reason="left the company", at=1_000, until=until)


@pytest.fixture(params=("file", "redis"))
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """How a store is opened, any number of times."""

    @asynccontextmanager
    async def open_file() -> AsyncIterator[RevocationStore]:
        yield RevocationFile(tmp_path / "revocations.json")

    if request.param == "file":
        return open_file
    server: RedisServer = request.getfixturevalue("redis_server")

    @asynccontextmanager
    async def open_shared() -> AsyncIterator[RevocationStore]:
        store = await open_redis(RedisSettings(unix=server.socket, timeout_ms=10_000))
        try:
            yield RedisRevocations(store)
        finally:
            await store.close()

    return open_shared


def test_who_is_revoked_is_found_and_nobody_else(opened: Open) -> None:
    async def run() -> None:
        async with opened() as store, opened() as elsewhere:
            revocations = Revocations(store)
            await revocations.look()
            assert revocations.find(tenant="acme", actor="alice") is None
            for target in (ALICE, TOKEN):
                await elsewhere.add(revoked(target))
            await revocations.look()
            assert revocations.find(tenant="acme", actor="alice") == revoked(ALICE)
            assert revocations.find(tenant="acme", actor="bob", token_ids=["jti-1"]) == revoked(
                TOKEN
            )
            for tenant, actor, token_id in (
                ("globex", "alice", "jti-1"),
                ("acme", "bob", ""),
                ("acme", "jti-1", "alice"),
                ("acme", "", ""),
            ):
                found = revocations.find(
                    tenant=tenant, actor=actor, token_ids=[token_id] if token_id else []
                )
                assert found is None
            await elsewhere.add(revoked(ACME))
            await revocations.look()
            assert revocations.find(tenant="acme", actor="bob") == revoked(ACME)
            assert await elsewhere.lift(ACME)
            assert not await elsewhere.lift(ACME)
            await revocations.look()
            assert revocations.find(tenant="acme", actor="bob") is None

    asyncio.run(run())


def test_a_workload_is_revoked_for_every_tenant_and_no_other_is(opened: Open) -> None:
    async def run() -> None:
        async with opened() as store:
            await store.add(revoked(AGENT))
            revocations = Revocations(store)
            await revocations.look()
            for tenant in ("acme", "globex"):
                found = revocations.find(tenant=tenant, actor="alice", workload=AGENT.name)
                assert found == revoked(AGENT)
            for workload in ("", f"{AGENT.name}/1", AGENT.name.upper(), "alice"):
                assert revocations.find(tenant="acme", actor="alice", workload=workload) is None
            # Who is named like a workload is none.
            assert revocations.find(tenant="", actor=AGENT.name, token_ids=[AGENT.name]) is None

    asyncio.run(run())


def test_what_comes_in_force_and_what_is_lifted_is_told_once(opened: Open) -> None:
    heard: list[tuple[Target, bool]] = []

    async def hear(revocation: Revocation, in_force: bool) -> None:  # noqa: FBT001 - as Heard
        heard.append((revocation.target, in_force))

    async def run() -> None:
        async with opened() as store:
            await store.add(revoked(ALICE))
            revocations = Revocations(store)
            await revocations.look(hear)
            await revocations.look(hear)
            await store.lift(ALICE)
            await revocations.look(hear)

    asyncio.run(run())
    assert heard == [(ALICE, True), (ALICE, False)]


def test_a_revocation_can_end_by_itself(tmp_path: Path) -> None:
    now = 1_000.0
    store = RevocationFile(tmp_path / "revocations.json")
    revocations = Revocations(store, clock=lambda: now)
    asyncio.run(store.add(revoked(ALICE, until=1_060)))
    asyncio.run(revocations.look())
    assert revocations.find(tenant="acme", actor="alice")
    now = 1_060
    assert revocations.find(tenant="acme", actor="alice") is None


def test_the_last_word_on_a_target_counts(tmp_path: Path) -> None:
    store = RevocationFile(tmp_path / "revocations.json")
    asyncio.run(store.add(revoked(ALICE, until=5)))
    asyncio.run(store.add(revoked(ALICE)))
    assert asyncio.run(store.read()) == {ALICE: revoked(ALICE)}


def test_changes_of_many_at_once_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "revocations.json"
    targets = [replace(ALICE, name=f"actor-{number}") for number in range(20)]

    async def run() -> None:
        await asyncio.gather(*(RevocationFile(path).add(revoked(each)) for each in targets))

    asyncio.run(run())
    assert asyncio.run(RevocationFile(path).read()).keys() == set(targets)
    assert path.stat().st_mode & 0o777 == 0o600
    assert {each.name for each in tmp_path.iterdir()} == {path.name, f"{path.name}.lock"}


def test_a_store_that_fails_for_long_lets_nobody_act(tmp_path: Path) -> None:
    path = tmp_path / "revocations.json"
    times = {"now": 0.0}
    revocations = Revocations(RevocationFile(path), monotonic=lambda: times["now"])

    async def run() -> None:
        await revocations.look()
        path.write_text("nonsense")
        looking = asyncio.create_task(revocations.keep_looking())
        for _ in range(100):
            if revocations._failing:
                break
            await asyncio.sleep(0.05)
        times["now"] = 9.0
        assert revocations.find(tenant="acme", actor="alice") is None
        times["now"] = 10.5
        with pytest.raises(RevocationError) as caught:
            revocations.find(tenant="acme", actor="alice")
        assert caught.value.reason_code == "revocations_unavailable"
        path.unlink()
        for _ in range(100):
            if not revocations._failing:
                break
            await asyncio.sleep(0.05)
        assert revocations.find(tenant="acme", actor="alice") is None
        looking.cancel()

    asyncio.run(run())


def test_sidecars_whose_looks_fail_together_do_not_look_together_again(tmp_path: Path) -> None:
    async def pauses(drawn: float) -> tuple[float, float, float]:
        path = tmp_path / f"revocations-{drawn}.json"
        revocations = Revocations(RevocationFile(path), draw=lambda: drawn)
        await revocations.look()
        before = revocations._pause()
        path.write_text("nonsense")
        looking = asyncio.create_task(revocations.keep_looking())
        async with asyncio.timeout(10):
            while not revocations._failing:  # noqa: ASYNC110 - nobody is told
                await asyncio.sleep(0.01)
        looking.cancel()
        failing = revocations._pause()
        path.unlink()
        await revocations.look()
        return before, failing, revocations._pause()

    assert asyncio.run(pauses(0.0)) == (0.5, 0.5, 0.5)
    assert asyncio.run(pauses(1.0)) == (0.5, 2.0, 0.5)


def test_a_store_that_fails_in_a_way_nobody_thought_of_lets_nobody_act_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(RevocationFile):
        async def version(self) -> str:
            raise RuntimeError("a secret")

    now = 0.0
    revocations = Revocations(Broken(tmp_path / "revocations.json"), monotonic=lambda: now)

    async def run() -> None:
        looking = asyncio.create_task(revocations.keep_looking())
        for _ in range(100):
            if caplog.records:
                break
            await asyncio.sleep(0.05)
        assert not looking.done()
        looking.cancel()

    asyncio.run(run())
    now = 11.0
    with pytest.raises(RevocationError):
        revocations.find(tenant="acme", actor="alice")
    assert "RuntimeError" in caplog.text
    assert "a secret" not in caplog.text


def test_a_look_that_took_longer_than_what_it_read_counts_lets_nobody_act(tmp_path: Path) -> None:
    now, takes = 0.0, 0.0

    class Slow(RevocationFile):
        async def version(self) -> str:
            nonlocal now
            now += takes
            if takes > 30:
                raise RevocationError("It can not be read.")
            return await super().version()

    revocations = Revocations(
        Slow(tmp_path / "revocations.json"), monotonic=lambda: now, draw=lambda: 0.0
    )

    async def run() -> None:
        nonlocal takes
        await revocations.look()
        takes = 31.0
        looking = asyncio.create_task(revocations.keep_looking())
        for _ in range(500):
            if revocations._failing:
                break
            await asyncio.sleep(0.01)
        looking.cancel()
        takes = 11.0
        await revocations.look()
        with pytest.raises(RevocationError):
            revocations.find(tenant="acme", actor="alice")
        takes = 0.0
        await revocations.look()
        assert revocations.find(tenant="acme", actor="alice") is None

    asyncio.run(run())


@pytest.mark.parametrize(
    "text",
    (
        b"",
        b"[]",
        b"{}",
        b'{"revocations": [{}]}',
        b'{"revocations": [1]}',
        to_json([revoked(ALICE)]).replace(b'"actor"', b'"planet"'),
        to_json([revoked(ALICE)]).replace(b"1000", b'"1000"'),
        to_json([revoked(ALICE)]).replace(b"alice", b""),
        to_json([revoked(ACME)]).replace(b'"name": ""', b'"name": "x"'),
        to_json([revoked(ALICE)]).replace(b"acme", b""),
        to_json([revoked(AGENT)]).replace(b'"tenant": ""', b'"tenant": "acme"'),
        to_json([revoked(AGENT)]).replace(b"spiffe://example.org/agent", b""),
    ),
)
def test_a_file_that_holds_no_revocations_is_refused(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own message
        from_json(text)
    path = tmp_path / "revocations.json"
    path.write_bytes(text)
    with pytest.raises(RevocationError, match=r"revocations\.json"):
        asyncio.run(Revocations(RevocationFile(path)).look())
