"""The engine of `policy.engine: {opa: {managed: true}}`: an OPA of the sidecar's own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import aiohttp

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.bundle import Bundle
from pdp.policy.engine import BundleError, Entrypoint, PolicyError
from pdp.policy.opa.client import OpaClient, unavailable
from pdp.policy.opa.process import OpaFolder, OpaProcess
from pdp.reason import ReasonCode

START_TIMEOUT_SECONDS: Final = 60.0
"""Longest time from a process to its first answers."""
POLL_SECONDS: Final = 0.01
FIRST_DELAY_SECONDS: Final = 0.1
MAX_DELAY_SECONDS: Final = 10.0
"""Longest wait before a process that died is started again; it doubles up to here."""
QUESTIONS_PER_WORKER: Final = 2
"""Questions that one worker of OPA has before it at most: one that it evaluates, and one
on the wire. More wait in the sidecar, where their deadline has not begun: given to OPA at
once, most of them ran past it together when more came than could be answered."""
_log: Final = logging.getLogger(__name__)


class ManagedOpa:
    """OPA, answering for one bundle, and started again when it dies."""

    def __init__(
        self, revision: str, server: _Server, start: Callable[[], Awaitable[_Server]]
    ) -> None:
        self.revision = revision
        self._server = server
        """The latest; one that has died refuses every question."""
        self._start = start
        self._supervision = asyncio.create_task(self._supervise())

    @classmethod
    async def start(
        cls, bundle: Bundle, *, opa: Path, deadline_ms: int, workers: int
    ) -> ManagedOpa:
        """Start OPA on a bundle; it has answered every entrypoint when this returns.

        Raises BundleError, in OPA's words, when OPA can not run the bundle.
        """

        async def start() -> _Server:
            return await _Server.start(bundle, opa=opa, deadline_ms=deadline_ms, workers=workers)

        return cls(bundle.revision, await start(), start)

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        """The value of a rule for ``input = document``. Raises PolicyError."""
        reply = await self._server.client.evaluate(entrypoint, document)
        if reply.revision != self.revision:
            raise unavailable()
        return reply.value_or_denial()

    async def healthy(self) -> bool:
        """Whether OPA runs and takes questions."""
        return await self._server.client.healthy()

    async def close(self) -> None:
        """End the process and remove what was written for it."""
        self._supervision.cancel()
        await asyncio.gather(self._supervision, return_exceptions=True)
        await self._server.stop()

    async def _supervise(self) -> None:
        clock = asyncio.get_running_loop().time
        delay = FIRST_DELAY_SECONDS
        while True:
            since = clock()
            await self._server.process.wait()
            await self._server.stop()
            if clock() - since > MAX_DELAY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            while self._server.process.ended:
                _log.error("OPA has ended; it is started again in %.1f s", delay)
                await asyncio.sleep(delay)
                delay = min(2 * delay, MAX_DELAY_SECONDS)
                try:
                    self._server = await self._start()
                except BundleError as error:
                    _log.error("%s", error.message)
                except Exception as error:  # noqa: BLE001 - the next try may go well
                    _log.error("OPA could not be started: %s", type(error).__name__)


class _Server:
    """One process, its folder, and the connections to it."""

    def __init__(self, folder: OpaFolder, process: OpaProcess, client: OpaClient) -> None:
        self.folder = folder
        self.process = process
        self.client = client

    @classmethod
    async def start(cls, bundle: Bundle, *, opa: Path, deadline_ms: int, workers: int) -> _Server:
        """One that has answered every entrypoint. Raises BundleError."""
        folder = await _folder(bundle)
        try:
            process = await OpaProcess.start(opa, folder, workers=workers)
        except BaseException:
            folder.remove()
            raise
        client = OpaClient(
            "http://localhost",
            connect=lambda: aiohttp.UnixConnector(str(folder.socket), limit=0),
            deadline_ms=deadline_ms,
            concurrency=workers * QUESTIONS_PER_WORKER,
        )
        server = cls(folder, process, client)
        try:
            await server._get_ready()
        except BaseException:
            await server.stop()
            raise
        return server

    async def stop(self) -> None:
        """End it, if it has not ended, and tidy up; once or again."""
        await self.client.close()
        await self.process.stop()
        await asyncio.to_thread(self.folder.remove)

    async def _get_ready(self) -> None:
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                while not await self.client.healthy():
                    if self.process.ended:
                        raise await self.process.refusal()
                    await asyncio.sleep(POLL_SECONDS)
                await asyncio.to_thread(self.folder.clear)
                await self._check_entrypoints()
        except TimeoutError:
            raise _refused(f"is not up within {START_TIMEOUT_SECONDS:.0f} seconds") from None

    async def _check_entrypoints(self) -> None:
        try:
            rules = await self.client.rules()
            for entrypoint in Entrypoint:
                there = any(f"{rule}/".startswith(f"{entrypoint}/") for rule in rules)
                if not there and not entrypoint.optional:
                    raise _refused(
                        f"has no rule {entrypoint} in its Rego; OPA needs the sources in the"
                        " bundle, as Wasm alone is for the embedded engine"
                    )
                # Also prepares the query, which the first call would wait for else.
                await self.client.evaluate(entrypoint, {}, deadline_seconds=START_TIMEOUT_SECONDS)
        except PolicyError as error:
            raise _refused(f"can not be evaluated ({error.reason_code})") from None


async def _folder(bundle: Bundle) -> OpaFolder:
    """A folder for OPA, which is removed where nobody waits for it any longer."""
    making = asyncio.ensure_future(asyncio.to_thread(OpaFolder, bundle))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        with contextlib.suppress(BundleError):
            (await making).remove()
        raise


def _refused(what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {what}.")
