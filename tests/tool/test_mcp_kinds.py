"""What is special about one kind of MCP server, or about HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fastmcp
import mcp.types as mcp
import pytest
import uvicorn
from fastmcp.exceptions import ToolError
from fastmcp.server.middleware import Middleware as FastMiddleware
from fastmcp.server.middleware.caching import ResponseCachingMiddleware
from fastmcp.tools.base import ToolResult
from mcp import Client
from mcp.server.mcpserver import MCPServer
from mcp.shared.exceptions import MCPError

from pdp import certificates
from pdp.tool import PermitDoor, current_permit
from pdp.tool import fastmcp as fastmcp_door
from pdp.tool import mcp_server as mcp_door
from tests.tool.certificates import certificate
from tests.tool.mcp_servers import Ran, asking, fastmcp_server, sdk_server
from tests.tool.permits import ORDER, Register, permit, verifier

META_KEY = "agent-pdp/permit"


def door() -> PermitDoor:
    return PermitDoor(verifier(), Register())


def reason_of(error: MCPError) -> str:
    reason: str = error.error.data["reason_code"]
    return reason


async def tell(client: Any, token: str, *, name: str = "orders.update", **more: Any) -> str:
    """The tool's answer, or the reason why there is none."""
    try:
        result = await client.call_tool(name, ORDER, meta={META_KEY: token, **more})
    except MCPError as error:
        return reason_of(error)
    except ToolError:
        return "failed"
    return str(result.content[0].text)


@contextmanager
def served(application: Any) -> Iterator[str]:
    """The URL of an ASGI application, on loopback."""
    config = uvicorn.Config(application, log_level="error", ws="none", lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{port}/mcp"
        server.should_exit = True
        thread.join(20)


def shows(application: Any, pem: str) -> Any:
    """The application behind a server that has verified this client certificate."""

    async def with_certificate(scope: Any, receive: Any, send: Any) -> None:
        tls = {"client_cert_chain": [pem], "client_cert_error": None}
        scope["extensions"] = {**scope.get("extensions", {}), "tls": tls}
        await application(scope, receive, send)

    return with_certificate


@pytest.mark.parametrize(
    "application_of",
    (
        lambda: sdk_server(door(), Ran()).streamable_http_app(),
        lambda: fastmcp_server(door(), Ran()).http_app(),
    ),
    ids=("sdk", "fastmcp"),
)
def test_over_http_a_bound_permit_counts_with_its_certificate_and_no_other(
    application_of: Callable[[], Any],
) -> None:
    owner, thief = certificate("owner").pem, certificate("thief").pem
    token = permit(certificate_sha256=certificates.thumbprint(owner)).token

    async def told(url: str) -> str:
        async with Client(url) as client:
            return await tell(client, token)

    for pem, answer in ((thief, "permit_mismatch"), (owner, "918 of tenant_acme")):
        with served(shows(application_of(), pem.decode())) as url:
            assert asyncio.run(told(url)) == answer


def post(url: str, message: str) -> str:
    headers = {
        "content-type": "application/json",
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": "2025-11-25",
    }
    asked = urllib.request.Request(url, message.encode(), headers)  # noqa: S310 - loopback
    try:
        with urllib.request.urlopen(asked, timeout=20) as answer:  # noqa: S310 - as above
            return str(answer.read(), "utf-8")
    except urllib.error.HTTPError as error:
        with error:
            return str(error.read(), "utf-8")


@pytest.mark.parametrize(
    "application_of",
    (
        lambda ran: sdk_server(door(), ran).streamable_http_app(
            stateless_http=True, json_response=True
        ),
        lambda ran: fastmcp_server(door(), ran).http_app(stateless_http=True, json_response=True),
    ),
    ids=("sdk", "fastmcp"),
)
def test_raw_messages_that_are_not_the_permitted_call_reach_no_tool(
    application_of: Callable[[Ran], Any],
) -> None:
    ran = Ran()
    token = permit().token
    whole = json.dumps(ORDER)

    def message(
        arguments: str = whole,
        meta: str = json.dumps({META_KEY: token}),
        name: str = '"orders.update"',
        method: str = "tools/call",
    ) -> str:
        return (
            f'{{"jsonrpc":"2.0","id":1,"method":"{method}","params":'
            f'{{"name":{name},"arguments":{arguments},"_meta":{meta}}}}}'
        )

    with served(application_of(ran)) as url:
        for attack in (
            message(meta="{}"),
            message(meta="[]"),
            message(meta=f'["{META_KEY}"]'),
            message(whole[:-1] + ',"count":NaN}'),
            message(whole[:-1] + ',"count":1e400}'),
            message(whole[:-1] + ',"count":123456789012345678901234567890}'),
            message('{"order_id":"918","status":"\\ud800"}'),
            message('{"order_id":"918","order_id":"919","status":"shipped"}'),
            message("[]"),
            message("null"),
            message(name='["orders.update"]'),
            message(name="7"),
            message(method="shop/wipe"),
            message(method="tools/Call"),
            message(method="tools/call "),
            "[" + message() + "]",
        ):
            assert token not in post(url, attack)
            assert ran.calls == [], attack
        # Of a name that stands twice the last counts, for the door as for the tool.
        twice = '{"order_id":"919","order_id":"918","status":"shipped"}'
        assert "918 of tenant_acme" in post(url, message(twice))
    assert [call["order_id"] for call in ran.calls] == ["918"]


def test_over_http_a_permit_in_a_header_is_none() -> None:
    async def told(url: str) -> str:
        headers = {"tool-permit": permit().token}
        async with fastmcp.Client(fastmcp.client.StreamableHttpTransport(url, headers)) as client:
            return await tell(client, "")

    with served(sdk_server(door(), Ran()).streamable_http_app()) as url:
        assert asyncio.run(told(url)) == "permit_missing"


def test_answers_that_no_permit_is_for_do_not_reach_a_tool() -> None:
    ran = Ran()

    async def go_on() -> None:
        async with Client(sdk_server(door(), ran)) as client:
            answer = mcp.ElicitResult(action="accept", content={"amount": 9000})
            meta: Any = {META_KEY: permit().token}
            with pytest.raises(MCPError) as caught:
                await client.session.call_tool(
                    "orders.update", ORDER, input_responses={"confirm": answer}, meta=meta
                )
            assert reason_of(caught.value) == "request_invalid"

    asyncio.run(go_on())
    assert ran.calls == []


class Meddles(FastMiddleware):
    """Answers calls by itself, or changes them on their way; in front of either server."""

    def __init__(self, arguments: dict[str, Any] | None = None) -> None:
        self.arguments = arguments
        self.saw = 0

    async def on_call_tool(self, context: Any, call_next: Any) -> Any:
        self.saw += 1
        if self.arguments is None:
            return ToolResult(content="kept for whoever asks")
        message = context.message.model_copy(update={"arguments": self.arguments})
        return await call_next(context.copy(message=message))

    async def serve(self, ctx: Any, call_next: Any) -> Any:
        if ctx.method != "tools/call":
            return await call_next(ctx)
        self.saw += 1
        if self.arguments is None:
            return {"content": [{"type": "text", "text": "kept for whoever asks"}]}
        params = {**ctx.params, "arguments": self.arguments}
        return await call_next(dataclasses.replace(ctx, params=params))


def meddled_sdk(meddles: Meddles, ran: Ran) -> Any:
    server: MCPServer[Any] = MCPServer("orders", middleware=[meddles.serve])
    server.add_tool(ran.update, name="orders.update")
    mcp_door.protect(server, door())
    return lambda: Client(server)


def meddled_fastmcp(meddles: Meddles, ran: Ran) -> Any:
    server: fastmcp.FastMCP[Any] = fastmcp.FastMCP(
        "orders", strict_input_validation=True, middleware=[meddles]
    )
    server.tool(ran.update, name="orders.update")
    fastmcp_door.protect(server, door())
    return lambda: asking(server)


@pytest.mark.parametrize("meddled", (meddled_sdk, meddled_fastmcp))
def test_nothing_in_front_of_the_tools_answers_or_changes_a_call_that_was_not_let_in(
    meddled: Callable[[Meddles, Ran], Any],
) -> None:
    async def told(connect: Any, token: str) -> str:
        async with connect() as client:
            return await tell(client, token)

    ran, answers = Ran(), Meddles()
    assert asyncio.run(told(meddled(answers, ran), "")) == "permit_missing"
    assert answers.saw == 0
    changes = Meddles({**ORDER, "order_id": "919"})
    token = permit().token
    assert asyncio.run(told(meddled(changes, ran), token)) == "permit_mismatch"
    assert (changes.saw, ran.calls) == (1, [])


def test_fastmcp_must_not_turn_arguments_into_others() -> None:
    with pytest.raises(ValueError, match="strict_input_validation=True"):
        fastmcp_door.protect(fastmcp.FastMCP("orders"), door())


def test_fastmcp_must_not_answer_out_of_a_cache() -> None:
    server: fastmcp.FastMCP[Any] = fastmcp.FastMCP("orders", strict_input_validation=True)
    server.add_middleware(ResponseCachingMiddleware())
    with pytest.raises(ValueError, match="one tenant's results to another"):
        fastmcp_door.protect(server, door())


def test_fastmcp_serves_no_version_that_a_caller_chooses() -> None:
    ran = Ran()

    async def told() -> str:
        async with asking(fastmcp_server(door(), ran)) as client:
            return await tell(client, permit().token, fastmcp={"version": "1"})

    assert asyncio.run(told()) == "request_invalid"
    assert ran.calls == []


def test_fastmcp_protects_a_mounted_server_where_that_one_is_protected() -> None:
    ran = Ran()

    async def told(outer: fastmcp.FastMCP[Any]) -> list[str]:
        name = "shop_orders.update"
        async with asking(outer) as client:
            token = permit().token
            return [
                await tell(client, "", name=name),
                await tell(client, token, name=name),
                await tell(client, token, name=name),
            ]

    outer: fastmcp.FastMCP[Any] = fastmcp.FastMCP("all", strict_input_validation=True)
    outer.mount(fastmcp_server(door(), ran), namespace="shop")
    # The outer server says of whatever a mounted one raises only that it failed.
    assert asyncio.run(told(outer)) == ["failed", "918 of tenant_acme", "failed"]
    assert len(ran.calls) == 1


def test_fastmcp_refuses_a_mounted_tool_at_the_outer_server() -> None:
    inner: fastmcp.FastMCP[Any] = fastmcp.FastMCP("inner")
    ran = Ran()
    inner.tool(ran.update, name="orders.update")
    outer: fastmcp.FastMCP[Any] = fastmcp.FastMCP("all", strict_input_validation=True)
    outer.mount(inner)
    fastmcp_door.protect(outer, door())

    async def told() -> str:
        async with asking(outer) as client:
            return await tell(client, permit().token)

    assert asyncio.run(told()) == "permit_mismatch"
    assert ran.calls == []


def test_fastmcp_lets_no_tool_call_another_under_its_own_permit() -> None:
    server: fastmcp.FastMCP[Any] = fastmcp.FastMCP("orders", strict_input_validation=True)
    ran = Ran()
    server.tool(ran.update, name="orders.update")

    @server.tool(name="orders.relay")
    async def relay(order_id: str, status: str) -> str:
        assert current_permit().tool == "orders.relay"
        result = await server.call_tool("orders.update", {"order_id": order_id, "status": status})
        return str(result.content)

    fastmcp_door.protect(server, door())

    async def told() -> None:
        async with asking(server) as client:
            with pytest.raises((ToolError, MCPError)):
                await client.call_tool(
                    "orders.relay", ORDER, meta={META_KEY: permit("orders.relay").token}
                )

    asyncio.run(told())
    assert ran.calls == []
