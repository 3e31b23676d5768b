"""Both faces of the guard, called alike, so that one suite proves the two."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import Any, Protocol

from pdp.client import AsyncGuard, Call, Guard, Hold, Permit, PermitDenied, ToolInfo

Function = Callable[..., Any]
Condition = Callable[[], object]
Block = Callable[[Hold], Iterator[Condition]]
"""What is done inside a ``with guard.reserve(...)``; it yields what is to come true before
it goes on.
"""


class Face(Protocol):
    def tool(self, name: str, **options: Any) -> Callable[[Function], Function]: ...
    def acting_for(self, token: str, **options: Any) -> AbstractContextManager[None]: ...
    def authorize(self, tool: str, arguments: dict[str, Any], **options: Any) -> Permit: ...
    def authorize_all(self, calls: list[Call], **options: Any) -> list[Permit | PermitDenied]: ...
    def tools(self) -> tuple[ToolInfo, ...]: ...
    def executed(self, permit: Permit, charges: Any = ()) -> None: ...
    def failed(self, permit: Permit, error: BaseException, charges: Any = ()) -> None: ...
    def spend(self, what: Any, block: Block, **options: Any) -> None: ...
    def close(self) -> None: ...
    def dispose(self) -> None: ...


class Blocking:
    def __init__(self, target: str, **options: Any) -> None:
        guard = Guard(target, **options)
        self.tool = guard.tool
        self.acting_for = guard.acting_for
        self.authorize = guard.authorize
        self.authorize_all = guard.authorize_all
        self.tools = guard.tools
        self.executed = guard.executed
        self.failed = guard.failed
        self._reserve = guard.reserve
        self.close = self.dispose = guard.close

    def spend(self, what: Any, block: Block, **options: Any) -> None:
        with self._reserve(what, **options) as hold:
            for condition in block(hold):
                while not condition():
                    time.sleep(0.002)


class Awaiting:
    def __init__(self, target: str, **options: Any) -> None:
        self._guard = AsyncGuard(target, **options)
        self._runner = asyncio.Runner()
        self.acting_for = self._guard.acting_for

    def tool(self, name: str, **options: Any) -> Callable[[Function], Function]:
        def decorate(function: Function) -> Function:
            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

            guarded = self._guard.tool(name, **options)(awaited)

            @functools.wraps(guarded)
            def call(*args: Any, **kwargs: Any) -> Any:
                return self._run(guarded(*args, **kwargs))

            return call

        return decorate

    def authorize(self, tool: str, arguments: dict[str, Any], **options: Any) -> Permit:
        permit: Permit = self._run(self._guard.authorize(tool, arguments, **options))
        return permit

    def authorize_all(self, calls: list[Call], **options: Any) -> list[Permit | PermitDenied]:
        outcomes: list[Permit | PermitDenied] = self._run(
            self._guard.authorize_all(calls, **options)
        )
        return outcomes

    def tools(self) -> tuple[ToolInfo, ...]:
        tools: tuple[ToolInfo, ...] = self._run(self._guard.tools())
        return tools

    def executed(self, permit: Permit, charges: Any = ()) -> None:
        self._run(self._guard.executed(permit, charges))

    def failed(self, permit: Permit, error: BaseException, charges: Any = ()) -> None:
        self._run(self._guard.failed(permit, error, charges))

    def spend(self, what: Any, block: Block, **options: Any) -> None:
        async def spend() -> None:
            async with self._guard.reserve(what, **options) as hold:
                for condition in block(hold):
                    while not condition():  # noqa: ASYNC110 - of whatever kind it is
                        await asyncio.sleep(0.002)

        self._run(spend())

    def close(self) -> None:
        self._run(self._guard.close())

    def dispose(self) -> None:
        self.close()
        self._runner.close()

    def _run(self, work: Any) -> Any:
        async def awaited() -> Any:
            return await work

        coroutine: Coroutine[Any, Any, Any] = awaited()
        return self._runner.run(coroutine, context=copy_context())
