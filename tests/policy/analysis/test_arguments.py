from __future__ import annotations

import pytest

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.analysis.arguments import NeedsCaseError, edge_arguments, made_arguments


@pytest.mark.parametrize(
    ("rule", "tenant_rule", "made"),
    (
        ({"type": "string", "enum": ["b", "a"]}, {}, "b"),
        ({"type": "string", "enum": ["b", "a"]}, {"enum": ["a"]}, "a"),
        ({"type": "string"}, {}, "x"),
        ({"type": "string", "pattern": "[0-9]{1,12}"}, {}, "1"),
        ({"type": "string", "pattern": "[^@]+@[^@]+", "tenant_rule_required": True},
         {"domains": ["a.example"]}, "someone@a.example"),
        ({"type": "boolean"}, {}, True),
        ({"type": "integer"}, {}, 1),
        ({"type": "integer", "minimum": 2.5}, {}, 3),
        ({"type": "integer", "minimum": 2, "maximum": 9}, {"minimum": 4}, 4),
        ({"type": "integer", "maximum": 0}, {}, 0),
        ({"type": "number", "minimum": 2.5}, {}, 2.5),
    ),
)  # fmt: skip
def test_an_argument_is_made_that_keeps_both_rules(
    rule: JsonObject, tenant_rule: JsonObject, made: JsonValue
) -> None:
    assert made_arguments({"a": rule}, {"a": tenant_rule}) == {"a": made}


def test_what_is_optional_is_left_out() -> None:
    assert made_arguments({"a": {"type": "string", "required": False}}, {}) == {}


@pytest.mark.parametrize(
    "rule",
    ({"type": "string", "pattern": "[0-9a-f]{64}"}, {"type": "string", "pattern": "("}, {}),
)
def test_an_argument_that_can_not_be_made_needs_a_case(rule: JsonObject) -> None:
    with pytest.raises(NeedsCaseError, match="the argument digest"):
        made_arguments({"digest": rule}, {})


def test_edges_are_those_of_tool_and_tenant() -> None:
    rules: JsonObject = {
        "kind": {"type": "string", "enum": ["memo", "task"]},
        "pages": {"type": "integer", "minimum": 1, "maximum": 5},
    }
    edges = dict(edge_arguments({"kind": "memo"}, rules, {"pages": {"maximum": 3}}))
    assert edges == {
        'kind = "task"': {"kind": "task"},
        "without kind": {},
        "pages = 1": {"kind": "memo", "pages": 1},
        "pages = 5": {"kind": "memo", "pages": 5},
        "pages = 3": {"kind": "memo", "pages": 3},
    }
