"""The same MCP server three times: low-level and high-level of the official SDK, and of the
package fastmcp. It has one tool that tells what it was given.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import fastmcp
import mcp.types as mcp
from mcp import Client
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import MCPServer

from pdp.tool import PermitDoor, current_permit
from pdp.tool import fastmcp as fastmcp_door
from pdp.tool import mcp_server as mcp_door

Call = Callable[..., Awaitable[Any]]


class Asks(Protocol):
    """A client, as far as the tests need one."""

    async def call_tool(self, name: str, arguments: Any = None, *, meta: Any = None) -> Any: ...

    async def list_tools(self) -> Any: ...


class Ran:
    """What the tool was given, call by call."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def update(
        self, order_id: str, status: str = "", count: int = 0, tags: list[str] | None = None
    ) -> str:
        permit = current_permit()
        self.calls.append({"order_id": order_id, "status": status, "count": count, "tags": tags})
        return f"{order_id} of {permit.tenant}"


def everything() -> str:
    return "secret"


Serve = Callable[[PermitDoor, Ran], Callable[[], AbstractAsyncContextManager[Asks]]]


def low_level(door: PermitDoor, ran: Ran) -> Callable[[], AbstractAsyncContextManager[Asks]]:
    async def call(context: Any, params: mcp.CallToolRequestParams) -> mcp.CallToolResult:
        assert "agent-pdp/permit" not in json.dumps([params.model_dump(mode="json"), context.meta])
        told = ran.update(**(params.arguments or {}))
        return mcp.CallToolResult(content=[mcp.TextContent(type="text", text=told)])

    async def list_tools(context: Any, params: Any) -> mcp.ListToolsResult:
        return mcp.ListToolsResult(
            tools=[mcp.Tool(name="orders.update", input_schema={"type": "object"})]
        )

    async def read(context: Any, params: mcp.ReadResourceRequestParams) -> Any:
        return mcp.ReadResourceResult(
            contents=[mcp.TextResourceContents(uri=params.uri, text="secret")]
        )

    server: Server[Any] = Server(
        "orders", on_call_tool=call, on_list_tools=list_tools, on_read_resource=read
    )
    mcp_door.protect(server, door)
    return lambda: Client(server)


def sdk_server(door: PermitDoor, ran: Ran) -> MCPServer[Any]:
    server: MCPServer[Any] = MCPServer("orders")
    server.add_tool(ran.update, name="orders.update")
    server.resource("orders://all")(everything)
    mcp_door.protect(server, door)
    return server


def high_level(door: PermitDoor, ran: Ran) -> Callable[[], AbstractAsyncContextManager[Asks]]:
    server = sdk_server(door, ran)
    return lambda: Client(server)


def with_handshake(door: PermitDoor, ran: Ran) -> Callable[[], AbstractAsyncContextManager[Asks]]:
    """As clients before 2026-07-28 talk to it."""
    server = sdk_server(door, ran)
    return lambda: Client(server, mode="legacy")


def fastmcp_server(door: PermitDoor, ran: Ran) -> fastmcp.FastMCP[Any]:
    server: fastmcp.FastMCP[Any] = fastmcp.FastMCP("orders", strict_input_validation=True)
    server.tool(ran.update, name="orders.update")
    server.resource("orders://all")(everything)
    fastmcp_door.protect(server, door)
    return server


def fast(door: PermitDoor, ran: Ran) -> Callable[[], AbstractAsyncContextManager[Asks]]:
    server = fastmcp_server(door, ran)
    return lambda: asking(server)


@asynccontextmanager
async def asking(server: Any) -> AsyncIterator[Asks]:
    """A client of the package fastmcp."""
    async with fastmcp.Client(server) as client:
        yield client
