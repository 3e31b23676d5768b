from __future__ import annotations

import asyncio

import pytest

from pdp.off_loop import run_off_loop, running_loop


async def double(number: int) -> int:
    return 2 * number


async def fail() -> None:
    raise KeyError("why")


def test_what_need_not_wait_is_done_at_once() -> None:
    assert run_off_loop(double(4)) == 8
    with pytest.raises(KeyError, match="why"):
        run_off_loop(fail())


def test_what_waits_is_closed_and_not_done_by_halves() -> None:
    ended = []

    async def wait() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            ended.append(True)

    with pytest.raises(RuntimeError, match="off it"):
        run_off_loop(wait())
    assert ended == [True]


def test_a_loop_is_known_to_its_own_thread_only() -> None:
    async def look() -> None:
        assert running_loop() is asyncio.get_running_loop()
        assert await asyncio.to_thread(running_loop) is None

    asyncio.run(look())
    assert running_loop() is None
