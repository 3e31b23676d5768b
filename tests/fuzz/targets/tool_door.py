"""Requests to a tool's server, in plain JSON over ASGI and as MCP's calls (pdp.tool)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, MutableMapping
from typing import Any, Final

from pdp.canonical import JsonObject, JsonValue
from pdp.errors import PdpError
from pdp.tool.asgi import PermitMiddleware
from pdp.tool.door import PermitDoor
from pdp.tool.mcp_server import META_KEY, permit_in, read_call
from tests.fuzz.choices import ODD_VALUES, Choices, edited, edited_bytes
from tests.fuzz.contract import refuses
from tests.fuzz.targets import permit

BODY: Final[JsonValue] = permit.ARGUMENTS
CALL: Final[JsonValue] = {
    "name": permit.USUAL.tool,
    "arguments": permit.ARGUMENTS,
    "_meta": {META_KEY: permit.GOOD},
}
SHOWN_CERTIFICATE: Final = "A" * 43


class SeenDoor(PermitDoor):
    """Waits for no thread, and has seen the certificate that the permit is bound to."""

    async def admit_async(self, permit: str, **call: Any) -> Any:
        return self.admit(permit, **{**call, "certificate_sha256": SHOWN_CERTIFICATE})


ran: Final[list[bytes]] = []


async def _application(scope: Any, receive: Any, send: Any) -> None:
    message = await receive()
    ran.append(message["body"])
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


MIDDLEWARE: Final = PermitMiddleware(
    _application,
    SeenDoor(permit.VERIFIER, redeemer=None),
    lambda scope, body: (scope["path"][1:], body),
    max_body_bytes=2_000,
)


def samples() -> Iterable[bytes]:
    yield b"\0"
    yield b"\1"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    return _asgi(choices) if choices.number(2) == 0 else _mcp(choices)


def _asgi(choices: Choices) -> bool:
    body = json.dumps(BODY).encode()
    if choices.yes():
        body = json.dumps(edited(BODY, choices)).encode("utf-8", "surrogatepass")
    elif choices.yes():
        body = edited_bytes(body, choices)
    shown = permit.GOOD.encode()
    headers = [(choices.pick([b"tool-permit", b"Tool-Permit", b"x"]), shown)]
    if choices.yes():
        headers.append((b"tool-permit", choices.some()))
    if choices.yes():
        headers = [(b"tool-permit", edited_bytes(shown, choices))]
    path = choices.pick(["/orders.update", "/orders.delete", "/", "/\udcff"])
    cut = choices.number(len(body) + 1)
    received: list[dict[str, Any]] = [
        {"type": "http.request", "body": body[:cut], "more_body": True},
        {"type": choices.pick(["http.request", "http.disconnect"]), "body": body[cut:]},
    ]
    scope = {"type": "http", "path": path, "headers": headers, "method": "POST"}
    status = asyncio.run(_served(scope, received))
    taken = bool(ran)
    if taken:
        assert ran == [body]
        assert status == 200
        assert path == "/orders.update"
        # What the application reads is what the permit is for.
        assert json.loads(body) == permit.ARGUMENTS
    else:
        assert 400 <= status < 500
    ran.clear()
    return taken


async def _served(scope: Any, received: list[dict[str, Any]]) -> int:
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return received.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    await MIDDLEWARE(scope, receive, send)
    assert permit.GOOD not in str(sent)
    return int(sent[0]["status"])


def _mcp(choices: Choices) -> bool:
    params = edited(CALL, choices)
    if not isinstance(params, dict):
        return False
    meta: Any = params.get("_meta", choices.pick(ODD_VALUES))
    shown = permit_in(meta)
    assert isinstance(shown, str)
    call = refuses(lambda: read_call(params), PdpError)
    if call is None:
        return False
    tool, arguments = call
    assert tool == params["name"]
    return bool(_admitted(shown, tool, arguments))


def _admitted(shown: str, tool: str, arguments: JsonObject) -> object:
    found = refuses(
        lambda: permit.VERIFIER.verify(
            shown, tool=tool, arguments=arguments, certificate_sha256=SHOWN_CERTIFICATE
        ),
        PdpError,
        secret=permit.GOOD,
    )
    if found is not None:
        assert (tool, arguments) == (permit.USUAL.tool, permit.ARGUMENTS)
    return found
