"""Become another program that the kernel kills when the process that began this dies.

Run as a script, with the process id of the parent and then the command. It is a
program of its own because nothing may run between fork and exec in a process with
threads, and because the kernel forgets the wish at a fork but not at an exec.
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
    os.execv(command[0], command)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
