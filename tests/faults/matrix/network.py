"""What can become of a server that is reached over a network."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from pdp.closing import Closing
from tests.faults.matrix.table import Failure
from tests.faults.toxiproxy import Toxiproxy, free_port
from tests.policy.sources.servers import raw_server

NAME: Final = "way"
NONSENSE: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 9\r\n"
    b"Connection: close\r\n\r\nnot these"
)
FORBIDDEN: Final = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Way(Closing):
    """The one way to a server, which can be broken."""

    def __init__(self, folder: Path, upstream: str) -> None:
        self._proxy = Toxiproxy(folder)
        self._upstream = upstream
        self.address = self._proxy.add(NAME, upstream)
        """HOST:PORT where it begins."""

    def close(self) -> None:
        self._proxy.stop()

    def breaks(
        self, *, slow_ms: int, partial_bytes: int = 40
    ) -> Mapping[Failure, Callable[[], AbstractContextManager[None]]]:
        """How each failure of the way is brought about."""

        def poisoned(toxic: str, **attributes: int) -> Callable[[], AbstractContextManager[None]]:
            def poison() -> None:
                self._proxy.poison(NAME, toxic, "downstream", **attributes)

            return lambda: self._broken(poison)

        return {
            Failure.DOWN: lambda: self._broken(lambda: self._proxy.cut(NAME)),
            Failure.SLOW: poisoned("latency", latency=slow_ms),
            Failure.HANGING: poisoned("timeout", timeout=0),
            Failure.PARTIAL: poisoned("limit_data", bytes=partial_bytes),
            Failure.WRONG_BYTES: lambda: self._replaced(NONSENSE),
            Failure.PERMISSION_LOST: lambda: self._replaced(FORBIDDEN),
        }

    @contextlib.contextmanager
    def _broken(self, break_it: Callable[[], None]) -> Iterator[None]:
        break_it()
        try:
            yield
        finally:
            self._proxy.heal()

    @contextlib.contextmanager
    def _replaced(self, answer: bytes) -> Iterator[None]:
        """Something else answers in the server's place."""
        with raw_server(answer) as other:
            self._proxy.lead(NAME, other)
            try:
                yield
            finally:
                self._proxy.lead(NAME, self._upstream)


@contextlib.contextmanager
def paused(process_id: int) -> Iterator[None]:
    """The process stands still."""
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


class FileServer(Closing):
    """A process that hands out the files of a folder, at one port whenever it runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
        self._start()

    @contextlib.contextmanager
    def killed(self) -> Iterator[None]:
        """It is dead; another one follows it."""
        self._process.kill()
        self._process.wait(20)
        try:
            yield
        finally:
            self._start()

    def paused(self) -> AbstractContextManager[None]:
        """It stands still."""
        return paused(self._process.pid)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)

    def _start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        host, port = self.address.split(":")
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                return
            assert time.monotonic() < deadline, "the file server does not answer"
            time.sleep(0.02)
