"""HTTP for bundles: bounded, to one origin, and quiet about what it carries."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from multidict import CIMultiDictProxy

from pdp.policy.sources.source import SourceError
from pdp.reason import ReasonCode

MAX_HEADER_BYTES: Final = 16 * 1024
MAX_SECRET_BYTES: Final = 64 * 1024
CONNECT_SECONDS: Final = 10.0
_OK: Final = 200
FIRST_RETRY_SECONDS: Final = 1.0
MAX_RETRY_AFTER_SECONDS: Final = 3_600.0
"""Longest wait that a server can ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a server answered."""

    status: int
    headers: CIMultiDictProxy[str] = field(repr=False)
    body: bytes = field(repr=False)
    """Empty unless the status is 200: what else a server says is not read."""


class Connection:
    """Connections to one origin; made when first used, on the loop that uses them."""

    def __init__(
        self,
        place: str,
        *,
        ca_file: Path | None,
        client_certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self._place = place
        self._ca_file = ca_file
        self._client_certificate = client_certificate
        self._session: aiohttp.ClientSession | None = None

    async def get(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        max_bytes: int,
        timeout_seconds: float,
    ) -> Reply:
        """The answer to one GET; redirects are answers. Raises SourceError."""
        try:
            session = await self._open()
            async with (
                asyncio.timeout(timeout_seconds),
                session.get(
                    url,
                    headers={**headers, "Accept-Encoding": "identity"},
                    allow_redirects=False,
                ) as response,
            ):
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise self.error("is sent in an encoding that was not asked for")
                return Reply(
                    status=response.status,
                    headers=response.headers,
                    body=await self._body(response, max_bytes) if response.status == _OK else b"",
                )
        except TimeoutError:
            raise self.error(f"did not come within {timeout_seconds:g} seconds") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The error's text may hold the URL's query; its kind says enough.
            raise self.error(f"can not be reached ({_kind(error)})") from None

    def error(self, what: str) -> SourceError:
        """The error for this place; ``what`` follows its name."""
        return SourceError(
            ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {self._place} {what}."
        )

    def secret(self, path: Path) -> str:
        """A token or password, as its file has it now. Raises SourceError."""
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_SECRET_BYTES).strip()
        except (OSError, UnicodeError):
            raise self.error(f"can not be asked for: {path} can not be read") from None
        if not text or not text.isprintable():
            raise self.error(f"can not be asked for: {path} holds no single line of text")
        return text

    async def close(self) -> None:
        """Close what is open."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = await asyncio.to_thread(self._tls)
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=context, limit=4),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
                auto_decompress=False,
                trust_env=False,
                max_field_size=MAX_HEADER_BYTES,
            )
        return self._session

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self._ca_file)
            if self._client_certificate is not None:
                context.load_cert_chain(*self._client_certificate)
        except (OSError, ssl.SSLError):
            raise self.error("can not be asked for: a certificate or key can not be used") from None
        return context

    async def _body(self, response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
        too_large = self.error(f"is larger than {max_bytes} bytes")
        if (response.content_length or 0) > max_bytes:
            raise too_large
        body = bytearray()
        async for chunk in response.content.iter_chunked(64 * 1024):
            body += chunk
            if len(body) > max_bytes:
                raise too_large
        return bytes(body)


class Pace:
    """When to ask again: regularly, moved a little, and more rarely after failures."""

    def __init__(self, poll_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self._failures = 0
        self._asked_for: float | None = None

    def went_well(self) -> None:
        """The server answered."""
        self._failures, self._asked_for = 0, None

    def failed(self, retry_after: str | None = None) -> None:
        """It did not; it may have said how long to leave it alone (whole seconds)."""
        self._failures += 1
        known = retry_after is not None and retry_after.isascii() and retry_after.isdecimal()
        self._asked_for = (
            min(float(retry_after), MAX_RETRY_AFTER_SECONDS) if known and retry_after else None
        )

    def seconds(self, *, at_once: bool = False) -> float:
        """How long to wait now; ``at_once`` when the last answer was waited for."""
        if self._asked_for is not None:
            return self._asked_for
        if self._failures:
            longest = FIRST_RETRY_SECONDS * 2.0 ** min(self._failures - 1, 16)
            return random.uniform(0.5, 1.0) * min(longest, self._poll_seconds)  # noqa: S311 - jitter
        if at_once:
            return 0.0
        return random.uniform(0.9, 1.1) * self._poll_seconds  # noqa: S311 - jitter


def shown(url: str) -> str:
    """A URL without what may be secret: user, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def status_error(connection: Connection, status: int) -> SourceError:
    """What a status means for whoever runs the sidecar."""
    return connection.error(_MEANINGS.get(status, f"was answered with status {status}"))


_MEANINGS: Final = {
    301: "is elsewhere (301): name the address that it is at",
    302: "is elsewhere (302): name the address that it is at",
    307: "is elsewhere (307): name the address that it is at",
    308: "is elsewhere (308): name the address that it is at",
    401: "was refused (401): check the credentials",
    403: "was refused (403): check what the credentials may read",
    404: "is not there (404): check the address",
    429: "was asked for too often (429)",
    503: "is not to be had now (503)",
}


def _kind(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return "its certificate is not one that is trusted here"
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS was refused"
    return type(error).__name__
