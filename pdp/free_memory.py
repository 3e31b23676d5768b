"""Memory that is free within the process, back to the machine."""

from __future__ import annotations

import contextlib
import ctypes


def give_back_memory() -> None:
    """Let go of what malloc keeps for later: compiling a policy and reading its data take
    tens of megabytes that are seldom needed again. Takes milliseconds, in which no other
    thread allocates; does nothing where the C library is not GNU's.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
