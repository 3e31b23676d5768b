"""Memory that is free within the process, back to the machine."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final

LOOK_EVERY_SECONDS: Final = 5.0
"""How often it is looked whether memory is to be given back."""
WORTHWHILE_BYTES: Final = 32 * 1024 * 1024
"""What a process must have grown by since the last time."""


def give_back_memory() -> None:
    """Let go of what malloc keeps for later: compiling a policy and reading its data take
    tens of megabytes that are seldom needed again. Takes milliseconds, in which no other
    thread allocates; does nothing where the C library is not GNU's.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def keep_giving_back_memory(*, look_every_seconds: float = LOOK_EVERY_SECONDS) -> None:
    """Do so, until cancelled, whenever calls have taken much: large messages leave holes of
    hundreds of megabytes. On another thread, so that no call waits for it: 1 to 15 ms then.
    """
    least = _resident_bytes()
    while True:
        await asyncio.sleep(look_every_seconds)
        if _resident_bytes() - least >= WORTHWHILE_BYTES:
            await asyncio.to_thread(give_back_memory)
            least = _resident_bytes()


def _resident_bytes() -> int:
    """0 where the system does not tell."""
    try:
        fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    except OSError:
        return 0
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
