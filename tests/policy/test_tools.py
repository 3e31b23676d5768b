from __future__ import annotations

from typing import Any

import pytest

from pdp.canonical import JsonObject
from pdp.policy.engine import PolicyError
from pdp.policy.tools import MAX_TOOLS, VisibleTool, parse_visible_tools

READ: JsonObject = {"name": "orders.read", "callable": True, "reason_code": "ok"}
DROP: JsonObject = {"name": "orders.drop", "callable": False, "reason_code": "role_not_allowed"}


def test_tools_are_read_by_name() -> None:
    assert parse_visible_tools([READ, DROP]) == (
        VisibleTool("orders.drop", False, "role_not_allowed"),
        VisibleTool("orders.read", True, "ok"),
    )
    assert parse_visible_tools([]) == ()


@pytest.mark.parametrize(
    "answer",
    (
        None,
        {},
        {"orders.read": READ},
        "orders.read",
        ["orders.read"],
        [None],
        [READ, READ],
        [READ, {**DROP, "name": "orders.read"}],
        [{**READ, "more": 1}],
        [{"name": "orders.read", "callable": True}],
        [{**READ, "callable": False}],
        [{**READ, "callable": 1}],
        [{**DROP, "callable": True}],
        [{**DROP, "reason_code": "Not so"}],
        [{**DROP, "reason_code": ""}],
        [{**DROP, "reason_code": None}],
        *([{**READ, "name": name}] for name in ("", "a b", "-a", "a\n", "a" * 129, 1, None)),
        [{**READ, "name": f"tool-{number}"} for number in range(MAX_TOOLS + 1)],
    ),
)
def test_any_other_answer_is_refused(answer: Any) -> None:
    with pytest.raises(PolicyError) as refused:
        parse_visible_tools(answer)
    assert refused.value.reason_code == "policy_invalid"


def test_as_many_tools_as_there_may_be_are_read() -> None:
    tools: Any = [{**READ, "name": f"tool-{number:04}"} for number in range(MAX_TOOLS)]
    assert len(parse_visible_tools(tools)) == MAX_TOOLS
