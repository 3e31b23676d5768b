"""OPA servers for tests: real ones, and one that answers as it is told."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

from aiohttp import web

TRIES: Final = 500

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def served(opa: Path, *arguments: str | Path) -> Iterator[str]:
    """A real OPA on loopback, by its URL, ready to be asked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command: list[str | Path] = [opa, "run", "--server", "--addr", address, "--log-level", "error"]
    with subprocess.Popen(
        [*command, "--skip-version-check", "--shutdown-grace-period", "0", *arguments],
        stdin=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until_up(process, f"http://{address}/health?bundles")
            yield f"http://{address}"
        finally:
            process.terminate()


def wait_until_up(process: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(TRIES):
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310 - loopback
                return
        except OSError:
            assert process.poll() is None, "opa has ended"
            process_wait(process)
    raise AssertionError("opa did not come up")


def process_wait(process: subprocess.Popen[bytes]) -> None:
    """Give it a moment, less when it ends."""
    try:
        process.wait(0.02)
    except subprocess.TimeoutExpired:
        return


@asynccontextmanager
async def answering(handler: Handler, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that answers every request as ``handler`` does, by its URL."""
    application = web.Application(client_max_size=16 * 1024 * 1024)
    application.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(
        application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    try:
        assert runner.addresses
        yield f"http{'s' if tls else ''}://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return when a condition holds; it must within 10 s."""
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)
