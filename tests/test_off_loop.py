from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from pdp.off_loop import DiskThread, run_off_loop, running_loop


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


def test_a_disk_thread_does_what_was_begun_though_nobody_waits_any_more() -> None:
    done = []

    async def go() -> None:
        disk = DiskThread()
        begun, may_go_on = threading.Event(), threading.Event()

        async def wait() -> None:
            begun.set()
            may_go_on.wait(10)
            done.append("the first")

        async def follow() -> None:
            assert running_loop() is None
            done.append("the next")

        tasks = [asyncio.create_task(disk.run(steps())) for steps in (wait, follow)]
        await asyncio.to_thread(begun.wait, 10)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert done == []
        may_go_on.set()
        await disk.close()

    asyncio.run(go())
    assert done == ["the first", "the next"]


def test_a_disk_thread_answers_with_what_came_of_it_and_goes_on() -> None:
    async def go() -> None:
        disk = DiskThread()
        with pytest.raises(KeyError, match="why"):
            await disk.run(fail())
        with pytest.raises(RuntimeError, match="off it"):
            await disk.run(asyncio.sleep(0))
        assert await disk.run(double(4)) == 8
        await disk.close()
        with pytest.raises(RuntimeError, match="closed"):
            await disk.run(double(4))

    asyncio.run(go())


def test_a_disk_thread_keeps_nothing_of_what_has_failed() -> None:
    class Message:
        pass

    async def go() -> None:
        disk = DiskThread()
        message = Message()
        kept = weakref.ref(message)

        async def work(message: Message) -> None:
            raise KeyError(id(message))

        steps = work(message)
        del message
        with pytest.raises(KeyError):
            await disk.run(steps)
        del steps
        await disk.run(double(4))  # what came before is let go of by then
        assert kept() is None
        await disk.close()

    gc.collect()
    gc.disable()
    try:
        asyncio.run(go())
    finally:
        gc.enable()
