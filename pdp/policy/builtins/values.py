"""Rego values in Python, and the text that OPA's Wasm reads and writes them in.

The text is JSON, where an object may have keys of any kind and sets are written
``{1, 2}`` and ``set()``: what ``opa_value_dump`` writes and ``opa_value_parse`` reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import MAX_EMAX, Decimal, DecimalException
from json import JSONDecoder
from typing import Final, TypeAlias

from pdp.policy.builtins.faults import BuiltinError, too_large

MAX_DIGITS: Final = 4_000
"""Of a number that is counted with, written out in full. Python's own limit is 4,300."""
_MAX_BITS: Final = 13_000
"""Of an int that is given back; 3,913 digits."""
MAX_RESULT_BYTES: Final = 1024 * 1024
"""Largest value that a built-in gives back."""


class Number:
    """A number, as exact as its text. Equal to whatever has the same value."""

    __slots__ = ("text", "value")

    def __init__(self, text: str) -> None:
        try:
            self.value = Decimal(text)
        except DecimalException:
            raise too_large("a number") from None
        if abs(self.value.adjusted()) > MAX_EMAX // 2 or not self.value.is_finite():
            raise too_large("a number")
        # Rego may leave out a zero before the point; what reads results does not.
        self.text = text.replace(".", "0.", 1) if text.removeprefix("-")[:1] == "." else text

    @property
    def is_integer(self) -> bool:
        """Whether it is whole, however it is written."""
        exponent = self.value.as_tuple().exponent
        assert isinstance(exponent, int)  # noqa: S101 - finite
        return exponent >= 0 or self.value == self.value.to_integral_value()

    def integer(self) -> int:
        """Its value, where it is whole. Raises BuiltinError for a giant."""
        if self.value.adjusted() >= MAX_DIGITS:
            raise too_large("a number")
        return int(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Number) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


class Object(Mapping["Value", "Value"]):
    """An object; keys may be of any kind."""

    __slots__ = ("_entries", "_hash")

    def __init__(self, entries: Iterable[tuple[Value, Value]] = ()) -> None:
        # A wrapper is needed: to Python, True and 1.0 are the same key. Here they are not,
        # as numbers are a class of their own.
        self._entries: dict[Value, Value] = dict(entries)
        self._hash: int | None = None

    def __getitem__(self, key: Value) -> Value:
        return self._entries[key]

    def __iter__(self) -> Iterator[Value]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Object) and self._entries == other._entries

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._entries.items()))
        return self._hash


Value: TypeAlias = "bool | Number | str | tuple[Value, ...] | frozenset[Value] | Object | None"
"""Arrays are tuples, sets are frozensets."""


def number(value: int) -> Number:
    """The number of an int. Raises BuiltinError for a giant."""
    if value.bit_length() > _MAX_BITS:
        raise too_large("a number")
    return Number(str(value))


def parse(text: bytes) -> Value:
    """The value that a text stands for. Raises BuiltinError."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise BuiltinError("a string is not UTF-8") from None
    try:
        value, end = _parse_at(decoded, _skip_space(decoded, 0))
    except (ValueError, IndexError, RecursionError):
        raise BuiltinError("a value can not be read") from None
    if _skip_space(decoded, end) != len(decoded):
        raise BuiltinError("a value can not be read")
    return value


def dump(value: Value) -> bytes:
    """The text of a value. Raises BuiltinError where it is too long or no Unicode."""
    try:
        encoded = text_of(value).encode()
    except UnicodeEncodeError:
        raise BuiltinError("a string is not UTF-8") from None
    except RecursionError:
        raise too_large("a value") from None
    if len(encoded) > MAX_RESULT_BYTES:
        raise too_large("a value")
    return encoded


def text_of(value: Value) -> str:
    """The text of a value, sets and objects in OPA's order."""
    parts: list[str] = []
    _write(value, parts)
    return "".join(parts)


def sort_key(value: Value) -> tuple[object, ...]:  # noqa: PLR0911 - one for each kind
    """By which values of all kinds stand in OPA's order."""
    match value:
        case None:
            return (0,)
        case bool():
            return (1, value)
        case Number():
            return (2, value.value)
        case str():
            return (3, value)
        case tuple():
            return (4, tuple(map(sort_key, value)))
        case Object():
            entries = sorted((sort_key(key), sort_key(item)) for key, item in value.items())
            return (5, tuple(key for key, _ in entries), tuple(item for _, item in entries))
        case frozenset():
            return (6, tuple(sorted(map(sort_key, value))))


def in_order(values: Iterable[Value]) -> list[Value]:
    """Values of all kinds in OPA's order."""
    return sorted(values, key=sort_key)


_DECODER: Final = JSONDecoder()
_SPACES: Final = " \t\r\n"
_NUMBER: Final = re.compile(r"-?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?").match
_EMPTY_SET: Final = re.compile(r"set\([ \t\r\n]*\)").match
_WORDS: Final[Mapping[str, tuple[str, bool | None]]] = {
    "n": ("null", None),
    "t": ("true", True),
    "f": ("false", False),
}


def _parse_at(text: str, start: int) -> tuple[Value, int]:
    first = text[start]
    if first == '"':
        string: tuple[str, int] = _DECODER.raw_decode(text, start)
        return string
    if first == "[":
        return _parse_array(text, start)
    if first == "{":
        return _parse_object_or_set(text, start)
    if (found := _NUMBER(text, start)) is not None:
        return Number(found.group()), found.end()
    if (found := _EMPTY_SET(text, start)) is not None:
        return frozenset(), found.end()
    word, value = _WORDS.get(first, ("?", None))
    if not text.startswith(word, start):
        raise ValueError
    return value, start + len(word)


def _parse_array(text: str, start: int) -> tuple[Value, int]:
    items: list[Value] = []
    at = _skip_space(text, start + 1)
    while text[at] != "]":
        item, end = _parse_at(text, at)
        items.append(item)
        at = _next(text, end, "]")
    return tuple(items), at + 1


def _parse_object_or_set(text: str, start: int) -> tuple[Value, int]:
    at = _skip_space(text, start + 1)
    if text[at] == "}":
        return Object(), at + 1
    entries: list[tuple[Value, Value]] = []
    members: list[Value] = []
    while text[at] != "}":
        key, end = _parse_at(text, at)
        end = _skip_space(text, end)
        if text[end] == ":":
            item, end = _parse_at(text, _skip_space(text, end + 1))
            entries.append((key, item))
        else:
            members.append(key)
        at = _next(text, end, "}")
    if entries and members:
        raise ValueError
    return (Object(entries) if entries else frozenset(members)), at + 1


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACES:
        at += 1
    return at


def _next(text: str, end: int, closing: str) -> int:
    """Where the next item of a collection begins, or its closing bracket stands."""
    at = _skip_space(text, end)
    if text[at] == ",":
        return _skip_space(text, at + 1)
    if text[at] != closing:
        raise ValueError
    return at


def _write(value: Value, parts: list[str]) -> None:
    match value:
        case None:
            parts.append("null")
        case bool():
            parts.append("true" if value else "false")
        case Number():
            parts.append(value.text)
        case str():
            parts.append(quoted(value))
        case tuple():
            _write_all("[", value, "]", parts)
        case Object():
            separator = "{"
            for key in in_order(value):
                parts.append(separator)
                _write(key, parts)
                parts.append(": ")
                _write(value[key], parts)
                separator = ", "
            parts.append("}" if value else "{}")
        case frozenset():
            if value:
                _write_all("{", in_order(value), "}", parts)
            else:
                parts.append("set()")


def _write_all(opening: str, items: Iterable[Value], closing: str, parts: list[str]) -> None:
    parts.append(opening)
    for index, item in enumerate(items):
        if index:
            parts.append(", ")
        _write(item, parts)
    parts.append(closing)


_ESCAPED: Final = re.compile(r'[\x00-\x1f"\\]')
_ESCAPES: Final[Mapping[str, str]] = {
    '"': '\\"',
    "\\": "\\\\",
    "\n": "\\n",
    "\r": "\\r",
    "\t": "\\t",
}


def quoted(text: str) -> str:
    """A string as ``opa_value_dump`` writes it."""
    return f'"{_ESCAPED.sub(_escape, text)}"'


def _escape(found: re.Match[str]) -> str:
    character = found.group()
    return _ESCAPES.get(character) or f"\\u{ord(character):04x}"
