"""Who waits for revocations learns of them when they are in force, and not before."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from pdp.audit.record import AuditError
from pdp.reason import ReasonCode
from pdp.revocation.file import RevocationFile
from pdp.revocation.revocations import Kind, Revocation, RevocationError, Revocations, Target

ALICE = Revocation(
    target=Target(kind=Kind.ACTOR, tenant="acme", name="alice"), by="eve", reason="", at=1_000
)


def test_whoever_is_told_finds_it_in_force(tmp_path: Path) -> None:
    store = RevocationFile(tmp_path / "revocations.json")
    revocations = Revocations(store)

    async def wait() -> Revocation | None:
        await revocations.changed_from(revocations.generation)
        return revocations.find(tenant="acme", actor="alice")

    async def run() -> None:
        waiting = [asyncio.create_task(wait()) for _ in range(3)]
        await revocations.look()
        assert not any(task.done() for task in waiting)
        await store.add(ALICE)
        await revocations.look()
        assert await asyncio.gather(*waiting) == [ALICE] * 3

    asyncio.run(run())


def test_it_is_told_although_it_can_not_be_put_on_record(tmp_path: Path) -> None:
    store = RevocationFile(tmp_path / "revocations.json")
    revocations = Revocations(store)

    async def fail(revocation: Revocation, in_force: bool) -> None:  # noqa: FBT001 - as Heard
        raise AuditError(ReasonCode.AUDIT_UNAVAILABLE, "Not written.")

    async def run() -> None:
        before = revocations.generation
        await store.add(ALICE)
        with pytest.raises(AuditError):
            await revocations.look(fail)
        assert await revocations.changed_from(before) != before

    asyncio.run(run())


def test_a_revocation_that_takes_another_s_place_is_told_and_one_that_is_lifted_is_not(
    tmp_path: Path,
) -> None:
    store = RevocationFile(tmp_path / "revocations.json")
    revocations = Revocations(store)
    heard: list[tuple[int, bool]] = []

    async def hear(revocation: Revocation, in_force: bool) -> None:  # noqa: FBT001 - as Heard
        heard.append((revocation.until, in_force))

    async def run() -> None:
        told = []
        for change in (
            store.add(replace(ALICE, until=5)),
            store.add(replace(ALICE, until=6)),
            store.lift(ALICE.target),
        ):
            await change
            await revocations.look(hear)
            told.append(revocations.generation)
        assert told[0] != told[1]
        assert told[1] == told[2]

    asyncio.run(run())
    assert heard == [(5, True), (6, True), (6, False)]


def test_that_it_can_not_be_told_any_more_who_is_revoked_is_told(tmp_path: Path) -> None:
    path = tmp_path / "revocations.json"
    path.write_text("nonsense")
    revocations = Revocations(RevocationFile(path), stale_seconds=0)

    async def run() -> None:
        looking = asyncio.create_task(revocations.keep_looking())
        await revocations.changed_from(revocations.generation)
        with pytest.raises(RevocationError):
            revocations.find(tenant="acme", actor="alice")
        looking.cancel()

    asyncio.run(run())


class Stuck(RevocationFile):
    """A store on a disk that hangs, and comes back."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked = 0
        self.comes_back = asyncio.Event()

    async def version(self) -> str:
        self.asked += 1
        await self.comes_back.wait()
        return await super().version()


def test_a_store_that_never_answers_is_asked_once_and_is_one_that_can_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdp.revocation.revocations.PATIENCE_SECONDS", 0.05)

    async def run() -> None:
        store = Stuck(tmp_path / "revocations.json")
        revocations = Revocations(store, stale_seconds=0)
        looking = asyncio.create_task(revocations.keep_looking())
        for _ in range(2):
            await revocations.changed_from(revocations.generation)
            with pytest.raises(RevocationError):
                revocations.find(tenant="acme", actor="alice")
        assert store.asked == 1
        await store.add(ALICE)
        store.comes_back.set()
        for _ in range(500):
            if not revocations._failing:
                break
            await asyncio.sleep(0.01)
        assert revocations.find(tenant="acme", actor="alice") == ALICE
        looking.cancel()

    asyncio.run(run())
