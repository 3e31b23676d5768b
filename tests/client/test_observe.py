from __future__ import annotations

import asyncio

import pytest

from pdp.client import AsyncGuard, Decision, Guard, PermitDenied


def test_an_observer_sees_an_allowed_call_before_its_tool_runs(
    target: str, token: str, actor: str
) -> None:
    seen: list[str] = []
    decisions: list[Decision] = []

    def observe(decision: Decision) -> None:
        seen.append("decision")
        decisions.append(decision)

    with Guard(target, observe=observe) as guard:

        @guard.tool("orders.update")
        def update_order(order_id: str, status: str) -> str:
            seen.append("tool")
            return f"{order_id} {status}"

        with guard.acting_for(token):
            update_order("918", "shipped")

    assert seen == ["decision", "tool"]
    [decision] = decisions
    assert decision.allowed
    assert decision.reason_code == "ok"
    assert (decision.tool, decision.tenant, decision.actor) == (
        "orders.update",
        "tenant_acme",
        actor,
    )
    assert decision.charges == (("tools", "calls", 1),)
    assert decision.audit_sequence > 0
    assert len(decision.audit_hash) == 64
    assert decision.step_seconds.keys() == {"identify", "isolate", "authorize", "execute", "audit"}
    assert not decision.replayed


def test_an_observer_sees_a_refusal_and_a_replay(target: str, token: str) -> None:
    decisions: list[Decision] = []
    arguments = {"order_id": "918", "status": "shipped"}
    with Guard(target, observe=decisions.append) as guard, guard.acting_for(token):
        with pytest.raises(PermitDenied):
            guard.authorize("orders.update", {**arguments, "tenant_id": "tenant_globex"})
        first = guard.authorize("orders.update", arguments)
        guard.authorize("orders.update", arguments, request_id=first.transaction)

    refused, allowed, replayed = decisions
    assert not refused.allowed
    assert refused.reason_code == "argument_not_allowed"
    assert refused.tenant == "tenant_acme"
    assert not allowed.replayed
    assert replayed.replayed
    assert replayed.request_id == allowed.request_id == first.transaction
    assert replayed.decision_id == allowed.decision_id == first.decision_id


def test_a_decision_holds_no_permit(target: str, token: str) -> None:
    decisions: list[Decision] = []
    with Guard(target, observe=decisions.append) as guard, guard.acting_for(token):
        permit = guard.authorize("orders.update", {"order_id": "918", "status": "shipped"})
    assert permit.token not in repr(decisions)
    assert token not in repr(decisions)


def test_an_observer_that_raises_blocks_the_tool(target: str, token: str) -> None:
    ran: list[str] = []

    def observe(_decision: Decision) -> None:
        raise RuntimeError

    with Guard(target, observe=observe) as guard:

        @guard.tool("orders.read")
        def read_order(order_id: str) -> None:
            ran.append(order_id)

        with guard.acting_for(token), pytest.raises(PermitDenied) as denied:
            read_order("918")

    assert denied.value.reason_code == "guard_failed"
    assert not ran


def test_the_async_guard_is_observed_too(target: str, token: str) -> None:
    decisions: list[Decision] = []

    async def run() -> None:
        async with AsyncGuard(target, observe=decisions.append) as guard:

            @guard.tool("orders.read")
            async def read_order(order_id: str) -> str:
                return order_id

            with guard.acting_for(token):
                await read_order("918")

    asyncio.run(run())
    assert [decision.tool for decision in decisions] == ["orders.read"]
