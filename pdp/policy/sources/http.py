"""A bundle from a web server, or from one that speaks OPA's bundle protocol.

https://www.openpolicyagent.org/docs/management-bundles: ETag, ``Prefer`` for delta
bundles and for how long the server may hold the request.
"""

from __future__ import annotations

import asyncio
import hashlib
from http import HTTPStatus
from typing import Final

from pdp.config import HttpSource
from pdp.policy.archive import MAX_ARCHIVE_BYTES, read_archive
from pdp.policy.sources.connection import Connection, Pace, Reply, shown, status_error
from pdp.policy.sources.source import Fetched, SourceError

MEDIA_TYPE: Final = "application/vnd.openpolicyagent.bundles"
"""Says that the server holds requests open."""
MAX_TAG_LENGTH: Final = 1_024
_GRACE_SECONDS: Final = 10.0
"""Beyond what the server may hold a request open."""


class HttpBundleSource:
    """One URL."""

    def __init__(self, settings: HttpSource) -> None:
        certificate, key = settings.client_certificate_file, settings.client_key_file
        self._settings = settings
        self._connection = Connection(
            self.place,
            ca_file=settings.ca_file,
            client_certificate=(certificate, key) if certificate and key else None,
        )
        self._pace = Pace(settings.poll_seconds)
        self._holds = False

    @property
    def place(self) -> str:
        """The URL without its query."""
        return shown(self._settings.url)

    async def fetch(self, tag: str | None) -> Fetched | None:
        """What the server holds now, or will hold within long_poll_seconds.

        Raises SourceError, BundleError.
        """
        try:
            reply = await self._ask(tag)
        except SourceError:
            self._pace.failed()
            raise
        if reply.status not in {HTTPStatus.OK, HTTPStatus.NOT_MODIFIED} or (
            reply.status == HTTPStatus.NOT_MODIFIED and tag is None
        ):
            self._pace.failed(reply.headers.get("Retry-After"))
            raise status_error(self._connection, reply.status)
        self._pace.went_well()
        self._holds = reply.headers.get("Content-Type") == MEDIA_TYPE
        if reply.status == HTTPStatus.NOT_MODIFIED:
            return None
        found = reply.headers.get("ETag") or f"sha256:{hashlib.sha256(reply.body).hexdigest()}"
        if len(found) > MAX_TAG_LENGTH or not found.isprintable():
            raise self._connection.error("has an ETag that is too long or not printable")
        if found == tag:
            return None
        files = await asyncio.to_thread(read_archive, reply.body, place=self.place)
        return Fetched(files=files, tag=found)

    async def wait(self) -> None:
        """Return when it is time to ask again."""
        held = self._holds and self._settings.long_poll_seconds is not None
        await asyncio.sleep(self._pace.seconds(at_once=held))

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _ask(self, tag: str | None) -> Reply:
        settings = self._settings
        headers = {"Prefer": "modes=snapshot"}
        timeout_seconds = settings.timeout_seconds
        if tag is not None:
            headers["Prefer"] = "modes=snapshot,delta"
            if not tag.startswith("sha256:"):
                headers["If-None-Match"] = tag
            if settings.long_poll_seconds is not None:
                headers["Prefer"] += f";wait={settings.long_poll_seconds}"
                timeout_seconds = settings.long_poll_seconds + _GRACE_SECONDS
        if settings.bearer_token_file is not None:
            token = await asyncio.to_thread(self._connection.secret, settings.bearer_token_file)
            headers["Authorization"] = f"Bearer {token}"
        return await self._connection.get(
            settings.url,
            headers=headers,
            max_bytes=MAX_ARCHIVE_BYTES,
            timeout_seconds=timeout_seconds,
        )
