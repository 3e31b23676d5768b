from __future__ import annotations

from pathlib import Path

import pytest

from pdp.policy.analysis.cases import DEFAULT_TIME, Cases, CasesError, parse_cases, read_cases

WHOLE = b"""\
tools:
  orders.read:
    - name: usual
      arguments: {order_id: "918", deep: {list: [1, 2.5, true, null]}}
      resource: {type: order, id: "918"}
      context: {channel: web}
    - arguments: {day: 2026-01-01}
roles: [viewer, viewer, clerk]
scopes: [orders:read]
time: 2026-03-01T00:00:00Z
"""


def test_every_key_of_a_cases_file_is_read() -> None:
    cases = parse_cases(WHOLE, place="cases.yaml")
    usual, second = cases.tools["orders.read"]
    assert usual.name == "usual"
    assert usual.arguments == {"order_id": "918", "deep": {"list": [1, 2.5, True, None]}}
    assert usual.resource == {"type": "order", "id": "918"}
    assert usual.context == {"channel": "web"}
    assert second.name == "2"
    assert second.arguments == {"day": "2026-01-01"}
    assert cases.roles == ("viewer", "clerk")
    assert cases.scopes == ("orders:read",)
    assert cases.time == 1_772_323_200


def test_an_empty_file_says_nothing() -> None:
    assert parse_cases(b"", place="cases.yaml") == Cases()
    assert Cases().time == DEFAULT_TIME


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("tool: {}", "c.yaml:1: 'tool' is not known; the file has tools, roles, scopes, time."),
        ("roles: []\nroles: []", "c.yaml:2: 'roles' stands twice."),
        ("tools:\n  a:\n    - argument: {}", "c.yaml:3: 'argument' is not known; a case has"),
        ("tools:\n  a: []", "c.yaml:2: tools.a must be a list of at least one case."),
        ("tools:\n  a: [{}, {name: '1'}]", "c.yaml:2: the case '1' stands twice."),
        ("tools:\n  a:\n  - arguments: 1", "c.yaml:3: arguments must be a mapping."),
        ("tools:\n  a:\n  - resource:\n      type: x", "c.yaml:4: resource must have both"),
        ("tools:\n  a:\n  - arguments:\n      x: .nan", "c.yaml:4: is not a value that JSON has."),
        ("tools:\n  a:\n  - arguments:\n      x: !!binary aa", "c.yaml:4: is not a value"),
        ("roles: [1]", "c.yaml:1: an item of roles must be a text"),
        ("roles: viewer", "c.yaml:1: roles must be a list."),
        ("\ntime: 2026-01-01", "c.yaml:2: time must be RFC 3339 with an offset"),
        ("- a", "c.yaml:1: the file must be a mapping."),
        ("a: [", "c.yaml:2: is not YAML"),
        ("a: &a [*a]", "c.yaml:1: 'a' is not known"),
        ("tools: &a {b: [{arguments: {c: *a}}]}", "is nested more than 64 deep"),
        ("a: *b", "c.yaml:1: is not YAML"),
    ),
)
def test_a_mistake_is_named_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(CasesError) as refused:
        parse_cases(text.encode(), place="c.yaml")
    assert message in refused.value.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CasesError, match="can not be read: No such file"):
        read_cases(tmp_path / "none.yaml")
