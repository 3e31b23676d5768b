"""Reads a document into sections, and finds all that is wrong with it in one go.

msgspec checks each single value. The walk over the document is here, and so is what is
said about it: msgspec stops at the first fault, does not name the keys of mappings, and
repeats words that it does not know. What is said here never holds a value.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Collection, Sequence
from enum import EnumMeta
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeGuard, Union, get_args, get_origin

import msgspec

Location = tuple[str | int, ...]
"""Where a value stands: its keys, and places in lists, from the top."""
Fault = tuple[Location, str]
"""Where something is wrong, and what."""
_Kind = object
"""A type as it stands at a key, Annotated or not."""
_Read = Any
"""A value of such a type, or _WRONG."""

_WRONG: Final = object()
"""In place of a value with a fault."""
_WORDS: Final[dict[_Kind, str]] = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "an integer",
    list: "a list",
    NoneType: "null",
    Path: "a path",
    str: "a text",
}


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Keys that belong together. __post_init__ raises ValueError where they do not fit."""

    def check_given(self, keys: Collection[str]) -> None:
        """Raises ValueError where keys stand together that must not, even at their defaults."""


def read_section(section: type[Section], document: object) -> tuple[_Read, list[Fault]]:
    """The document as a section, which it is only if there are no faults."""
    reader = _Reader()
    return reader.value(section, document, ()), reader.faults


class _Reader:
    def __init__(self) -> None:
        self.faults: list[Fault] = []

    def value(self, kind: _Kind, given: object, at: Location) -> _Read:
        members = _members(kind)
        if given is None and NoneType in members:
            return None
        sections = [member for member in members if _is_section(member)]
        if sections and isinstance(given, dict):
            return self._section(sections, given, at)
        others = [member for member in members if member not in {NoneType, *sections}]
        try:
            if not others:
                raise msgspec.ValidationError
            return self._other(others[0], given, at)
        except (msgspec.ValidationError, UnicodeEncodeError):
            return self._wrong(at, _expected(members, given))
        except ValueError as error:
            return self._wrong(at, str(error))

    def _other(self, kind: _Kind, given: object, at: Location) -> _Read:
        """A list, a mapping with keys of the operator's own, or a single value."""
        shape, rules = _taken_apart(kind)
        if get_origin(shape) not in {list, dict}:
            return _single(shape, rules, given)
        if not _is_as_long(given, get_origin(shape), rules):
            raise msgspec.ValidationError
        return self._entries(get_args(shape), given, at)

    def _entries(self, kinds: Sequence[_Kind], given: Any, at: Location) -> _Read:  # noqa: ANN401
        if isinstance(given, list):
            return [self.value(kinds[0], each, (*at, place)) for place, each in enumerate(given)]
        return {
            self.value(kinds[0], key, (*at, key)): self.value(kinds[1], each, (*at, key))
            for key, each in given.items()
        }

    def _section(
        self, sections: Sequence[type[Section]], given: dict[Any, object], at: Location
    ) -> _Read:
        section = self._tagged(sections, given, at)
        if section is None:
            return _WRONG
        tag = section.__struct_config__.tag_field
        before = len(self.faults)
        fields = _fields(section)
        known = [*fields] if tag is None else [tag, *fields]
        values = {}
        for key, value in given.items():
            if key in fields:
                values[key] = self.value(fields[key].type, value, (*at, key))
            elif key not in known:
                self._wrong((*at, key), _unknown(key, known))
        for name, field in fields.items():
            if field.required and name not in given:
                self._wrong((*at, name), "is required")
        if len(self.faults) > before:
            return _WRONG
        try:
            read = section(**values)
            read.check_given(values)
        except ValueError as error:
            return self._wrong(at, str(error))
        return read

    def _tagged(
        self, sections: Sequence[type[Section]], given: dict[Any, object], at: Location
    ) -> type[Section] | None:
        """The one of them that the document means."""
        tag = sections[0].__struct_config__.tag_field
        if tag is None:
            return sections[0]
        by_tag = {str(each.__struct_config__.tag): each for each in sections}
        section = by_tag.get(str(given.get(tag)))
        if section is None:
            missing = tag not in given
            self._wrong((*at, tag), "is required" if missing else f"expected {' or '.join(by_tag)}")
        return section

    def _wrong(self, at: Location, what: str) -> _Read:
        self.faults.append((at, what))
        return _WRONG


@functools.cache
def _fields(section: type[Section]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(section)}


def _members(kind: _Kind) -> tuple[_Kind, ...]:
    return get_args(kind) if get_origin(kind) in {Union, UnionType} else (kind,)


def _is_section(kind: _Kind) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _taken_apart(kind: _Kind) -> tuple[Any, Sequence[Any]]:
    """A type, and its rules: bounds of msgspec's, and functions that raise ValueError."""
    if get_origin(kind) is not Annotated:
        return kind, ()
    shape, *rules = get_args(kind)
    return shape, rules


def _is_as_long(given: Any, shape: Any, rules: Sequence[Any]) -> bool:  # noqa: ANN401
    return isinstance(given, shape) and all(
        (rule.min_length or 0) <= len(given) <= (rule.max_length or len(given)) for rule in rules
    )


def _single(shape: _Kind, rules: Sequence[Any], given: object) -> _Read:
    bounds = [rule for rule in rules if isinstance(rule, msgspec.Meta)]
    kind = Annotated[shape, *bounds] if bounds else shape
    value = msgspec.convert(given, kind, dec_hook=_path)
    if isinstance(value, str):
        value.encode()  # raises for half of a surrogate pair, which is no text
        if value.endswith("\n") and any(rule.pattern for rule in bounds):
            raise msgspec.ValidationError  # "$" matches before a last line feed too
    for rule in rules:
        if not isinstance(rule, msgspec.Meta):
            value = rule(value)
    return value


def _path(_: type, given: object) -> Path:
    if not isinstance(given, str):
        raise TypeError
    return Path(given)


def _unknown(key: object, known: Sequence[str]) -> str:
    meant = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {meant[0]}?" if meant else f"expected {', '.join(known)}"
    return f"unknown key; {hint}"


def _expected(members: Sequence[_Kind], given: object) -> str:
    """What can stand there, and what does if it is of another kind; never itself."""
    described = [_described(member) for member in members if member is not NoneType]
    wanted = " or ".join(dict.fromkeys(described))
    kinds = tuple(_kind_of_values(member) for member in members)
    if isinstance(given, kinds) or (isinstance(given, int) and float in kinds):
        return f"expected {wanted}"
    return f"expected {wanted}, got {_WORDS.get(type(given), type(given).__name__)}"


def _kind_of_values(member: _Kind) -> type:
    if _is_section(member):
        return dict
    shape = _taken_apart(member)[0]
    kind = get_origin(shape) or shape
    return kind if kind in _WORDS and kind is not Path else str  # one of a few words


def _described(member: _Kind) -> str:
    if _is_section(member):
        return "a section"
    shape, rules = _taken_apart(member)
    if get_origin(shape) is Literal or isinstance(shape, EnumMeta):
        return " or ".join(get_args(shape) or list(shape))
    kind = get_origin(shape) or shape
    entries = "entries" if kind in {list, dict} else "characters"
    text = _WORDS[kind]
    for rule in rules:
        if isinstance(rule, msgspec.Meta):
            text += _bounds(rule, entries)
    return text


def _bounds(rule: msgspec.Meta, entries: str) -> str:
    text = "".join(
        f" {word} {bound}"
        for word, bound in (("over", rule.gt), ("from", rule.ge), ("to", rule.le))
        if bound is not None
    )
    if rule.max_length is not None:
        text += f" of {rule.min_length or 0} to {rule.max_length} {entries}"
    return text if rule.pattern is None else f"{text} that matches {rule.pattern}"
