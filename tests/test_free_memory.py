"""Memory that nobody needs any more goes back to the machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from pdp.free_memory import give_back_memory, keep_giving_back_memory
from tests.e2e.operating import soon

MIB = 1024 * 1024


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_is_free_between_what_is_not_is_given_back() -> None:
    # Larger than what Python has arenas of its own for, smaller than what malloc maps.
    blocks = [bytes(10_000) for _ in range(10_000)]
    kept = blocks[::1000]
    del blocks
    before = resident_bytes()
    give_back_memory()
    assert before - resident_bytes() > 50 * MIB
    assert kept == [bytes(10_000)] * 10


def test_what_calls_have_taken_is_given_back_while_it_runs() -> None:
    async def play() -> None:
        before = resident_bytes()
        task = asyncio.create_task(keep_giving_back_memory(look_every_seconds=0.01))
        await asyncio.sleep(0)  # it knows how little there was
        blocks = [bytes(10_000) for _ in range(10_000)]
        kept = blocks[::1000]
        assert resident_bytes() - before > 50 * MIB
        del blocks
        assert await asyncio.to_thread(soon, lambda: resident_bytes() - before < 20 * MIB)
        assert kept == [bytes(10_000)] * 10
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(play())
