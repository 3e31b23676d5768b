from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pdp.policy.analysis.cases import Cases
from pdp.policy.analysis.diff import Change, Comparison, compare, summary
from pdp.policy.analysis.questions import Only
from pdp.policy.bundle import Bundle
from tests.policy.analysis.small import changed, no_progress

Edit = Callable[[Any], object]


def difference(bundle: Bundle, change: Edit) -> Comparison:
    return compare(
        changed(bundle),
        changed(bundle, change),
        Cases(),
        Only(),
        processes=1,
        progress=no_progress,
    )


def told(found: Comparison) -> list[tuple[str, str, str, str]]:
    return [(each.change.value, each.tenant, each.role, each.tool) for each in found.differing]


def test_the_same_bundle_differs_in_nothing(starter: Bundle) -> None:
    found = difference(starter, lambda data: None)
    assert found.differing == ()
    assert found.asked == 6


def test_a_tool_given_to_a_role_is_a_grant_with_an_example(starter: Bundle) -> None:
    found = difference(
        starter,
        lambda data: data["tenants"]["acme"]["roles"]["reader"]["tools"].append("notes.write"),
    )
    assert told(found) == [("grant", "acme", "reader", "notes.write")]
    (grant,) = found.differing
    assert grant.before.reason_code == "role_not_allowed"
    assert grant.example["action"] == {
        "name": "notes.write",
        "properties": {"arguments": {"kind": "memo"}},
    }


def test_a_suspended_tenant_loses_what_it_had(starter: Bundle) -> None:
    found = difference(starter, lambda data: data["tenants"]["acme"].update(status="suspended"))
    assert [each[1:] for each in told(found) if each[0] == "revoke"] == [
        ("acme", "reader", "notes.read"),
        ("acme", "writer", "notes.read"),
        ("acme", "writer", "notes.write"),
    ]
    assert [each.after.reason_code for each in found.of(Change.REASON)] == ["tenant_suspended"]


def test_other_charges_scopes_and_lifetime_are_other_terms(starter: Bundle) -> None:
    def terms(data: Any) -> None:
        data["tools"]["notes.write"]["charge"][0]["amount"] = 9
        data["tools"]["notes.read"]["permit"] = {"ttl_seconds": 5}

    found = difference(starter, terms)
    assert {each.change for each in found.differing} == {Change.TERMS}
    after = {each.tool: each.after for each in found.differing}
    assert after["notes.read"].ttl_seconds == 5
    assert after["notes.write"].charges[0].amount == 9


def test_a_permit_for_any_arguments_or_for_more_calls_is_a_grant(starter: Bundle) -> None:
    """Calls that were denied, or asked about one by one, are then made unasked."""

    def once(data: Any) -> None:
        data["tools"]["notes.read"]["permit"] = {"binds": ["tool"]}

    def often(data: Any) -> None:
        data["tools"]["notes.read"]["permit"] = {"binds": ["tool"], "max_uses": 5}

    def change(before: Edit, after: Edit) -> set[Change]:
        found = compare(
            changed(starter, before), changed(starter, after), Cases(), Only(), processes=1,
            progress=no_progress,
        )  # fmt: skip
        return {each.change for each in found.differing if each.tool == "notes.read"}

    assert change(lambda data: None, once) == {Change.GRANT}
    assert change(once, often) == {Change.GRANT}
    assert change(often, once) == {Change.TERMS}
    assert change(often, lambda data: None) == {Change.TERMS}
    assert change(often, often) == set()


def test_an_argument_limit_that_is_raised_is_a_grant(starter: Bundle) -> None:
    def raise_limit(data: Any) -> None:
        data["tools"]["notes.write"]["arguments"]["pages"]["maximum"] = 500

    (grant,) = difference(starter, raise_limit).of(Change.GRANT)
    assert (grant.tenant, grant.role, grant.calls) == ("acme", "writer", 1)
    action: Any = grant.example["action"]
    assert action["properties"]["arguments"] == {"kind": "memo", "pages": 500}


def test_a_rule_of_the_tenant_that_is_dropped_is_a_grant(starter: Bundle) -> None:
    def restrict(data: Any) -> None:
        data["tenants"]["acme"]["tools"] = {
            "notes.write": {"arguments": {"kind": {"enum": ["memo"]}}}
        }

    found = compare(
        changed(starter, restrict), changed(starter), Cases(), Only(), processes=1,
        progress=no_progress,
    )  # fmt: skip
    assert told(found) == [("grant", "acme", "writer", "notes.write")]


def test_a_scope_that_the_tenant_gains_is_a_grant(starter: Bundle) -> None:
    def drop(data: Any) -> None:
        data["tenants"]["globex"]["scopes"] = []

    found = difference(starter, drop)
    assert told(found) == [("revoke", "globex", "reader", "notes.read")]


def test_tenants_roles_and_tools_that_come_and_go_are_named(starter: Bundle) -> None:
    def come_and_go(data: Any) -> None:
        tenants, tools = data["tenants"], data["tools"]
        tenants["initech"] = tenants.pop("globex")
        tenants["acme"]["roles"]["boss"] = tenants["acme"]["roles"].pop("writer")
        tools["notes.drop"] = tools.pop("notes.write")

    found = difference(starter, come_and_go)
    names = found.names
    assert (names.tenants_added, names.tenants_removed) == (("initech",), ("globex",))
    assert (names.roles_added, names.roles_removed) == ((("acme", "boss"),), (("acme", "writer"),))
    assert (names.tools_added, names.tools_removed) == (("notes.drop",), ("notes.write",))
    assert ("grant", "initech", "reader", "notes.read") in told(found)
    assert ("revoke", "globex", "reader", "notes.read") in told(found)
    assert ("grant", "acme", "boss", "notes.read") in told(found)


def test_other_rules_are_asked_about_at_every_edge(
    starter: Bundle, build_policy: Callable[..., Bundle]
) -> None:
    rego = {name: text for name, text in starter.rego.items() if not name.endswith("_test.rego")}
    arguments = "pdp/arguments/arguments.rego"
    lax = rego[arguments].replace('keeps("maximum", bound, value) if {', 'keeps("maximum", _, _) if true\n\nkeeps("nothing", bound, value) if {')  # fmt: skip
    assert lax != rego[arguments]
    old = changed(build_policy({**rego, "data.json": {}}))
    new = replace(changed(build_policy({**rego, arguments: lax, "data.json": {}})))

    def higher(data: Any) -> None:
        data["tools"]["notes.write"]["arguments"]["pages"]["maximum"] = 0

    old, new = changed(old, higher), changed(new, higher)
    found = compare(old, new, Cases(), Only(), processes=1, progress=no_progress)
    assert told(found) == [("grant", "acme", "writer", "notes.write")]


def test_what_is_the_same_for_many_tenants_is_told_once(starter: Bundle) -> None:
    def many(data: Any) -> None:
        data["tenants"] |= {f"t{number}": data["tenants"]["acme"] for number in range(200)}

    def grant(data: Any) -> None:
        data["tenants"]["acme"]["roles"]["reader"]["tools"].append("notes.write")
        many(data)

    old, new = changed(starter, many), changed(starter, grant)
    found = compare(old, new, Cases(), Only(), processes=1, progress=no_progress)
    (some,) = summary(found.differing)
    assert {(each.change, each.role, each.tool) for each in some} == {
        (Change.GRANT, "reader", "notes.write")
    }
    assert len(some) == 201


def test_what_moves_otherwise_at_another_tenant_is_told_apart(starter: Bundle) -> None:
    def drop(data: Any) -> None:
        data["tenants"]["acme"]["status"] = "suspended"
        data["tenants"]["globex"]["roles"]["reader"]["tools"] = []

    found = difference(starter, drop)
    reading = [some for some in summary(found.of(Change.REVOKE)) if some[0].role == "reader"]
    assert {(some[0].tenant, some[0].after.reason_code) for some in reading} == {
        ("acme", "tenant_suspended"),
        ("globex", "role_not_allowed"),
    }
