"""Coroutines that run off the event loop, on a thread that may wait for a disk.

Handing work to another thread and back costs more than most of what a decision does. So
what a decision still needs after its policy was evaluated is done on the same thread, and
all of what a report needs on one thread, by the same coroutines that run on the event
loop: what these await is, where no loop runs, done at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs on this thread, which must not be held up; None where there
    is none.
    """
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def run_off_loop(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine all of which can be done at once. Only where no event loop
    runs. RuntimeError where it waits after all: it is closed then.
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    coroutine.close()
    raise RuntimeError("what waits for an event loop was run off it")


class DiskThread:
    """A thread that may wait for disks, for coroutines that wait for nothing else."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="disk", daemon=True)
        self._thread.start()

    async def run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """What the coroutine returns or raises. It is finished even if the awaiting task is
        cancelled. How many wait is bounded by whoever lets calls in.
        """
        if self._closed:
            coroutine.close()
            raise RuntimeError("the disk thread is closed")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[_T] = loop.create_future()
        self._jobs.put((coroutine, loop, answer))
        try:
            return await answer
        finally:
            # Its failure knows this frame: both would be garbage that is found late.
            del answer

    async def close(self) -> None:
        """Finish what waits, then end the thread."""
        self._closed = True
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            coroutine, loop, answer = job
            came_of_it = _outcome(coroutine)
            with contextlib.suppress(RuntimeError):  # nobody waits on a loop that is closed
                loop.call_soon_threadsafe(_settle, answer, *came_of_it)
            # They are not to outlive their caller while this thread waits.
            del job, coroutine, answer, came_of_it


_Job = tuple[Coroutine[Any, Any, Any], asyncio.AbstractEventLoop, asyncio.Future[Any]]


def _outcome(coroutine: Coroutine[Any, Any, Any]) -> tuple[object, BaseException | None]:
    """What it returns, or raises."""
    try:
        return run_off_loop(coroutine), None
    except BaseException as error:  # noqa: BLE001 - it belongs to the asker
        return None, error


def _settle(answer: asyncio.Future[Any], result: object, failure: BaseException | None) -> None:
    if answer.done():  # cancelled: it is done all the same
        return
    if failure is None:
        answer.set_result(result)
    else:
        answer.set_exception(failure)
