from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from pdp import certificates
from pdp.canonical import JsonObject
from pdp.tool import PermitDoor, current_permit
from pdp.tool.asgi import Call, Message, PermitMiddleware, Receive, Scope, Send
from tests.tool.certificates import certificate
from tests.tool.permits import ORDER, Register, permit, verifier

BODY = json.dumps(ORDER).encode()


def tool_of(scope: Scope, body: JsonObject) -> Call | None:
    if scope["path"] == "/healthz":
        return None
    if scope["path"] != "/orders":
        raise KeyError(scope["path"])
    return "orders.update", body


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    tenant = "nobody"
    if "state" in scope:
        tenant = scope["state"]["permit"].tenant
        assert current_permit() is scope["state"]["permit"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": tenant.encode() + message["body"]})


class Server:
    def __init__(self, *, max_body_bytes: int = 1024) -> None:
        self.app = PermitMiddleware(
            application, PermitDoor(verifier(), Register()), tool_of, max_body_bytes=max_body_bytes
        )

    def ask(
        self,
        *permits: str,
        path: str = "/orders",
        parts: Sequence[bytes] = (BODY,),
        kind: str = "http",
        tls: dict[str, Any] | None = None,
    ) -> tuple[int, bytes]:
        messages: list[Message] = []
        messages += [
            {"type": "http.request", "body": part, "more_body": number < len(parts)}
            for number, part in enumerate(parts, start=1)
        ]
        messages.append({"type": "http.disconnect"})
        sent: list[Any] = []

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        scope: Scope = {
            "type": kind,
            "path": path,
            "headers": [(b"Tool-Permit", token.encode()) for token in permits],
            "extensions": {} if tls is None else {"tls": tls},
        }
        asyncio.run(self.app(scope, receive, send))
        if kind == "websocket":
            return sent[0]["code"], b""
        return sent[0]["status"], sent[1]["body"]


def test_a_request_with_a_permit_for_it_reaches_the_application_once() -> None:
    server, token = Server(), permit().token
    assert server.ask(token, parts=(BODY[:9], BODY[9:])) == (200, b"tenant_acme" + BODY)
    status, body = server.ask(token)
    assert (status, json.loads(body)["reason_code"]) == (403, "permit_used")


@pytest.mark.parametrize(
    ("permits", "body", "answer"),
    (
        ((), BODY, (401, "permit_missing")),
        (("nonsense",), BODY, (401, "permit_invalid")),
        ((permit().token, permit().token), BODY, (401, "permit_missing")),
        ((permit("mail.send").token,), BODY, (403, "permit_mismatch")),
        ((permit().token,), b'{"order_id": "919"}', (403, "permit_mismatch")),
        ((permit().token,), b"[", (400, "arguments_invalid")),
        ((permit().token,), b'{"a": 1, "a": 2}', (400, "arguments_invalid")),
        ((permit().token,), b" " * 2000, (400, "request_invalid")),
    ),
)
def test_any_other_request_is_refused(
    permits: tuple[str, ...], body: bytes, answer: tuple[int, str]
) -> None:
    status, told = Server().ask(*permits, parts=(body,))
    assert (status, json.loads(told)["reason_code"]) == answer
    assert all(token.encode() not in told for token in permits)


def test_a_route_that_nobody_named_is_refused_and_one_that_needs_no_permit_is_served() -> None:
    assert Server().ask(permit().token, path="/other")[0] == 400
    assert Server().ask(path="/healthz", parts=(b"",)) == (200, b"nobody")


def test_a_websocket_is_refused() -> None:
    assert Server().ask(permit().token, kind="websocket")[0] == 1008


def test_a_permit_that_is_bound_to_a_certificate_needs_one_that_the_server_has_verified() -> None:
    owner, thief = (certificate(name).pem.decode() for name in ("owner", "thief"))
    bound = permit(certificate_sha256=certificates.thumbprint(owner.encode())).token
    not_shown: tuple[dict[str, Any] | None, ...] = (
        None,
        {},
        {"client_cert_chain": [], "client_cert_error": None},
        {"client_cert_chain": [thief, owner], "client_cert_error": None},
        {"client_cert_chain": [owner], "client_cert_error": "self-signed certificate"},
        {"client_cert_chain": [owner]},
        {"client_cert_chain": ["nonsense"], "client_cert_error": None},
    )
    for tls in not_shown:
        status, body = Server().ask(bound, tls=tls)
        assert (status, json.loads(body)["reason_code"]) == (403, "permit_mismatch"), tls
    shown = {"client_cert_chain": [owner], "client_cert_error": None}
    assert Server().ask(bound, tls=shown)[0] == 200
