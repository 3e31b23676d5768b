"""What the data could be if other tenants' part of it were another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Final

from pdp.canonical import JsonObject, JsonValue

MERGED_AT_MOST: Final = 50
"""Tenants out of whose data the most permissive one is made."""
ITEMS_AT_MOST: Final = 100
_Path = tuple[str, ...]


class Mutation(Enum):
    """What becomes of other tenants' data; ``told`` says it in words."""

    DELETED = "the data of every other tenant is deleted"
    ALLOWED = "other tenants are allowed everything that any tenant is"
    DENIED = "other tenants are denied everything"
    GARBAGE = "the data of other tenants is of wrong types"
    COPIED = "other tenants have a copy of this tenant's data"

    @property
    def told(self) -> str:
        """The change in words."""
        return self.value


class Neighbours:
    """Data in which some tenants keep what they have and the others are changed.

    A tenant's data is whatever stands under its name in ``data.tenants``, and in every
    other object of the data that has a tenant's name as a key.
    """

    def __init__(self, data: JsonObject) -> None:
        self._data = data
        named = data.get("tenants")
        self.tenants: list[str] = sorted(named) if isinstance(named, dict) else []
        self._paths = list(_keyed_by(data, frozenset(self.tenants), ()))
        self._places = [_at(data, path) for path in self._paths]
        tools = data.get("tools")
        self._every: tuple[list[JsonValue], ...] = (
            [*sorted(tools)] if isinstance(tools, dict) else [],
            [*self.tenants],
        )
        self._widest = [self._merged(place) for place in self._places]
        self._index = {name: index for index, name in enumerate(self.tenants)}

    def changed(
        self, mutation: Mutation, *, kept: AbstractSet[str], bit: int
    ) -> tuple[JsonObject, list[str]]:
        """The data, and the names of the tenants whose part of it was changed."""
        others = [name for name in self.tenants if name not in kept]
        data: JsonObject = dict(self._data)
        for path, place, widest in zip(self._paths, self._places, self._widest, strict=True):
            fresh = {key: value for key, value in place.items() if key not in self._index}
            for name in self.tenants:
                if name in kept:
                    value: JsonValue = place.get(name)
                else:
                    value = self._hostile(mutation, name, place, widest, kept, bit)
                if value is not None or (name in kept and name in place):
                    fresh[name] = value
            data = _with(data, path, fresh)
        return data, others

    def near(self, tenant: str) -> list[str]:
        """Some other tenants: the next one, the first, and one far off."""
        count, index = len(self.tenants), self._index.get(tenant, 0)
        picked = [self.tenants[at % count] for at in (index + 1, 0, index + count // 2)]
        return [name for name in dict.fromkeys(picked) if name != tenant]

    def nobody_like(self, name: str) -> str:
        """A name of the same form that no tenant has."""
        for letter in "zyxwvutsrqponmlkjihgfedcba":
            nobody = name[:-1] + letter
            if nobody not in self._index:
                return nobody
        return f"{name}z"

    def _hostile(
        self,
        mutation: Mutation,
        name: str,
        place: JsonObject,
        widest: JsonValue,
        kept: AbstractSet[str],
        bit: int,
    ) -> JsonValue:
        """What stands for another tenant; None for nothing."""
        if mutation is Mutation.DELETED:
            return None
        if mutation is Mutation.ALLOWED:
            return widest
        if mutation is Mutation.DENIED:
            return _narrowest(widest)
        index = self._index[name]
        if mutation is Mutation.GARBAGE:
            return (*_GARBAGE, _wrong(widest))[index % (len(_GARBAGE) + 1)]
        partner = index ^ (1 << bit)
        if partner < len(self.tenants) and self.tenants[partner] in kept:
            return place.get(self.tenants[partner])
        return place.get(min(kept)) if kept else None

    def _merged(self, place: JsonObject) -> JsonValue:
        widest: JsonValue = None
        for name in self.tenants[:MERGED_AT_MOST]:
            if name in place:
                widest = _union(widest, place[name])
        return self._with_every_name(widest)

    def _with_every_name(self, value: JsonValue) -> JsonValue:
        """A list that names a tool, or a tenant, names every one."""
        if isinstance(value, dict):
            return {key: self._with_every_name(item) for key, item in value.items()}
        if isinstance(value, list):
            for every in self._every:
                if any(item in every for item in value):
                    return every
        return value


_GARBAGE: Final[tuple[JsonValue, ...]] = ("garbage", 0, [], True, {}, [["garbage"]])


def _keyed_by(value: JsonValue, names: AbstractSet[str], path: _Path) -> Iterator[_Path]:
    """Where the objects are that have a tenant's name as a key."""
    if not isinstance(value, dict):
        return
    if path == ("tools",):
        return
    if path == ("tenants",) or (path and not names.isdisjoint(value)):
        yield path
        return
    for key, below in value.items():
        yield from _keyed_by(below, names, (*path, key))


def _at(data: JsonObject, path: _Path) -> JsonObject:
    place = data
    for key in path:
        below = place[key]
        place = below if isinstance(below, dict) else {}
    return place


def _with(data: JsonObject, path: _Path, value: JsonObject) -> JsonObject:
    """The data with another value at a path; nothing else is copied."""
    if not path:
        return value
    key, *rest = path
    below = data.get(key)
    inner = below if isinstance(below, dict) else {}
    return {**data, key: _with(inner, tuple(rest), value)}


def _union(one: JsonValue, other: JsonValue) -> JsonValue:
    """What permits whatever either permits, by the look of it."""
    if one is None:
        return other
    if isinstance(one, dict) and isinstance(other, dict):
        keys = list(dict.fromkeys([*one, *other]))[:ITEMS_AT_MOST]
        return {key: _union(one.get(key), other.get(key)) for key in keys}
    if isinstance(one, list) and isinstance(other, list):
        items = {json.dumps(item, sort_keys=True): item for item in [*one, *other]}
        return list(items.values())[:ITEMS_AT_MOST]
    if isinstance(one, bool) and isinstance(other, bool):
        return one or other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return max(one, other)
    return "active" if "active" in (one, other) else one


def _narrowest(value: JsonValue) -> JsonValue:
    if isinstance(value, Mapping):
        return {key: _narrowest(item) for key, item in value.items()}
    if isinstance(value, list):
        return []
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return 0
    return "suspended" if value == "active" else ""


def _wrong(value: JsonValue) -> JsonValue:
    """The same keys, each with a value of another type."""
    if not isinstance(value, dict):
        return {"garbage": 1}
    return {key: "garbage" if isinstance(item, dict | list) else [1] for key, item in value.items()}
