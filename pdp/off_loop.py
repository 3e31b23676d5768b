"""Coroutines that run off the event loop, on a thread that may wait for a disk.

Handing work to another thread and back costs more than most of what a decision does. So
what a decision still needs after its policy was evaluated is done on the same thread, by
the same coroutines that run on the event loop: what these await is, where no loop runs,
done at once.
"""

from __future__ import annotations

import asyncio
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
