"""object.subset and graph.reachable_paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from pdp.policy.builtins.faults import UndefinedError, too_large
from pdp.policy.builtins.operands import an_object
from pdp.policy.builtins.values import Object, Value

MAX_PATH_STEPS: Final = 100_000
"""Vertices on all paths of a graph together."""


def subset(larger: Value, smaller: Value) -> Value:
    """object.subset: objects recursively, arrays as a run within, sets by their members."""
    if isinstance(larger, tuple) and isinstance(smaller, frozenset):
        # As OPA counts: what stands twice in the array counts twice.
        return bool(larger) and sum(item in smaller for item in larger) >= len(smaller)
    answer = _is_subset(larger, smaller)
    if answer is None:
        raise UndefinedError
    return answer


def _is_subset(larger: Value, smaller: Value) -> bool | None:
    """None where the kinds can not be compared."""
    match larger, smaller:
        case Object(), Object():
            return all(key in larger and _holds(larger[key], smaller[key]) for key in smaller)
        case frozenset(), frozenset():
            return smaller <= larger
        case tuple(), tuple():
            return _is_run_of(larger, smaller)
    return None


def _holds(larger: Value, smaller: Value) -> bool:
    return larger == smaller or bool(_is_subset(larger, smaller))


def _is_run_of(larger: tuple[Value, ...], smaller: tuple[Value, ...]) -> bool:
    # Each value becomes a character: the search in strings is never quadratic.
    characters: dict[Value, str] = {}
    whole, run = (
        "".join(characters.setdefault(item, chr(len(characters))) for item in items)
        for items in (larger, smaller)
    )
    return run in whole


def reachable_paths(graph: Value, initial: Value) -> Value:
    """graph.reachable_paths: all paths, each up to where it ends or would close a cycle."""
    edges = an_object(graph)
    if not isinstance(initial, tuple | frozenset):
        raise UndefinedError
    paths: set[Value] = set()
    steps = 0
    for root in initial:
        if root not in edges:
            continue
        # A path that is yet to be followed, and the vertex that comes next.
        waiting: list[tuple[tuple[Value, ...], Value]] = [
            ((root,), neighbor) for neighbor in _neighbors(edges[root])
        ]
        if not waiting:
            paths.add((root,))
        while waiting:
            path, vertex = waiting.pop()
            steps += len(path)
            if steps > MAX_PATH_STEPS:
                raise too_large("a graph")
            # OPA follows an edge from where it begins back to there once.
            if (vertex in path and path != (root,)) or vertex not in edges:
                paths.add(path)
                continue
            path = (*path, vertex)
            neighbors = _neighbors(edges[vertex])
            if not neighbors:
                paths.add(path)
            waiting += [(path, neighbor) for neighbor in neighbors]
    return frozenset(paths)


def _neighbors(value: Value) -> tuple[Value, ...]:
    return tuple(value) if isinstance(value, tuple | frozenset) else ()


BUILTINS: Final[Mapping[str, Callable[..., Value]]] = {
    "graph.reachable_paths": reachable_paths,
    "object.subset": subset,
}
