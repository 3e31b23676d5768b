"""The HTTP listener: metrics, probes, the policy's state and the public permit keys. No
tenant's data.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from pdp.canonical import JsonObject

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment


class _Handler(WSGIRequestHandler):
    timeout = 5  # seconds; a slower client is cut off
    server_version = "pdp"
    sys_version = ""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Probes and scrapes are not worth a line each."""


MAX_CONNECTIONS: Final = 32
"""Served at the same time; for one more the oldest is closed, so that slow clients can
neither use up the descriptors that calls need nor keep probes out.
"""
END_SECONDS: Final = 1.0
"""How long a connection that was closed may take to notice it."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[_Handler]) -> None:
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._served: dict[Any, None] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - the base's
        """As the base class does, for as many at a time as there may be."""
        if not self._free.acquire(blocking=False):
            self._close_oldest()
            if not self._free.acquire(timeout=END_SECONDS):
                self.shutdown_request(request)
                return
        with self._lock:
            self._served[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - the base's
        """In the connection's own thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._served.pop(request, None)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - the base's
        """As the base class does, but a client that is slow or gone is not worth a line."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def _close_oldest(self) -> None:
        with self._lock:
            oldest = next(iter(self._served), None)
            if oldest is not None:
                del self._served[oldest]
                with contextlib.suppress(OSError):  # it has just ended by itself
                    oldest.shutdown(socket.SHUT_RDWR)

    def server_bind(self) -> None:
        """As the base class does, but without asking the network for a name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


class HttpListener:
    """Serves GET on threads of its own, so that neither it nor the calls wait for
    each other.
    """

    def __init__(
        self,
        address: str,
        *,
        registry: CollectorRegistry,
        jwks: Callable[[], str],
        is_ready: Callable[[], bool],
        status: Callable[[], JsonObject],
    ) -> None:
        host, _, port = address.rpartition(":")
        self._registry = registry
        self._jwks = jwks
        self._is_ready = is_ready
        self._status = status
        server_class = _Server6 if ":" in host else _Server
        self._server = server_class((host.strip("[]"), int(port)), _Handler)
        self._server.set_app(self._answer)
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="http-listener", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        status, kind, body = "200 OK", "text/plain; charset=utf-8", b"ok\n"
        path = environ.get("PATH_INFO", "")
        if environ.get("REQUEST_METHOD") != "GET":
            status, body = "405 Method Not Allowed", b"only GET\n"
        elif path == "/metrics":
            kind, body = CONTENT_TYPE_LATEST, generate_latest(self._registry)
        elif path == "/.well-known/jwks.json":
            kind, body = "application/jwk-set+json", self._jwks().encode("utf-8")
        elif path == "/status":
            kind, body = "application/json", json.dumps(self._status()).encode("utf-8")
        elif path == "/readyz":
            if not self._is_ready():
                status, body = "503 Service Unavailable", b"not ready\n"
        elif path != "/healthz":
            status, body = "404 Not Found", b"not found\n"
        # Unless it is named, the server is called by Python's version.
        server = ("Server", _Handler.server_version)
        start(status, [("Content-Type", kind), ("Content-Length", str(len(body))), server])
        return [body]
