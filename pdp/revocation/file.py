"""Revocations in a file of the state directory, or in one that is mounted."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pdp.private_files import replace
from pdp.revocation.revocations import (
    MAX_BYTES,
    MAX_REVOCATIONS,
    Known,
    Revocation,
    RevocationError,
    Target,
    from_json,
    to_json,
)


class RevocationFile:
    """The RevocationStore port on one file. Without the file, nothing is revoked."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def version(self) -> str:
        """See RevocationStore.version."""
        return await asyncio.to_thread(self._version)

    async def read(self) -> Known:
        """See RevocationStore.read."""
        return await asyncio.to_thread(self._read)

    async def add(self, revocation: Revocation) -> None:
        """See RevocationStore.add."""

        def change(known: dict[Target, Revocation]) -> bool:
            known[revocation.target] = revocation
            if len(known) > MAX_REVOCATIONS:
                raise RevocationError(
                    f"There are {MAX_REVOCATIONS} revocations already: lift some first."
                )
            return True

        await asyncio.to_thread(self._change, change)

    async def lift(self, target: Target) -> bool:
        """See RevocationStore.lift."""
        return await asyncio.to_thread(
            self._change, lambda known: known.pop(target, None) is not None
        )

    def _version(self) -> str:
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return "none"
        except OSError as error:
            raise self._failed("read", error) from None
        return f"{found.st_dev}.{found.st_ino}.{found.st_mtime_ns}.{found.st_size}"

    def _read(self) -> Known:
        try:
            with self._path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._failed("read", error) from None
        try:
            return from_json(content)
        except ValueError as error:
            raise RevocationError(f"{self._path} {error}.") from None

    def _change(self, change: Callable[[dict[Target, Revocation]], bool]) -> bool:
        with self._locked():
            known = dict(self._read())
            if not change(known):
                return False
            try:
                replace(self._path, lambda: to_json(known.values()))
            except OSError as error:
                raise self._failed("written", error) from None
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time, of all processes."""
        lock = self._path.with_name(f"{self._path.name}.lock")
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self._failed("written", error) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _failed(self, what: str, error: OSError) -> RevocationError:
        return RevocationError(f"{self._path} can not be {what}: {error.strerror}.")
