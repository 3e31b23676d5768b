"""What anybody says to the HTTP listener, byte by byte (pdp.server.http)."""

from __future__ import annotations

import contextlib
import functools
import io
import socket
import sys
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry

from pdp.server.http import HttpListener
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited_bytes
from tests.fuzz.contract import SECRET

SECONDS: Final = 10.0
"""For an answer; more is a hang. A client that says nothing more is cut off after five."""
PATHS: Final = (
    b"/healthz", b"/readyz", b"/metrics", b"/status", b"/.well-known/jwks.json", b"/", b"//healthz",
    b"/healthz/../status", b"/healthz?a=%00", b"http://x/healthz", b"*", b"/%2e%2e/", b"/\xff",
    b"/" + b"a" * 9_000,
)  # fmt: skip
METHODS: Final = (b"GET", b"HEAD", b"POST", b"get", b"CONNECT", b"", b"GET GET", b"\0")
VERSIONS: Final = (
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"HTTP/0.9",
    b"HTTP/2.0",
    b"HTTP/1.1.1",
    b"",
    b"HTTP/-1",
)
HEADERS: Final = (
    b"Host: localhost", b"Content-Length: 10", b"Content-Length: -1", b"Content-Length: x",
    b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Connection: keep-alive",
    b"Authorization: Bearer " + SECRET.encode(), b" folded", b"no colon", b": empty", b"X: \xff\0",
    b"X: " + b"y" * 9_000, b"Upgrade: h2c", b"Content-Type: multipart/form-data; boundary=\x80",
)  # fmt: skip
MOST_HEADERS: Final = 120


@functools.cache
def _listener() -> HttpListener:
    return HttpListener(
        "127.0.0.1:0",
        registry=CollectorRegistry(),
        jwks=jose.JWKS.decode,
        is_ready=lambda: True,
        status=dict,
    )


def samples() -> Iterable[bytes]:
    for number in range(5):
        yield bytes([0, number])


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    written = io.StringIO()
    with contextlib.redirect_stderr(written):
        answer = _answered(_request(choices))
        usual = _answered(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert usual.startswith(b"HTTP/1.0 200 OK\r\n")
    assert written.getvalue() == "", written.getvalue()
    head, _, body = answer.partition(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/"):
        # Before 1.0 an answer had no head, and what is no request at all has none.
        assert b"Traceback" not in answer
        return False
    status = int(head.split()[1])
    assert status == 200 or 400 <= status < 500 or status in {501, 505}, head
    assert SECRET.encode() not in answer
    if status == 200:
        assert b"\r\nContent-Length: %d\r\n" % len(body) in head + b"\r\n"
    assert sys.version.split()[0].encode() not in head
    return status == 200


def _request(choices: Choices) -> bytes:
    if choices.number(8) == 1:
        return choices.rest()
    path = choices.pick(PATHS)
    line = b" ".join([choices.pick(METHODS), path, choices.pick(VERSIONS)])
    headers = []
    for _ in range(choices.number(4)):
        header = choices.pick(HEADERS) if choices.number(4) else choices.some()
        headers += [header] * (MOST_HEADERS if choices.number(16) == 1 else 1)
    request = b"\r\n".join([line, *headers, b"", choices.some()])
    return edited_bytes(request, choices) if choices.number(4) == 1 else request


def _answered(request: bytes) -> bytes:
    """All that comes back until the listener hangs up."""
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", _listener().port), SECONDS) as connection:
        with contextlib.suppress(OSError):  # it has hung up
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65_536):
                answer += part
    return bytes(answer)
