"""What a built-in was given, as what it needs; anything else makes it undefined."""

from __future__ import annotations

from pdp.policy.builtins.faults import UndefinedError
from pdp.policy.builtins.values import Number, Object, Value

_MAX_INT64_DIGITS = 19


def string(value: Value) -> str:
    """A string."""
    if not isinstance(value, str):
        raise UndefinedError
    return value


def a_number(value: Value) -> Number:
    """A number of any kind."""
    if not isinstance(value, Number):
        raise UndefinedError
    return value


def whole_number(value: Value) -> int:
    """A number that is whole, of any size and however it is written."""
    given = a_number(value)
    if not given.is_integer:
        raise UndefinedError
    return given.integer()


def int64(value: Value) -> int:
    """A number that Go's OPA reads as an int: ``1`` and ``1.0`` are, ``1e0`` is none."""
    text = a_number(value).text
    digits, _, zeros = text.removeprefix("-").partition(".")
    if (
        len(text.removeprefix("-")) > _MAX_INT64_DIGITS
        or not digits.isdecimal()
        or zeros.strip("0")
    ):
        raise UndefinedError
    result = -int(digits) if text.startswith("-") else int(digits)
    if not -(2**63) <= result < 2**63:
        raise UndefinedError
    return result


def array(value: Value) -> tuple[Value, ...]:
    """An array."""
    if not isinstance(value, tuple):
        raise UndefinedError
    return value


def an_object(value: Value) -> Object:
    """An object."""
    if not isinstance(value, Object):
        raise UndefinedError
    return value


def strings(value: Value) -> list[str]:
    """An array or a set, all of strings."""
    if not isinstance(value, tuple | frozenset):
        raise UndefinedError
    return [string(item) for item in value]
