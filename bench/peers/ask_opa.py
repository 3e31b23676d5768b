"""OPA over REST: through opa-python-client, and through a connection that is kept open by hand."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from typing import Any

from opa_client.opa import OpaClient
from opa_client.opa_async import AsyncOpaClient

from bench.peers.question import TOOL, Call


def document(call: Call) -> dict[str, Any]:
    return {
        "tenant": call.tenant,
        "role": call.role,
        "scopes": call.scopes,
        "tool": TOOL,
        "arguments": {"order_id": call.order_id, "status": call.status},
    }


class Client:
    """A session of requests is not made for several threads, so each has its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._of_thread = threading.local()

    def ask(self, call: Call) -> bool:
        try:
            client = self._of_thread.client
        except AttributeError:
            client = self._of_thread.client = OpaClient(host="127.0.0.1", port=self._port)
        answer = client.query_rule(
            input_data=document(call), package_path="authz", rule_name="allow"
        )
        return bool(answer["result"])


class AsyncClient:
    def __init__(self, port: int) -> None:
        self._client = AsyncOpaClient(host="127.0.0.1", port=port)
        self._entered = False

    async def ask(self, call: Call) -> bool:
        if not self._entered:
            self._entered = True
            await self._client.__aenter__()
        answer = await self._client.query_rule(
            input_data=document(call), package_path="authz", rule_name="allow"
        )
        return bool(answer["result"])


class Tuned:
    """One connection per thread, kept open, without Nagle's wait: what a hand-written client
    can do at best, without pool, retries or errors.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._of_thread = threading.local()

    def ask(self, call: Call) -> bool:
        try:
            connection = self._of_thread.connection
        except AttributeError:
            connection = self._of_thread.connection = self._connect()
        body = json.dumps({"input": document(call)}).encode()
        connection.request("POST", "/v1/data/authz/allow", body, _HEADERS)
        answer = connection.getresponse()
        return bool(json.loads(answer.read())["result"])

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


_HEADERS = {"Content-Type": "application/json"}
