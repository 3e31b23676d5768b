"""A file of keys that is read again when it changes."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

from pdp.permit.claims import PermitError

LOOK_SECONDS: Final = 1.0
"""How often the file is looked at."""

_T = TypeVar("_T")
_log: Final = logging.getLogger(__name__)


class FollowedKeys(ABC, Generic[_T]):
    """The keys of a file. Whatever becomes of the file, the last good keys stay in force."""

    def __init__(self, path: Path, read: Callable[[Path], _T]) -> None:
        """``read`` raises PermitError, and so does this for the first time."""
        self._path = path
        self._read = read
        self._seen = _mark(path)
        self._take(read(path))

    async def keep_looking(self) -> None:
        """Take up what the file says, whenever it changes."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Take up what the file says, if it has changed."""
        mark = await asyncio.to_thread(_mark, self._path)
        if mark == self._seen:
            return
        self._seen = mark
        try:
            keys = await asyncio.to_thread(self._read, self._path)
        except PermitError as error:
            _log.error("%s The keys that were read before stay in force.", error.message)
        else:
            self._take(keys)
            self._changed()

    @abstractmethod
    def _take(self, keys: _T) -> None:
        """Put keys in force."""

    def _changed(self) -> None:
        """Other keys are in force than before."""


def _mark(path: Path) -> tuple[int, ...] | None:
    """What changes when the file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode)
