"""JSON that both sides read alike: strict parsing, RFC 8785 bytes, digests.

The runtime, the sidecar and the tool server each compute the digest of a call's
arguments, so they must agree on what the arguments are. Parsing therefore
refuses whatever two JSON parsers could read differently (I-JSON, RFC 7493):
duplicate keys, NaN and Infinity, integers that a double can not hold, lone
surrogates.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Final

import rfc8785

MAX_SAFE_INTEGER: Final = 2**53 - 1
"""Largest integer that every JSON implementation keeps exact (RFC 7493 2.2)."""

MAX_DEPTH: Final = 64
"""Levels of nesting that are read."""

_LONGEST_SAFE_INTEGER: Final = len(str(-MAX_SAFE_INTEGER))

JsonScalar = bool | int | float | str | None
JsonValue = JsonScalar | list["JsonValue"] | dict[str, "JsonValue"]
JsonObject = dict[str, JsonValue]


class JsonError(ValueError):
    """The bytes or the value are not JSON of the agreed form; says where it can."""


def parse_object(data: bytes, *, max_bytes: int) -> JsonObject:
    """Parse one JSON object. Raises JsonError; never shows the content."""
    value = parse(data, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise JsonError("must be a JSON object")
    return value


def parse(data: bytes, *, max_bytes: int) -> JsonValue:
    """Parse one JSON value of at most ``max_bytes`` bytes. Raises JsonError."""
    if len(data) > max_bytes:
        raise JsonError(f"is {len(data)} bytes long; at most {max_bytes} are read")
    try:
        value: JsonValue = _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise JsonError("is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise JsonError(f"is nested more than {MAX_DEPTH} deep") from None
    check(value)
    return value


def check(value: object, *, depth: int = MAX_DEPTH) -> None:
    """Check that a Python value is JSON of the agreed form. Raises JsonError.

    Accepts exactly dict with str keys, list, str, int, float, bool and None, no
    subclasses and no tuples, so that what is digested is what a tool receives.
    """
    # Most of what is within is text, for which a call each would be most of the cost.
    kind = type(value)
    if kind is dict:
        _check_depth(depth)
        for key, item in value.items():  # type: ignore[attr-defined]
            if type(key) is not str:
                raise JsonError(f"holds a key of type {type(key).__name__}; keys are strings")
            if not key.isascii():
                _check_text(key)
            if type(item) is not str or not item.isascii():
                check(item, depth=depth - 1)
    elif kind is list:
        _check_depth(depth)
        for item in value:  # type: ignore[attr-defined]
            if type(item) is not str or not item.isascii():
                check(item, depth=depth - 1)
    elif kind is str:
        _check_text(value)  # type: ignore[arg-type]
    else:
        _check_atom(value)


def canonical_bytes(value: JsonValue) -> bytes:
    """The RFC 8785 form of a value that :func:`check` accepts. Raises ValueError for
    any other.
    """
    if _json_encodes_alike(value):
        return _ENCODER.encode(value).encode("utf-8")
    return rfc8785.dumps(value)


def sha256_hex(value: JsonValue) -> str:
    """SHA-256 over the RFC 8785 form: 64 lower-case hexadecimal digits."""
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def _json_encodes_alike(value: JsonValue) -> bool:
    """Whether the json module's C encoder writes the very bytes of RFC 8785, in a
    tenth of the time. It differs in floats, and in the order of keys beyond ASCII.
    """
    kind = type(value)
    if kind is dict:
        for key, item in value.items():  # type: ignore[union-attr]
            if not key.isascii() or not (type(item) is str or _json_encodes_alike(item)):
                return False
        return True
    if kind is list:
        return all(map(_json_encodes_alike, value))  # type: ignore[arg-type]
    if kind is int:
        return -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER  # type: ignore[operator]
    return value is None or kind in _ALIKE


def _check_depth(depth: int) -> None:
    if depth == 0:
        raise JsonError(f"is nested more than {MAX_DEPTH} deep")


def _check_atom(value: object) -> None:
    if type(value) is int:
        if not -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
            raise JsonError("holds an integer beyond +-(2^53 - 1); send it as a string")
    elif type(value) is float:
        if not math.isfinite(value):
            raise JsonError("holds NaN or Infinity")
    elif type(value) is not bool and value is not None:
        raise JsonError(f"holds a value of type {type(value).__name__}; JSON has none such")


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise JsonError("holds a lone surrogate") from None


def _unique_pairs(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise JsonError("holds a duplicate key")
    return members


def _parse_int(digits: str) -> int:
    if len(digits) > _LONGEST_SAFE_INTEGER:
        raise JsonError("holds an integer beyond +-(2^53 - 1); send it as a string")
    return int(digits)


def _refuse_constant(_name: str) -> JsonValue:
    raise JsonError("holds NaN or Infinity")


_ALIKE: Final = (str, bool)

_ENCODER: Final = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, sort_keys=True, separators=(",", ":")
)

_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique_pairs,
    parse_int=_parse_int,
    parse_constant=_refuse_constant,
)
