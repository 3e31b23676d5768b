"""Slow clients of the HTTP listener use up nothing that calls need."""

from __future__ import annotations

import contextlib
import http.client
import socket

from prometheus_client import CollectorRegistry

from pdp.server.http import MAX_CONNECTIONS, HttpListener


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def test_more_connections_than_there_may_be_are_closed_at_once() -> None:
    listener = HttpListener(
        "127.0.0.1:0",
        registry=CollectorRegistry(),
        jwks=lambda: "{}",
        is_ready=lambda: True,
        status=dict,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", listener.port), 10))
            for _ in range(MAX_CONNECTIONS + 10)
        ]
        closed = 0
        for connection in slow[MAX_CONNECTIONS:]:
            with contextlib.suppress(ConnectionError):
                closed += connection.recv(1) == b""
        assert closed == 10
        for connection in slow:
            connection.close()
        statuses = {0}
        for _ in range(100):  # their threads end as they notice
            with contextlib.suppress(http.client.HTTPException, OSError):
                statuses.add(get(listener.port, "/healthz"))
        assert 200 in statuses
        assert get(listener.port, "/elsewhere") == 404
