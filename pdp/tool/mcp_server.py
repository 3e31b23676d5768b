"""An MCP server of the official SDK (``mcp`` 2) whose tools need permits.

The permit comes with the call, in ``_meta`` of ``tools/call`` under ``agent-pdp/permit``:
the same way over stdio and over HTTP, and beside the arguments that it is for. Arguments
are compared as they were sent. What else a client can ask for is refused unless it is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Final

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import MCPServer
from mcp.shared.exceptions import MCPError

from pdp.canonical import JsonError, JsonObject, check, sha256_hex
from pdp.errors import PdpError
from pdp.permit import PermitError
from pdp.reason import ReasonCode
from pdp.tool import tls
from pdp.tool.current import current_permit, serving
from pdp.tool.door import PermitDoor
from pdp.tool.refusal import status_of

__all__ = ["HANDSHAKE", "META_KEY", "current_permit", "protect"]

META_KEY: Final = "agent-pdp/permit"
HANDSHAKE: Final = frozenset(
    {
        "initialize",
        "ping",
        "server/discover",
        "notifications/initialized",
        "notifications/cancelled",
        "notifications/progress",
        "notifications/roots/list_changed",
    }
)
"""What every client may say."""

Exact = Callable[[str, JsonObject], None]
"""Raises PermitError unless the tool of that name is given these very arguments."""


def protect(
    server: Server[Any] | MCPServer[Any],
    door: PermitDoor,
    *,
    prefix: str = "",
    open_methods: Collection[str] = ("tools/list",),
) -> None:
    """Put the door before every tool of a server, and before all else that it has in front
    of its tools. Do it last: what comes later may change a call behind the door.

    The policy knows a tool by ``prefix`` and its name here. ``open_methods`` need no
    permit: whoever reaches the server may ask for them. A client whose call is refused
    gets a JSON-RPC error, with the reason code in its data.
    """
    exact = _given_what_was_sent(server) if isinstance(server, MCPServer) else None
    server.middleware.insert(
        0, PermitMiddleware(door, prefix=prefix, open_methods=open_methods, exact=exact)
    )
    server.middleware.append(_refuse_changed_calls)


class PermitMiddleware:
    """Lets only calls of tools in that have a permit for exactly what they ask."""

    def __init__(
        self,
        door: PermitDoor,
        *,
        prefix: str,
        open_methods: Collection[str],
        exact: Exact | None,
    ) -> None:
        self._door = door
        self._prefix = prefix
        self._open_methods = HANDSHAKE | frozenset(open_methods)
        self._exact = exact

    async def __call__(
        self, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        """Serve one message. Raises MCPError."""
        if ctx.method in self._open_methods:
            return await call_next(ctx)
        try:
            if ctx.method != "tools/call":
                raise PermitError(
                    ReasonCode.PERMIT_MISMATCH, "No permit lets this method be called."
                )
            params = ctx.params or {}
            name, arguments = read_call(params)
            permit = await self._door.admit_async(
                permit_in(params.get("_meta")),
                tool=self._prefix + name,
                arguments=arguments,
                certificate_sha256=_certificate_sha256(ctx),
            )
            if self._exact is not None:
                self._exact(name, arguments)
        except PdpError as error:
            raise refusal(error) from None
        with serving(permit), admitted(name, arguments):
            return await call_next(_without_permit(ctx))


async def _refuse_changed_calls(
    ctx: ServerRequestContext[Any, Any], call_next: CallNext
) -> HandlerResult:
    """The last thing before the tool."""
    if ctx.method == "tools/call":
        try:
            check_unchanged(*read_call(ctx.params or {}))
        except PdpError as error:
            raise refusal(error) from None
    return await call_next(ctx)


_admitted: ContextVar[tuple[str, str] | None] = ContextVar("admitted", default=None)


@contextlib.contextmanager
def admitted(name: str, arguments: JsonObject) -> Iterator[None]:
    """This call has been let in, and no other, for what runs inside."""
    token = _admitted.set((name, sha256_hex(arguments)))
    try:
        yield
    finally:
        _admitted.reset(token)


def check_unchanged(name: str, arguments: JsonObject) -> None:
    """Raises PermitError unless this is the call that was let in."""
    try:
        check(arguments)
    except JsonError:
        digest = ""
    else:
        digest = sha256_hex(arguments)
    if _admitted.get() != (name, digest):
        raise PermitError(
            ReasonCode.PERMIT_MISMATCH,
            "Something in this server has changed the call on its way to the tool.",
        )


def permit_in(meta: object) -> str:
    """The permit that a call's ``_meta`` brings; empty for none."""
    permit = meta.get(META_KEY) if isinstance(meta, Mapping) else None
    return permit if isinstance(permit, str) else ""


def refusal(error: PdpError) -> MCPError:
    """What the client is told."""
    return MCPError(
        status_of(error),
        f"{error.reason_code}: {error.message}",
        {"reason_code": str(error.reason_code)},
    )


def read_call(params: Mapping[str, Any]) -> tuple[str, JsonObject]:
    """The tool's name and its arguments. Raises PermitError for what no permit can be for."""
    name = params.get("name")
    arguments = params.get("arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise PermitError(ReasonCode.REQUEST_INVALID, "The request stands for no tool's call.")
    if params.get("inputResponses") is not None or params.get("requestState") is not None:
        raise PermitError(
            ReasonCode.REQUEST_INVALID,
            "The call goes on with answers that no permit is for: make it anew, with arguments.",
        )
    return name, arguments


def _given_what_was_sent(server: MCPServer[Any]) -> Exact:
    """MCPServer reads arguments into a model, which may turn "1" into 1, read JSON out of a
    text, or leave out what it does not know.
    """
    # There is no public way to a tool's model; tests/tool/test_mcp_server.py watches this one.
    tools = server._tool_manager  # noqa: SLF001

    def exact(name: str, arguments: JsonObject) -> None:
        tool = tools.get_tool(name)
        if tool is None:
            raise PermitError(ReasonCode.REQUEST_INVALID, "There is no such tool here.")
        try:
            metadata = tool.fn_metadata
            model = metadata.arg_model.model_validate(metadata.pre_parse_json(arguments))
            given = model.model_dump(mode="json", by_alias=True, exclude_unset=True, warnings=False)
            check(given)
        except (ValueError, JsonError):
            raise PermitError(
                ReasonCode.ARGUMENTS_INVALID, "The tool does not take these arguments."
            ) from None
        if sha256_hex(given) != sha256_hex(arguments):
            raise PermitError(
                ReasonCode.PERMIT_MISMATCH,
                "The tool would be given other arguments than the permit is for: send each as"
                " the tool's schema says, and no other.",
            )

    return exact


def _certificate_sha256(context: ServerRequestContext[Any, Any]) -> str:
    """Over HTTP the transport hands on the request."""
    return tls.certificate_sha256(getattr(context.request, "scope", {}))


def _without_permit(context: ServerRequestContext[Any, Any]) -> ServerRequestContext[Any, Any]:
    """The tool needs it no more, and whatever logs requests must not see it."""
    params = dict(context.params or {})
    params["_meta"] = {key: value for key, value in params["_meta"].items() if key != META_KEY}
    meta: Any = {key: value for key, value in (context.meta or {}).items() if key != META_KEY}
    return dataclasses.replace(context, params=params, meta=meta)
