"""A candidate beside the policy in force: asked the same, and never obeyed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.contract import check_answer
from pdp.policy.engine import ActivePolicy, Entrypoint, PolicyEngine, PolicyError
from pdp.reason import ReasonCode

MAX_WAITING: Final = 128
"""Answers that wait to be compared; further ones are counted as missed. Each holds the
question, whose arguments alone may be a MiB of text.
"""
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What one of the two said."""

    revision: str
    value: JsonValue = field(repr=False)
    """Of the agreed form, or None when ``reason_code`` says why there is none."""
    reason_code: str = ReasonCode.OK

    @property
    def allow(self) -> bool | None:
        """What a decision says; None for limits."""
        if isinstance(self.value, dict):
            return self.value.get("allow") is True
        return False if self.value is None else None

    @property
    def said(self) -> str:
        """The reason code of a decision, or of its failure."""
        code = self.value.get("reason_code") if isinstance(self.value, dict) else None
        return code if isinstance(code, str) else str(self.reason_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A question on which the candidate would have answered otherwise."""

    entrypoint: Entrypoint
    document: JsonObject = field(repr=False)
    active: Answered
    candidate: Answered

    @property
    def fields(self) -> tuple[str, ...]:
        """The keys of the answers that differ; none for limits."""
        active, candidate = self.active.value, self.candidate.value
        if not isinstance(active, dict) or not isinstance(candidate, dict):
            return ()
        keys = active.keys() | candidate.keys()
        return tuple(sorted(key for key in keys if active.get(key) != candidate.get(key)))


class ShadowedPolicy:
    """The policy in force, which answers; the candidate hears every question after it.

    Comparing never delays an answer: it is done by one task, as far behind as
    MAX_WAITING questions.
    """

    def __init__(
        self,
        active: ActivePolicy,
        candidate: ActivePolicy,
        *,
        differs: Callable[[Difference], Awaitable[None]],
        counted: Callable[[str], None],
    ) -> None:
        self._active = active
        self._candidate = candidate
        self._differs = differs
        self._counted = counted
        """Is called with "same", "differs" or "missed"."""
        self._waiting: asyncio.Queue[tuple[Entrypoint, JsonObject, Answered]] = asyncio.Queue(
            MAX_WAITING
        )

    @property
    def revision(self) -> str:
        """The revision in force."""
        return self._active.revision

    @contextmanager
    def pin(self) -> Iterator[PolicyEngine]:
        """As the policy in force does it."""
        with self._active.pin() as engine:
            yield _Overheard(engine, self._offer)

    async def changed_from(self, revision: str) -> str:
        """Of the policy in force."""
        return await self._active.changed_from(revision)

    async def compare(self) -> None:
        """Compare until cancelled."""
        while True:
            question = await self._waiting.get()
            try:
                await self._compare(*question)
            except Exception as error:  # noqa: BLE001 - the next may go well
                _log.error("a candidate's answer is not on record: %s", type(error).__name__)

    async def _compare(
        self, entrypoint: Entrypoint, document: JsonObject, active: Answered
    ) -> None:
        try:
            candidate = await self._ask_candidate(entrypoint, document)
        except Exception:
            self._counted("missed")
            raise
        if (active.value, active.reason_code) == (candidate.value, candidate.reason_code):
            self._counted("same")
            return
        self._counted("differs")
        await self._differs(
            Difference(entrypoint=entrypoint, document=document, active=active, candidate=candidate)
        )

    async def _ask_candidate(self, entrypoint: Entrypoint, document: JsonObject) -> Answered:
        revision = self._candidate.revision
        try:
            with self._candidate.pin() as engine:
                revision = engine.revision
                return _answered(entrypoint, revision, await engine.evaluate(entrypoint, document))
        except PolicyError as error:
            return Answered(revision=revision, value=None, reason_code=error.reason_code)

    def _offer(self, entrypoint: Entrypoint, document: JsonObject, active: Answered) -> None:
        try:
            self._waiting.put_nowait((entrypoint, document, active))
        except asyncio.QueueFull:
            self._counted("missed")


class _Overheard:
    """An engine whose answers are offered for comparison."""

    def __init__(
        self, engine: PolicyEngine, offer: Callable[[Entrypoint, JsonObject, Answered], None]
    ) -> None:
        self._engine = engine
        self._offer = offer

    @property
    def revision(self) -> str:
        return self._engine.revision

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        """As the engine does it. Raises PolicyError."""
        if entrypoint is Entrypoint.SERVICE_CLASS:
            # It is of no call, so there is nothing that a difference could be on record of.
            return await self._engine.evaluate(entrypoint, document)
        try:
            value = await self._engine.evaluate(entrypoint, document)
        except PolicyError as error:
            failed = Answered(
                revision=self._engine.revision, value=None, reason_code=error.reason_code
            )
            self._offer(entrypoint, document, failed)
            raise
        self._offer(entrypoint, document, _answered(entrypoint, self._engine.revision, value))
        return value

    async def close(self) -> None:
        """Who opened the engine closes it."""


def _answered(entrypoint: Entrypoint, revision: str, value: JsonValue) -> Answered:
    try:
        check_answer(entrypoint, value)
    except PolicyError as error:
        return Answered(revision=revision, value=None, reason_code=error.reason_code)
    return Answered(revision=revision, value=value)
