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


def test_slow_clients_are_closed_for_new_ones_and_keep_no_probe_out() -> None:
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
        for connection in slow[:10]:
            with contextlib.suppress(ConnectionError):
                assert connection.recv(1) == b"", "the oldest are closed"
        slow[-1].sendall(b"GET /healthz HTTP/1.0\r\n")
        for _ in range(MAX_CONNECTIONS - 1):
            assert get(listener.port, "/healthz") == 200
        slow[-1].sendall(b"\r\n")
        assert slow[-1].recv(12) == b"HTTP/1.0 200", "it is younger than those that were closed"
        assert get(listener.port, "/elsewhere") == 404
