"""An MCP server of the package ``fastmcp`` (4) whose tools need permits.

As :mod:`pdp.tool.mcp_server`: the permit comes in ``_meta`` of ``tools/call`` under
``agent-pdp/permit``, and what else a client can ask for is refused unless it is named.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fastmcp import FastMCP
from fastmcp.server.middleware import CallNext, Middleware, MiddlewareContext
from fastmcp.server.middleware.caching import ResponseCachingMiddleware
from fastmcp.tools.base import ToolResult
from fastmcp.tools.function_tool import FunctionTool
from mcp.types import CallToolRequestParams

from pdp.canonical import JsonObject
from pdp.errors import PdpError
from pdp.permit import Permit, PermitError
from pdp.reason import ReasonCode
from pdp.tool import tls
from pdp.tool.current import current_permit, serving
from pdp.tool.door import PermitDoor
from pdp.tool.mcp_server import (
    HANDSHAKE,
    META_KEY,
    admitted,
    check_unchanged,
    permit_in,
    read_call,
    refusal,
)

__all__ = ["META_KEY", "current_permit", "protect"]


def protect(
    server: FastMCP[Any],
    door: PermitDoor,
    *,
    prefix: str = "",
    open_methods: Collection[str] = ("tools/list",),
) -> None:
    """Put the door before every tool of a server, and before all else that it has in front
    of its tools. Do it last: what comes later may change a call behind the door.

    The policy knows a tool by ``prefix`` and its name here. ``open_methods`` need no
    permit. Only functions of this server are called: protect a server that you mount
    itself, and not the one that you mount it on. Raises ValueError for a server that would
    give a tool other arguments than were sent, or one tenant's results to another.
    """
    if not server.strict_input_validation:
        raise ValueError(
            "This server turns arguments into others, which no permit is for: make it with"
            " FastMCP(..., strict_input_validation=True)."
        )
    if any(isinstance(before, ResponseCachingMiddleware) for before in server.middleware):
        raise ValueError(
            "ResponseCachingMiddleware gives one tenant's results to another: leave it out."
        )
    server.middleware.insert(0, PermitMiddleware(door, prefix=prefix, open_methods=open_methods))
    server.add_middleware(_ChangedCalls())


class PermitMiddleware(Middleware):
    """Lets only calls of tools in that have a permit for exactly what they ask."""

    def __init__(self, door: PermitDoor, *, prefix: str, open_methods: Collection[str]) -> None:
        self._door = door
        self._prefix = prefix
        self._named = HANDSHAKE | frozenset(open_methods) | {"tools/call"}

    async def on_message(
        self, context: MiddlewareContext[Any], call_next: CallNext[Any, Any]
    ) -> Any:  # noqa: ANN401 - whatever the method returns
        """Refuse what is not named."""
        if context.method not in self._named:
            raise refusal(
                PermitError(ReasonCode.PERMIT_MISMATCH, "No permit lets this method be called.")
            )
        return await call_next(context)

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        """Refuse a call without a permit for it. Raises MCPError."""
        try:
            name, arguments = _call_in(context)
            permit = await self._admit(context, name, arguments)
        except PdpError as error:
            raise refusal(error) from None
        with serving(permit), admitted(name, arguments):
            return await call_next(context)

    async def _admit(
        self, context: MiddlewareContext[CallToolRequestParams], name: str, arguments: JsonObject
    ) -> Permit:
        serving_now = context.fastmcp_context
        request = serving_now.request_context if serving_now is not None else None
        if serving_now is None or request is None:
            raise PermitError(ReasonCode.PERMIT_MISSING, "No permit was given.")
        meta = request.meta or {}
        asked = meta.get("fastmcp")
        if isinstance(asked, Mapping) and "version" in asked:
            raise PermitError(
                ReasonCode.REQUEST_INVALID, "A permit is for a tool, and not for a version of it."
            )
        permit = await self._door.admit_async(
            permit_in(meta),
            tool=self._prefix + name,
            arguments=arguments,
            certificate_sha256=tls.certificate_sha256(getattr(request.request, "scope", {})),
        )
        if not isinstance(await serving_now.fastmcp.get_tool(name), FunctionTool):
            raise PermitError(
                ReasonCode.PERMIT_MISMATCH, "The tool is not a function of this server."
            )
        return permit


class _ChangedCalls(Middleware):
    """The last thing before the tool."""

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: CallNext[CallToolRequestParams, ToolResult],
    ) -> ToolResult:
        """Refuse a call that is not the one that was let in. Raises MCPError."""
        try:
            check_unchanged(*_call_in(context))
        except PdpError as error:
            raise refusal(error) from None
        return await call_next(context)


def _call_in(context: MiddlewareContext[CallToolRequestParams]) -> tuple[str, JsonObject]:
    call = context.message
    return read_call(
        {
            "name": call.name,
            "arguments": call.arguments,
            "inputResponses": call.input_responses,
            "requestState": call.request_state,
        }
    )
