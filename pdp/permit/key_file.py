"""The public permit keys of others, in a file that is read again when it changes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pdp.permit.claims import PermitError
from pdp.permit.keys import PermitKeySet
from pdp.permit.ring import LOOK_SECONDS, file_mark
from pdp.reason import ReasonCode

_log: Final = logging.getLogger(__name__)


class PublicKeyFile:
    """A JWK set of another trust domain's sidecars.

    Whatever becomes of the file, the last good keys stay in force.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises PermitError."""
        self._path = path
        self._seen = file_mark(path)
        self.keys = _read(path)

    def find(self, kid: str) -> Ed25519PublicKey | None:
        """The key of that id."""
        return self.keys.find(kid)

    async def keep_looking(self) -> None:
        """Take up what the file says, whenever it changes."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Take up what the file says, if it has changed."""
        mark = await asyncio.to_thread(file_mark, self._path)
        if mark == self._seen:
            return
        self._seen = mark
        try:
            self.keys = await asyncio.to_thread(_read, self._path)
        except PermitError as error:
            _log.error("%s The keys that were read before stay in force.", error.message)


def _read(path: Path) -> PermitKeySet:
    try:
        return PermitKeySet.from_file(path)
    except OSError as error:
        raise PermitError(
            ReasonCode.PERMIT_UNAVAILABLE, f"The keys {path} can not be read: {error.strerror}."
        ) from None
    except PermitError as error:
        raise PermitError(error.reason_code, f"{path}: {error.message}") from None
