"""Guards that did not cover a tool, or that failed and let it run, in the products of others."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdp.client import Call, Guard, PermitDenied
from pdp.permit import Permit, PermitError
from pdp.testing import Caller, SidecarProcess
from pdp.tool import Once, PermitDoor
from pdp.tool.once import SqliteOnce
from tests.client.stand_in import StandIn
from tests.e2e.operating import records
from tests.field.shop import SERVERS, SHIPPED, door_of, serving, tell
from tests.field.world import of, reason, token


@pytest.mark.parametrize("kind", SERVERS)
def test_openai_agents_4620_and_956_tools_of_mcp_servers_are_guarded_too(
    sidecar: SidecarProcess, guard: Guard, kind: str
) -> None:
    """openai/openai-agents-python#4620, #956: guardrails of the runtime were not run for the
    tools of MCP servers; here the server itself has a door, and a call past the guard is refused.
    """
    with serving(sidecar.target, kind) as (connect, ran):
        assert tell(connect, None) == "permit_missing"
        with guard.acting_for(token()):
            read = guard.authorize("orders.read", {"order_id": "918"})
            update = guard.authorize("orders.update", dict(SHIPPED))
        assert tell(connect, read.token) == "permit_mismatch"
        assert tell(connect, update.token, {**SHIPPED, "order_id": "919"}) == "permit_mismatch"
        assert ran.calls == []
        assert tell(connect, update.token) == "918 of tenant_acme"
    assert len(ran.calls) == 1


class HookAbortedError(Exception):
    """The one exception that blocks a call in such a framework."""


Hook = Callable[[str, dict[str, Any]], "bool | None"]


def dispatch(hooks: list[Hook], name: str, tool: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Calls a tool as crewAI 1.15 does: whatever else a hook raises is swallowed."""
    for hook in hooks:
        try:
            if hook(name, given) is False:
                return "blocked"
        except HookAbortedError:
            return "blocked"
        except Exception:  # noqa: BLE001, S110 - what the story is about
            pass
    try:
        return tool(**given)
    except Exception as error:  # noqa: BLE001 - told to the model as an observation
        return f"error: {type(error).__name__}"


def broken(name: str, given: dict[str, Any]) -> bool | None:
    raise ConnectionError("the hook's own sidecar is away")


def forgetful(name: str, given: dict[str, Any]) -> bool | None:
    return None


@pytest.fixture
def nobody(tmp_path: Path) -> Iterator[Guard]:
    """A guard whose sidecar is away."""
    with Guard(f"unix://{tmp_path}/nobody.sock", timeout_seconds=0.2) as guard:
        yield guard


@pytest.mark.parametrize("hook", (broken, forgetful))
def test_crewai_5888_a_hook_that_fails_lets_no_guarded_tool_run(nobody: Guard, hook: Hook) -> None:
    """crewAIInc/crewAI#5888: what a hook raised was swallowed and the tool ran. There is no
    crewAI adapter here; its dispatcher is written out, and the guard stands around the function
    itself, where no hook can leave it out.
    """
    ran: list[str] = []

    @nobody.tool("orders.update")
    def update(order_id: str, status: str) -> None:
        ran.append(order_id)

    def unguarded(order_id: str, status: str) -> str:
        return "it has run"

    assert dispatch([hook], "update", unguarded, dict(SHIPPED)) == "it has run"
    with nobody.acting_for(token()):
        assert dispatch([hook], "update", update, dict(SHIPPED)) == "error: PermitDenied"
    assert not ran


def test_crewai_5888_a_hook_that_asks_the_guard_blocks_in_its_own_words(
    sidecar: SidecarProcess, nobody: Guard, guard: Guard
) -> None:
    """As a hook, which such a framework wants too: every denial becomes the exception that
    blocks, and the tool's own door wants the permit that only an answer brings.
    """

    def hook_of(asked: Guard, permits: list[Permit]) -> Hook:
        def hook(name: str, given: dict[str, Any]) -> bool | None:
            try:
                permits.append(asked.authorize(name, given))
            except PermitDenied as denied:
                raise HookAbortedError(denied.reason_code) from None
            return None

        return hook

    with door_of(sidecar.target) as door:
        permits: list[Permit] = []
        ran: list[str] = []

        def update(order_id: str, status: str) -> str:
            given = {"order_id": order_id, "status": status}
            permit = door.admit(permits.pop().token, tool="orders.update", arguments=dict(given))
            ran.append(order_id)
            return permit.tenant

        for asked, expected in ((nobody, "blocked"), (guard, "tenant_acme")):
            with asked.acting_for(token()):
                hooks = [hook_of(asked, permits)]
                assert dispatch(hooks, "orders.update", update, dict(SHIPPED)) == expected
        assert dispatch([broken], "orders.update", update, dict(SHIPPED)) == "error: IndexError"
    assert ran == ["918"]


def test_crewai_5888_a_coworker_acts_with_less_than_who_delegated_to_it(guard: Guard) -> None:
    """Its other half: a coworker ran with all of its own tools; here it has what the one before
    it delegated, whatever it could do by itself.
    """
    ran: list[str] = []

    @guard.tool("orders.read")
    def read(order_id: str) -> None:
        ran.append("read")

    @guard.tool("orders.update")
    def update(order_id: str, status: str) -> None:
        ran.append("update")

    with guard.acting_for(token()):
        coworker = guard.delegate("researcher", tools=["orders.read"])
    with guard.accept(coworker.metadata()):
        assert reason(update, **SHIPPED) == "tool_not_delegated"
        assert reason(read, "918") == "ok"
    assert ran == ["read"]


@pytest.mark.parametrize("kind", SERVERS)
def test_mcp_python_sdk_1223_and_fastmcp_1895_each_tool_has_scopes_of_its_own(
    sidecar: SidecarProcess, guard: Guard, kind: str
) -> None:
    """modelcontextprotocol/python-sdk#1223, PrefectHQ/fastmcp#1895: a server had one list of
    scopes for all of its tools; here each tool has its own, by role and by tenant.
    """
    with serving(sidecar.target, kind) as (connect, ran):
        outcomes = []
        for roles in (["viewer"], ["support_agent"]):
            with guard.acting_for(token(roles=roles)):
                offered = {tool.name for tool in guard.tools() if tool.callable}
                assert ("orders.update" in offered) == (roles == ["support_agent"])
                assert "orders.read" in offered
                try:
                    permit = guard.authorize("orders.update", dict(SHIPPED))
                except PermitDenied as denied:
                    outcomes.append((denied.reason_code, tell(connect, None)))
                else:
                    outcomes.append(("ok", tell(connect, permit.token)))
        assert outcomes == [
            ("role_not_allowed", "permit_missing"),
            ("ok", "918 of tenant_acme"),
        ]
    assert len(ran.calls) == 1
    unscoped = token(roles=["support_agent"], scope="orders:read")
    with guard.acting_for(unscoped):
        assert reason(guard.authorize, "orders.update", dict(SHIPPED)) == "scope_missing"


def test_fastmcp_3678_an_agents_calls_are_narrowed_counted_and_on_record(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """PrefectHQ/fastmcp#3678: rules for each agent, delegation, rates and an audit trail were
    asked for together; here one call passes all of them and is one record that names the agent.
    """
    actor = f"user-{uuid.uuid4()}"
    with guard.acting_for(token(actor=actor)):
        agent = guard.delegate("mailer", tools=["orders.update"], budget=[("tools", "calls", 1)])
    with guard.accept(agent.metadata()):
        ended = [reason(guard.authorize, "orders.read", {"order_id": "918"})]
        ended += [reason(guard.authorize, "orders.update", dict(SHIPPED)) for _ in range(2)]
    assert ended == ["tool_not_delegated", "ok", "tenant_budget_exceeded"]
    decided = [
        each
        for each in records(sidecar)
        if each["actor_id"] == actor and each["type"] == "decision"
    ]
    told = [each for each in decided if each["action"] != "delegate"]
    assert [each["reason_code"] for each in told] == ended
    assert all(each["identity"]["agents"] == ["mailer"] for each in told)


def test_langgraph_7780_and_6208_a_node_that_runs_again_is_charged_and_done_once(
    sidecar: SidecarProcess, guard: Guard, tmp_path: Path
) -> None:
    """langchain-ai/langgraph#7780, #6208: a node that is interrupted runs again from its first
    line, side effects too; here the key that its call was given before makes it the same call.
    """
    done: list[str] = []
    once = Once(SqliteOnce(tmp_path / "once.db"))

    def ship(permit: Permit) -> str:
        done.append(permit.tenant)
        return "shipped"

    with (
        door_of(sidecar.target) as strict,
        door_of(sidecar.target, counts=False) as remembering,
        Caller(sidecar.target, token=token()) as caller,
    ):
        key = str(uuid.uuid4())

        def node(door: PermitDoor) -> str:
            answer = caller.authorize("orders.update", SHIPPED, request_id=key)
            try:
                permit = door.admit(answer.permit, tool="orders.update", arguments=dict(SHIPPED))
            except PermitError as error:
                return error.reason_code
            return str(once.run(permit, lambda: ship(permit)))

        assert [node(strict) for _ in range(3)] == ["shipped", "permit_used", "permit_used"]
        assert [node(remembering) for _ in range(3)] == ["shipped"] * 3
        assert of(caller, "tools-per-actor-minute").held == 1
    assert done == ["tenant_acme"]


def test_agentcore_calls_that_a_model_makes_in_parallel_are_decided_each_by_itself(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """Bedrock AgentCore, temporal rules: of calls that an agent made in parallel 98 of 100 were
    denied, and the denied used up its limit; here each is decided alone and a denial costs nothing.
    """
    bearer = token()
    calls = [
        Call("orders.update", {"order_id": str(number), "status": status})
        for number in range(8)
        for status in ("shipped", "stolen")
    ]
    with guard.acting_for(bearer):
        answers = guard.authorize_all(calls)
    allowed = [isinstance(answer, Permit) for answer in answers]
    assert allowed == [True, False] * 8
    denied = {answer.reason_code for answer in answers if isinstance(answer, PermitDenied)}
    assert denied == {"argument_not_allowed"}
    with Caller(sidecar.target, token=bearer) as caller:
        assert of(caller, "tools-per-actor-minute").held == 8


def test_crewai_5888_an_answer_that_is_not_understood_is_no_yes(tmp_path: Path) -> None:
    """The same direction for what comes back: nonsense, and yes without a permit, block."""
    with StandIn() as stand_in, Guard(stand_in.target) as guard:
        ran: list[str] = []

        @guard.tool("orders.update")
        def update(order_id: str, status: str) -> None:
            ran.append(order_id)

        answers = [b"\xff\xff\xff", b"", b"\x08\x01"]
        stand_in.answer = lambda _request, _context: answers[len(stand_in.asked) - 1]
        for _ in answers:
            with guard.acting_for("the.users.token"):
                assert dispatch([], "update", update, dict(SHIPPED)) == "error: PermitDenied"
        assert len(stand_in.asked) == 3
    assert not ran
