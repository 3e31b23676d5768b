"""A web server on loopback that hands out the bundle and the issuer's keys, and notes
every request.
"""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Self
from urllib.parse import urlsplit

BUNDLE: Final = "/bundle.tar.gz"
JWKS: Final = "/jwks.json"


@dataclass(frozen=True, slots=True)
class Request:
    """What one sidecar asked for."""

    at: float
    """Seconds, by a clock of this process that only goes forward."""
    path: str
    sidecar: str
    sent_bytes: int
    """Of the body; 0 where the sidecar had it."""


class Origin:
    """Serves from when it is entered. What it hands out can be replaced at any time."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self._documents: dict[str, tuple[str, bytes]] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.origin = self
        self._thread = threading.Thread(target=self._server.serve_forever)

    def put(self, path: str, content: bytes) -> None:
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        self._documents[path] = tag, content

    def url(self, path: str, sidecar: str) -> str:
        """Where that sidecar finds it: by the query the requests are told apart."""
        return f"http://127.0.0.1:{self._server.server_port}{path}?{sidecar}"

    def answer(self, url: str, known: str | None) -> tuple[str, bytes | None]:
        """The tag, and the body unless it is known."""
        parts = urlsplit(url)
        tag, content = self._documents[parts.path]
        body = None if tag == known else content
        sent_bytes = 0 if body is None else len(body)
        self.requests.append(Request(time.monotonic(), parts.path, parts.query, sent_bytes))
        return tag, body

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # a whole fleet may come at once
    origin: Origin


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        tag, body = self.server.origin.answer(self.path, self.headers.get("If-None-Match"))
        self.send_response(HTTPStatus.OK if body is not None else HTTPStatus.NOT_MODIFIED)
        self.send_header("ETag", tag)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body is not None:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own
        """Nothing: what is asked for is in requests."""
