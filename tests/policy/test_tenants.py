"""Nothing that is decided for one tenant depends on another tenant's data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdp.budget.ledger import Charge
from pdp.canonical import JsonObject, JsonValue
from pdp.identity.subject import Subject
from pdp.policy.bundle import Bundle
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.question import authorize_input, budget_input
from pdp.policy.wasm import WasmEvaluator

Questions = list[tuple[Entrypoint, JsonObject]]

TENANTS = ("tenant_acme", "tenant_globex", "tenant_initech", "tenant_nobody")
TOOLS = ("orders.read", "orders.update", "mail.send", "reports.generate", "orders.drop")
ROLES = ("support_agent", "analyst", "viewer", "agent", "finance_admin")
SCOPES = ("orders:read", "orders:write", "mail:send", "reports:generate")
CALLS: tuple[tuple[str, JsonObject], ...] = (
    ("orders.read", {"order_id": "918"}),
    ("orders.update", {"order_id": "918", "status": "shipped"}),
    ("orders.update", {"order_id": "918", "status": "shipped", "tenant_id": "tenant_globex"}),
    ("mail.send", {"to": "kim@customers.example", "subject": "Hello", "body": "Hello."}),
    ("mail.send", {"to": "kim@globex.example", "subject": "Hello", "body": "Hello."}),
    ("reports.generate", {"topic": "Refunds", "pages": 3}),
    ("orders.drop", {}),
)

# Half of the time an actor who lacks nothing, so that the last rungs are reached as well.
subjects = st.builds(
    Subject,
    tenant=st.sampled_from(TENANTS),
    actor=st.just("alice"),
    roles=st.just(ROLES) | st.lists(st.sampled_from(ROLES), max_size=3).map(tuple),
    scopes=st.just(SCOPES) | st.lists(st.sampled_from(SCOPES), max_size=4).map(tuple),
)
# A tenant's data that grants as much as there is to grant, and anything else beside it.
generous: JsonObject = {
    "status": "active",
    "scopes": list(SCOPES),
    "allowlist": list(TOOLS),
    "roles": {role: {"tools": list(TOOLS), "budgets": {"llm": ["tokens_in"]}} for role in ROLES},
    "tools": {
        "mail.send": {"arguments": {"to": {"domains": ["globex.example", "customers.example"]}}}
    },
    "limits": [],
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from((*TENANTS, *TOOLS, *ROLES)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("status", "scopes", "allowlist", "roles", "tools", "limits", "*", "")),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


class Decisions:
    """The starter bundle, asked with other tenants in its data."""

    def __init__(self, starter: Bundle) -> None:
        self._data: dict[str, Any] = json.loads(starter.data)
        self._engine = WasmEvaluator(starter, deadline_ms=5_000, memory_max_mib=64)

    @property
    def tenants(self) -> dict[str, Any]:
        return dict(self._data["tenants"])

    def with_tenants(self, tenants: JsonObject, asked: Questions) -> list[JsonValue]:
        self._engine.set_data(json.dumps({**self._data, "tenants": tenants}).encode())
        return [self._decide(*question) for question in asked]

    def _decide(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        try:
            return self._engine.evaluate(entrypoint, document)
        except PolicyError as error:
            return error.reason_code

    def close(self) -> None:
        self._engine.close()


@pytest.fixture(scope="module")
def decisions(starter: Bundle) -> Iterator[Decisions]:
    decisions = Decisions(starter)
    yield decisions
    decisions.close()


def questions(subject: Subject, tool: str, arguments: JsonObject) -> Questions:
    call = authorize_input(
        subject,
        tool=tool,
        arguments=arguments,
        resource={"type": "tenant", "id": "tenant_globex"},
        time=0,
        request_id="req-1",
        context={"tenant": "tenant_globex"},
    )
    spend = budget_input(
        subject,
        operation="charge",
        charges=[Charge("llm", "tokens_in", 1)],
        tool=tool,
        time=0,
        request_id="req-1",
    )
    return [
        (Entrypoint.AUTHZ_DECISION, call),
        (Entrypoint.BUDGET_LIMITS, call),
        (Entrypoint.BUDGET_DECISION, spend),
        (Entrypoint.BUDGET_LIMITS, spend),
    ]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    subject=subjects,
    call=st.sampled_from(CALLS),
    lacking=st.just(set())
    | st.sets(st.sampled_from(("allowlist", "scopes", "roles", "tools", "limits"))),
    of_others=st.fixed_dictionaries(
        {tenant: st.just(generous) | anything for tenant in (*TENANTS, "")}
    ),
)
def test_other_tenants_data_never_changes_a_decision(
    decisions: Decisions,
    subject: Subject,
    call: tuple[str, JsonObject],
    lacking: set[str],
    of_others: JsonObject,
) -> None:
    tenants = decisions.tenants
    asked = questions(subject, *call)
    own: JsonObject = {
        name: {key: value for key, value in data.items() if key not in lacking}
        for name, data in tenants.items()
        if name == subject.tenant
    }
    others = {name: data for name, data in of_others.items() if name != subject.tenant}

    decided = decisions.with_tenants(own, asked)

    assert decisions.with_tenants(tenants | own, asked) == decided
    assert decisions.with_tenants(others | own, asked) == decided


def test_without_any_tenant_everything_is_a_denial(decisions: Decisions) -> None:
    subject = Subject(tenant="tenant_acme", actor="alice", roles=ROLES, scopes=SCOPES)

    decided = decisions.with_tenants({}, questions(subject, "orders.read", {"order_id": "918"}))

    unknown: JsonObject = {"allow": False, "reason_code": "tenant_unknown"}
    assert decided == [unknown, [], unknown, []]


@pytest.mark.parametrize("failing", ("limits", "roles", "tools", "scopes"))
def test_one_tenants_broken_data_harms_no_other(decisions: Decisions, failing: str) -> None:
    tenants = decisions.tenants
    subject = Subject(
        tenant="tenant_acme", actor="alice", roles=("support_agent",), scopes=("orders:write",)
    )
    asked = questions(subject, "orders.update", {"order_id": "918", "status": "shipped"})
    decided = decisions.with_tenants(tenants, asked)
    broken = [{"id": {"broken": [1]}}, "support_agent", None]

    tenants["tenant_globex"] = {**tenants["tenant_globex"], failing: broken}

    assert decisions.with_tenants(tenants, asked) == decided
    assert decided[0] != "policy_error"
