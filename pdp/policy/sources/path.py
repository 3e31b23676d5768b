"""A bundle in a file or a directory, looked at again and again.

Looking is cheap and works on every file system and through the links of a Kubernetes
ConfigMap, which inotify does not.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pdp.policy.archive import MAX_ARCHIVE_BYTES, MAX_ENTRIES, Files, read_archive, read_directory
from pdp.policy.sources.source import Fetched, SourceError
from pdp.reason import ReasonCode

MAX_TRIES: Final = 5
"""How often a directory is read that changes while it is read, before it is left for the
next look.
"""
SETTLE_SECONDS: Final = 0.1
"""How long nothing may have changed. File systems count time in steps of some
milliseconds, within which a second change can not be seen.
"""
_Glance = tuple[tuple[str, int, int, int], ...]
"""Of every file its path, size, time of change and inode."""


class PathSource:
    """A .tar.gz or a directory."""

    def __init__(self, path: Path, *, poll_seconds: float) -> None:
        self._path = path
        self._poll_seconds = poll_seconds
        self._seen: tuple[_Glance, str] | None = None

    @property
    def place(self) -> str:
        """The path."""
        return str(self._path)

    async def fetch(self, tag: str | None) -> Fetched | None:
        """What lies there now. Raises SourceError, BundleError."""
        return await asyncio.to_thread(self._fetch, tag)

    async def wait(self) -> None:
        """Return when it is time to look again."""
        await asyncio.sleep(self._poll_seconds)

    async def close(self) -> None:
        """Nothing is open between two looks."""

    def _fetch(self, tag: str | None) -> Fetched | None:
        try:
            glance = _glance(self._path)
            if self._seen is not None and tag is not None and self._seen == (glance, tag):
                return None
            for _ in range(MAX_TRIES):
                files = self._read()
                before, glance = glance, _glance(self._path)
                if glance == before and _is_settled(glance):
                    break
                time.sleep(SETTLE_SECONDS)
            else:
                raise self._error("changes all the time; write it beside, then rename it")
        except OSError as error:
            raise self._error(f"can not be read: {error.strerror}") from None
        found = _digest(files)
        self._seen = (glance, found)
        return None if found == tag else Fetched(files=files, tag=found)

    def _read(self) -> Files:
        """Raises OSError, SourceError, BundleError."""
        if self._path.is_dir():
            return read_directory(self._path)
        with self._path.open("rb") as file:
            content = file.read(MAX_ARCHIVE_BYTES + 1)
        return read_archive(content, place=self.place)

    def _error(self, what: str) -> SourceError:
        return SourceError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {self._path} {what}.")


def _glance(path: Path) -> _Glance:
    """Raises OSError."""
    found = []
    for count, file in enumerate(_entries(path)):
        if count > 2 * MAX_ENTRIES:
            break  # read_directory says what is wrong
        stat = file.stat()
        found.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(found)


def _is_settled(glance: _Glance) -> bool:
    now = time.time_ns()
    return all(abs(now - changed) > SETTLE_SECONDS * 1e9 for _, _, changed, _ in glance)


def _entries(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    # Where "..data" leads is part of what is seen: a ConfigMap changes by that link alone.
    yield path.resolve()
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder) / name
            if file.exists():
                yield file


def _digest(files: Files) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(hashlib.sha256(name.encode()).digest())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
