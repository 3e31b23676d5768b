"""A bundle in a file or a directory, looked at again and again.

Looking is cheap and works on every file system and through the links of a Kubernetes
ConfigMap, which inotify does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pdp.policy.archive import MAX_ARCHIVE_BYTES, MAX_ENTRIES, Files, read_archive, read_directory
from pdp.policy.engine import BundleError
from pdp.policy.sources.source import Fetched, SourceError, fault_of
from pdp.reason import ReasonCode

MAX_TRIES: Final = 5
"""How often a bundle is read that changes while it is read, before it is left for the
next look.
"""
SETTLE_SECONDS: Final = 0.1
"""How long after the look a directory is read, and how old a change must be before looks
that are alike are trusted: times of files go in steps of milliseconds, and two changes
within one step look like one.
"""


@dataclass(frozen=True, slots=True)
class _Look:
    """One file or folder, without reading it."""

    path: str
    target: str = ""
    """Where a link leads; what follows is of what is there."""
    device: int = 0
    inode: int = 0
    size: int = 0
    modified_ns: int = 0
    changed_ns: int = 0
    """Unlike the former this can not be set: it is when content, mode or name changed."""


_Glance = tuple[_Look, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was found when it was read last."""

    glance: _Glance
    tag: str | None
    fault: str | None
    """Why it is no bundle."""


class PathSource:
    """A .tar.gz or a directory."""

    def __init__(
        self,
        path: Path,
        *,
        poll_seconds: float,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._poll_seconds = poll_seconds
        self._sleep = sleep
        self._clock = clock
        self._seen: _Seen | None = None

    @property
    def place(self) -> str:
        """The path."""
        return str(self._path)

    async def fetch(self, tag: str | None) -> Fetched | None:
        """What lies there now: all of one write, never half. Raises SourceError, BundleError."""
        return await asyncio.to_thread(self._fetch, tag)

    async def wait(self) -> None:
        """Return when it is time to look again."""
        await asyncio.sleep(self._poll_seconds)

    async def close(self) -> None:
        """Nothing is open between two looks."""

    def _fetch(self, tag: str | None) -> Fetched | None:
        try:
            glance = _glance(self._path)
            seen = self._seen
            if seen is not None and seen.glance == glance:
                if seen.fault is not None:
                    raise BundleError(ReasonCode.POLICY_UNAVAILABLE, seen.fault)
                if seen.tag == tag:
                    return None
            for _ in range(MAX_TRIES):
                found = self._read()
                before, glance = glance, _glance(self._path)
                if before == glance:
                    break
            else:
                raise self._error("changes all the time; write it elsewhere, then rename it")
        except OSError as error:
            raise self._error(f"can not be read: {error.strerror}") from None
        if isinstance(found, BundleError):
            self._remember(glance, None, found.message)
            raise found
        digest = _digest(found)
        self._remember(glance, digest, None)
        return None if digest == tag else Fetched(files=found, tag=digest)

    def _remember(self, glance: _Glance, tag: str | None, fault: str | None) -> None:
        changed_at = max(look.changed_ns for look in glance) / 1e9
        is_old = self._clock() - changed_at > SETTLE_SECONDS
        self._seen = _Seen(glance, tag, fault) if is_old else None

    def _read(self) -> Files | BundleError:
        """What lies there, or why it is no bundle; another look tells whether it changed
        meanwhile. Raises OSError, SourceError.
        """
        is_directory = self._path.is_dir()
        if not is_directory:
            # Its checksum says when it is whole.
            with contextlib.suppress(BundleError):
                return read_archive(self._content(), place=self.place)
        self._sleep(SETTLE_SECONDS)
        try:
            if is_directory:
                return read_directory(self._path)
            return read_archive(self._content(), place=self.place)
        except BundleError as error:
            return error

    def _content(self) -> bytes:
        if self._path.exists() and not self._path.is_file():
            raise self._error("is neither a file nor a directory")
        with self._path.open("rb") as file:
            return file.read(MAX_ARCHIVE_BYTES + 1)

    def _error(self, what: str) -> SourceError:
        return fault_of(str(self._path), what)


def _glance(path: Path) -> _Glance:
    """Differs when anything that is read there does, and costs no reading. Raises OSError."""
    found = [_look(path, path.is_symlink())]
    folders, known = [str(path)], {(found[0].device, found[0].inode)}
    while folders and len(found) <= 2 * MAX_ENTRIES:  # past that it is refused anyway
        try:
            with os.scandir(folders.pop()) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue  # a file, or gone, which is in what was found
        for entry in entries:
            look = _look(entry, entry.is_symlink())
            found.append(look)
            # Hidden folders are not read, but the link "..data" of a ConfigMap is looked at.
            if entry.is_dir() and not entry.name.startswith("."):
                identity = look.device, look.inode
                if identity not in known:  # else a link led back
                    folders.append(entry.path)
                    known.add(identity)
    return tuple(found)


def _look(at: Path | os.DirEntry[str], is_link: bool) -> _Look:  # noqa: FBT001 - private
    """Raises OSError, but for what is not there."""
    try:
        target = str(Path(at).readlink()) if is_link else ""
        stat = at.stat()
    except FileNotFoundError:
        return _Look(os.fspath(at))
    return _Look(
        os.fspath(at),
        target,
        stat.st_dev,
        stat.st_ino,
        stat.st_size,
        stat.st_mtime_ns,
        stat.st_ctime_ns,
    )


def _digest(files: Files) -> str:
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(hashlib.sha256(name.encode()).digest())
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
