"""What a bundle says of itself: its .manifest, as OPA reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.archive import Files, refused
from pdp.policy.data import parse_json_object
from pdp.policy.roots import contains, overlap, segments

MANIFEST: Final = ".manifest"
WASM: Final = "policy.wasm"
REGO_VERSION: Final = 1
REVISION: Final = re.compile(r"[\x21-\x7e]{1,128}")
"""What a revision looks like."""
_KEYS: Final = frozenset(
    {"revision", "roots", "wasm", "rego_version", "file_rego_versions", "metadata"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What the sidecar goes by."""

    revision: str
    """Names this release; empty when the manifest names none."""
    roots: tuple[str, ...]
    """Which part of the data document is the bundle's, without slashes around them;
    ("",) for all of it."""
    sequence: int | None
    """Grows with every release (metadata.pdp.sequence): an older one is told by it."""


def manifest_document(files: Files, *, place: str) -> JsonObject:
    """The manifest's JSON without what is null; {} where there is none. Raises BundleError."""
    for name in files:
        if name != MANIFEST and name.endswith((MANIFEST, f"{MANIFEST}.pb")):
            raise refused(
                place, f"has a second or another manifest, {name}; it takes one, {MANIFEST}"
            )
    document = parse_json_object(MANIFEST, files.get(MANIFEST, b"{}"), place=place)
    for key in document:
        # OPA's JSON decoder takes a key in any case, so that both would read another manifest.
        if key not in _KEYS and key.lower() in _KEYS:
            raise refused(place, f'has the key "{key}" in {MANIFEST}; write "{key.lower()}"')
    return {key: value for key, value in document.items() if value is not None}


def parse_manifest(files: Files, *, place: str) -> Manifest:
    """The bundle's manifest, checked. Raises BundleError."""
    document = manifest_document(files, place=place)
    revision = document.get("revision", "")
    if not isinstance(revision, str) or not REVISION.fullmatch(revision or "-"):
        raise refused(place, f"has a revision in {MANIFEST} that is not 1 to 128 ASCII characters")
    roots = _roots(document.get("roots", [""]), place)
    _check_rego_versions(document, place)
    _check_wasm(document.get("wasm", []), roots, files, place)
    return Manifest(
        revision=revision, roots=roots, sequence=_sequence(document.get("metadata", {}), place)
    )


def _roots(value: JsonValue, place: str) -> tuple[str, ...]:
    named = value if isinstance(value, list) else [None]
    roots = tuple(root.strip("/") for root in named if isinstance(root, str))
    if len(roots) != len(named):
        raise refused(place, f"has roots in {MANIFEST} that are not a list of paths")
    for index, root in enumerate(roots):
        for other in roots[:index]:
            if overlap(root, other):
                raise refused(
                    place, f'has roots in {MANIFEST} that overlap, "{other}" and "{root}"'
                )
    return roots


def _check_rego_versions(document: JsonObject, place: str) -> None:
    by_file = document.get("file_rego_versions", {})
    versions: Iterable[JsonValue] = by_file.values() if isinstance(by_file, dict) else [None]
    for version in (document.get("rego_version", REGO_VERSION), *versions):
        if type(version) is not int or version != REGO_VERSION:
            raise refused(
                place, f"has another Rego version in {MANIFEST} than {REGO_VERSION}, which is run"
            )


def _check_wasm(value: JsonValue, roots: tuple[str, ...], files: Files, place: str) -> None:
    """The resolvers: which rule is asked of which module."""
    named = set()
    for resolver in value if isinstance(value, list) else [None]:
        entrypoint = resolver.get("entrypoint") if isinstance(resolver, dict) else None
        module = resolver.get("module") if isinstance(resolver, dict) else None
        if not isinstance(entrypoint, str) or not isinstance(module, str):
            raise refused(place, f'has "wasm" in {MANIFEST} that does not list its entrypoints')
        if module.removeprefix("/") != WASM or WASM not in files:
            raise refused(place, f"names a module in {MANIFEST} that it does not hold as {WASM}")
        if not contains(roots, segments(entrypoint)):
            raise refused(
                place, f'has the entrypoint "{entrypoint}" outside of the roots in {MANIFEST}'
            )
        if entrypoint in named:
            raise refused(place, f'names the entrypoint "{entrypoint}" twice in {MANIFEST}')
        named.add(entrypoint)


def _sequence(metadata: JsonValue, place: str) -> int | None:
    own = metadata.get("pdp", {}) if isinstance(metadata, dict) else None
    sequence = own.get("sequence") if isinstance(own, dict) else -1
    if sequence is None:
        return None
    if type(sequence) is not int or sequence < 0:
        raise refused(
            place, f"has a metadata.pdp.sequence in {MANIFEST} that is not a whole number from 0"
        )
    return sequence
