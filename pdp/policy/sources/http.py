"""A bundle from a web server, or from one that speaks OPA's bundle protocol.

https://www.openpolicyagent.org/docs/management-bundles: ETag, and ``Prefer`` for delta
bundles and for how long the server may hold the request.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Final

from pdp.config import HttpSource
from pdp.errors import PdpError
from pdp.http_connection import Connection, Reply, shown
from pdp.pace import Pace
from pdp.policy.archive import MAX_ARCHIVE_BYTES, read_archive
from pdp.policy.sources.source import Fetched, fault_of

MEDIA_TYPE: Final = "application/vnd.openpolicyagent.bundles"
"""By this type of a bundle a server says that it holds requests until there is a change."""
MAX_ETAG_LENGTH: Final = 1_024
LEAST_SECONDS: Final = 1.0
"""Between two requests, whatever the server says: one that promises to hold them and does
not is not asked all the time.
"""
_CONTENT_TAG: Final = re.compile(r"sha256:[0-9a-f]{64}")
"""The tag of what came without an ETag, which is quoted."""


class HttpBundleSource:
    """One URL. Redirects are not followed: the token goes where the settings say."""

    def __init__(
        self, settings: HttpSource, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        certificate, key = settings.client_certificate_file, settings.client_key_file
        self._settings = settings
        self._clock = clock
        self._connection = Connection(
            partial(fault_of, self.place),
            ca_file=settings.ca_file,
            client_certificate=(certificate, key) if certificate and key else None,
        )
        self._pace = Pace(settings.poll_seconds)
        self._asked_at = -LEAST_SECONDS
        self._given: str | None = None
        # What is in force may be from another source of the same settings, so that the
        # first request here is one that can be held.
        self._holds = self._held = settings.long_poll_seconds is not None

    @property
    def place(self) -> str:
        """The URL without its query."""
        return shown(self._settings.url)

    async def fetch(self, tag: str | None) -> Fetched | None:
        """What the server holds now or, with a tag, within long_poll_seconds.

        Raises SourceError, BundleError.
        """
        self._asked_at = self._clock()
        try:
            reply = await self._ask(tag)
            found = await self._read(reply, tag)
        except PdpError as error:
            self._pace.failed(error)
            raise
        self._pace.went_well()
        return found

    async def wait(self) -> None:
        """Return when it is time to ask again."""
        rest = max(0.0, LEAST_SECONDS - (self._clock() - self._asked_at))
        await asyncio.sleep(self._pace.seconds(regular=rest if self._held else None))

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _ask(self, tag: str | None) -> Reply:
        settings = self._settings
        headers = {"Prefer": "modes=snapshot"}
        timeout_seconds = settings.timeout_seconds
        if tag is not None and not _CONTENT_TAG.fullmatch(tag):
            headers["If-None-Match"] = tag
            headers["Prefer"] = "modes=snapshot,delta"
            if settings.long_poll_seconds is not None:
                headers["Prefer"] += f";wait={settings.long_poll_seconds}"
                timeout_seconds += settings.long_poll_seconds
        if settings.bearer_token_file is not None:
            token = await self._connection.secret(settings.bearer_token_file)
            headers["Authorization"] = f"Bearer {token}"
        return await self._connection.request(
            settings.url,
            headers=headers,
            max_bytes=MAX_ARCHIVE_BYTES,
            timeout_seconds=timeout_seconds,
        )

    async def _read(self, reply: Reply, tag: str | None) -> Fetched | None:
        if reply.status == HTTPStatus.NOT_MODIFIED and tag is not None:
            self._note(is_news=False)
            return None
        if reply.status != HTTPStatus.OK:
            raise self._connection.status_error(reply)
        etag = reply.headers.get("ETag") or None
        if etag is not None and not (etag.isascii() and etag.isprintable()):
            raise self._connection.error("has an ETag that is not printable")
        if etag is not None and len(etag) > MAX_ETAG_LENGTH:
            raise self._connection.error(f"has an ETag of more than {MAX_ETAG_LENGTH} characters")
        self._holds = (
            self._settings.long_poll_seconds is not None
            and etag is not None
            and reply.headers.get("Content-Type") == MEDIA_TYPE
        )
        found = etag if etag is not None else await asyncio.to_thread(_content_tag, reply.body)
        self._note(is_news=found not in {tag, self._given})
        self._given = found
        if found == tag:
            return None
        files = await asyncio.to_thread(read_archive, reply.body, place=self.place)
        return Fetched(files=files, tag=found)

    def _note(self, *, is_news: bool) -> None:
        """Whether this answer was held, as far as can be told: at once comes only news."""
        took_long = self._clock() - self._asked_at >= LEAST_SECONDS
        self._held = self._holds and (is_news or took_long)


def _content_tag(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"
