"""Probes are told how things stand, and never what is no longer known."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health

from pdp.server.readiness import Readiness


def test_a_policy_that_can_not_be_asked_is_not_ready_and_is_asked_again() -> None:
    said: list[bool | Exception] = [True, OSError("no descriptor left"), True]

    async def answers() -> bool:
        now = said.pop(0)
        if isinstance(now, Exception):
            raise now
        return now

    async def run() -> None:
        readiness = Readiness(
            health.aio.HealthServicer(),
            ("",),
            policy_answers=answers,
            audit_is_healthy=lambda: True,
            keys_are_usable=lambda: True,
        )
        seen = []
        while said:
            await readiness.look()
            seen.append(readiness.ready)
        assert seen == [True, False, True]

    asyncio.run(run())
