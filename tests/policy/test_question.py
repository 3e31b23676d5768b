"""What a policy is asked: who it is comes from the token, the rest is the caller's word."""

from __future__ import annotations

from dataclasses import replace

from pdp.budget.ledger import Charge
from pdp.canonical import check
from pdp.identity.subject import Delegation, Link, Subject
from pdp.policy.question import Usage, authorize_input, budget_input

ALICE = Subject(
    tenant="tenant_acme",
    actor="alice",
    roles=("support_agent",),
    scopes=("orders:write",),
    issuer="https://id.example",
    token_id="token-1",
)
SUBJECT = {
    "type": "user",
    "id": "alice",
    "properties": {
        "tenant": "tenant_acme",
        "roles": ["support_agent"],
        "scopes": ["orders:write"],
        "issuer": "https://id.example",
    },
}


def test_a_call_is_put_as_authzen_puts_it() -> None:
    document = authorize_input(
        ALICE,
        tool="orders.update",
        arguments={"order_id": "918", "tenant": "tenant_globex"},
        resource={"type": "order", "id": "918"},
        time=1_800_000_000.25,
        request_id="req-1",
        context={"tenant": "tenant_globex", "ip": "192.0.2.1"},
    )

    assert document == {
        "subject": SUBJECT,
        "action": {
            "name": "orders.update",
            "properties": {"arguments": {"order_id": "918", "tenant": "tenant_globex"}},
        },
        "resource": {"type": "order", "id": "918"},
        "context": {
            "time": "2027-01-15T08:00:00.250+00:00",
            "request_id": "req-1",
            "client": {"tenant": "tenant_globex", "ip": "192.0.2.1"},
        },
        "tool": "orders.update",
    }
    check(document)


def test_a_call_without_a_resource_names_none() -> None:
    document = authorize_input(
        ALICE,
        tool="orders.read",
        arguments={},
        resource=None,
        time=0,
        request_id="req-1",
        context={},
    )

    assert "resource" not in document


def test_a_charge_is_put_with_what_is_asked_for() -> None:
    document = budget_input(
        ALICE,
        operation="reserve",
        charges=[Charge("llm", "tokens_in", 1200), Charge("llm", "tokens_out", 2**53 - 1)],
        tool="",
        time=0,
        request_id="req-2",
    )

    assert document == {
        "subject": SUBJECT,
        "action": {"name": "budget.reserve"},
        "context": {
            "time": "1970-01-01T00:00:00.000+00:00",
            "request_id": "req-2",
            "client": {},
        },
        "tool": "",
        "charges": [
            {"budget": "llm", "unit": "tokens_in", "amount": 1200},
            {"budget": "llm", "unit": "tokens_out", "amount": 2**53 - 1},
        ],
    }
    check(document)


def test_what_the_token_says_of_organisation_team_and_session_stands_with_the_subject() -> None:
    bob = replace(ALICE, organisation="acme-group", team="returns", session="s-1")

    call = authorize_input(
        bob,
        tool="orders.read",
        arguments={},
        resource=None,
        time=0,
        request_id="req-1",
        context={},
    )
    spend = budget_input(bob, operation="get", charges=(), tool="", time=0, request_id="")

    told = {"organisation": "acme-group", "team": "returns", "session": "s-1"}
    for document in (call, spend):
        assert document["subject"] == {**SUBJECT, "properties": SUBJECT["properties"] | told}  # type: ignore[operator]


def test_the_workload_and_the_agents_that_act_stand_with_the_subject() -> None:
    delegation = Delegation(
        links=(Link(id="d-1", agent="planner"), Link(id="d-2", agent="mailer")),
        tools=frozenset({"mail.send", "orders.read"}),
        arguments={},
        root_token_id="token-1",
        ledger="ledger-1",
    )
    bob = replace(ALICE, workload="spiffe://example.org/agent", delegation=delegation)

    document = budget_input(bob, operation="get", charges=(), tool="", time=0, request_id="")

    told = {
        "workload": "spiffe://example.org/agent",
        "delegation": {
            "agents": ["planner", "mailer"],
            "tools": ["mail.send", "orders.read"],
        },
    }
    assert document["subject"] == {**SUBJECT, "properties": SUBJECT["properties"] | told}  # type: ignore[operator]


def test_usage_is_put_in_place_of_charges() -> None:
    document = budget_input(
        ALICE,
        operation="reserve",
        charges=(),
        usage=Usage(model="gpt-x", quantities=(("tokens_in", 1200), ("tokens_out", 4000))),
        tool="",
        time=0,
        request_id="req-3",
    )

    assert document["action"] == {"name": "budget.reserve"}
    assert document["charges"] == []
    assert document["usage"] == {
        "model": "gpt-x",
        "quantities": {"tokens_in": 1200, "tokens_out": 4000},
    }
    assert "price_version" not in document
    check(document)


def test_a_settlement_is_put_with_the_prices_that_the_hold_was_made_at() -> None:
    document = budget_input(
        ALICE,
        operation="settle",
        charges=(),
        usage=Usage(model="gpt-x", quantities=(("tokens_in", 1199),)),
        price_version="2026-11-01",
        tool="",
        time=0,
        request_id="req-4",
    )

    assert document["action"] == {"name": "budget.settle"}
    assert document["price_version"] == "2026-11-01"
