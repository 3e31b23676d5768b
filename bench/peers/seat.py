"""One client of one system in a process of its own, that asks when it is told.

Run by :mod:`bench.peers.clients`: ``python -m bench.peers.seat MODULE:CLASS``, with the
class' options as one line of JSON on standard input. Every further line names a slice:
``{"callers": 8, "first": 5000, "calls": 640}``, which that many callers work through at the
same time, each one call after the other; the answer is what they saw. ``{"cases": true}``
asks the cases that have a right answer.

Every system is asked by the same loop: threads where its client blocks, tasks of one event
loop where it does not. A call's arguments are made before its time is taken.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Protocol

from bench.peers.question import CASES, Call, call

MOST_CALLERS = 128


class Asks(Protocol):
    """A client that blocks until it knows whether a call may be made."""

    def ask(self, call: Call) -> bool: ...


class Awaits(Protocol):
    """One that can be awaited."""

    async def ask(self, call: Call) -> bool: ...


class Blocking:
    """Asks in threads."""

    def __init__(self, asker: Asks) -> None:
        self._asker = asker
        self._threads = ThreadPoolExecutor(MOST_CALLERS)

    def ask(self, question: Call) -> bool:
        return self._asker.ask(question)

    def work(self, shares: list[range]) -> list[int]:
        found = [self._threads.submit(copy_context().run, self._work, share) for share in shares]
        return [nanoseconds for each in found for nanoseconds in each.result()]

    def _work(self, share: range) -> list[int]:
        ask, times = self._asker.ask, []
        for number in share:
            question = call(number)
            began = time.perf_counter_ns()
            allowed = ask(question)
            times.append(time.perf_counter_ns() - began)
            if not allowed:
                raise RuntimeError(f"call {number} was refused")
        return times


class Awaiting:
    """Asks in tasks."""

    def __init__(self, asker: Awaits, loop: asyncio.AbstractEventLoop) -> None:
        self._asker = asker
        self._loop = loop

    def ask(self, question: Call) -> bool:
        return self._loop.run_until_complete(self._asker.ask(question))

    def work(self, shares: list[range]) -> list[int]:
        return self._loop.run_until_complete(self._gathered(shares))

    async def _gathered(self, shares: list[range]) -> list[int]:
        found = await asyncio.gather(*(self._work(share) for share in shares))
        return [nanoseconds for each in found for nanoseconds in each]

    async def _work(self, share: range) -> list[int]:
        ask, times = self._asker.ask, []
        for number in share:
            question = call(number)
            began = time.perf_counter_ns()
            allowed = await ask(question)
            times.append(time.perf_counter_ns() - began)
            if not allowed:
                raise RuntimeError(f"call {number} was refused")
        return times


def shares(first: int, calls: int, callers: int) -> list[range]:
    return [range(first + number, first + calls, callers) for number in range(callers)]


def opened(kind: type[Any], options: dict[str, Any]) -> Blocking | Awaiting:
    """An asker whose ``ask`` is a coroutine is made on the loop that it is asked on."""
    if not inspect.iscoroutinefunction(kind.ask):
        return Blocking(kind(**options))
    loop = asyncio.new_event_loop()

    async def make() -> Awaits:
        return kind(**options)

    return Awaiting(loop.run_until_complete(make()), loop)


def main() -> None:
    module, _, name = sys.argv[1].partition(":")
    kind = getattr(importlib.import_module(module), name)
    seat = opened(kind, json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        told = json.loads(line)
        if "cases" in told:
            say([seat.ask(case.call) for case in CASES])
            continue
        cpu, began = time.process_time(), time.perf_counter()
        times = seat.work(shares(told["first"], told["calls"], told["callers"]))
        elapsed = time.perf_counter() - began
        say({"ns": times, "seconds": elapsed, "cpu_seconds": time.process_time() - cpu})


def say(answer: object) -> None:
    # Some of the libraries print to standard output, so that an answer is told by its mark.
    print(f"\n\x1e{json.dumps(answer)}", flush=True)


if __name__ == "__main__":
    main()
