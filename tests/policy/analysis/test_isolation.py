from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pdp.policy.analysis import isolation
from pdp.policy.analysis.cases import Cases
from pdp.policy.analysis.isolation import Leak, Search, search
from pdp.policy.analysis.mutations import Mutation, Neighbours
from pdp.policy.analysis.questions import Only
from pdp.policy.bundle import Bundle
from tests.policy.analysis.small import LEAKY, changed, no_progress

Build = Callable[..., Bundle]


def searched(bundle: Bundle, only: Only = Only()) -> Search:  # noqa: B008 - it is frozen
    return search(bundle, Cases(), only, processes=1, progress=no_progress)


def leaky(**edits: Any) -> dict[str, Any]:
    """LEAKY with texts of its Rego replaced, and data that ``data`` changes."""
    return {**LEAKY, **edits}


def by_change(found: Search) -> dict[str, Leak]:
    return {leak.changed: leak for leak in found.leaks}


def test_the_starter_policy_gives_no_counterexample(starter: Bundle) -> None:
    found = searched(changed(starter))
    assert found.leaks == ()
    assert found.leaks_found == 0
    assert found.tenants == 2
    assert found.evaluations > 100


def test_a_grant_out_of_another_tenants_data_is_found_and_its_owner_named(
    build_policy: Build,
) -> None:
    found = searched(build_policy(LEAKY))
    assert found.leaks_found > 0
    leak = by_change(found)[Mutation.DELETED.told]
    assert (leak.tenant, leak.role, leak.tool) == ("acme", "reader", "notes.read")
    assert leak.entrypoint == "pdp/authz/decision"
    assert leak.others == ("globex",)
    assert isinstance(leak.before, dict)
    assert isinstance(leak.after, dict)
    assert (leak.before["allow"], leak.after["allow"]) == (True, False)


def test_a_grant_that_another_tenant_could_give_is_found(build_policy: Build) -> None:
    """initech is nobody's partner yet; it would be, if others named every tenant."""
    found = searched(build_policy(LEAKY), Only(tenants=frozenset({"initech"})))
    assert Mutation.ALLOWED.told in by_change(found)


def test_a_limit_out_of_another_tenants_data_is_found(build_policy: Build) -> None:
    budget = LEAKY["pdp/budget/budget.rego"]
    assert isinstance(budget, str)
    shared = budget.replace(
        "limits := data.tenants[input.subject.properties.tenant].limits",
        "limits := [limit | some other in data.tenants; some limit in other.limits]",
    )
    data: dict[str, Any] = {
        "tenants": {
            "acme": {"roles": {"r": {}}, "limits": [{"budget": "b", "unit": "u"}]},
            "globex": {"roles": {"r": {}}, "limits": [{"budget": "c", "unit": "u"}]},
        },
        "tools": {"t": {}},
    }
    found = searched(build_policy(leaky(**{"pdp/budget/budget.rego": shared, "data.json": data})))
    assert {leak.entrypoint for leak in found.leaks} == {"pdp/budget/limits"}


def test_a_service_class_out_of_another_tenants_data_is_found(build_policy: Build) -> None:
    shared = """package pdp.sidecar

service_class := {"priority": "low"} if {
	some other in data.tenants
	input.subject.properties.tenant in other.slowed
}
"""
    data: dict[str, Any] = {
        "tenants": {"acme": {"limits": []}, "globex": {"limits": [], "slowed": ["acme"]}},
        "tools": {},
    }
    edits = {"pdp/sidecar/sidecar.rego": shared, "data.json": data}
    found = searched(build_policy(leaky(**edits)))
    assert {leak.entrypoint for leak in found.leaks} == {"pdp/sidecar/service_class"}


def test_a_listing_of_another_tenants_tools_is_found(build_policy: Build) -> None:
    shared = """package pdp.tools

visible := [{"name": name, "callable": true, "reason_code": "ok"} |
	some other in data.tenants
	some name in other.allowlist
]
"""
    data: dict[str, Any] = {
        "tenants": {
            "acme": {"limits": [], "allowlist": ["notes.read"]},
            "globex": {"limits": [], "allowlist": ["notes.secret"]},
        },
        "tools": {},
    }
    edits = {"pdp/tools/tools.rego": shared, "data.json": data}
    found = searched(build_policy(leaky(**edits)))
    assert {leak.entrypoint for leak in found.leaks} == {"pdp/tools/visible"}


def test_a_budget_decision_out_of_another_tenants_data_is_found(build_policy: Build) -> None:
    budget = LEAKY["pdp/budget/budget.rego"]
    assert isinstance(budget, str)
    counted = budget.replace(
        'decision := {"allow": false, "reason_code": "budget_not_allowed"}',
        'default decision := {"allow": false, "reason_code": "budget_not_allowed"}\n'
        'decision := {"allow": true, "reason_code": "ok"} if count(data.tenants) > 1',
    )
    data: dict[str, Any] = {
        "tenants": {
            name: {"roles": {"r": {}}, "limits": [{"budget": "b", "unit": "u"}]}
            for name in ("acme", "globex")
        },
        "tools": {"t": {}},
    }
    found = searched(build_policy(leaky(**{"pdp/budget/budget.rego": counted, "data.json": data})))
    assert {(leak.entrypoint, leak.changed) for leak in found.leaks} == {
        ("pdp/budget/decision", Mutation.DELETED.told)
    }


def test_a_rule_that_lets_the_call_name_its_tenant_is_found(build_policy: Build) -> None:
    authz = LEAKY["pdp/authz/authz.rego"]
    assert isinstance(authz, str)
    trusting = authz.split("# The leak")[0] + (
        "allowed if {\n\tsome role in input.subject.properties.roles\n"
        "\tinput.action.name in data.tenants[input.context.client.tenant].roles[role].tools\n}\n"
    )
    found = searched(build_policy(leaky(**{"pdp/authz/authz.rego": trusting})))
    assert {leak.changed for leak in found.leaks} == {
        "the context of the call names another tenant, and not nobody"
    }
    (leak,) = {leak.others for leak in found.leaks}
    assert leak == ("acme",)


def test_a_scope_or_role_that_only_another_tenant_has_is_found(build_policy: Build) -> None:
    authz = LEAKY["pdp/authz/authz.rego"]
    assert isinstance(authz, str)
    start = authz.split("allowed if")[0]
    for leak in (
        (
            "\tsome other in data.tenants\n\tsome scope in other.scopes\n"
            "\tscope in input.subject.properties.scopes\n"
        ),
        (
            "\tsome other in data.tenants\n\tsome role in input.subject.properties.roles\n"
            "\tinput.action.name in other.roles[role].tools\n"
        ),
    ):
        data: dict[str, Any] = {
            "tenants": {
                "acme": {"roles": {"reader": {}}, "scopes": []},
                "globex": {"roles": {"boss": {"tools": ["notes.read"]}}, "scopes": ["notes"]},
            },
            "tools": {"notes.read": {}},
        }
        rego = f"{start}allowed if {{\n{leak}}}\n"
        found = searched(
            build_policy(leaky(**{"pdp/authz/authz.rego": rego, "data.json": data})),
            Only(tenants=frozenset({"acme"})),
        )
        assert Mutation.DELETED.told in by_change(found)


def test_data_by_tenant_outside_of_data_tenants_is_changed_too(build_policy: Build) -> None:
    authz = LEAKY["pdp/authz/authz.rego"]
    assert isinstance(authz, str)
    elsewhere = authz.replace(
        "some other in data.tenants", "some other in data.agreements.of"
    ).replace("in other.partners", "in other")
    data: dict[str, Any] = {
        "tenants": {name: {"roles": {"reader": {}}} for name in ("acme", "globex")},
        "tools": {"notes.read": {}},
        "agreements": {"of": {"globex": ["acme"]}},
    }
    found = searched(build_policy(leaky(**{"pdp/authz/authz.rego": elsewhere, "data.json": data})))
    assert by_change(found)[Mutation.DELETED.told].others == ("globex",)


def test_among_many_tenants_one_leak_is_found_by_halves(
    build_policy: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants: dict[str, Any] = {f"t{number:02}": {"roles": {"reader": {}}} for number in range(40)}
    tenants["t31"]["partners"] = ["t07"]
    files = leaky(**{"data.json": {"tenants": tenants, "tools": {"notes.read": {}}}})
    found = searched(build_policy(files), Only(tenants=frozenset({"t07"})))
    assert {leak.others for leak in found.leaks if leak.mutation is Mutation.DELETED} == {("t31",)}
    assert {leak.mutation for leak in found.leaks} >= {Mutation.DELETED, Mutation.DENIED}


def test_every_pair_of_tenants_is_set_apart_with_few_loads() -> None:
    every = [f"t{number}" for number in range(1000)]
    loads = [load for load in isolation._loads(every, every) if load[1] is Mutation.GARBAGE]
    assert len(loads) == 20
    apart = [frozenset(every) - kept for kept, _, _ in loads]
    for one, other in (("t0", "t999"), ("t3", "t4"), ("t511", "t512")):
        assert any(one not in changed and other in changed for changed in apart)
        assert any(other not in changed and one in changed for changed in apart)


def test_several_processes_find_the_same(
    build_policy: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = build_policy(LEAKY)
    alone = searched(bundle)
    monkeypatch.setattr(isolation, "FEW_EVALUATIONS", 0)
    monkeypatch.setattr(isolation, "TENANTS_PER_TASK", 2)
    together = search(bundle, Cases(), Only(), processes=2, progress=no_progress)
    assert together.leaks_found == alone.leaks_found
    assert together.leaks == alone.leaks


def test_a_tool_with_a_tenants_name_is_no_tenants_data() -> None:
    data: Any = {"tenants": {"a": {"x": 1}, "b": {"x": 2}}, "tools": {"b": {"scopes": []}}}
    for mutation in Mutation:
        mutated, others = Neighbours(data).changed(mutation, kept=frozenset({"a"}), bit=0)
        assert others == ["b"]
        assert mutated["tools"] == data["tools"]
        tenants = mutated["tenants"]
        assert isinstance(tenants, dict)
        assert tenants["a"] == {"x": 1}
        assert tenants.get("b") != {"x": 2} or mutation is Mutation.ALLOWED
