"""semver.*: Semantic Versioning 2.0.0."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final

from pdp.policy.builtins.faults import UndefinedError
from pdp.policy.builtins.operands import string
from pdp.policy.builtins.values import Value, number

_NUMERIC: Final = "(0|[1-9][0-9]*)"
_IDENTIFIERS: Final = r"([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)"
_VERSION: Final = re.compile(
    rf"v?{_NUMERIC}\.{_NUMERIC}\.{_NUMERIC}(?:-{_IDENTIFIERS})?(?:\+{_IDENTIFIERS})?"
)
_PADDED: Final = re.compile("0[0-9]+")
_MAX_INT64: Final = 2**63 - 1
_MAX_INT64_DIGITS: Final = 19


def compare(one: Value, other: Value) -> Value:
    """semver.compare."""
    left, right = _precedence(string(one)), _precedence(string(other))
    return number((left > right) - (left < right))


def is_valid(version: Value) -> Value:
    """semver.is_valid."""
    if not isinstance(version, str):
        return False
    try:
        _precedence(version)
    except UndefinedError:
        return False
    return True


def _precedence(version: str) -> tuple[object, ...]:
    found = _VERSION.fullmatch(version)
    if found is None:
        raise UndefinedError
    numbers = [_int64(found[index]) for index in (1, 2, 3)]
    if any(one > _MAX_INT64 for one in numbers):
        raise UndefinedError
    if found[4] is None:
        return (*numbers, 1)
    identifiers = found[4].split(".")
    if any(map(_PADDED.fullmatch, identifiers)):
        raise UndefinedError
    return (*numbers, 0, tuple(map(_identifier, identifiers)))


def _identifier(text: str) -> tuple[int, int | str]:
    # OPA takes numbers beyond an int64 for the largest one.
    return (0, min(_int64(text), _MAX_INT64)) if text.isdecimal() else (1, text)


def _int64(digits: str) -> int:
    return int(digits) if len(digits) <= _MAX_INT64_DIGITS else _MAX_INT64 + 1


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "semver.compare": compare,
    "semver.is_valid": is_valid,
}
