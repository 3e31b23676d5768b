"""The engine of `policy.engine: {opa: {url}}`: an OPA server that runs already."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import aiohttp

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.engine import Entrypoint, PolicyEngine, PolicyError
from pdp.policy.opa.client import UNKNOWN_REVISION, OpaClient, unavailable

MAX_CONNECTIONS: Final = 32
"""Questions that the server is asked at the same time at most."""


class OpaEngine:
    """The policy in force is whatever an OPA server has in force.

    Which revision that is, the server says with each answer; it is "unknown" before
    the first one, and of policies that it has not got from a bundle with a revision.
    """

    def __init__(self, url: str, *, token_file: Path | None, deadline_ms: int) -> None:
        self._token_file = token_file
        self._client = OpaClient(
            url,
            connect=lambda: aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
            token=self._token,
            deadline_ms=deadline_ms,
            concurrency=MAX_CONNECTIONS,
        )
        self._revision = UNKNOWN_REVISION
        self._changed = asyncio.Event()

    @property
    def revision(self) -> str:
        """The revision of the server's last answer."""
        return self._revision

    @contextmanager
    def pin(self) -> Iterator[PolicyEngine]:
        """One revision for all the questions of one call: where the server takes up
        another between two of them, the second is refused (policy_unavailable).
        """
        yield _Call(self)

    async def changed_from(self, revision: str) -> str:
        """The revision of the server's last answer, as soon as it is another than
        ``revision``.
        """
        while self._revision == revision:
            await self._changed.wait()
        return self._revision

    async def healthy(self) -> bool:
        """Whether the server has activated its bundles and takes questions."""
        if not await self._client.healthy():
            return False
        try:
            # Also learns of a new revision while nobody asks.
            await self.ask(Entrypoint.AUTHZ_DECISION, {})
        except PolicyError as error:
            return error.reason_code not in _NO_ANSWER
        return True

    async def ask(self, entrypoint: Entrypoint, document: JsonObject) -> tuple[JsonValue, str]:
        """The value of a rule, and the revision that it follows from. Raises PolicyError."""
        reply = await self._client.evaluate(entrypoint, document)
        if reply.revision != self._revision:
            self._revision = reply.revision
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
        return reply.value_or_denial(), reply.revision

    async def close(self) -> None:
        """Let go of the connections; later questions get policy_unavailable."""
        await self._client.close()

    def _token(self) -> str | None:
        """Read anew for every question: whoever renews the file need not tell."""
        return self._token_file.read_text().strip() if self._token_file else None


_NO_ANSWER: Final = frozenset({"policy_unavailable", "policy_timeout"})


class _Call:
    """The engine as one call sees it."""

    __slots__ = ("_engine", "_revision")

    def __init__(self, engine: OpaEngine) -> None:
        self._engine = engine
        self._revision: str | None = None

    @property
    def revision(self) -> str:
        return self._engine.revision if self._revision is None else self._revision

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        value, revision = await self._engine.ask(entrypoint, document)
        if self._revision not in {None, revision}:
            raise unavailable()
        self._revision = revision
        return value

    async def close(self) -> None:
        """Nothing: the connections are the engine's."""
