"""What a fuzzer's bytes stand for: decisions, so that a small change of them is a small change
of a well-formed thing, and not only noise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Final, TypeVar

from pdp.canonical import JsonValue

T = TypeVar("T")

ODD_VALUES: Final[Sequence[JsonValue]] = (
    None, True, False, 0, 1, -1, 2**31, 2**53 - 1, 2**53, -(2**63), 10**30, 0.5, 1e21, 1e308, -0.0,
    "", " ", "0", "x" * 300, "\0", "a\nb", "a b", "../x", "\u202e", "\U0001f600", "*", "tenant_other",
    "none", "HS256", [], {}, [[]], [None], {"": None}, {"a": {"a": {}}}, [1, "1", None], ["x"] * 300,
)  # fmt: skip
MOST_EDITS: Final = 6
DEPTH_OF_A_TOWER: Final = 70
"""Deeper than anything that is read (pdp.canonical.MAX_DEPTH)."""


class Choices:
    """Takes decisions from bytes; when they are used up, each is the first one there is."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def are_left(self) -> bool:
        return self._at < len(self._data)

    def number(self, below: int) -> int:
        size = max(1, (max(below - 1, 0).bit_length() + 7) // 8)
        return int.from_bytes(self.take(size)) % below

    def pick(self, options: Sequence[T]) -> T:
        return options[self.number(len(options))]

    def yes(self) -> bool:
        return self.number(2) == 1

    def take(self, size: int) -> bytes:
        """So many, or what is left."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return taken

    def some(self) -> bytes:
        """Up to 255."""
        return self.take(self.number(256))

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def text(self) -> str:
        return self.some().decode("utf-8", "replace")


def edited(value: JsonValue, choices: Choices) -> JsonValue:
    """A copy of a JSON value with a few changes anywhere in it."""
    holder: list[JsonValue] = [copy.deepcopy(value)]
    for _ in range(MOST_EDITS):
        if not choices.are_left:
            break
        _edit(holder, choices)
    return holder[0]


def edited_bytes(content: bytes, choices: Choices) -> bytes:
    """The same for bytes: some are changed, left out, doubled or added."""
    changed = bytearray(content)
    for _ in range(MOST_EDITS):
        if not choices.are_left:
            break
        start = choices.number(len(changed) + 1)
        end = min(len(changed), start + choices.number(64))
        match choices.number(6):
            case 0:
                changed[start : start + 1] = bytes([choices.number(256)])
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end]
            case 3:
                changed[start:end] = choices.some()
            case 4:
                del changed[start:]
            case _:
                if start < len(changed):
                    changed[start] ^= 1 << choices.number(8)
    return bytes(changed)


def _edit(holder: list[JsonValue], choices: Choices) -> None:
    inside: JsonValue = holder
    key: int | str = 0
    below: JsonValue = holder[0]
    while isinstance(below, dict | list) and below and choices.number(4):
        inside = below
        key = choices.pick(list(below)) if isinstance(below, dict) else choices.number(len(below))
        below = _at(inside, key)
    match choices.number(7):
        case 0:
            _put(inside, key, copy.deepcopy(choices.pick(ODD_VALUES)))
        case 1:
            _put(inside, key, choices.text())
        case 2 if inside is not holder:
            del inside[key]  # type: ignore[arg-type,union-attr]
        case 3 if isinstance(inside, dict):
            inside[choices.text()] = below
        case 4 if (
            isinstance(inside, list) and inside is not holder and not isinstance(below, dict | list)
        ):
            inside.extend([below] * choices.number(400))
        case 5:
            for _ in range(choices.number(DEPTH_OF_A_TOWER)):
                below = [below] if choices.yes() else {"a": below}
            _put(inside, key, below)
        case _:
            _put(inside, key, choices.number(2**64) - 2**63)


def _at(inside: JsonValue, key: int | str) -> JsonValue:
    return inside[key]  # type: ignore[index]


def _put(inside: JsonValue, key: int | str, value: JsonValue) -> None:
    inside[key] = value  # type: ignore[index]
