"""Delegate, as callers of a real sidecar meet it, those that mean ill among them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.canonical import JsonObject, sha256_hex
from pdp.testing import Caller, SidecarProcess, refusal_of
from tests.delegation.parties import BUNDLE, IDP, MAX_DEPTH
from tests.e2e.operating import records

UPDATE: JsonObject = {"order_id": "918", "status": "shipped"}


@pytest.fixture
def user(sidecar: SidecarProcess) -> Iterator[Caller]:
    """A new actor each time, so that limits by actor and keys are its own."""
    with caller(sidecar, token()) as found:
        yield found


def token(actor: str = "", **claims: Any) -> str:
    return IDP.token(
        "tenant_acme",
        actor or f"user-{uuid.uuid4().hex[:8]}",
        roles=["support_agent", "agent", "billing"],
        scopes=["orders:read", "orders:write", "mail:send"],
        **claims,
    )


def caller(sidecar: SidecarProcess, bearer: str) -> Caller:
    return Caller(sidecar.target, token=bearer)


def request(**fields: Any) -> authorization_pb2.DelegateRequest:
    usual: dict[str, Any] = {
        "request_id": str(uuid.uuid4()),
        "delegate": "worker",
        "tools": ["orders.read", "orders.update"],
    }
    rules = fields.pop("rules", None)
    if rules is not None:
        fields["arguments_json"] = json.dumps(rules).encode()
    return authorization_pb2.DelegateRequest(**{**usual, **fields})


def charges(amount: int, budget: str = "llm", unit: str = "usd_micros") -> list[common_pb2.Charge]:
    return [common_pb2.Charge(budget=budget, unit=unit, amount=amount)]


def child(sidecar: SidecarProcess, parent: Caller, **fields: Any) -> Caller:
    return caller(sidecar, parent.authorization.Delegate(request(**fields)).token)


def why(parent: Caller, **fields: Any) -> str:
    return refusal_of(parent.authorization.Delegate, request(**fields)).reason_code


def verdict(asker: Caller, tool: str, arguments: JsonObject | None = None) -> str:
    return asker.authorize(tool, arguments).reason_code


def spend(asker: Caller, amount: int, **fields: Any) -> Any:
    return asker.budget.ChargeBudget(
        budget_pb2.ChargeBudgetRequest(
            idempotency_key=str(uuid.uuid4()), **{"charges": charges(amount), **fields}
        )
    )


def reserve(asker: Caller, amount: int) -> str:
    response = asker.budget.ReserveBudget(
        budget_pb2.ReserveBudgetRequest(idempotency_key=str(uuid.uuid4()), charges=charges(amount))
    )
    return response.hold_id


def settle(hold_id: str, amount: int) -> budget_pb2.SettleBudgetRequest:
    return budget_pb2.SettleBudgetRequest(
        idempotency_key=str(uuid.uuid4()), hold_id=hold_id, charges=charges(amount)
    )


def release(hold_id: str) -> budget_pb2.ReleaseBudgetRequest:
    return budget_pb2.ReleaseBudgetRequest(idempotency_key=str(uuid.uuid4()), hold_id=hold_id)


# What is asked for


@pytest.mark.parametrize(
    ("fields", "field"),
    (
        ({"request_id": ""}, "request_id"),
        ({"request_id": "a b"}, "request_id"),
        ({"delegate": ""}, "delegate"),
        ({"delegate": "a\nb"}, "delegate"),
        ({"delegate": "a" * 256}, "delegate"),
        ({"tools": []}, "tools"),
        ({"tools": ["orders.read", ""]}, "tools[1]"),
        ({"tools": ["*"]}, "tools[0]"),
        ({"tools": ["orders.read"] * 2}, "tools"),
        ({"tools": [f"tool-{n}" for n in range(129)]}, "tools"),
        ({"ttl_seconds": -1}, "ttl_seconds"),
        ({"ttl_seconds": 86_401}, "ttl_seconds"),
        ({"ttl_seconds": 601}, "ttl_seconds"),
        ({"budget": charges(0)}, "budget[0].amount"),
        ({"budget": charges(-5)}, "budget[0].amount"),
        ({"budget": charges(2**53)}, "budget[0].amount"),
        ({"budget": charges(1, budget="*")}, "budget[0].budget"),
        ({"budget": charges(1) * 2}, "budget"),
        ({"budget": [each for n in range(17) for each in charges(1, f"b{n}")]}, "budget"),
        ({"arguments_json": b"[]"}, "arguments_json"),
        ({"arguments_json": b"{"}, "arguments_json"),
        ({"arguments_json": b'{"orders.read":{},"orders.read":{}}'}, "arguments_json"),
        ({"arguments_json": b'{"orders.read":{"a":{"max":NaN}}}'}, "arguments_json"),
        ({"arguments_json": b'{"orders.read":{"a":{"max":9007199254740993}}}'}, "arguments_json"),
        ({"arguments_json": b'{"orders.read":{"a":{"max":1e999}}}'}, "arguments_json"),
        ({"rules": {"mail.send": {"to": {"prefix": "x"}}}}, "arguments_json"),
        ({"rules": {"orders.read": []}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": []}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {"regex": ".*"}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {"max": True}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {"max": "5"}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {"one_of": []}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {"one_of": [None]}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {"one_of": [["x"]]}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {"prefix": ""}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"": {"max": 1}}}}, "arguments_json"),
        ({"rules": {"orders.read": {"a": {"prefix": "x" * 2_100}}}}, "arguments_json"),
    ),
)
def test_what_is_out_of_bounds_is_refused_by_its_field(
    user: Caller, fields: dict[str, Any], field: str
) -> None:
    refusal = refusal_of(user.authorization.Delegate, request(**fields))
    assert refusal.status is grpc.StatusCode.INVALID_ARGUMENT
    assert (refusal.reason_code, refusal.fields) == ("request_invalid", (field,))


def test_a_token_that_would_be_too_long_says_what_to_name_less_of(user: Caller) -> None:
    tools = [f"{'tool' * 20}-{n}" for n in range(128)]
    refusal = refusal_of(user.authorization.Delegate, request(tools=tools))
    assert (refusal.reason_code, refusal.fields) == ("request_invalid", ("tools",))
    assert "fewer tools" in refusal.message


def test_a_delegation_lasts_as_long_as_asked_and_no_longer_than_the_callers_token(
    sidecar: SidecarProcess, user: Caller
) -> None:
    def lasts(asker: Caller, **fields: Any) -> int:
        answer = asker.authorization.Delegate(request(**fields))
        payload = answer.token.split(".")[1]
        claims = json.loads(_decoded(payload))
        assert claims["exp"] == answer.expires_at.seconds
        return int(claims["exp"] - claims["iat"])

    assert lasts(user) == 120
    assert lasts(user, ttl_seconds=600) == 600
    with caller(sidecar, token(lifetime_seconds=50)) as short:
        assert 48 <= lasts(short, ttl_seconds=600) <= 50
    with child(sidecar, user, ttl_seconds=40) as agent:
        assert 38 <= lasts(agent, ttl_seconds=600) <= 40
    # Other services still take the token for a moment; nothing can be delegated with it.
    with caller(sidecar, token(lifetime_seconds=-5)) as ended:
        assert why(ended) == "token_expired"


def _decoded(segment: str) -> bytes:
    import base64  # noqa: PLC0415

    return base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))


# Narrower and narrower


def test_a_child_has_no_more_tools_than_its_parent(sidecar: SidecarProcess, user: Caller) -> None:
    with child(sidecar, user, tools=["orders.read"]) as agent:
        assert why(agent, tools=["orders.update"]) == "delegation_too_wide"
        assert why(agent, tools=["orders.read", "mail.send"]) == "delegation_too_wide"
        with child(sidecar, agent, tools=["orders.read"]) as grandchild:
            assert verdict(grandchild, "orders.read", {"order_id": "1"}) == "ok"
            assert verdict(grandchild, "orders.update", UPDATE) == "tool_not_delegated"


def test_a_childs_rules_stand_beside_its_parents(sidecar: SidecarProcess, user: Caller) -> None:
    shipping = {"orders.update": {"status": {"one_of": ["shipped", "packed"]}}}
    with (
        child(sidecar, user, rules=shipping) as agent,
        child(
            sidecar,
            agent,
            rules={
                "orders.update": {
                    "status": {"one_of": ["packed", "cancelled"]},
                    "order_id": {"prefix": "91"},
                }
            },
        ) as grandchild,
        child(sidecar, agent) as free,
    ):
        assert verdict(agent, "orders.update", UPDATE) == "ok"
        for asker in (agent, free, grandchild):
            cancelled: JsonObject = {**UPDATE, "status": "cancelled"}
            assert verdict(asker, "orders.update", cancelled) == "argument_not_delegated"
        assert verdict(free, "orders.update", UPDATE) == "ok"
        assert verdict(grandchild, "orders.update", UPDATE) == "argument_not_delegated"
        packed: JsonObject = {**UPDATE, "status": "packed"}
        assert verdict(grandchild, "orders.update", packed) == "ok"
        other: JsonObject = {**packed, "order_id": "818"}
        assert verdict(grandchild, "orders.update", other) == "argument_not_delegated"
        assert (
            verdict(grandchild, "orders.update", {"status": "packed"}) == "argument_not_delegated"
        )


def test_a_childs_slice_is_of_its_parents(sidecar: SidecarProcess, user: Caller) -> None:
    with child(sidecar, user, budget=charges(1_000)) as agent:
        assert why(agent, budget=charges(1_001)) == "delegation_too_wide"
        assert why(agent, budget=charges(1, unit="tokens_in")) == "delegation_too_wide"
        with child(sidecar, agent) as free, child(sidecar, free, budget=charges(600)) as last:
            assert why(free, budget=charges(1_001)) == "delegation_too_wide"
            spend(last, 600)
            assert refusal_of(spend, last, 1).reason_code == "tenant_budget_exceeded"
            spend(free, 400)
            assert refusal_of(spend, free, 1).reason_code == "tenant_budget_exceeded"
            assert refusal_of(spend, agent, 1).reason_code == "tenant_budget_exceeded"
    spend(user, 1)


def test_agents_act_one_for_another_only_so_deep(sidecar: SidecarProcess, user: Caller) -> None:
    chain = [user]
    try:
        for _ in range(MAX_DEPTH):
            chain.append(child(sidecar, chain[-1]))
        assert verdict(chain[-1], "orders.update", UPDATE) == "ok"
        assert why(chain[-1]) == "delegation_too_deep"
    finally:
        for agent in chain[1:]:
            agent.close()


def test_the_names_of_a_chain_fit_into_every_permit(sidecar: SidecarProcess, user: Caller) -> None:
    name = "\u00e4" * 255
    with (
        child(sidecar, user, delegate=name) as parent,
        child(sidecar, parent, delegate=name) as agent,
    ):
        refusal = refusal_of(agent.authorization.Delegate, request(delegate="abcde"))
        assert (refusal.reason_code, refusal.fields) == ("request_invalid", ("delegate",))
        assert agent.authorize("orders.update", UPDATE).permit


def test_batches_and_lists_are_narrowed_too(sidecar: SidecarProcess, user: Caller) -> None:
    questions = [
        authorization_pb2.AuthorizeRequest(
            request_id=str(uuid.uuid4()),
            action=authorization_pb2.Action(name=tool),
            arguments_json=json.dumps(arguments).encode(),
        )
        for tool, arguments in (
            ("orders.update", UPDATE),
            ("orders.update", {**UPDATE, "status": "cancelled"}),
            ("orders.read", {"order_id": "918"}),
        )
    ]
    rules = {"orders.update": {"status": {"one_of": ["shipped"]}}}
    with child(sidecar, user, tools=["orders.update"], rules=rules) as agent:
        batch = authorization_pb2.AuthorizeBatchRequest(questions=questions)
        results = agent.authorization.AuthorizeBatch(batch).results
        assert [each.answer.reason_code for each in results] == [
            "ok",
            "argument_not_delegated",
            "tool_not_delegated",
        ]
        listed = agent.authorization.ListTools(authorization_pb2.ListToolsRequest()).tools
        assert {each.name for each in listed if each.callable} == {"orders.update"}


def test_every_delegation_and_every_refusal_is_on_record(
    sidecar: SidecarProcess, user: Caller
) -> None:
    rules = {"orders.read": {"order_id": {"prefix": "secret-918"}}}
    asked = request(rules=rules, budget=charges(7), ttl_seconds=60)
    answer = user.authorization.Delegate(asked)
    with caller(sidecar, answer.token) as agent:
        assert why(agent, tools=["mail.send"]) == "delegation_too_wide"
    made, refused = [each for each in records(sidecar) if each["action"] == "delegate"][-2:]
    assert (made["type"], made["outcome"], made["reason_code"]) == ("decision", "allowed", "ok")
    assert made["request_id"] == asked.request_id
    assert made["detail"] == {
        "delegate": "worker",
        "tools": ["orders.read", "orders.update"],
        "arguments": {"orders.read": ["order_id"]},
        "ttl_seconds": 60,
        "budget": [{"budget": "llm", "unit": "usd_micros", "amount": 7}],
        "delegation_id": answer.delegation_id,
        "expires_at": answer.expires_at.seconds,
    }
    assert made["hash"] == answer.audit.hash
    assert (refused["outcome"], refused["reason_code"]) == ("denied", "delegation_too_wide")
    assert refused["identity"]["delegations"] == [answer.delegation_id]
    log = "".join(json.dumps(each) for each in records(sidecar))
    assert "secret-918" not in log
    assert answer.token not in log


# Again, and with other content


def test_the_same_request_gets_the_same_token_again(sidecar: SidecarProcess, user: Caller) -> None:
    asked = request(budget=charges(5), rules={"orders.read": {"order_id": {"max": 5}}})
    first, again = (user.authorization.Delegate(asked) for _ in range(2))
    assert (first.replayed, again.replayed) == (False, True)
    assert first.token == again.token
    assert first.delegation_id == again.delegation_id
    asked.budget[0].amount = 6
    assert refusal_of(user.authorization.Delegate, asked).reason_code == "idempotency_key_reused"


def test_another_identity_gets_nothing_by_another_ones_key(sidecar: SidecarProcess) -> None:
    asked = request()
    with (
        caller(sidecar, token("shared", jti="one")) as one,
        caller(sidecar, token("shared", jti="two")) as two,
    ):
        one.authorization.Delegate(asked)
        for other in (two, child(sidecar, one)):
            refusal = refusal_of(other.authorization.Delegate, asked)
            assert refusal.reason_code == "idempotency_key_reused"


def test_an_agent_gets_no_answer_of_its_parent_by_its_key(
    sidecar: SidecarProcess, user: Caller
) -> None:
    key = str(uuid.uuid4())
    spending = budget_pb2.ChargeBudgetRequest(idempotency_key=key, charges=charges(5))
    user.budget.ChargeBudget(spending)
    user.authorize("orders.update", UPDATE, request_id=key)
    with child(sidecar, user) as agent:
        refusal = refusal_of(agent.budget.ChargeBudget, spending)
        assert refusal.reason_code == "idempotency_key_reused"
        refusal = refusal_of(agent.authorize, "orders.update", UPDATE, request_id=key)
        assert refusal.reason_code == "idempotency_key_reused"


# What an agent spends, holds and ends


def test_an_agent_spends_of_what_was_delegated_and_refunds_nothing(
    sidecar: SidecarProcess, user: Caller
) -> None:
    with child(sidecar, user, budget=charges(100), tools=["orders.read"]) as agent:
        spent = spend(agent, 10)
        for fields, code in (
            ({"charges": charges(1, unit="tokens_in")}, "budget_not_delegated"),
            ({"charges": [*charges(1), *charges(1, unit="tokens_in")]}, "budget_not_delegated"),
            ({"tool": "orders.update"}, "tool_not_delegated"),
        ):
            assert refusal_of(spend, agent, 1, **fields).reason_code == code
        spend(agent, 1, tool="orders.read")
        refund = budget_pb2.RefundBudgetRequest(
            idempotency_key=str(uuid.uuid4()), hold_id=spent.charge_id
        )
        refusal = refusal_of(agent.budget.RefundBudget, refund)
        assert (refusal.status, refusal.reason_code) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "tool_not_delegated",
        )
        assert verdict(agent, "orders.read", {"order_id": "1"}) == "ok"
    record = records(sidecar)[-2]
    assert (record["action"], record["outcome"]) == ("budget.refund", "denied")
    assert record["identity"]["agents"] == ["worker"]


def test_an_agent_sees_what_is_left_of_its_slices(sidecar: SidecarProcess, user: Caller) -> None:
    with child(sidecar, user, budget=charges(100)) as agent:
        reserve(agent, 30)
        limits = agent.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
        [found] = [each for each in limits if each.limit_id.startswith("~delegation.")]
        assert (found.limit, found.held, found.remaining) == (100, 30, 70)
        assert len(limits) > 1


def test_nobody_ends_a_hold_of_whoever_delegated_to_it_or_of_a_sibling(
    sidecar: SidecarProcess, user: Caller
) -> None:
    with (
        child(sidecar, user) as parent,
        child(sidecar, user) as sibling,
        child(sidecar, parent) as agent,
    ):
        holds = [reserve(each, 5) for each in (user, parent, sibling, agent)]
        for hold in holds[:3]:
            for end in (settle(hold, 1), settle(hold, 0)):
                refusal = refusal_of(agent.budget.SettleBudget, end)
                assert refusal.reason_code == "hold_not_found"
            refusal = refusal_of(agent.budget.ReleaseBudget, release(hold))
            assert refusal.reason_code == "hold_not_found"
        assert refusal_of(parent.budget.ReleaseBudget, release(holds[0])).reason_code == (
            "hold_not_found"
        )
        agent.budget.SettleBudget(settle(holds[3], 1))
        another = reserve(agent, 5)
        parent.budget.SettleBudget(settle(another, 5))
        user.budget.ReleaseBudget(release(holds[1]))
        sibling.budget.ReleaseBudget(release(holds[2]))
        user.budget.SettleBudget(settle(holds[0], 5))


def test_what_a_model_used_is_settled_by_the_agent_that_reserved_it(
    sidecar: SidecarProcess, user: Caller
) -> None:
    usage = common_pb2.Usage(
        model="gpt-x-mini",
        quantities=[common_pb2.Quantity(unit="tokens_in", amount=1_000)],
    )
    asked = budget_pb2.ReserveBudgetRequest(idempotency_key=str(uuid.uuid4()), usage=usage)
    with child(sidecar, user) as agent, child(sidecar, user) as sibling:
        first = agent.budget.ReserveBudget(asked)
        assert agent.budget.ReserveBudget(asked).replayed
        end = budget_pb2.SettleBudgetRequest(
            idempotency_key=str(uuid.uuid4()),
            hold_id=first.hold_id,
            quantities=[common_pb2.Quantity(unit="tokens_in", amount=500)],
        )
        assert refusal_of(sibling.budget.SettleBudget, end).reason_code == "hold_not_found"
        assert agent.budget.SettleBudget(end).settled


# Tokens in places that are not theirs


def test_a_delegation_is_no_permit_and_a_permit_is_no_delegation(
    sidecar: SidecarProcess, user: Caller
) -> None:
    delegation = user.authorization.Delegate(request()).token
    redemption = execution_pb2.RedeemPermitRequest(
        permit=delegation,
        idempotency_key="k",
        tool="orders.update",
        arguments_sha256=sha256_hex(UPDATE),
        audience="tools",
    )
    assert refusal_of(user.execution.RedeemPermit, redemption).reason_code == "permit_invalid"
    report = execution_pb2.ReportOutcomeRequest(
        permit=delegation, outcome=execution_pb2.OUTCOME_EXECUTED
    )
    assert refusal_of(user.execution.ReportOutcome, report).reason_code == "permit_invalid"
    permit = user.authorize("orders.update", UPDATE).permit
    with caller(sidecar, permit) as thief:
        assert refusal_of(thief.authorize, "orders.update", UPDATE).reason_code == "token_invalid"


def test_a_permit_of_an_agent_ends_with_its_delegation(
    sidecar: SidecarProcess, user: Caller
) -> None:
    with child(sidecar, user, ttl_seconds=3) as agent:
        answer = agent.authorize("orders.update", UPDATE)
        claims = json.loads(_decoded(answer.permit.split(".")[1]))
        assert claims["exp"] - claims["iat"] <= 3
        assert claims["act"] == {"sub": "worker"}
        assert len(claims["tctx"]["delegations"]) == 1


def test_a_single_tenant_sidecar_narrows_too(tmp_path: Path) -> None:
    config = {"identity": {"mode": "single_tenant", "roles": ["x"]}}
    with (
        SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE, config=config) as sidecar,
        caller(sidecar, "local") as local,
        child(sidecar, local, tools=["orders.read"]) as agent,
    ):
        assert verdict(local, "orders.update", UPDATE) == "tenant_unknown"
        assert verdict(agent, "orders.read", {}) == "tenant_unknown"
        assert verdict(agent, "orders.update", UPDATE) == "tool_not_delegated"
        with caller(sidecar, agent.metadata[0][1].removeprefix("Bearer ") + "x") as broken:
            refusal = refusal_of(broken.authorize, "orders.read", {})
            assert refusal.reason_code == "token_invalid"
