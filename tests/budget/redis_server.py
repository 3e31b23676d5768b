"""A Redis of the tests' own, on a Unix socket in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / ".tools"


def redis_command() -> str:
    """The server that `make test` has put in place, or the system's."""
    installed = TOOLS / "redis-server"
    found = str(installed) if installed.exists() else shutil.which("redis-server")
    assert found, "no redis-server: run python scripts/install_package.py redis-server"
    return found


class RedisServer:
    """A server that can be killed and started again with what it has kept.

    ``options`` are lines of its configuration; appendonly is on.
    """

    def __init__(self, folder: Path, *options: str, sentinel: bool = False) -> None:
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.options = options
        self.sentinel = sentinel
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> RedisServer:
        lines = [
            "port 0",
            f"unixsocket {self.socket}",
            f"dir {self.folder}",
            *self.options,
        ]
        if not self.sentinel:
            lines += ["appendonly yes", "save ''", "maxmemory-policy noeviction"]
        configuration = self.folder / "redis.conf"
        configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                [redis_command(), configuration, *(["--sentinel"] if self.sentinel else [])],
                stdout=log,
                stderr=log,
            )
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 20
        while b"PONG" not in self._ping():
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "redis.log").read_text()
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)

    def _ping(self) -> bytes:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection,
        ):
            connection.settimeout(1)
            connection.connect(str(self.socket))
            connection.sendall(b"PING\r\n")
            return connection.recv(64)
        return b""

    def command(self, *words: str) -> bytes:
        """One command on a connection of its own; its first reply as it came."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(str(self.socket))
            parts = [word.encode() for word in words]
            connection.sendall(
                b"".join(
                    [b"*%d\r\n" % len(parts), *(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)]
                )
            )
            return connection.recv(1 << 20)

    def keys(self, pattern: str) -> list[str]:
        """The keys that match, few enough to come at once."""
        lines = self.command("KEYS", pattern).decode().split("\r\n")
        return [line for line in lines if line and line[0] not in "*$"]

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Without a chance to write anything more."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)
        self.process = None
        self.socket.unlink(missing_ok=True)

    def stop(self) -> None:
        if self.process is not None:
            self.kill()
