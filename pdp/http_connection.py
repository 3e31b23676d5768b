"""HTTP for what is fetched from elsewhere: bounded, to one origin, and quiet about what it
carries.
"""

from __future__ import annotations

import asyncio
import email.utils
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from multidict import CIMultiDictProxy
from yarl import URL

from pdp.errors import FetchError

MAX_HEADER_BYTES: Final = 16 * 1024
MAX_SECRET_BYTES: Final = 64 * 1024
CONNECT_SECONDS: Final = 10.0
OK: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a server answered."""

    status: int
    headers: CIMultiDictProxy[str] = field(repr=False)
    body: bytes = field(repr=False)
    """Empty unless the status is 200: what else a server says is not read."""


class Connection:
    """Connections to one origin; made when first used, on the loop that uses them.

    Certificates and keys are read anew when their files change, so that they can be
    rotated. No proxy, cookie or credential of the environment is used. ``fault`` makes
    the error for what goes wrong: its text follows the name of what is fetched.
    """

    def __init__(
        self,
        fault: Callable[[str], FetchError],
        *,
        ca_file: Path | None,
        client_certificate: tuple[Path, Path] | None = None,
    ) -> None:
        self.error = fault
        self._ca_file = ca_file
        self._client_certificate = client_certificate
        self._session: aiohttp.ClientSession | None = None
        self._certificates: tuple[tuple[int, ...], ...] = ()

    async def request(
        self,
        url: str,
        *,
        headers: Mapping[str, str],
        max_bytes: int,
        timeout_seconds: float,
        method: Literal["GET", "HEAD"] = "GET",
    ) -> Reply:
        """What one request is answered with; a redirect is an answer. Raises FetchError."""
        try:
            async with asyncio.timeout(timeout_seconds):
                session = await self._open()
                async with session.request(
                    method,
                    # As it stands: a signed query may not be written in another way.
                    URL(url, encoded=url.isascii()),
                    headers={**headers, "Accept-Encoding": "identity"},
                    allow_redirects=False,
                ) as response:
                    wanted = response.status == OK and method == "GET"
                    body = await self._body(response, max_bytes) if wanted else b""
                    return Reply(status=response.status, headers=response.headers, body=body)
        except TimeoutError:
            raise self.error(f"did not come within {timeout_seconds:g} seconds") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # The error's text may hold the URL's query; its kind says enough.
            raise self.error(f"can not be fetched: {_kind(error)}") from None

    def status_error(self, reply: Reply) -> FetchError:
        """What a status means for whoever runs the sidecar."""
        error = self.error(_MEANINGS.get(reply.status, f"was answered with status {reply.status}"))
        error.status = reply.status
        error.retry_after_seconds = _retry_after(reply.headers)
        return error

    async def secret(self, path: Path) -> str:
        """A token or password, as its file has it now. Raises FetchError."""

        def read() -> bytes:
            with path.open("rb") as file:
                return file.read(MAX_SECRET_BYTES + 1)

        try:
            content = await asyncio.to_thread(read)
        except OSError:
            raise self.error(f"can not be asked for: {path} can not be read") from None
        text = content.decode("utf-8", errors="replace").strip()
        if not text.isprintable() or not text or len(content) > MAX_SECRET_BYTES:
            raise self.error(f"can not be asked for: {path} holds no single line of text")
        return text

    async def close(self) -> None:
        """Close what is open."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _open(self) -> aiohttp.ClientSession:
        certificates = await asyncio.to_thread(self._certificates_now)
        if self._session is not None and certificates == self._certificates:
            return self._session
        await self.close()
        context = await asyncio.to_thread(self._tls)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            auto_decompress=False,
            trust_env=False,
            max_field_size=MAX_HEADER_BYTES,
        )
        self._certificates = certificates
        return self._session

    def _certificates_now(self) -> tuple[tuple[int, ...], ...]:
        """Changes when a file of certificates or keys does."""
        files = [self._ca_file] if self._ca_file is not None else []
        files += self._client_certificate or ()
        try:
            found = [file.stat() for file in files]
        except OSError:
            raise self._unusable() from None
        return tuple((one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found)

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self._ca_file)
            if self._client_certificate is not None:
                # With no password given, OpenSSL would ask for it on the terminal.
                context.load_cert_chain(*self._client_certificate, password="")
        except (OSError, ValueError):
            raise self._unusable() from None
        return context

    def _unusable(self) -> FetchError:
        return self.error("can not be asked for: a certificate or key can not be used")

    async def _body(self, response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
        """Raises FetchError, and what aiohttp does."""
        if set(response.headers.getall("Content-Encoding", ())) - {"identity"}:
            raise self.error("is sent with a Content-Encoding: let the server send it as it is")
        if (response.content_length or 0) > max_bytes:
            raise self.error(f"is larger than {max_bytes} bytes")
        chunks = []
        left = max_bytes
        async for chunk in response.content.iter_any():
            left -= len(chunk)
            if left < 0:
                raise self.error(f"is larger than {max_bytes} bytes")
            chunks.append(chunk)
        return b"".join(chunks)


def shown(url: str) -> str:
    """A URL without what may be secret: user, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """RFC 9110 10.2.3: seconds, or a date, which is taken by the server's own clock."""
    value = headers.get("Retry-After", "")
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        until, now = (
            email.utils.parsedate_to_datetime(text) for text in (value, headers.get("Date", ""))
        )
        return (until - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None


_ELSEWHERE: Final = "is elsewhere: name the address that it is at"
_MEANINGS: Final = {
    **{status: f"{_ELSEWHERE} (status {status})" for status in (301, 302, 303, 307, 308)},
    401: "was refused: check the credentials (status 401)",
    403: "was refused: check what the credentials may read (status 403)",
    404: "is not there: check the address (status 404)",
    429: "was asked for too often: raise poll_seconds (status 429)",
    503: "can not be had now: check the server (status 503)",
}


def _kind(error: Exception) -> str:
    for kind, meaning in _KINDS.items():
        if isinstance(error, kind):
            return meaning
    return type(error).__name__


_KINDS: Final[Mapping[type[Exception], str]] = {
    aiohttp.ClientConnectorCertificateError: "the server's certificate is not one to be trusted",
    aiohttp.ClientSSLError: "the server refuses TLS",
    ssl.SSLError: "the server refuses TLS",
    aiohttp.ClientConnectorDNSError: "the server's name is not known",
    aiohttp.ClientConnectorError: "the server can not be reached",
    aiohttp.ClientPayloadError: "the answer broke off",
    aiohttp.ClientConnectionError: "the server hung up",
    aiohttp.ClientResponseError: "the answer is not HTTP",
}
