"""Which tenant an organisation is, from a file that may change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from pdp.canonical import JsonError, parse_object
from pdp.errors import PdpError
from pdp.identity.subject import MAX_ORGANISATION_LENGTH, TENANT_PATTERN
from pdp.reason import ReasonCode

MAX_BYTES: Final = 32 * 1024 * 1024
MAX_ORGANISATIONS: Final = 100_000
LOOK_SECONDS: Final = 0.5

_log: Final = logging.getLogger(__name__)


class OrganisationFileError(PdpError):
    """The file can not be used; the message names it and what is wrong."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(ReasonCode.TENANT_UNKNOWN, f"The organisations in {path} {what}.")


class OrganisationFile:
    """The Organisations port on a JSON file: {"organisation id": "tenant id"}."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises OrganisationFileError."""
        self._path = path
        self._seen = self._version()
        self._tenants = _read(path)
        self._failing = False

    def get(self, organisation: str, /) -> str | None:
        """See Organisations.get."""
        return self._tenants.get(organisation)

    async def keep_looking(self, changed: Callable[[], None]) -> None:
        """Look twice a second whether it has changed. One that can not be used leaves what
        was read before in force. ``changed`` is called once another one is.
        """
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            before = self._tenants
            await self.look()
            if self._tenants is not before:
                changed()

    async def look(self) -> None:
        """Take the file up, if it has changed."""
        try:
            version = await asyncio.to_thread(self._version)
            if version != self._seen:
                self._tenants = await asyncio.to_thread(_read, self._path)
                self._seen = version
                _log.info("the organisations in %s are in force", self._path)
            self._failing = False
        except OrganisationFileError as error:
            if not self._failing:
                _log.error("%s Those that were read before stay in force.", error.message)
            self._failing = True

    def _version(self) -> tuple[int, int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise OrganisationFileError(self._path, f"can not be read: {error.strerror}") from None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> Mapping[str, str]:
    try:
        with path.open("rb") as file:
            members = parse_object(file.read(MAX_BYTES + 1), max_bytes=MAX_BYTES)
    except OSError as error:
        raise OrganisationFileError(path, f"can not be read: {error.strerror}") from None
    except JsonError as error:
        raise OrganisationFileError(path, f"can not be read: {error}") from None
    if not 0 < len(members) <= MAX_ORGANISATIONS:
        raise OrganisationFileError(path, f"must be 1 to {MAX_ORGANISATIONS}")
    tenants = {}
    for organisation, tenant in members.items():
        if not 0 < len(organisation) <= MAX_ORGANISATION_LENGTH:
            raise OrganisationFileError(
                path, f"hold an id that is not 1 to {MAX_ORGANISATION_LENGTH} characters long"
            )
        if not isinstance(tenant, str) or not TENANT_PATTERN.fullmatch(tenant):
            raise OrganisationFileError(path, "hold what is no tenant's id")
        tenants[organisation] = tenant
    return tenants
