"""A whole MCP server behind the door of pdp.tool, by what is posted to it."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterable, MutableMapping
from typing import Any, Final

from pdp.canonical import JsonValue
from pdp.tool.mcp_server import META_KEY
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.targets import permit
from tests.fuzz.targets.tool_door import SeenDoor
from tests.tool.mcp_servers import Ran, sdk_server

VERSION: Final = b"2025-11-25"
METHODS: Final = (
    "tools/list", "resources/read", "initialize", "prompts/get", "completion/complete", "tools/Call",
    "notifications/cancelled", "logging/setLevel", "ping", "tools/call ", "server/discover", "",
)  # fmt: skip
CALL: Final[JsonValue] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {
        "name": permit.USUAL.tool,
        "arguments": permit.ARGUMENTS,
        "_meta": {META_KEY: permit.GOOD},
    },
}


class _Served:
    """The server's application, on a loop that goes on from input to input."""

    def __init__(self) -> None:
        self.ran = Ran()
        server = sdk_server(SeenDoor(permit.VERIFIER, redeemer=None), self.ran)
        self.application: Any = server.streamable_http_app(stateless_http=True, json_response=True)
        self.runner = asyncio.Runner()
        self._events: list[MutableMapping[str, Any]] = [{"type": "lifespan.startup"}]
        self.runner.run(self._start())

    async def _start(self) -> None:
        started = asyncio.Event()

        async def receive() -> MutableMapping[str, Any]:
            if self._events:
                return self._events.pop(0)
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        async def send(message: MutableMapping[str, Any]) -> None:
            assert message["type"] == "lifespan.startup.complete", message
            started.set()

        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._lifespan = asyncio.create_task(self.application(scope, receive, send))
        await started.wait()


@functools.cache
def _served() -> _Served:
    return _Served()


def samples() -> Iterable[bytes]:
    yield b"\0"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    served = _served()
    served.ran.calls.clear()
    body = _body(choices)
    answer = served.runner.run(_posted(served, body))
    assert permit.GOOD.encode() not in answer, "the permit is shown"
    if not served.ran.calls:
        return False
    assert served.ran.calls == [{**permit.ARGUMENTS, "count": 0, "tags": None}]
    # It ran for what was said, as a lenient reader reads it.
    params = json.loads(body)["params"]
    assert (params["name"], params["arguments"]) == (permit.USUAL.tool, permit.ARGUMENTS)
    assert params["_meta"][META_KEY] == permit.GOOD
    return True


def _body(choices: Choices) -> bytes:
    call = CALL
    match choices.number(4):
        case 1:
            call = edited(CALL, choices)
        case 2:
            return edited_bytes(json.dumps(CALL).encode(), choices)
        case 3:
            call = {**CALL, "method": choices.pick(METHODS)}  # type: ignore[dict-item]
            call = edited(call, choices)
        case _:
            pass
    return json.dumps(call).encode("utf-8", "surrogatepass")


async def _posted(served: _Served, body: bytes) -> bytes:
    received: list[MutableMapping[str, Any]] = [{"type": "http.request", "body": body}]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return received.pop(0) if received else {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/mcp",
        "raw_path": b"/mcp",
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"127.0.0.1:8000"),
            (b"content-type", b"application/json"),
            (b"accept", b"application/json, text/event-stream"),
            (b"mcp-protocol-version", VERSION),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    async with asyncio.timeout(20):
        await served.application(scope, receive, send)
    assert sent[0]["status"] < 500, sent[0]["status"]
    return b"".join(message.get("body", b"") for message in sent)
