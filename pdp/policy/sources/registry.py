"""Requests to an OCI registry, with the credentials that it asks for.

The pull part of the OCI distribution specification 1.1, and the token flow of the
Docker registry: https://distribution.github.io/distribution/spec/auth/token/
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Literal
from urllib.parse import urlencode, urljoin, urlsplit

from pdp.config import OciSource, is_loopback
from pdp.http_connection import OK, Connection, Reply
from pdp.policy.sources.source import fault_of

MAX_TOKEN_BYTES: Final = 64 * 1024
TOKEN_SECONDS: Final = 60.0
"""How long a registry's token lasts that does not say so itself."""
MAX_TOKEN_SECONDS: Final = 3_600.0
"""Longest time that one is used."""
_PARAMETER: Final = re.compile(r'([A-Za-z]+)="([^"\\]*)"')
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_UNAUTHORIZED: Final = 401


@dataclass(frozen=True, slots=True)
class _Token:
    header: str = field(repr=False)
    ends_at: float


class Registry:
    """One repository of one registry, to read from."""

    def __init__(
        self,
        settings: OciSource,
        *,
        host: str,
        repository: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._repository = repository
        scheme = "http" if settings.plain_http else "https"
        self._url = f"{scheme}://{host}/v2/{repository}"
        self._connection = Connection(partial(fault_of, settings.image), ca_file=settings.ca_file)
        self._clock = clock
        self._token: _Token | None = None
        self._wants_password = False
        self.error = self._connection.error

    async def manifest(
        self,
        reference: str,
        *,
        accept: Sequence[str],
        max_bytes: int,
        method: Literal["GET", "HEAD"] = "GET",
    ) -> Reply:
        """A manifest by its tag or digest, or only its headers. Raises SourceError."""
        url = f"{self._url}/manifests/{reference}"
        reply = await self._authorized(url, ", ".join(accept), max_bytes, method)
        if reply.status != OK:
            raise self._connection.status_error(reply)
        return reply

    async def blob(self, digest: str, *, max_bytes: int) -> bytes:
        """A blob, be it kept elsewhere; whether it is what its digest says is not checked
        here. Raises SourceError.
        """
        url = f"{self._url}/blobs/{digest}"
        reply = await self._authorized(url, "*/*", max_bytes)
        if reply.status in _REDIRECTS:
            elsewhere = self._safe(reply.headers.get("Location", ""), base=url)
            if elsewhere is None:
                raise self.error("is redirected to an address that is not https")
            reply = await self._ask(elsewhere, "*/*", None, max_bytes)
            if reply.status in _REDIRECTS:
                raise self.error("is redirected more than once")
        if reply.status != OK:
            raise self._connection.status_error(reply)
        return reply.body

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _authorized(
        self, url: str, accept: str, max_bytes: int, method: Literal["GET", "HEAD"] = "GET"
    ) -> Reply:
        """The answer to a request with the credentials that the registry is known to want,
        or else says that it wants.
        """
        reply = await self._ask(url, accept, await self._known(), max_bytes, method)
        if reply.status == _UNAUTHORIZED:
            header = await self._wanted(reply.headers.getall("WWW-Authenticate", ()))
            if header is not None:
                reply = await self._ask(url, accept, header, max_bytes, method)
        return reply

    async def _ask(
        self,
        url: str,
        accept: str,
        authorization: str | None,
        max_bytes: int,
        method: Literal["GET", "HEAD"] = "GET",
    ) -> Reply:
        headers = {"Accept": accept}
        if authorization is not None:
            headers["Authorization"] = authorization
        return await self._connection.request(
            url,
            headers=headers,
            max_bytes=max_bytes,
            timeout_seconds=self._settings.timeout_seconds,
            method=method,
        )

    async def _known(self) -> str | None:
        """The Authorization header, where it is known already what the registry wants."""
        if self._wants_password:
            return await self._password()
        if self._token is not None and self._clock() < self._token.ends_at:
            return self._token.header
        return None

    async def _wanted(self, challenges: Sequence[str]) -> str | None:
        """The Authorization header that the registry asks for, if there is one to give."""
        by_scheme: dict[str, str] = {}
        for challenge in challenges:
            scheme, _, rest = challenge.strip().partition(" ")
            by_scheme.setdefault(scheme.lower(), rest)
        self._token, self._wants_password = None, False
        if "bearer" in by_scheme:
            self._token = await self._new_token(dict(_PARAMETER.findall(by_scheme["bearer"])))
            return self._token.header  # once even if it has ended already
        self._wants_password = "basic" in by_scheme
        return await self._known()

    async def _password(self) -> str | None:
        user_file, password_file = self._settings.username_file, self._settings.password_file
        if user_file is None or password_file is None:
            return None
        user = await self._connection.secret(user_file)
        password = await self._connection.secret(password_file)
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    async def _new_token(self, challenge: Mapping[str, str]) -> _Token:
        """A token to pull from this repository, whatever scope the challenge names."""
        realm = self._safe(challenge.get("realm", ""))
        if realm is None:
            raise self.error("asks for a token at an address that is not https")
        query = {"scope": f"repository:{self._repository}:pull"}
        if "service" in challenge:
            query["service"] = challenge["service"]
        reply = await self._ask(
            f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}",
            "application/json",
            await self._password(),
            MAX_TOKEN_BYTES,
        )
        if reply.status != OK:
            raise self._connection.status_error(reply)
        try:
            answer = json.loads(reply.body)
            token = answer.get("token") or answer["access_token"]
            lasts = float(answer.get("expires_in") or TOKEN_SECONDS)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise self.error("is kept by a registry whose token can not be read") from None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self.error("is kept by a registry whose token can not be read")
        # A little before it ends, so that it does not end on the way.
        return _Token(f"Bearer {token}", self._clock() + 0.9 * min(lasts, MAX_TOKEN_SECONDS))

    def _safe(self, named: str, base: str = "") -> str | None:
        """An address that the registry names, if it is https or, like the registry itself,
        plain on loopback.
        """
        if not named.isascii() or not named.isprintable() or "#" in named:
            return None
        try:
            url = urljoin(base, named)
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError:
            return None
        if not host or "@" in parts.netloc:
            return None
        plain = self._settings.plain_http and is_loopback(f"{host}:0")
        return url if parts.scheme == "https" or (parts.scheme == "http" and plain) else None
