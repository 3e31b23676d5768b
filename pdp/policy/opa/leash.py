"""Become another program, one that the kernel kills when the parent dies.

Run as a script, with the process id of the parent and then the command. It is a
program of its own because in a process with threads nothing may run between fork and
exec, and because the kernel keeps the wish across an exec. The parent is the thread
that began this: for the sidecar, the one of the event loop.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _become(parent: int, command: list[str]) -> None:
    libc = ctypes.CDLL(None)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)) != 0:
        sys.exit("the kernel does not take PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        sys.exit("the parent has ended already")  # before the kernel was asked
    try:
        os.execv(command[0], command)  # noqa: S606 - no shell is wanted
    except OSError as error:
        sys.exit(f"{command[0]} can not be run: {error.strerror}")


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
