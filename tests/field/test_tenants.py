"""Tenants that were mixed up, dropped or believed, in the products of others."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fastmcp
import grpc
import pytest
from fastmcp.server.middleware.caching import ResponseCachingMiddleware

from pdp.api.v1 import authorization_pb2
from pdp.client import AsyncGuard, Guard, current_permit
from pdp.permit import Permit, PermitError
from pdp.testing import Caller, SidecarProcess
from pdp.tool import fastmcp as fastmcp_door
from tests.field.shop import ORDERS, SERVERS, SHIPPED, door_of, serving, tell, told
from tests.field.world import IDP, of, reason, token

TENANTS = ("tenant_acme", "tenant_globex")


def test_asana_2025_a_tool_server_serves_the_permits_tenant_alone(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """Asana's MCP server, June 2025: a fault of its own authorization showed one customer's
    data to others; here the tool looks only where the permit says, whatever id it is asked for.
    """
    with door_of(sidecar.target) as door:

        @door.tool("orders.read")
        def read(permit: Permit, *, order_id: str) -> str:
            return ORDERS[permit.tenant].get(order_id, "none")

        def asked(tenant: str, order_id: str) -> str:
            with guard.acting_for(token(tenant)):
                permit = guard.authorize("orders.read", {"order_id": order_id})
            return str(read(permit.token, order_id=order_id))

        assert [asked(tenant, "918") for tenant in TENANTS] == [
            "acme's order 918",
            "globex's order 918",
        ]
        assert asked("tenant_acme", "2") == asked("tenant_globex", "1") == "none"


IN_THE_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"tenant": "tenant_globex"},
    {"tenant_id": "tenant_globex"},
    {"subject": {"properties": {"tenant": "tenant_globex"}}},
    {"state": {"tenant_id": "tenant_globex"}},
)


@pytest.mark.parametrize("claimed", IN_THE_ARGUMENTS)
def test_microsoft_mcp_3617_a_tenant_in_the_arguments_is_not_dropped_in_silence(
    guard: Guard, claimed: dict[str, Any]
) -> None:
    """microsoft/mcp#3617: who asked for tenant B got tenant A's data, as the parameter was
    dropped on the way; here an argument that the tool does not have refuses the call.
    """
    with guard.acting_for(token("tenant_acme")):
        refused = reason(guard.authorize, "orders.read", {"order_id": "918", **claimed})
    assert refused == "argument_not_allowed"


@pytest.mark.parametrize(
    "name", ("tenant", "tenant-id", "x-tenant-id", "x-org-id", "x-forwarded-user", "subject")
)
def test_microsoft_mcp_3617_a_tenant_in_a_header_is_none(
    sidecar: SidecarProcess, name: str
) -> None:
    """The same from the side: what a header says of the tenant is heard by nobody."""
    metadata = [(name, "tenant_globex")]
    with Caller(sidecar.target, token=token("tenant_acme"), metadata=metadata) as caller:
        assert caller.authorize("orders.read", {"order_id": "918"}).tenant_id == "tenant_acme"


def test_microsoft_mcp_3617_a_tenant_in_the_agents_state_is_none(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """Nor is what an agent's state, a resource or a key says of it."""
    state: dict[str, Any] = {"tenant": "tenant_globex", "subject": {"id": "root"}}
    with guard.acting_for(token("tenant_acme"), context=state):
        permit = guard.authorize(
            "orders.read",
            {"order_id": "918"},
            resource=("order", "tenant_globex"),
            request_id=f"tenant_globex-{uuid.uuid4()}",
        )
    assert permit.tenant == "tenant_acme"
    with door_of(sidecar.target) as door:
        admitted = door.admit(permit.token, tool="orders.read", arguments={"order_id": "918"})
    assert admitted.tenant == "tenant_acme"


@pytest.mark.parametrize("tenant", (None, "", "tenant_nobody", ["tenant_acme"], "tenant_acme "))
def test_microsoft_mcp_3617_who_has_no_tenant_has_no_others(
    sidecar: SidecarProcess, tenant: Any
) -> None:
    """And a token that names none, or one that nobody knows, is not given a default."""
    bearer = IDP.token(None, "user-7", roles=["support_agent"], tenant_id=tenant)
    with Caller(sidecar.target, token=bearer) as caller:
        try:
            answer = caller.authorize("orders.read", {"order_id": "918"})
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED  # noqa: PT017 - one of two ways
        else:
            assert (answer.decision, answer.reason_code, answer.permit) == (
                False,
                "tenant_unknown",
                "",
            )


def test_agent_identity_management_200_nobody_gets_another_tenants_decision(
    sidecar: SidecarProcess,
) -> None:
    """opena2a-org/agent-identity-management#200: the authorizer did not know whose the caller
    was, and told one tenant of another's decisions; here the same key of another is another's.
    """
    key = str(uuid.uuid4())
    answers = []
    for tenant in TENANTS:
        with Caller(sidecar.target, token=token(tenant, "user-7")) as caller:
            answers.append(caller.authorize("orders.update", SHIPPED, request_id=key))
    first, second = answers
    assert [each.tenant_id for each in answers] == list(TENANTS)
    assert not second.replayed
    assert first.decision_id != second.decision_id
    assert first.permit != second.permit


def test_agent_identity_management_200_a_listing_is_of_the_callers_tenant(
    sidecar: SidecarProcess,
) -> None:
    """Nor does a question about everything: tools, limits and what is left of them."""
    for tenant, limit in (("tenant_acme", 1000), ("tenant_globex", 500)):
        with Caller(sidecar.target, token=token(tenant)) as caller:
            listed = caller.authorization.ListTools(
                authorization_pb2.ListToolsRequest(context_json=b'{"tenant":"tenant_globex"}')
            )
            assert listed.tools
            assert of(caller, "tools-per-day").limit == limit


def test_mcp_context_forge_2055_a_pooled_connection_keeps_its_callers_apart(
    sidecar: SidecarProcess,
) -> None:
    """IBM/mcp-context-forge#2055: sessions were pooled by headers that users share, and one
    was answered with another's; here one connection carries many, each with its own identity.
    """
    with Guard(sidecar.target, timeout_seconds=20) as guard, ThreadPoolExecutor(16) as threads:

        @guard.tool("orders.read")
        def read(order_id: str) -> tuple[str, str, str]:
            permit = current_permit()
            return permit.tenant, permit.actor, ORDERS[permit.tenant][order_id]

        def asked(number: int) -> bool:
            tenant, actor = TENANTS[number % 2], f"user-{number % 10}-{uuid.uuid4()}"
            with guard.acting_for(token(tenant, actor)):
                found = read("918")
            return found == (tenant, actor, ORDERS[tenant]["918"])

        assert all(threads.map(asked, range(100)))


@pytest.mark.parametrize("kind", SERVERS)
def test_pydantic_ai_6425_a_shared_session_serves_each_run_under_its_own_identity(
    sidecar: SidecarProcess, kind: str
) -> None:
    """pydantic/pydantic-ai#6425: overlapping runs on one MCP session went out as whoever had
    opened it; here whose call it is comes with the call, in its permit.
    """

    async def run() -> list[str]:
        with serving(sidecar.target, kind) as (connect, _):
            async with AsyncGuard(sidecar.target, timeout_seconds=20) as guard, connect() as client:

                @guard.tool("orders.update")
                async def update(order_id: str, status: str) -> str:
                    return await told(client, current_permit().token)

                async def agent(number: int) -> str:
                    with guard.acting_for(token(TENANTS[number % 2])):
                        return await update(**SHIPPED)

                return await asyncio.gather(*(agent(number) for number in range(20)))

    assert asyncio.run(run()) == ["918 of tenant_acme", "918 of tenant_globex"] * 10


def test_fastmcp_a_cache_by_name_and_arguments_is_refused(sidecar: SidecarProcess) -> None:
    """PrefectHQ/fastmcp, ResponseCachingMiddleware of 3.0.0rc2: results were kept by tool and
    arguments, so that one tenant got another's; here a server with such a cache does not start.
    """
    server: fastmcp.FastMCP[Any] = fastmcp.FastMCP(
        "orders", strict_input_validation=True, middleware=[ResponseCachingMiddleware()]
    )
    with door_of(sidecar.target) as door, pytest.raises(ValueError, match="one tenant's results"):
        fastmcp_door.protect(server, door)


@pytest.mark.parametrize("kind", SERVERS)
def test_fastmcp_the_same_call_of_two_tenants_has_two_results(
    sidecar: SidecarProcess, guard: Guard, kind: str
) -> None:
    """And without one, the same tool with the same arguments is each tenant's own."""
    with serving(sidecar.target, kind) as (connect, ran):
        answers = []
        for tenant in (*TENANTS, *TENANTS):
            with guard.acting_for(token(tenant)):
                permit = guard.authorize("orders.update", SHIPPED)
            answers.append(tell(connect, permit.token))
    assert answers == ["918 of tenant_acme", "918 of tenant_globex"] * 2
    assert len(ran.calls) == 4


class Threads:
    """Conversations of all tenants in one store, under keys of the caller's choice."""

    def __init__(self) -> None:
        self.kept: dict[str, list[str]] = {}

    def of(self, thread_id: str) -> list[str]:
        return self.kept.setdefault(f"{current_permit().namespace}threads/{thread_id}", [])


def remembering(guard: Guard) -> tuple[Threads, Callable[..., list[str]]]:
    threads = Threads()

    @guard.tool("orders.read", omit={"thread_id"})
    def read(order_id: str, thread_id: str) -> list[str]:
        thread = threads.of(thread_id)
        thread.append(f"{current_permit().tenant} {order_id}")
        return list(thread)

    return threads, read


def test_idun_670_a_thread_that_another_tenant_names_is_an_empty_one(guard: Guard) -> None:
    """Idun-Group/idun-agent-platform#670: a thread id was all that it took to read somebody's
    conversation; here what is kept stands under the namespace of the permit's tenant.
    """
    _, read = remembering(guard)
    with guard.acting_for(token("tenant_acme")):
        read("918", thread_id="thread-1")
    with guard.acting_for(token("tenant_globex")):
        for chosen in ("thread-1", "../tenant_acme/threads/thread-1", "tenant_acme/thread-1"):
            assert read("2", thread_id=chosen) == ["tenant_globex 2"]
    with guard.acting_for(token("tenant_acme")):
        assert read("1", thread_id="thread-1") == ["tenant_acme 918", "tenant_acme 1"]


def test_agent_service_toolkit_305_without_an_identity_the_thread_is_not_reached(
    guard: Guard,
) -> None:
    """JoshuaC215/agent-service-toolkit#305: the check of who owns a thread never fired, and
    nobody noticed; here what has no permit has no namespace, so nothing is read or written.
    """
    threads, read = remembering(guard)
    assert reason(read, "918", thread_id="thread-1") == "identity_missing"
    with pytest.raises(LookupError):
        threads.of("thread-1")
    assert threads.kept == {}


def test_agt_597_a_server_of_one_tenant_takes_no_others_permit(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """microsoft/agent-governance-toolkit#597: how tenants are kept apart was a checklist for
    whoever builds with it; here a door for one tenant refuses the others' permits by itself.
    """
    with door_of(sidecar.target, only_tenant="tenant_globex") as door:
        for tenant, expected in (("tenant_acme", "permit_mismatch"), ("tenant_globex", "ok")):
            with guard.acting_for(token(tenant)):
                permit = guard.authorize("orders.update", SHIPPED)
            try:
                door.admit(permit.token, tool="orders.update", arguments=dict(SHIPPED))
            except PermitError as error:
                assert error.reason_code == expected  # noqa: PT017 - of one of the two
            else:
                assert expected == "ok"


def test_agt_597_a_tenant_in_what_is_written_beside_the_call_is_data(
    sidecar: SidecarProcess,
) -> None:
    """Its policy request had no tenant of its own, so whoever wrote the body chose one; here no
    field of a question that is answered changes whose it is.
    """
    everywhere = json.dumps({"tenant": "tenant_globex", "org": "tenant_globex"}).encode()
    with Caller(sidecar.target, token=token("tenant_acme")) as caller:
        answer = caller.authorize(
            "orders.read",
            {"order_id": "918"},
            context_json=everywhere,
            audience="tenant_globex",
            resource=authorization_pb2.Resource(type="tenant", id="tenant_globex"),
        )
        assert answer.tenant_id == "tenant_acme"
        other = caller.authorize("tenant_globex/orders.read", {"order_id": "918"})
        assert (other.decision, other.reason_code) == (False, "tool_not_allowed")
        assert other.tenant_id == "tenant_acme"
