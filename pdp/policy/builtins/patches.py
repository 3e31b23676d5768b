"""json.patch: RFC 6902, where keys may be of any kind and sets can be changed too.

OPA 1.22 goes astray in a patch that adds to an array, or removes from it, and goes into
its items afterwards: it counts them as they were before. Such a patch is a fault here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from pdp.policy.builtins.faults import BuiltinError, UndefinedError, too_large
from pdp.policy.builtins.operands import an_object, array, int64, string
from pdp.policy.builtins.values import Number, Object, Value

MAX_COPIED: Final = 100_000
"""Members of all collections that are made anew."""

_Path: TypeAlias = tuple[Value, ...]
_Change: TypeAlias = "Callable[[Value, Value], Value]"


def patch(document: Value, operations: Value) -> Value:
    """json.patch: undefined where one of the operations can not be applied."""
    patched = _Patched(document)
    for operation in array(operations):
        patched.apply(an_object(operation))
    return patched.document()


class _Patched:
    """A document that is changed, each time into another value."""

    def __init__(self, document: Value) -> None:
        self._document = document
        self._is_removed = False
        self._copied = 0
        self._shifted: dict[int, tuple[Value, ...]] = {}
        """Arrays whose items have other places than at first, by identity."""

    def document(self) -> Value:
        """What there is of it. Raises UndefinedError where it was removed."""
        if self._is_removed:
            raise UndefinedError
        return self._document

    def apply(self, operation: Object) -> None:
        """Change it. Raises UndefinedError where that can not be done."""
        path, name = _path(_of(operation, "path")), string(_of(operation, "op"))
        match name:
            case "add":
                self._insert(path, _of(operation, "value"))
            case "remove":
                self._remove(path)
            case "replace":
                self._remove(path)
                self._insert(path, _of(operation, "value"))
            case "move":
                source = _path(_of(operation, "from"))
                moved = self._at(source)
                self._remove(source)
                self._insert(path, moved)
            case "copy":
                copy = self._at(_path(_of(operation, "from")))
                # Copies of copies would double with every operation.
                self._count(_members(copy))
                self._insert(path, copy)
            case "test":
                if self._at(path) != _of(operation, "value"):
                    raise UndefinedError
            case _:
                raise UndefinedError

    def _at(self, path: _Path) -> Value:
        value = self.document()
        for key in path:
            value = self._into(value, key)
        return value

    def _into(self, value: Value, key: Value) -> Value:
        if id(value) in self._shifted:
            raise BuiltinError("a patch goes into an array that it has changed")
        return _member(value, key)

    def _insert(self, path: _Path, value: Value) -> None:
        if not path:
            self._document, self._is_removed = value, False
            return
        self._document = self._changed(
            self.document(), path, lambda parent, key: _with(parent, key, value)
        )

    def _remove(self, path: _Path) -> None:
        if path:
            self._document = self._changed(self.document(), path, _without)
            return
        self.document()
        self._is_removed = True

    def _count(self, members: int) -> None:
        self._copied += members
        if self._copied > MAX_COPIED:
            raise too_large("a patch")

    def _changed(self, value: Value, path: _Path, change: _Change) -> Value:
        self._count(len(value) if isinstance(value, tuple | frozenset | Object) else 0)
        key, *rest = path
        if not rest:
            changed = change(value, key)
            if isinstance(changed, tuple):
                self._shifted[id(changed)] = changed
            return changed
        changed = self._changed(self._into(value, key), tuple(rest), change)
        match value:
            case Object():
                return Object({**value, key: changed}.items())
            case tuple():
                at = _index(value, key)
                return (*value[:at], changed, *value[at + 1 :])
            case frozenset():
                return value - {key} | {changed}
        raise UndefinedError


def _of(operation: Object, name: str) -> Value:
    if name not in operation:
        raise UndefinedError
    return operation[name]


def _path(path: Value) -> _Path:
    if path == "":
        return ()
    if isinstance(path, str):
        parts = path.lstrip("/").split("/")
        return tuple(part.replace("~1", "/").replace("~0", "~") for part in parts)
    return array(path)


def _members(value: Value) -> int:
    """How many values it is made of, itself included."""
    match value:
        case Object():
            return 1 + sum(_members(key) + _members(item) for key, item in value.items())
        case tuple() | frozenset():
            return 1 + sum(map(_members, value))
    return 1


def _member(value: Value, key: Value) -> Value:
    match value:
        case Object() if key in value:
            return value[key]
        case tuple() if 0 <= (at := _index(value, key)) < len(value):
            return value[at]
        case frozenset() if key in value:
            return key
    raise UndefinedError


def _with(parent: Value, key: Value, value: Value) -> Value:
    match parent:
        case Object():
            return Object({**parent, key: value}.items())
        case tuple() if 0 <= (at := _index(parent, key)) <= len(parent):
            return (*parent[:at], value, *parent[at:])
        case frozenset() if key == value:
            return parent | {value}
    raise UndefinedError


def _without(parent: Value, key: Value) -> Value:
    _member(parent, key)
    match parent:
        case Object():
            return Object((other, value) for other, value in parent.items() if other != key)
        case tuple():
            at = _index(parent, key)
            return (*parent[:at], *parent[at + 1 :])
        case frozenset():
            return parent - {key}
    raise UndefinedError


def _index(items: tuple[Value, ...], key: Value) -> int:
    """Where a key points to in an array; ``-`` is behind its end."""
    if key == "-":
        return len(items)
    if isinstance(key, str):
        if not _INDEX.fullmatch(key) or (key != "0" and key.startswith("0")):
            raise UndefinedError
        key = Number(key.removeprefix("+"))
    return int64(key)


_INDEX: Final = re.compile(r"[+-]?[0-9]+(?:\.0*)?")

BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {"json.patch": patch}
