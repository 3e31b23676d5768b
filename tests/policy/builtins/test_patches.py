"""json.patch, where OPA's own cases do not look."""

from __future__ import annotations

import pytest

from pdp.policy.builtins import BuiltinError, Evaluation, call
from tests.policy.builtins.asking import ask


def test_operations_are_applied_in_their_order() -> None:
    operations = [
        {"op": "add", "path": "/a/-", "value": 3},
        {"op": "copy", "from": "/b", "path": "/a~1b"},
        {"op": "remove", "path": "/a/0"},
        {"op": "move", "from": "/b/c", "path": "/d"},
        {"op": "replace", "path": "/d", "value": 5},
        {"op": "test", "path": "/d", "value": 5},
    ]
    assert ask("json.patch", {"a": [1, 2], "b": {"c": 4}}, operations) == {
        "a": [2, 3],
        "b": {},
        "a/b": {"c": 4},
        "d": 5,
    }


@pytest.mark.parametrize(
    "operation",
    (
        {"op": "add", "path": "/a/3", "value": 1},
        {"op": "add", "path": "/a/01", "value": 1},
        {"op": "add", "path": "/a/x", "value": 1},
        {"op": "add", "path": "/x/y", "value": 1},
        {"op": "add", "path": "/c"},
        {"op": "remove", "path": "/x"},
        {"op": "remove", "path": "/a/-"},
        {"op": "remove", "path": ""},
        {"op": "replace", "path": "/x", "value": 1},
        {"op": "test", "path": "/a", "value": [1]},
        {"op": "eat", "path": "/a"},
        {"path": "/a"},
    ),
)
def test_what_can_not_be_applied_makes_all_undefined(operation: object) -> None:
    assert ask("json.patch", {"a": [1, 2]}, [operation]) is None


def test_members_of_sets_are_their_own_keys() -> None:
    arguments = [b'{"s": {1, "a"}}', b'[{"op": "add", "path": ["s", 2], "value": 2}]']
    assert call("json.patch", arguments, Evaluation(now_ns=0)) == b'{"s": {1, 2, "a"}}'


def test_going_into_an_array_that_was_changed_ends_the_evaluation() -> None:
    operations = [
        {"op": "remove", "path": "/0"},
        {"op": "replace", "path": "/1/0", "value": 7},
    ]
    with pytest.raises(BuiltinError):
        ask("json.patch", [[1], [2], [3]], operations)


def test_a_patch_that_would_take_long_ends_the_evaluation() -> None:
    operations = [{"op": "add", "path": "/-", "value": 1}] * 2_000
    with pytest.raises(BuiltinError):
        ask("json.patch", [0] * 2_000, operations)


def test_copies_of_copies_do_not_grow_without_limit() -> None:
    operations = [
        {"op": "copy", "from": "", "path": "/a"},
        {"op": "copy", "from": "/a", "path": "/b"},
    ]
    with pytest.raises(BuiltinError):
        ask("json.patch", {}, operations * 40)
