"""Strings: those built-ins about them that OPA does not compile into the module."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from pdp.policy.builtins.faults import UndefinedError, too_large
from pdp.policy.builtins.operands import int64, string, strings
from pdp.policy.builtins.values import Value, number

MAX_COMPARED_CHARACTERS: Final = 20_000_000
"""Of all occurrences of what is searched for; about 20 ms."""
MAX_FOUND: Final = 20_000
"""Places of a string in another."""
_GLOB_SPECIAL: Final = re.compile(r"[\\*?\[\]{}]")


def indexof_n(text: Value, search: Value) -> Value:
    """indexof_n: where a string begins in another, overlapping ones too."""
    wanted = string(search)
    whole = string(text)
    if not wanted:
        raise UndefinedError
    found: list[Value] = []
    compared = 0
    at = whole.find(wanted)
    while at >= 0:
        found.append(number(at))
        compared += len(wanted)
        if compared > MAX_COMPARED_CHARACTERS or len(found) > MAX_FOUND:
            raise too_large("a search")
        at = whole.find(wanted, at + 1)
    return tuple(found)


def count(text: Value, search: Value) -> Value:
    """strings.count."""
    return number(string(text).count(string(search)))


def split_n(text: Value, delimiter: Value, limit: Value) -> Value:
    """strings.split_n: the first parts; the last ones for a negative limit."""
    whole, between = string(text), string(delimiter)
    most = int64(limit)
    parts = whole.split(between) if between else list(whole)
    return tuple(parts[:most] if most >= 0 else parts[most:])


def any_prefix_match(search: Value, base: Value) -> Value:
    """strings.any_prefix_match."""
    return _any_starts_with(_one_or_more(search), _one_or_more(base))


def any_suffix_match(search: Value, base: Value) -> Value:
    """strings.any_suffix_match."""
    return _any_starts_with(
        [text[::-1] for text in _one_or_more(search)],
        [text[::-1] for text in _one_or_more(base)],
    )


def glob_quote_meta(pattern: Value) -> Value:
    """glob.quote_meta."""
    return _GLOB_SPECIAL.sub(r"\\\g<0>", string(pattern))


def _one_or_more(value: Value) -> list[str]:
    return [value] if isinstance(value, str) else strings(value)


def _any_starts_with(texts: Iterable[str], prefixes: Iterable[str]) -> bool:
    # Where no prefix begins with another one, only the last that sorts before a text can
    # be its beginning: no need to compare each with each.
    shortest: list[str] = []
    for prefix in sorted(prefixes):
        if not shortest or not prefix.startswith(shortest[-1]):
            shortest.append(prefix)
    for text in texts:
        at = bisect_right(shortest, text)
        if at and text.startswith(shortest[at - 1]):
            return True
    return False


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "glob.quote_meta": glob_quote_meta,
    "indexof_n": indexof_n,
    "strings.any_prefix_match": any_prefix_match,
    "strings.any_suffix_match": any_suffix_match,
    "strings.count": count,
    "strings.split_n": split_n,
}
