"""Roots: which part of the data document belongs to a bundle, as OPA compares them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pdp.canonical import JsonValue


def segments(root: str) -> list[str]:
    """The keys that a root leads through; none for the root of everything."""
    return root.split("/") if root else []


def contains(roots: Iterable[str], path: Sequence[str]) -> bool:
    """Whether a path lies within one of the roots."""
    return any(leads_to(segments(root), path) for root in roots)


def overlap(one: str, other: str) -> bool:
    """Whether a path can lie within both."""
    first, second = segments(one), segments(other)
    return leads_to(first, second) or leads_to(second, first)


def first_outside(
    roots: Sequence[str], value: JsonValue, path: tuple[str, ...]
) -> tuple[str, ...] | None:
    """The path of something in ``value``, which stands at ``path``, that lies outside of
    all roots; None when nothing does. Objects on the way to a root are within.
    """
    if contains(roots, path):
        return None
    if not isinstance(value, dict) or not any(leads_to(path, segments(root)) for root in roots):
        return path
    for key, below in value.items():
        found = first_outside(roots, below, (*path, key))
        if found is not None:
            return found
    return None


def leads_to(path: Sequence[str], further: Sequence[str]) -> bool:
    """Whether one path begins with the other."""
    return list(path) == list(further[: len(path)])
