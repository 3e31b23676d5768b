"""One bundle as it is received: verified, well formed, and within its roots."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from pdp.canonical import JsonObject, canonical_bytes
from pdp.policy.archive import Files, refused
from pdp.policy.data import data_document
from pdp.policy.engine import REQUIRED_ENTRYPOINTS
from pdp.policy.manifest import WASM, Manifest, parse_manifest
from pdp.policy.roots import contains, segments
from pdp.policy.signature import Verifier

PATCH: Final = "patch.json"
_PACKAGE: Final = re.compile(
    # Nothing but blanks and comments may stand before it.
    r"(?:[ \t\r\n]|#[^\n]*+(?:\n|\Z))*+"
    r"package[ \t\r\n]++([A-Za-z_]\w*+)"
    r'((?:\.[A-Za-z_]\w*+|\["(?:[^"\\\n]|\\.)*+"\])*+)(?=[\s#]|\Z)',
    re.ASCII,
)
_PACKAGE_STEP: Final = re.compile(r'\.(\w+)|\[("(?:[^"\\]|\\.)*")\]', re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One bundle: verified, well formed, and within its roots."""

    name: str
    """What the configuration calls it."""
    place: str
    """Where it comes from, for messages."""
    manifest: Manifest
    """Its revision is never empty: without one of its own it is a digest of the content."""
    files: Files = field(repr=False)
    data: JsonObject = field(repr=False)
    """The data document."""
    rego: Mapping[str, str] = field(repr=False)
    """Rego by its path, tests included."""
    wasm: bytes | None = field(repr=False)


def content_revision(*, wasm: bytes | None, rego: Mapping[str, str], data: bytes) -> str:
    """The revision of a bundle whose manifest names none: a digest of what decides. Tests
    are in it, as an OPA server that loads the bundle runs them with the rules.

    128 bits, so that no second bundle can be made to which the same records fit.
    """
    digest = hashlib.sha256()
    for piece in (
        wasm or b"",
        data,
        *(text.encode() for item in sorted(rego.items()) for text in item),
    ):
        digest.update(hashlib.sha256(piece).digest())
    return f"sha256:{digest.hexdigest()[:32]}"


def is_test(name: str) -> bool:
    """Whether a file of Rego holds tests, which are not compiled."""
    return name.endswith("_test.rego")


def read_part(files: Files, *, name: str, place: str, verifier: Verifier | None) -> Part:
    """One whole bundle, verified before anything of it is looked at. Raises BundleError."""
    if verifier is not None:
        verifier.verify(files, place=place)
    for path in files:
        base = path.rsplit("/", 1)[-1]
        if base == PATCH:
            raise refused(place, f"is a delta bundle ({path}) without the whole one that it is for")
        if base == WASM and path != WASM:
            raise refused(place, f"holds {path}; its one module is {WASM}, in no folder")
    manifest = parse_manifest(files, place=place)
    data = data_document(files, roots=manifest.roots, place=place)
    rego = {path: _text(path, files, place) for path in sorted(files) if path.endswith(".rego")}
    for path, text in rego.items():
        package = package_of(text)
        if package is None:
            raise refused(place, f"has a {path} that does not begin with its package")
        if not contains(manifest.roots, package):
            shown = json.dumps("/".join(package))
            raise refused(
                place, f"has the package {shown} in {path}, outside of the roots in .manifest"
            )
    wasm = files.get(WASM)
    if wasm is not None and not all(
        contains(manifest.roots, segments(entrypoint)) for entrypoint in REQUIRED_ENTRYPOINTS
    ):
        raise refused(place, f"holds {WASM}, whose rules lie outside of the roots in .manifest")
    if not manifest.revision:
        revision = content_revision(wasm=wasm, rego=rego, data=canonical_bytes(data))
        manifest = replace(manifest, revision=revision)
    return Part(
        name=name, place=place, manifest=manifest, files=files, data=data, rego=rego, wasm=wasm
    )


def _text(path: str, files: Files, place: str) -> str:
    try:
        return files[path].decode("utf-8")
    except UnicodeDecodeError:
        raise refused(place, f"has a {path} that is not UTF-8") from None


def package_of(rego: str) -> list[str] | None:
    """The path that a module's rules stand below, as OPA reads it; None where the text
    does not begin with a package.
    """
    found = _PACKAGE.match(rego)
    if found is None:
        return None
    first, rest = found.groups()
    try:
        return [first, *(name or json.loads(key) for name, key in _PACKAGE_STEP.findall(rest))]
    except json.JSONDecodeError:
        return None
