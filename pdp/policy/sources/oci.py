"""A bundle from an OCI registry.

The pull part of the OCI distribution specification 1.1, for one layer of one manifest,
as OPA, oras and the policy CLI push bundles. Digests are verified; nothing is written
to disk.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlencode, urljoin, urlsplit

from pdp.config import OciSource, is_loopback
from pdp.policy.archive import MAX_ARCHIVE_BYTES, read_archive
from pdp.policy.sources.connection import Connection, Pace, Reply, status_error
from pdp.policy.sources.source import Fetched, SourceError

MAX_MANIFEST_BYTES: Final = 4 * 1024 * 1024
MAX_TOKEN_BYTES: Final = 64 * 1024
TOKEN_SECONDS: Final = 60.0
"""How long a registry's token lasts that does not say so itself."""
_MANIFESTS: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_LAYER: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_CHALLENGE: Final = re.compile(r'([A-Za-z]+)="([^"\\]*)"')
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_OK: Final = 200
_UNAUTHORIZED: Final = 401


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What an image reference names."""

    registry: str
    repository: str
    reference: str
    """A digest, or else a tag."""

    @classmethod
    def parse(cls, text: str) -> Image:
        """From REGISTRY/REPOSITORY[:TAG][@DIGEST]; a digest goes before a tag."""
        name, _, digest = text.partition("@")
        registry, _, path = name.partition("/")
        repository, _, tag = path.partition(":")
        return cls(registry=registry, repository=repository, reference=digest or tag or "latest")

    @property
    def is_fixed(self) -> bool:
        """Whether nothing else can ever be put in its place."""
        return _DIGEST.fullmatch(self.reference) is not None


@dataclass(frozen=True, slots=True)
class _Token:
    header: str = field(repr=False)
    ends_at: float


class OciBundleSource:
    """One image reference."""

    def __init__(self, settings: OciSource, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._image = Image.parse(settings.image)
        self._origin = f"{'http' if settings.plain_http else 'https'}://{self._image.registry}"
        self._connection = Connection(self.place, ca_file=settings.ca_file)
        self._pace = Pace(settings.poll_seconds)
        self._clock = clock
        self._token: _Token | None = None
        self._is_settled = False

    @property
    def place(self) -> str:
        """The image reference."""
        return self._settings.image

    async def fetch(self, tag: str | None) -> Fetched | None:
        """What the reference names now. Raises SourceError, BundleError."""
        if self._is_settled and tag == self._image.reference:
            return None
        try:
            digest, manifest = await self._manifest(self._image.reference)
            if manifest.get("mediaType") in _INDEXES or "manifests" in manifest:
                entries = manifest.get("manifests")
                if not isinstance(entries, list) or len(entries) != 1:
                    raise self._connection.error("is an index of other than one manifest")
                _, manifest = await self._manifest(self._descriptor(entries[0])[0])
            if digest == tag:
                found = None
            else:
                found = await self._layer(manifest)
        except SourceError:
            self._pace.failed()
            raise
        self._pace.went_well()
        self._is_settled = self._image.is_fixed
        if found is None:
            return None
        files = await asyncio.to_thread(read_archive, found, place=self.place)
        return Fetched(files=files, tag=digest)

    async def wait(self) -> None:
        """Return when it is time to look at the tag again."""
        await asyncio.sleep(self._pace.seconds())

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def _manifest(self, reference: str) -> tuple[str, dict[str, Any]]:
        """A manifest or index, and its digest."""
        reply = await self._get(
            f"manifests/{reference}",
            accept=", ".join(_MANIFESTS + _INDEXES),
            max_bytes=MAX_MANIFEST_BYTES,
        )
        digest = f"sha256:{hashlib.sha256(reply.body).hexdigest()}"
        if _DIGEST.fullmatch(reference) and digest != reference:
            raise self._connection.error("has a manifest that is not what its digest says")
        try:
            manifest = json.loads(reply.body)
        except (ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict):
            raise self._connection.error("has a manifest that is not JSON")
        return digest, manifest

    async def _layer(self, manifest: Mapping[str, Any]) -> bytes:
        layers = manifest.get("layers")
        for layer in layers if isinstance(layers, list) else ():
            if isinstance(layer, dict) and layer.get("mediaType") == _LAYER:
                digest, size = self._descriptor(layer)
                break
        else:
            raise self._connection.error(f"has no layer of type {_LAYER}")
        if size > MAX_ARCHIVE_BYTES:
            raise self._connection.error(f"is larger than {MAX_ARCHIVE_BYTES} bytes")
        reply = await self._get(f"blobs/{digest}", accept=_LAYER, max_bytes=size)
        if f"sha256:{hashlib.sha256(reply.body).hexdigest()}" != digest:
            raise self._connection.error("has a layer that is not what its digest says")
        return reply.body

    def _descriptor(self, value: object) -> tuple[str, int]:
        """Digest and size of what a descriptor points to."""
        digest, size = (
            (value.get("digest"), value.get("size")) if isinstance(value, dict) else (None, None)
        )
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise self._connection.error("points to something without a sha256 digest")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise self._connection.error("points to something without a size")
        return digest, size

    async def _get(self, path: str, *, accept: str, max_bytes: int) -> Reply:
        url = f"{self._origin}/v2/{self._image.repository}/{path}"
        reply = await self._ask(url, accept, await self._authorization(None), max_bytes)
        if reply.status == _UNAUTHORIZED:
            self._token = None
            challenge = reply.headers.get("WWW-Authenticate", "")
            authorization = await self._authorization(challenge)
            if authorization is not None:
                reply = await self._ask(url, accept, authorization, max_bytes)
        if reply.status in _REDIRECTS:
            reply = await self._follow(url, reply, accept, max_bytes)
        if reply.status != _OK:
            self._pace.failed(reply.headers.get("Retry-After"))
            raise status_error(self._connection, reply.status)
        return reply

    async def _ask(self, url: str, accept: str, authorization: str | None, max_bytes: int) -> Reply:
        headers = {"Accept": accept}
        if authorization is not None:
            headers["Authorization"] = authorization
        return await self._connection.get(
            url,
            headers=headers,
            max_bytes=max_bytes,
            timeout_seconds=self._settings.timeout_seconds,
        )

    async def _follow(self, url: str, reply: Reply, accept: str, max_bytes: int) -> Reply:
        """Once, to where registries keep their blobs, and without credentials."""
        target = urljoin(url, reply.headers.get("Location", ""))
        if not self._may_ask(target):
            raise self._connection.error("is redirected to an address that is not https")
        return await self._ask(target, accept, None, max_bytes)

    async def _authorization(self, challenge: str | None) -> str | None:
        """The Authorization header: what is known already, or what a challenge asks for."""
        if self._token is not None and self._clock() < self._token.ends_at:
            return self._token.header
        if challenge is None:
            return None
        scheme, _, rest = challenge.partition(" ")
        if scheme.lower() == "basic":
            return await self._basic()
        if scheme.lower() != "bearer":
            return None
        self._token = await self._new_token(dict(_CHALLENGE.findall(rest)))
        return self._token.header

    async def _basic(self) -> str | None:
        user_file, password_file = self._settings.username_file, self._settings.password_file
        if user_file is None or password_file is None:
            return None
        user = await asyncio.to_thread(self._connection.secret, user_file)
        password = await asyncio.to_thread(self._connection.secret, password_file)
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    async def _new_token(self, challenge: Mapping[str, str]) -> _Token:
        realm = challenge.get("realm", "")
        if not self._may_ask(realm):
            raise self._connection.error("asks for a token at an address that is not https")
        query = {"scope": f"repository:{self._image.repository}:pull"}
        if "service" in challenge:
            query["service"] = challenge["service"]
        reply = await self._ask(
            f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}",
            "application/json",
            await self._basic(),
            MAX_TOKEN_BYTES,
        )
        if reply.status != _OK:
            raise status_error(self._connection, reply.status)
        try:
            answer = json.loads(reply.body)
            token = answer.get("token") or answer["access_token"]
            lasts = float(answer.get("expires_in", TOKEN_SECONDS))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self._connection.error("gives a token that can not be read") from None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self._connection.error("gives a token that can not be read")
        # A little before it ends, so that it does not end on the way.
        return _Token(f"Bearer {token}", self._clock() + 0.9 * min(lasts, 86_400.0))

    def _may_ask(self, url: str) -> bool:
        parts = urlsplit(url)
        if parts.hostname is None or "@" in parts.netloc:
            return False
        plain = self._settings.plain_http and is_loopback(f"{parts.hostname}:0")
        return parts.scheme == "https" or (parts.scheme == "http" and plain)
