"""From sources to what is released: built, signed, and verified again."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pdp.canonical import canonical_bytes
from pdp.policy.archive import Files, pack, read_archive
from pdp.policy.compile import build_files, compile_rego, find_opa
from pdp.policy.engine import BundleError
from pdp.policy.part import Part, content_revision, is_test, read_part
from pdp.policy.signature import SIGNATURES, Verifier, sign


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Who signs a bundle, and for what."""

    private_key_pem: bytes = field(repr=False)
    key_id: str
    algorithm: str
    """One of pdp.policy.signature.ALGORITHMS."""
    scope: str | None
    """What the bundle is for; a sidecar takes only what is signed for its own scope."""


class WasmOrigin(StrEnum):
    """Whether a bundle's Wasm is what its Rego builds."""

    SAME = "same"
    DIFFERS = "differs"
    """Another OPA built it, or it was made of other Rego."""
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a bundle is whose signature is good."""

    revision: str
    sequence: int | None
    roots: tuple[str, ...]
    files: tuple[str, ...]
    archive_sha256: str
    """Of the file as it is, to compare with what was released."""
    content: str
    """Digest of what decides: the revision that the bundle would have without one."""
    wasm: WasmOrigin
    wasm_note: str
    """Why the Wasm was not checked; empty when it was."""


def build(
    sources: Files, *, opa: Path | None, revision: str | None, sequence: int, signer: Signer | None
) -> tuple[bytes, Part]:
    """A release as a .tar.gz, and what is in it: the same bytes for the same arguments.

    Raises BundleError.
    """
    files = build_files(sources, opa=opa, revision=revision, sequence=sequence)
    if signer is not None:
        files = signed(files, signer)
    part = read_part(files, name="build", place="that was built", verifier=None)
    return pack(files), part


def signed(files: Files, signer: Signer) -> dict[str, bytes]:
    """The files with a signature over them, in place of one that they had.

    Raises BundleError, also for files that are no bundle.
    """
    read_part(files, name="sign", place="that is to be signed", verifier=None)
    unsigned = {name: content for name, content in files.items() if name != SIGNATURES}
    signature = sign(
        unsigned,
        private_key_pem=signer.private_key_pem,
        key_id=signer.key_id,
        algorithm=signer.algorithm,
        scope=signer.scope,
    )
    return {**unsigned, SIGNATURES: signature}


def verify(archive: bytes, *, place: str, verifier: Verifier, opa: Path | None) -> Verified:
    """Read a bundle as a sidecar would that trusts one key. Raises BundleError when that
    would refuse it.
    """
    files = read_archive(archive, place=place)
    part = read_part(files, name=place, place=place, verifier=verifier)
    data = canonical_bytes(part.data)
    wasm, note = _wasm_origin(part, data, opa)
    return Verified(
        revision=part.manifest.revision,
        sequence=part.manifest.sequence,
        roots=part.manifest.roots,
        files=tuple(sorted(files)),
        archive_sha256=hashlib.sha256(archive).hexdigest(),
        content=content_revision(wasm=part.wasm, rego=part.rego, data=data),
        wasm=wasm,
        wasm_note=note,
    )


def _wasm_origin(part: Part, data: bytes, opa: Path | None) -> tuple[WasmOrigin, str]:
    if part.wasm is None:
        return WasmOrigin.NOT_CHECKED, "it holds no policy.wasm"
    if all(map(is_test, part.rego)):
        return WasmOrigin.NOT_CHECKED, "it does not hold the Rego that it was made of"
    try:
        command = find_opa(opa)
    except BundleError:
        return WasmOrigin.NOT_CHECKED, "there is no opa command on PATH (--opa)"
    try:
        built = compile_rego(part.rego, data, opa=command)
    except BundleError as error:
        return WasmOrigin.NOT_CHECKED, f"its Rego alone does not build: {error.message}"
    return (WasmOrigin.SAME if built == part.wasm else WasmOrigin.DIFFERS), ""


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place in one step: a sidecar that watches it never sees half of it.

    Raises OSError.
    """
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
