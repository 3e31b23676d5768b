"""An issuer's keys over HTTP: from a URL, or from where the issuer says that they are
(OpenID Connect Discovery 1.0).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pdp.canonical import JsonError, parse_object
from pdp.http_connection import Connection, shown
from pdp.identity.key_source import fault_of
from pdp.identity.keys import MAX_JWKS_BYTES, IssuerKey, JwksError, parse_jwks

REQUEST_SECONDS: Final = 5.0
"""Longest time for one request."""
MAX_DISCOVERY_BYTES: Final = 256 * 1024
MAX_URL_LENGTH: Final = 2_000
MAX_ETAG_LENGTH: Final = 1_024
_WELL_KNOWN: Final = "/.well-known/openid-configuration"


class JwksUrl:
    """A JWK set at one URL. Redirects are not followed."""

    def __init__(
        self, url: str, *, ca_file: Path | None, bearer_token_file: Path | None = None
    ) -> None:
        self._document = _Document(url, ca_file=ca_file, bearer_token_file=bearer_token_file)
        self._read: tuple[bytes, Mapping[str, IssuerKey]] | None = None

    @property
    def place(self) -> str:
        """The URL without its query."""
        return self._document.place

    async def fetch(self) -> Mapping[str, IssuerKey]:
        """What the server holds now. Raises KeySourceError."""
        data = await self._document.get(MAX_JWKS_BYTES)
        if self._read is None or self._read[0] != data:
            try:
                keys = await asyncio.to_thread(parse_jwks, data, strict=False)
            except JwksError as error:
                raise fault_of(self.place, str(error)) from None
            self._read = data, keys
        return self._read[1]

    async def close(self) -> None:
        """Close the connection."""
        await self._document.close()


class DiscoveredJwks:
    """The JWK set that an issuer's discovery document names. It must be of the issuer's own
    origin, and the document must name the issuer exactly.
    """

    def __init__(
        self, issuer: str, *, ca_file: Path | None, bearer_token_file: Path | None = None
    ) -> None:
        self._issuer = issuer
        self._ca_file = ca_file
        self._bearer_token_file = bearer_token_file
        self._document = _Document(
            issuer.removesuffix("/") + _WELL_KNOWN,
            ca_file=ca_file,
            bearer_token_file=bearer_token_file,
        )
        self._jwks: tuple[str, JwksUrl] | None = None

    @property
    def place(self) -> str:
        """The URL of the document."""
        return self._document.place

    async def fetch(self) -> Mapping[str, IssuerKey]:
        """What the issuer holds now. Raises KeySourceError."""
        url = self._jwks_uri(await self._document.get(MAX_DISCOVERY_BYTES))
        if self._jwks is None or self._jwks[0] != url:
            if self._jwks is not None:
                await self._jwks[1].close()
            self._jwks = (
                url,
                JwksUrl(url, ca_file=self._ca_file, bearer_token_file=self._bearer_token_file),
            )
        return await self._jwks[1].fetch()

    async def close(self) -> None:
        """Close the connections."""
        await self._document.close()
        if self._jwks is not None:
            await self._jwks[1].close()

    def _jwks_uri(self, document: bytes) -> str:
        try:
            members = parse_object(document, max_bytes=MAX_DISCOVERY_BYTES)
        except JsonError as error:
            raise fault_of(self.place, str(error)) from None
        if members.get("issuer") != self._issuer:
            raise fault_of(self.place, "names another issuer than the configuration does")
        url = members.get("jwks_uri")
        if not isinstance(url, str) or len(url) > MAX_URL_LENGTH or not url.isprintable():
            raise fault_of(self.place, "names no jwks_uri")
        if _origin(url) != _origin(self._issuer):
            raise fault_of(
                self.place,
                "names a jwks_uri at another origin than the issuer's: if that is meant, set"
                " jwks_url to it",
            )
        return url


class _Document:
    """What one URL holds, fetched only where it has changed."""

    def __init__(self, url: str, *, ca_file: Path | None, bearer_token_file: Path | None) -> None:
        self.place = shown(url)
        self._url = url
        self._bearer_token_file = bearer_token_file
        self._connection = Connection(partial(fault_of, self.place), ca_file=ca_file)
        self._held: tuple[str, bytes] | None = None

    async def get(self, max_bytes: int) -> bytes:
        """The document as it is now. Raises KeySourceError."""
        headers = {"Accept": "application/json, application/jwk-set+json"}
        if self._held is not None:
            headers["If-None-Match"] = self._held[0]
        if self._bearer_token_file is not None:
            token = await self._connection.secret(self._bearer_token_file)
            headers["Authorization"] = f"Bearer {token}"
        reply = await self._connection.request(
            self._url, headers=headers, max_bytes=max_bytes, timeout_seconds=REQUEST_SECONDS
        )
        if self._held is not None and reply.status == HTTPStatus.NOT_MODIFIED:
            return self._held[1]
        if reply.status != HTTPStatus.OK:
            raise self._connection.status_error(reply)
        etag = reply.headers.get("ETag", "")
        usable = 0 < len(etag) <= MAX_ETAG_LENGTH and etag.isascii() and etag.isprintable()
        self._held = (etag, reply.body) if usable else None
        return reply.body

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()


def _origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port; None for what is no URL, or holds credentials."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    default = {"https": 443, "http": 80}.get(parts.scheme)
    if default is None or not parts.hostname or parts.username is not None:
        return None
    return parts.scheme, parts.hostname, port or default
