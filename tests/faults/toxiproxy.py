"""Toxiproxy, which breaks connections in every way: github.com/Shopify/toxiproxy."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

COMMAND: Final = Path(__file__).resolve().parents[2] / ".tools" / "toxiproxy-server"


def free_port() -> int:
    """A port of loopback that was free just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Toxiproxy:
    """A server of one run, with a proxy for each process that goes through it."""

    def __init__(self, folder: Path) -> None:
        assert COMMAND.exists(), "no toxiproxy-server: run make .tools/toxiproxy-server"
        self._port = free_port()
        with (folder / "toxiproxy.log").open("wb") as log:
            self._process = subprocess.Popen(
                [COMMAND, "-host", "127.0.0.1", "-port", str(self._port)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                self._ask("GET", "/version")
                return
            assert time.monotonic() < deadline, "toxiproxy-server does not answer"
            time.sleep(0.02)

    def add(self, name: str, upstream: str) -> str:
        """A way to an address; the address where it begins."""
        address = f"127.0.0.1:{free_port()}"
        proxy = {"name": name, "listen": address, "upstream": upstream, "enabled": True}
        self._ask("POST", "/proxies", proxy)
        return address

    def poison(self, name: str, toxic: str, stream: str, **attributes: int) -> None:
        """Break what goes up to the server ("upstream"), or comes back ("downstream"), until
        :meth:`heal`.
        """
        self._ask(
            "POST",
            f"/proxies/{name}/toxics",
            {"type": toxic, "stream": stream, "attributes": attributes},
        )

    def cut(self, name: str) -> None:
        """Close every connection, and take none, until :meth:`heal`."""
        self._ask("POST", f"/proxies/{name}", {"enabled": False})

    def lead(self, name: str, upstream: str) -> None:
        """Close every connection; from here on the way leads to that address."""
        self._ask("POST", f"/proxies/{name}", {"upstream": upstream, "enabled": True})

    def heal(self) -> None:
        """Every proxy lets everything through again."""
        self._ask("POST", "/reset")

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)

    def _ask(self, method: str, path: str, body: object = None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status < http.HTTPStatus.BAD_REQUEST, (path, text)
        finally:
            connection.close()
