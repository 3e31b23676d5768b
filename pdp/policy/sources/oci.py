"""A bundle from an OCI registry: one layer of one manifest, as OPA, oras and the policy
CLI push it. Digests are verified; nothing is written to disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pdp.config import OciSource
from pdp.errors import PdpError
from pdp.pace import Pace
from pdp.policy.archive import MAX_ARCHIVE_BYTES, read_archive
from pdp.policy.sources.registry import Registry
from pdp.policy.sources.source import Fetched

MAX_MANIFEST_BYTES: Final = 256 * 1024
"""Some hundred times what the manifest of one layer needs."""
_MANIFESTS: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_LAYERS: Final = (
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar",  # what oras says of a .tar.gz unless told better
)
_ATTESTATION: Final = {"os": "unknown", "architecture": "unknown"}
"""The platform of what buildx adds to an index: provenance, no bundle."""
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_HOSTS: Final = {"docker.io": "registry-1.docker.io"}
"""Registries that answer at another name than images give them."""


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


class OciBundleSource:
    """One image reference."""

    def __init__(self, settings: OciSource, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._image = Image.parse(settings.image)
        self._place = settings.image
        self._pace = Pace(settings.poll_seconds)
        self._registry = Registry(
            settings,
            host=_HOSTS.get(self._image.registry, self._image.registry),
            repository=self._image.repository,
            clock=clock,
        )

    @property
    def place(self) -> str:
        """The image reference."""
        return self._place

    async def fetch(self, tag: str | None) -> Fetched | None:
        """What the reference names now; the tag is its digest. Raises SourceError, BundleError."""
        if self._image.is_fixed and tag == self._image.reference:
            return None
        try:
            found = await self._fetch(tag)
        except PdpError as error:
            self._pace.failed(error)
            raise
        self._pace.went_well()
        return found

    async def wait(self) -> None:
        """Return when it is time to look at the tag again."""
        await asyncio.sleep(self._pace.seconds())

    async def close(self) -> None:
        """Close the connection."""
        await self._registry.close()

    async def _fetch(self, tag: str | None) -> Fetched | None:
        if tag is not None and await self._digest_now() == tag:
            return None
        digest, manifest = await self._manifest(self._image.reference)
        if digest == tag:
            return None
        if "manifests" in manifest:
            _, manifest = await self._manifest(self._only_entry(manifest))
        layer_digest, size = self._layer(manifest)
        content = await self._registry.blob(layer_digest, max_bytes=size)
        if await asyncio.to_thread(_digest_of, content) != layer_digest:
            raise self._registry.error("has a layer that is not what its digest says")
        files = await asyncio.to_thread(read_archive, content, place=self.place)
        return Fetched(files=files, tag=digest)

    async def _digest_now(self) -> str | None:
        """What the registry says that the reference names. Unlike the manifest itself, which
        is fetched when that moves, this is no pull where pulls are counted.
        """
        reply = await self._registry.manifest(
            self._image.reference,
            accept=_MANIFESTS + _INDEXES,
            max_bytes=MAX_MANIFEST_BYTES,
            method="HEAD",
        )
        return reply.headers.get("Docker-Content-Digest")

    async def _manifest(self, reference: str) -> tuple[str, dict[str, Any]]:
        """A manifest or an index, and its digest."""
        reply = await self._registry.manifest(
            reference, accept=_MANIFESTS + _INDEXES, max_bytes=MAX_MANIFEST_BYTES
        )
        digest = _digest_of(reply.body)
        if _DIGEST.fullmatch(reference) and digest != reference:
            raise self._registry.error("has a manifest that is not what its digest says")
        try:
            manifest = json.loads(reply.body)
        except (ValueError, RecursionError):
            manifest = None
        if not isinstance(manifest, dict):
            raise self._registry.error("has a manifest that is not a JSON object")
        if "manifests" in manifest and "layers" in manifest:
            # Two readers could each see another image: CVE-2021-41190.
            raise self._registry.error("has a manifest that is an index too")
        return digest, manifest

    def _only_entry(self, index: Mapping[str, Any]) -> str:
        """The digest of the one manifest of an index."""
        entries = index["manifests"]
        found = [
            entry
            for entry in (entries if isinstance(entries, list) else ())
            if not (isinstance(entry, dict) and entry.get("platform") == _ATTESTATION)
        ]
        if len(found) != 1:
            raise self._registry.error("is an index of other than one manifest")
        return self._descriptor(found[0])[0]

    def _layer(self, manifest: Mapping[str, Any]) -> tuple[str, int]:
        """Digest and size of the layer that is the bundle."""
        layers = manifest.get("layers")
        for layer in layers if isinstance(layers, list) else ():
            if isinstance(layer, dict) and layer.get("mediaType") in _LAYERS:
                digest, size = self._descriptor(layer)
                if size > MAX_ARCHIVE_BYTES:
                    raise self._registry.error(f"is larger than {MAX_ARCHIVE_BYTES} bytes")
                return digest, size
        raise self._registry.error(f"has no layer of type {_LAYERS[0]}")

    def _descriptor(self, value: object) -> tuple[str, int]:
        """Digest and size of what a descriptor points to."""
        digest, size = (
            (value.get("digest"), value.get("size")) if isinstance(value, dict) else (None, None)
        )
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise self._registry.error("points to something without a sha256 digest")
        if type(size) is not int or size < 0:
            raise self._registry.error("points to something without a size")
        return digest, size


def _digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
