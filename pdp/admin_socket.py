"""Where operators reach a sidecar: a Unix socket in a directory for its user alone."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from pdp.private_files import NotPrivateError


def make_admin_directory(directory: Path) -> None:
    """Make the directory with mode 0700, or check that it is the process's own and that
    nobody else can enter it. Raises NotPrivateError, OSError.
    """
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotPrivateError("is no directory; move it away, and it is made")
    if found.st_uid != os.geteuid():
        raise NotPrivateError("is another user's; move it away, and it is made")
    if found.st_mode & 0o077:
        raise NotPrivateError(
            f"can be entered by others (mode {found.st_mode & 0o777:04o}); run chmod 700 on it"
        )


@contextlib.contextmanager
def target_of(socket: Path) -> Iterator[str]:
    """GRPC's target for a socket, while the context lasts. Raises OSError where there is
    no such directory.

    The target leads through the open directory: an address has room for 107 bytes, and
    state directories may lie deeper.
    """
    directory = os.open(socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"unix:/proc/self/fd/{directory}/{socket.name}"
    finally:
        os.close(directory)
