"""Graphs, where OPA's own cases do not look."""

from __future__ import annotations

import json

import pytest

from pdp.policy.builtins import Evaluation, call


@pytest.mark.parametrize(
    ("graph", "paths"),
    (
        # OPA follows an edge from the first vertex back to itself, once.
        ({"a": ["a"]}, b'{["a", "a"]}'),
        ({"a": ["a", "b"], "b": []}, b'{["a", "a"], ["a", "a", "b"], ["a", "b"]}'),
        ({"a": ["b"], "b": ["b", "a"]}, b'{["a", "b"]}'),
        ({"a": ["b", "z"], "b": []}, b'{["a"], ["a", "b"]}'),
    ),
)
def test_paths_are_those_of_opa(graph: dict[str, list[str]], paths: bytes) -> None:
    arguments = [json.dumps(graph).encode(), b'["a"]']
    assert call("graph.reachable_paths", arguments, Evaluation(now_ns=0)) == paths
