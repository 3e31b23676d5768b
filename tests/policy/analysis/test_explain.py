from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdp.canonical import JsonObject
from pdp.identity.subject import Subject
from pdp.policy.analysis.explain import Explanation, explain_call
from pdp.policy.bundle import Bundle
from pdp.policy.question import authorize_input
from tests.policy.analysis.small import LEAKY, changed

BOTH = ("notes:read", "notes:write")
MEMO: JsonObject = {"kind": "memo"}
AUTHZ = "pdp/authz/authz.rego"
ARGUMENTS = "pdp/arguments/arguments.rego"
SUBJECT = "pdp/subject/subject.rego"


def asked(
    tenant: str = "acme",
    role: str = "writer",
    tool: str = "notes.write",
    arguments: JsonObject = MEMO,
    scopes: tuple[str, ...] = BOTH,
) -> JsonObject:
    return authorize_input(
        Subject(tenant=tenant, actor="alice", roles=(role,), scopes=scopes),
        tool=tool,
        arguments=arguments,
        resource=None,
        time=0,
        request_id="r",
        context={},
    )


@pytest.fixture(scope="session")
def explained(starter: Bundle, opa: Path) -> Callable[..., Explanation]:
    def explain(document: JsonObject, change: Any = lambda data: None) -> Explanation:
        return explain_call(changed(starter, change), document, opa=opa)

    return explain


def mail_to(data: Any) -> None:
    data["tools"]["notes.write"]["arguments"] |= {
        "to": {"type": "string", "domains": ["a.example"], "required": False},
        "note": {"type": "string", "max_length": 3, "required": False},
    }


def suspend(data: Any) -> None:
    data["tenants"]["acme"]["status"] = "suspended"


@pytest.mark.parametrize(
    ("document", "change", "code", "rule", "failed"),
    (
        (asked("nobody"), None, "tenant_unknown", 'reason_code := "tenant_unknown"',
         (SUBJECT, "tenant", "found := data.tenants[input.subject.properties.tenant]")),
        (asked(), suspend, "tenant_suspended", 'else := "tenant_suspended"',
         (SUBJECT, "active", 'tenant.status == "active"')),
        (asked(tool="none"), None, "tool_not_allowed", 'else := "tool_not_allowed"',
         (AUTHZ, "tool", "tool := data.tools[input.action.name]")),
        (asked("globex", "reader"), None, "tool_not_allowed", 'else := "tool_not_allowed"',
         (AUTHZ, "tool_allowed", "input.action.name in tenant.allowlist")),
        (asked(role="reader"), None, "role_not_allowed", 'else := "role_not_allowed"',
         (AUTHZ, "role_allowed", "input.action.name in role.tools")),
        (asked(scopes=("notes:read",)), None, "scope_missing", 'else := "scope_missing"',
         (AUTHZ, "scopes_held", "scope in input.subject.properties.scopes")),
        (asked(arguments={"kind": "memo", "pages": 9}), None, "argument_not_allowed",
         'default reason_code := "argument_not_allowed"', (ARGUMENTS, "keeps", "value <= bound")),
        (asked(arguments={"kind": "song"}), None, "argument_not_allowed",
         'default reason_code := "argument_not_allowed"', (ARGUMENTS, "keeps", "value in bound")),
    ),
)  # fmt: skip
def test_every_reason_of_the_starter_policy_names_its_rule_and_what_failed(
    explained: Callable[..., Explanation],
    starter: Bundle,
    document: JsonObject,
    change: Any,
    code: str,
    rule: str,
    failed: tuple[str, str, str],
) -> None:
    found = explained(document, change or (lambda data: None))
    assert found.answer.reason_code == code
    assert found.trace is not None
    (decisive,) = [place for place in found.trace.decisive if place.rule == "reason_code"]
    assert rule in decisive.text
    assert starter.rego[decisive.file].splitlines()[decisive.row - 1].strip() == decisive.text
    assert failed in {(place.file, place.rule, place.text) for place in found.trace.failed}
    for place in found.trace.failed:
        assert place.text in " ".join(starter.rego[place.file].split()) or "\n" in place.text
        assert place.text.split()[0] in starter.rego[place.file].splitlines()[place.row - 1]


def test_an_allowed_call_names_the_rules_that_fired(explained: Callable[..., Explanation]) -> None:
    found = explained(asked())
    assert found.answer.allow
    assert found.would_allow == ()
    assert found.trace is not None
    assert {"decision", "arguments_allowed", "scopes_held"} <= {p.rule for p in found.trace.fired}
    assert found.trace.failed == ()


def test_the_values_in_a_failed_condition_are_told(explained: Callable[..., Explanation]) -> None:
    found = explained(asked(arguments={"kind": "memo", "pages": 9}))
    assert found.trace is not None
    values = [dict(place.values) for place in found.trace.failed]
    assert {"value": "9", "bound": "5"} in values


@pytest.mark.parametrize(
    ("document", "change", "told"),
    (
        (asked(role="reader"), None, {
            ("the actor has the role writer",),
            ("the tenant's role reader names the tool notes.write",)}),
        (asked(scopes=()), None, {("the token holds the scope notes:write",)}),
        (asked(), suspend, {("the tenant's status is active",)}),
        (asked(arguments={"kind": "song"}), None, {
            ('the argument kind = "memo"',), ('the argument kind = "task"',)}),
        (asked(arguments={"kind": "memo", "pages": 9}), None, {
            ("the argument pages is left out",), ("the argument pages = 1",),
            ("the argument pages = 5",)}),
        (asked(arguments={}), None, {
            ('the argument kind = "memo"',), ('the argument kind = "task"',)}),
        (asked(arguments={"kind": "memo", "more": 1}), None, {
            ("the argument more is left out",)}),
        (asked(role="reader", scopes=()), None, {
            ("the actor has the role writer", "the token holds the scope notes:write"),
            ("the token holds the scope notes:write",
             "the tenant's role reader names the tool notes.write")}),
        (asked("globex", "reader"), None, {
            ("the tenant's allowlist names notes.write",
             "the tenant's role reader names the tool notes.write")}),
        (asked("nobody"), None, set()),
        (asked(), lambda data: data["tenants"]["acme"]["scopes"].remove("notes:write"), {
            ("the tenant holds the scope notes:write",)}),
        (asked(arguments={"kind": "memo", "to": "bo@b.example"}), mail_to, {
            ('the argument to = "bo@a.example"',), ("the argument to is left out",)}),
        (asked(arguments={"kind": "memo", "note": "long"}), mail_to, {
            ('the argument note = "lon"',), ("the argument note is left out",)}),
    ),
)  # fmt: skip
def test_the_smallest_changes_that_would_have_allowed_it_are_told(
    explained: Callable[..., Explanation],
    document: JsonObject,
    change: Any,
    told: set[tuple[str, ...]],
) -> None:
    found = explained(document, change or (lambda data: None))
    assert {each.changes for each in found.would_allow} == told


def test_another_tenant_is_never_suggested(explained: Callable[..., Explanation]) -> None:
    found = explained(asked("globex", "reader"))
    assert "acme" not in str(found.would_allow)


def test_a_rule_that_denies_by_what_holds_is_told_so(
    build_policy: Callable[..., Bundle], opa: Path
) -> None:
    authz = """package pdp.authz

default decision := {"allow": false, "reason_code": "policy_denied"}

decision := {"allow": false, "reason_code": "too_late"} if {
	input.action.name == "notes.write"
}
"""
    bundle = build_policy({**LEAKY, "pdp/authz/authz.rego": authz})
    found = explain_call(bundle, asked(), opa=opa)
    assert found.trace is not None
    assert [(place.row, place.text) for place in found.trace.decisive] == [
        (5, 'decision := {"allow": false, "reason_code": "too_late"} if {')
    ]
    assert found.trace.failed == ()
    assert [place.where for place in found.trace.held] == ["pdp/authz/authz.rego:6"]
    other = explain_call(bundle, asked(tool="notes.read"), opa=opa)
    assert other.trace is not None
    assert [place.where for place in other.trace.failed] == ["pdp/authz/authz.rego:6"]


def test_a_condition_over_several_lines_is_told_whole(
    build_policy: Callable[..., Bundle], opa: Path
) -> None:
    authz = """package pdp.authz

default decision := {"allow": false, "reason_code": "policy_denied"}

decision := {"allow": true, "reason_code": "ok"} if {
	input.action.name in {
		"one",
		"two",
	}
}
"""
    bundle = build_policy({**LEAKY, "pdp/authz/authz.rego": authz})
    found = explain_call(bundle, asked(), opa=opa)
    assert found.trace is not None
    assert [(place.where, place.text) for place in found.trace.failed] == [
        ("pdp/authz/authz.rego:6", 'input.action.name in { "one", "two", }')
    ]


def test_a_bundle_without_sources_says_that_its_rules_have_no_names(
    starter: Bundle, opa: Path
) -> None:
    found = explain_call(replace(changed(starter), rego={}), asked(role="reader"), opa=opa)
    assert found.trace is None
    assert "carries no Rego sources" in found.no_trace
    assert not found.answer.allow


def test_without_the_opa_command_the_rest_is_still_told(
    starter: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    found = explain_call(changed(starter), asked(role="reader"), opa=None)
    assert found.trace is None
    assert found.no_trace.startswith("there is no opa command on PATH.")
    assert len(found.would_allow) == 2


def test_an_opa_command_that_gives_nothing_is_told(starter: Bundle, tmp_path: Path) -> None:
    (tmp_path / "opa").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "opa").chmod(0o755)
    found = explain_call(changed(starter), asked(role="reader"), opa=tmp_path / "opa")
    assert found.trace is None
    assert found.no_trace == "the opa command gave no trace: JSONDecodeError"
