"""This product, asked through its own stub."""

from __future__ import annotations

import time

from bench.peers.question import TOOL, Call
from pdp.channel import AsyncConnection, Connection
from pdp.client import AsyncGuard, Guard, PermitDenied

READ_TOOL = "orders.read"


# Or what is called unary here would be asked over the stream, and nobody would know.
assert callable(Connection._message)  # noqa: SLF001
assert callable(AsyncConnection._message)  # noqa: SLF001


class _Unary(Connection):
    """Makes every question a call."""

    def _message(self, *_question: object) -> None:
        return None


class _AsyncUnary(AsyncConnection):
    """The same."""

    def _message(self, *_question: object) -> None:
        return None


class _UnaryGuard(Guard):
    _connect = _Unary


class _AsyncUnaryGuard(AsyncGuard):
    _connect = _AsyncUnary


def arguments(call: Call) -> dict[str, str]:
    return {"order_id": call.order_id, "status": call.status}


def holder(call: Call) -> str:
    """Under which the token of whoever makes a call is found."""
    return f"{call.tenant} {call.role} {' '.join(call.scopes)}"


class Sync:
    """A decision with everything on, over the stub's stream."""

    _guard: type[Guard] = Guard

    def __init__(self, target: str, tokens: dict[str, str]) -> None:
        self._tokens = tokens
        self.guard = self._guard(target, timeout_seconds=20)

    def ask(self, call: Call) -> bool:
        with self.guard.acting_for(self._tokens[holder(call)]):
            try:
                self.guard.authorize(TOOL, arguments(call))
            except PermitDenied:
                return False
        return True


class SyncUnary(Sync):
    """The same question as a call of its own."""

    _guard = _UnaryGuard


class Async:
    _guard: type[AsyncGuard] = AsyncGuard

    def __init__(self, target: str, tokens: dict[str, str]) -> None:
        self._tokens = tokens
        self._stub = self._guard(target, timeout_seconds=20)

    async def ask(self, call: Call) -> bool:
        with self._stub.acting_for(self._tokens[holder(call)]):
            try:
                await self._stub.authorize(TOOL, arguments(call))
            except PermitDenied:
                return False
        return True


class AsyncUnary(Async):
    _guard = _AsyncUnaryGuard


class Guarded(Sync):
    """A tool that is called under the guard: asked for, run, its outcome reported."""

    def __init__(self, target: str, tokens: dict[str, str]) -> None:
        super().__init__(target, tokens)
        self._tool = self.guard.tool(TOOL)(_update)

    def ask(self, call: Call) -> bool:
        with self.guard.acting_for(self._tokens[holder(call)]):
            try:
                self._tool(order_id=call.order_id, status=call.status)
            except PermitDenied:
                return False
        return True


def _update(order_id: str, status: str) -> str:
    return f"{order_id} is {status}"


class Reusable:
    """A tool whose permit the policy lets be used again: all calls but one in a thousand ask
    nobody. One tenant, as one agent run has.
    """

    def __init__(self, target: str, tokens: dict[str, str]) -> None:
        self._guard = Guard(target, timeout_seconds=20)
        self._tool = self._guard.tool(READ_TOOL)(_read)
        token, *_ = tokens.values()
        # For as long as it asks, as a service does around a whole request.
        self._guard.acting_for(token).__enter__()
        for number in range(50):
            self._tool(order_id=str(number))
            time.sleep(0.002)  # the stub keeps permits once it hears of changes

    def ask(self, call: Call) -> bool:
        return self._tool(order_id=call.order_id) == call.order_id


def _read(order_id: str) -> str:
    return order_id
