"""Files and directories that belong to the sidecar alone."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path


class NotPrivateError(Exception):
    """Others could change what lies there; the text says what to do."""


def make_directory(path: Path) -> None:
    """Make the directory with mode 0700, durably, or check that it is the process's own
    and that nobody else may write in it. Raises NotPrivateError, OSError.
    """
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each in missing:
        sync_directory(each.parent)
    found = path.stat()
    if found.st_uid != os.geteuid():
        raise NotPrivateError("is another user's; name a directory below it, which is then made")
    if found.st_mode & 0o022:
        raise NotPrivateError(
            f"can be written by others (mode {found.st_mode & 0o777:04o}); run chmod go-w on it, or"
            " name a directory below it, which is then made"
        )


def write_once(path: Path, content: Callable[[], bytes]) -> None:
    """Write the file with mode 0600, unless it is there.

    It is there whole or not at all, whenever the process is killed, and nothing is
    written through a link that somebody has laid. Raises OSError.
    """
    if not path.exists():
        replace(path, content)


def replace(path: Path, content: Callable[[], bytes]) -> None:
    """Put the content in the file's place, mode 0600, whole or not at all; once this has
    returned, loss of power does not bring back what was there before. Raises OSError.
    """
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content())
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
