"""A candidate is asked beside the policy in force, whatever becomes of it."""

from __future__ import annotations

import asyncio

import pytest

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.engine import Entrypoint
from pdp.policy.live import LivePolicy
from pdp.policy.shadow import MAX_WAITING, Difference, ShadowedPolicy


class Engine:
    """Denies, with the reason that it is told; or fails as no engine should."""

    def __init__(self, revision: str, reason_code: str) -> None:
        self.revision = revision
        self.reason_code = reason_code
        self.failure: Exception | None = None

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        return {"allow": False, "reason_code": self.reason_code}

    async def close(self) -> None: ...


class Scene:
    def __init__(self) -> None:
        self.active, self.candidate = Engine("1", "no"), Engine("2", "never")
        self.counts: list[str] = []
        self.differences: list[Difference] = []
        self.more = asyncio.Event()
        self.policy = ShadowedPolicy(
            LivePolicy(self.active),
            LivePolicy(self.candidate),
            differs=self.differs,
            counted=self.counts.append,
        )

    async def differs(self, difference: Difference) -> None:
        self.differences.append(difference)
        self.more.set()

    async def ask(self, entrypoint: Entrypoint = Entrypoint.AUTHZ_DECISION) -> JsonValue:
        with self.policy.pin() as engine:
            return await engine.evaluate(entrypoint, {})


def test_answers_are_compared_on_after_a_failure_of_the_candidate() -> None:
    async def run() -> None:
        scene = Scene()
        scene.candidate.failure = ValueError("of its own")
        comparing = asyncio.create_task(scene.policy.compare())
        for _ in range(2):
            assert await scene.ask() == {"allow": False, "reason_code": "no"}
        await asyncio.wait_for(scene.more.wait(), 5)
        assert [difference.candidate.said for difference in scene.differences] == ["never"]
        assert scene.counts == ["missed", "differs"]
        comparing.cancel()
        await asyncio.gather(comparing, return_exceptions=True)

    asyncio.run(run())


def test_questions_do_not_pile_up_behind_a_slow_candidate() -> None:
    async def run() -> None:
        scene = Scene()
        for _ in range(MAX_WAITING + 2):
            await scene.ask()
        assert scene.counts == ["missed"] * 2

    asyncio.run(run())


def test_a_service_class_is_of_no_call_and_is_not_compared() -> None:
    async def run() -> None:
        scene = Scene()
        assert await scene.ask(Entrypoint.SERVICE_CLASS) == {"allow": False, "reason_code": "no"}
        scene.active.failure = ValueError("of its own")
        with pytest.raises(ValueError, match="of its own"):
            await scene.ask(Entrypoint.SERVICE_CLASS)
        comparing = asyncio.create_task(scene.policy.compare())
        await scene.ask()
        await asyncio.wait_for(scene.more.wait(), 5)
        assert scene.counts == ["differs"]
        comparing.cancel()
        await asyncio.gather(comparing, return_exceptions=True)

    asyncio.run(run())
