"""An ASGI application whose routes need permits: a middleware.

The permit comes in the header ``Tool-Permit``. Every request is refused unless
``tool_of`` names its tool and arguments, or says that it needs no permit.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from pdp.canonical import JsonError, JsonObject, parse_object
from pdp.errors import PdpError
from pdp.permit import Permit
from pdp.reason import ReasonCode
from pdp.tool import tls
from pdp.tool.current import current_permit, serving
from pdp.tool.door import PermitDoor
from pdp.tool.refusal import status_of

__all__ = ["HEADER", "MAX_BODY_BYTES", "Call", "PermitMiddleware", "ToolOf", "current_permit"]

HEADER: Final = b"tool-permit"
MAX_BODY_BYTES: Final = 1024 * 1024

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

Call = tuple[str, JsonObject]
"""A tool, and its arguments."""
ToolOf = Callable[[Scope, JsonObject], "Call | None"]
"""Which call a request stands for, by its scope and its JSON body ({} where it has none);
None for one that needs no permit. KeyError and ValueError refuse the request."""


class PermitMiddleware:
    """Lets only requests in that have a permit for exactly what they ask. The application
    finds the verified permit in ``scope["state"]["permit"]`` and by ``current_permit()``,
    and the body as it came.

    A permit that is bound to a client certificate is accepted where the ASGI server has
    verified that certificate and shows it (ASGI's TLS extension), and nowhere else.
    """

    def __init__(
        self,
        application: Application,
        door: PermitDoor,
        tool_of: ToolOf,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._application = application
        self._door = door
        self._tool_of = tool_of
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection; websockets are refused."""
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            body = await self._body(receive)
            call = self._call(scope, body)
            permit = await self._admit(scope, *call) if call is not None else None
        except PdpError as error:
            await _refuse(send, error)
            return
        if permit is None:
            await self._application(scope, _again(body, receive), send)
            return
        scope["state"] = {**scope.get("state", {}), "permit": permit}
        with serving(permit):
            await self._application(scope, _again(body, receive), send)

    async def _admit(self, scope: Scope, tool: str, arguments: JsonObject) -> Permit:
        return await self._door.admit_async(
            _permit(scope),
            tool=tool,
            arguments=arguments,
            certificate_sha256=tls.certificate_sha256(scope),
        )

    def _call(self, scope: Scope, body: bytes) -> Call | None:
        try:
            read = parse_object(body or b"{}", max_bytes=self._max_body_bytes)
        except JsonError:
            raise PdpError(
                ReasonCode.ARGUMENTS_INVALID, "The body is not a JSON object of the agreed form."
            ) from None
        try:
            return self._tool_of(scope, read)
        except (KeyError, ValueError):
            raise PdpError(
                ReasonCode.REQUEST_INVALID, "The request stands for no tool's call."
            ) from None

    async def _body(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                raise PdpError(ReasonCode.REQUEST_INVALID, "The request ended too soon.")
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise PdpError(
                    ReasonCode.REQUEST_INVALID,
                    f"The body is larger than {self._max_body_bytes} bytes.",
                )
            if not message.get("more_body", False):
                return bytes(body)


def _permit(scope: Scope) -> str:
    """The one header; several are none."""
    found = [value for name, value in scope["headers"] if name.lower() == HEADER]
    return str(found[0], "latin-1") if len(found) == 1 else ""


def _again(body: bytes, receive: Receive) -> Receive:
    """Receives the body that was read, then whatever comes after it."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Send, error: PdpError) -> None:
    body = json.dumps({"reason_code": error.reason_code, "message": error.message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body})
