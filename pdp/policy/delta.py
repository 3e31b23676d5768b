"""Delta bundles: patch.json changes the data of the bundle before (OPA 1.22.2,
v1/bundle/store.go, applyPatches).

OPA takes no signature on them. Here one is asked for like on any other bundle, and
:func:`pdp.policy.signature.sign` makes it. A signed one names the revision that it is for
(metadata.pdp.base): else whoever hands it out could leave out the one before, with what it
took away, or lay it upon any other.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote_to_bytes

from pdp.canonical import MAX_DEPTH, JsonObject, JsonValue, canonical_bytes, parse_object
from pdp.policy.archive import MAX_CONTENT_BYTES, Files, refused
from pdp.policy.data import is_data, parse_json_object
from pdp.policy.manifest import MANIFEST, manifest_document, parse_manifest
from pdp.policy.part import PATCH, Part, read_part
from pdp.policy.roots import contains
from pdp.policy.signature import SIGNATURES, Verifier

MAX_OPERATIONS: Final = 100_000
_OPERATIONS: Final = frozenset({"upsert", "replace", "remove"})
_INDEX: Final = re.compile(r"0|[1-9][0-9]{0,8}")
_NO_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    kind: str
    path: tuple[str, ...]
    value: JsonValue


def apply_delta(
    base: Part, files: Files, *, name: str, place: str, verifier: Verifier | None
) -> Part:
    """The bundle that a delta makes of another: as if it had been read whole, with the
    delta's revision and sequence. Raises BundleError.
    """
    if verifier is not None:
        verifier.verify(files, place=place)
    for path in files:
        if path not in {PATCH, MANIFEST, SIGNATURES}:
            raise refused(place, f"is a delta bundle that holds {path} beside its {PATCH}")
    manifest = _manifest(base, files, place)
    _check_base(base, manifest, place, signed=verifier is not None)
    data = parse_object(canonical_bytes(base.data), max_bytes=MAX_CONTENT_BYTES)
    for number, operation in enumerate(_operations(files, place), start=1):
        if not contains(base.manifest.roots, operation.path):
            raise refused(
                place, f"has operation {number} in {PATCH} outside of the roots in {MANIFEST}"
            )
        try:
            _apply(data, operation)
        except LookupError:
            shown = json.dumps("/".join(operation.path))
            raise refused(
                place,
                f"has operation {number} in {PATCH}, {operation.kind} {shown}, that does not fit"
                " the data it is for",
            ) from None
    whole = {path: base.files[path] for path in base.files if not is_data(path)}
    whole.pop(SIGNATURES, None)
    whole["data.json"] = canonical_bytes(data)
    whole[MANIFEST] = json.dumps(manifest).encode()
    return read_part(whole, name=name, place=place, verifier=None)


def _manifest(base: Part, files: Files, place: str) -> JsonObject:
    """The base's manifest with the delta's revision and metadata."""
    whole = manifest_document(base.files, place=place)
    own = manifest_document(files, place=place)
    if own.get("wasm", whole.get("wasm")) != whole.get("wasm"):
        raise refused(place, f'is a delta bundle with another "wasm" in {MANIFEST} than its base')
    delta = parse_manifest({MANIFEST: json.dumps({**own, "wasm": []}).encode()}, place=place)
    if set(delta.roots) != set(base.manifest.roots):
        raise refused(place, f"is a delta bundle with other roots in {MANIFEST} than its base")
    kept = {key: whole[key] for key in whole.keys() - {"revision", "metadata"}}
    return kept | {key: own[key] for key in own.keys() & {"revision", "metadata"}}


def _check_base(base: Part, manifest: JsonObject, place: str, *, signed: bool) -> None:
    metadata = manifest.get("metadata")
    own = metadata.get("pdp") if isinstance(metadata, dict) else None
    named = own.get("base") if isinstance(own, dict) else None
    if named is None and signed:
        raise refused(
            place,
            "is a signed delta bundle that does not say which revision it is for"
            f" (metadata.pdp.base in {MANIFEST})",
        )
    if named not in (None, base.manifest.revision):
        raise refused(
            place,
            f"is a delta bundle for another revision (metadata.pdp.base in {MANIFEST}) than"
            f" {base.manifest.revision}",
        )


def _operations(files: Files, place: str) -> list[_Operation]:
    if PATCH not in files:
        raise refused(place, f"is a delta bundle without {PATCH}")
    patch = parse_json_object(PATCH, files[PATCH], place=place)
    listed = patch.get("data")
    if patch.keys() != {"data"} or not isinstance(listed, list) or not listed:
        raise refused(place, f'has a {PATCH} that is not {{"data": [operations]}}')
    if len(listed) > MAX_OPERATIONS:
        raise refused(place, f"has more than {MAX_OPERATIONS} operations in {PATCH}")
    operations = []
    for number, item in enumerate(listed, start=1):
        operation = _operation(item)
        if operation is None:
            raise refused(
                place,
                f"has operation {number} in {PATCH} that is not upsert, replace or remove with a"
                " path below the root, and a value for what is not removed",
            )
        if len(operation.path) > MAX_DEPTH:
            # Before it is done: what writes the data out can not go down that far.
            raise refused(
                place,
                f"has operation {number} in {PATCH} for data nested more than {MAX_DEPTH} deep",
            )
        operations.append(operation)
    return operations


def _operation(item: JsonValue) -> _Operation | None:
    if not isinstance(item, dict) or not item.keys() <= {"op", "path", "value"}:
        return None
    kind, pointer, value = item.get("op"), item.get("path"), item.get("value")
    if not isinstance(kind, str) or kind not in _OPERATIONS or not isinstance(pointer, str):
        return None
    # OPA writes "value": null where something is removed.
    if (value is not None) if kind == "remove" else ("value" not in item):
        return None
    path = _path(pointer)
    return None if path is None else _Operation(kind=kind, path=path, value=value)


def _path(pointer: str) -> tuple[str, ...] | None:
    """The keys of a path, which OPA reads as a URL's and then as a JSON pointer."""
    trimmed = pointer.strip("/")
    if not trimmed or _NO_ESCAPE.search(trimmed):
        return None
    try:
        steps = [unquote_to_bytes(step).decode("utf-8") for step in trimmed.split("/")]
    except UnicodeDecodeError:
        return None
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)


def _apply(document: JsonObject, operation: _Operation) -> None:
    """Change the document in place. Raises LookupError when there is nothing to do it to."""
    *folders, last = operation.path
    holder: JsonValue = document
    for step in folders:
        if isinstance(holder, dict):
            if operation.kind == "upsert":
                holder.setdefault(step, {})
            holder = holder[step]
        else:
            holder = _items(holder, step)[_index(step, holder)]
    if isinstance(holder, dict):
        if operation.kind != "upsert":
            del holder[last]
        if operation.kind != "remove":
            holder[last] = operation.value
    else:
        _apply_to_items(_items(holder, last), last, operation)


def _apply_to_items(items: list[JsonValue], step: str, operation: _Operation) -> None:
    if operation.kind == "upsert":
        at_end = step in {"-", str(len(items))}
        items.insert(len(items) if at_end else _index(step, items), operation.value)
    elif operation.kind == "replace":
        items[_index(step, items)] = operation.value
    else:
        del items[_index(step, items)]


def _items(value: JsonValue, step: str) -> list[JsonValue]:
    if not isinstance(value, list):
        raise KeyError(step)
    return value


def _index(step: str, items: JsonValue) -> int:
    """The place in a list that a step of a path names."""
    if not _INDEX.fullmatch(step) or int(step) >= len(_items(items, step)):
        raise IndexError(step)
    return int(step)
