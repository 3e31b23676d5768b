"""The engine of `policy.engine: {opa: {managed: true}}`: an OPA of the sidecar's own."""

from __future__ import annotations

import asyncio
import logging
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
QUESTIONS_PER_WORKER: Final = 16
"""Questions that one worker of OPA has before it at most; more wait in the sidecar."""
_log: Final = logging.getLogger(__name__)


class ManagedOpa:
    """One OPA process that answers for one bundle, and is started again when it dies."""

    def __init__(
        self, bundle: Bundle, folder: OpaFolder, *, opa: Path, deadline_ms: int, workers: int
    ) -> None:
        self.revision = bundle.revision
        self._folder = folder
        self._opa = opa.absolute()  # it is started in another folder
        self._workers = workers
        self._client = OpaClient(
            "http://localhost",
            connect=lambda: aiohttp.UnixConnector(str(folder.socket), limit=0),
            deadline_ms=deadline_ms,
            concurrency=workers * QUESTIONS_PER_WORKER,
        )
        self._process: OpaProcess | None = None
        self._ready = False
        self._supervision: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, bundle: Bundle, *, opa: Path, deadline_ms: int, workers: int
    ) -> ManagedOpa:
        """Start OPA on a bundle; it has answered every entrypoint when this returns.

        Raises BundleError, in OPA's words, when OPA can not run the bundle.
        """
        folder = await asyncio.to_thread(OpaFolder, bundle)
        engine = cls(bundle, folder, opa=opa, deadline_ms=deadline_ms, workers=workers)
        try:
            await engine._launch()
        except BaseException:
            await engine.close()
            raise
        engine._supervision = asyncio.create_task(engine._supervise())
        return engine

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        """The value of a rule for ``input = document``. Raises PolicyError."""
        if not self._ready:
            raise unavailable()
        reply = await self._client.evaluate(entrypoint, document)
        if reply.revision != self.revision:
            raise unavailable()
        return reply.value_or_denial()

    async def healthy(self) -> bool:
        """Whether OPA runs and takes questions."""
        return self._ready and await self._client.healthy()

    async def close(self) -> None:
        """End the process and remove what was written for it."""
        self._ready = False
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.gather(self._supervision, return_exceptions=True)
        await self._client.close()
        if self._process is not None:
            await self._process.stop()
        await asyncio.to_thread(self._folder.remove)

    async def _launch(self) -> None:
        """Start a process and ask it every entrypoint once. Raises BundleError."""
        self._process = await OpaProcess.start(self._opa, self._folder, workers=self._workers)
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                while not await self._client.healthy():
                    if self._process.ended:
                        raise await self._process.refusal()
                    await asyncio.sleep(POLL_SECONDS)
                await self._check_entrypoints()
        except TimeoutError:
            raise _refused(f"is not up within {START_TIMEOUT_SECONDS:.0f} seconds") from None
        self._ready = True

    async def _check_entrypoints(self) -> None:
        try:
            rules = await self._client.rules()
            for entrypoint in Entrypoint:
                if not any(f"{rule}/".startswith(f"{entrypoint}/") for rule in rules):
                    raise _refused(
                        f"has no rule {entrypoint} in its Rego; OPA needs the sources in the"
                        " bundle, as Wasm alone is for the embedded engine"
                    )
                # Also prepares the query, which the first call would wait for else.
                await self._client.evaluate(entrypoint, {}, deadline_seconds=START_TIMEOUT_SECONDS)
        except PolicyError as error:
            raise _refused(f"can not be evaluated ({error.reason_code})") from None

    async def _supervise(self) -> None:
        delay = FIRST_DELAY_SECONDS
        clock = asyncio.get_running_loop().time
        while self._process is not None:
            since = clock()
            await self._process.wait()
            self._ready = False
            if clock() - since > MAX_DELAY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            _log.error("OPA has ended; it is started again in %.1f s", delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_DELAY_SECONDS)
            try:
                await self._launch()
            except BundleError:
                await self._process.stop()


def _refused(what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {what}.")
