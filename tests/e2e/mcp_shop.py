"""An MCP server of its own process: `python -m tests.e2e.mcp_shop KIND TARGET`, over stdio."""

from __future__ import annotations

import sys
from typing import Any

from pdp.permit import PermitRedeemer, PermitVerifier, Sidecars
from pdp.tool import PermitDoor, current_permit


def update(order_id: str, status: str) -> str:
    return f"{order_id} of {current_permit().tenant} is {status}"


def main(kind: str, target: str) -> None:
    sidecars = Sidecars([PermitRedeemer(target)])
    verifier = PermitVerifier(sidecars, issuer="agent-pdp", audience="orders")
    door = PermitDoor(verifier, sidecars)
    server: Any
    if kind == "sdk":
        from mcp.server.mcpserver import MCPServer  # noqa: PLC0415 - one of the two

        from pdp.tool import mcp_server  # noqa: PLC0415

        server = MCPServer("orders")
        server.add_tool(update, name="orders.update")
        mcp_server.protect(server, door)
        server.run("stdio")
    else:
        from fastmcp import FastMCP  # noqa: PLC0415

        from pdp.tool import fastmcp as fastmcp_door  # noqa: PLC0415

        server = FastMCP("orders", strict_input_validation=True)
        server.tool(update, name="orders.update")
        fastmcp_door.protect(server, door)
        server.run("stdio", show_banner=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
