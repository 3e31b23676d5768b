"""The bundles of a policy together: what an engine loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

from pdp.canonical import JsonObject, JsonValue, canonical_bytes
from pdp.policy.archive import MAX_ARCHIVE_BYTES, read_archive, read_directory, refused
from pdp.policy.compile import compile_rego
from pdp.policy.engine import Entrypoint
from pdp.policy.manifest import REVISION, WASM
from pdp.policy.part import Part, is_test, read_part
from pdp.policy.roots import overlap, segments
from pdp.policy.signature import Verifier

__all__ = ["Bundle", "Part", "assemble", "joint_revision", "load_bundle", "read_part"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What an engine loads."""

    revision: str
    """The manifest's revision, or else a digest of the content; of several bundles both."""
    data: bytes = field(repr=False)
    """The data document: one JSON object."""
    rego: Mapping[str, str] = field(repr=False, default_factory=dict)
    """Rego by its path, tests included. What `opa build` packed lacks the rules that
    became Wasm; what `pdp policy build` packed lacks nothing."""
    wasm: bytes | None = field(repr=False)
    """None where it is yet to be compiled from the Rego."""


def assemble(parts: Sequence[Part]) -> Bundle:
    """The bundles of a policy as one. Raises BundleError where two claim the same root, can
    not be compiled together, or hold data where a rule is asked for.
    """
    for part in parts:
        for entrypoint in Entrypoint:
            # An OPA server would answer with the data, and the embedded engine would not.
            if _stands_in(part.data, segments(entrypoint)):
                raise refused(part.name, f"has data at {entrypoint}, where a rule is asked for")
    for one, other in combinations(parts, 2):
        for root in one.manifest.roots:
            for claimed in other.manifest.roots:
                if overlap(root, claimed):
                    raise refused(
                        one.name, f'has the root "{root}", which overlaps "{claimed}" of the policy'
                        f" bundle {other.name}",
                    )  # fmt: skip
    if len(parts) == 1:
        (part,) = parts
        rego = part.rego
    else:
        rego = {f"{part.name}/{path}": text for part in parts for path, text in part.rego.items()}
    return Bundle(
        revision=joint_revision({part.name: part.manifest.revision for part in parts}),
        data=canonical_bytes(_joint_data(parts)),
        rego=rego,
        wasm=_joint_wasm(parts),
    )


def load_bundle(path: Path, *, opa: Path | None = None, verifier: Verifier | None = None) -> Bundle:
    """Read one bundle from a .tar.gz or a directory, and compile it with ``opa``, or with
    the one on PATH, when it has no policy.wasm.

    Raises BundleError: the message says what is wrong, where, and what to do.
    """
    place = str(path)
    files = read_directory(path) if path.is_dir() else read_archive(_read(path), place=place)
    bundle = assemble([read_part(files, name=path.name, place=place, verifier=verifier)])
    if bundle.wasm is not None:
        return bundle
    if not bundle.rego:
        raise refused(place, f"holds no Rego, and no {WASM} that was made of it")
    return replace(bundle, wasm=compile_rego(bundle.rego, bundle.data, opa=opa))


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_ARCHIVE_BYTES + 1)
    except OSError as error:
        raise refused(str(path), f"can not be read: {error.strerror}") from None


def joint_revision(revisions: Mapping[str, str]) -> str:
    """The revision of several bundles, by their names: of one it alone, else NAME=REVISION
    in the order of names, and a digest of these where that is too long or not clear.
    """
    named = sorted(revisions.items())
    if len(named) == 1:
        text, clear = named[0][1], True
    else:
        text = ",".join(f"{name}={revision}" for name, revision in named)
        # A comma within a revision would let two policies share a joined one.
        clear = not any("," in revision for _, revision in named)
    if clear and REVISION.fullmatch(text):
        return text
    return f"sha256:{hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]}"


def _joint_data(parts: Sequence[Part]) -> JsonObject:
    """The data of parts whose roots are apart: objects meet only on the way to a root."""
    document: JsonObject = {}
    for part in parts:
        _add(document, part.data)
    return document


def _stands_in(value: JsonValue, path: Sequence[str]) -> bool:
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return False
        value = value[key]
    return True


def _add(document: JsonObject, more: JsonObject) -> None:
    for key, value in more.items():
        below = document.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            document[key] = merged = dict(below)
            _add(merged, value)
        else:
            document[key] = value


def _joint_wasm(parts: Sequence[Part]) -> bytes | None:
    """The module of the one part that has rules; None where rules of several meet, so that
    they must be compiled together.
    """
    built = [part for part in parts if part.wasm is not None]
    ruling = [part for part in parts if any(not is_test(path) for path in part.rego)]
    if len(built) == 1 and all(part is built[0] for part in ruling):
        return built[0].wasm
    for part in built:
        if part not in ruling:
            raise refused(
                part.name, f"holds {WASM} without the Rego that it was made of, and other bundles"
                " hold rules too: all Rego is needed to compile them together",
            )  # fmt: skip
    return None
