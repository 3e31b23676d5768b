"""Tool servers as their authors write them, behind the doors of the product."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, Final

from mcp.shared.exceptions import MCPError

from pdp.permit import PermitRedeemer, PermitVerifier, Sidecars
from pdp.tool import PermitDoor
from pdp.tool.mcp_server import META_KEY
from tests.tool.mcp_servers import Asks, Ran, fast, high_level

SHIPPED: Final = {"order_id": "918", "status": "shipped"}
ORDERS: Final = {
    "tenant_acme": {"918": "acme's order 918", "1": "acme's order 1"},
    "tenant_globex": {"918": "globex's order 918", "2": "globex's order 2"},
}
"""Orders of two tenants; one number stands in both."""
SERVERS: Final = {"sdk": high_level, "fastmcp": fast}
Connect = Callable[[], AbstractAsyncContextManager[Asks]]


@contextmanager
def door_of(
    target: str, *, only_tenant: str | None = None, counts: bool = True
) -> Iterator[PermitDoor]:
    """The door of a tool server that accepts the permits of one sidecar, and, unless it
    counts none, each once.
    """
    with (
        PermitRedeemer(target, timeout_seconds=20) as redeemer,
        Sidecars([redeemer]) as sidecars,
    ):
        verifier = PermitVerifier(sidecars, issuer="agent-pdp", audience="tools")
        yield PermitDoor(verifier, sidecars if counts else None, only_tenant=only_tenant)


@contextmanager
def serving(target: str, kind: str) -> Iterator[tuple[Connect, Ran]]:
    """An MCP server with the tool orders.update, and what that was given."""
    ran = Ran()
    with door_of(target) as door:
        yield SERVERS[kind](door, ran), ran


async def told(client: Asks, permit: str | None, arguments: Any = None) -> str:
    """What orders.update answers, or why it is refused."""
    meta = None if permit is None else {META_KEY: permit}
    try:
        answer = await client.call_tool("orders.update", arguments or SHIPPED, meta=meta)
    except MCPError as error:
        return str(error.error.data["reason_code"])
    return str(answer.content[0].text)


def tell(connect: Connect, permit: str | None, arguments: Any = None) -> str:
    """As :func:`told`, on a connection of its own."""

    async def connected() -> str:
        async with connect() as client:
            return await told(client, permit, arguments)

    return asyncio.run(connected())
