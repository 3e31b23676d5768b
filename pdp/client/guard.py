"""The guard: no tool runs without a permit. One face blocks, the other awaits."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import operator
import os
from collections.abc import Awaitable, Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Self, TypeVar

from pdp.canonical import JsonObject
from pdp.channel import CallError, call_error, connect, connect_async
from pdp.client.acting import Identity, running_under
from pdp.client.call import (
    Ask,
    Charge,
    PermitDesk,
    Resource,
    Tool,
    ToolCall,
    report_executed,
    report_failed,
    tool_call,
)
from pdp.client.decision import Decision
from pdp.client.errors import PermitDenied
from pdp.permit.claims import Permit
from pdp.permit.keys import PermitKeySet
from pdp.reason import ReasonCode

if TYPE_CHECKING:
    import grpc

_log: Final = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Face:
    """What both faces share: everything but how a message travels."""

    def __init__(
        self,
        target: str,
        *,
        audience: str = "",
        timeout_seconds: float = 2.0,
        permit_issuer: str = "agent-pdp",
        permit_keys: PermitKeySet | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        observe: Callable[[Decision], None] | None = None,
    ) -> None:
        """Guard tools through the sidecar at ``target`` (``unix:///path`` or
        ``host:port``, with ``credentials`` for TLS).

        ``audience`` is the tool server that is to accept the permits; empty leaves
        it to the sidecar. ``timeout_seconds`` bounds each question. ``permit_keys``
        pins the keys that permits must be signed with; without them the sidecar's
        own are fetched once, so the connection must be one to trust. ``observe`` is
        shown every answer of the sidecar, on the caller's thread and before the tool
        runs; if it raises, the tool does not run.
        """
        self._target = target
        self._credentials = credentials
        self._audience = audience
        self._timeout_seconds = timeout_seconds
        self._identity = Identity()
        self._desk = PermitDesk(
            self._identity, issuer=permit_issuer, keys=permit_keys, observe=observe
        )

    def acting_for(
        self, token: str, *, context: JsonObject | None = None, traceparent: str = ""
    ) -> AbstractContextManager[None]:
        """Act for the bearer of ``token``, the verified token of this request,
        inside the ``with``. Nothing else names the tenant.

        ``context`` is shown to the policy as input.context.client. ``traceparent``
        is a W3C trace context, for the audit record.
        """
        return self._identity.acting_for(token, context=context, traceparent=traceparent)

    def _tool(
        self,
        function: Callable[..., Any],
        name: str,
        resource: Callable[..., Resource | None] | None,
        cost: Callable[[Any], Sequence[Charge]] | None,
        omit: Collection[str],
        audience: str | None,
    ) -> Tool:
        return Tool(
            function,
            name=name,
            audience=self._audience if audience is None else audience,
            resource=resource,
            cost=cost,
            omit=omit,
        )

    def _call(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        resource: Resource | None,
        request_id: str,
        audience: str | None,
    ) -> ToolCall:
        return tool_call(
            tool,
            arguments,
            resource=resource,
            request_id=request_id,
            audience=self._audience if audience is None else audience,
        )


class Guard(_Face):
    """Blocks every tool call that lacks a permit. Threads may share it."""

    _channel: grpc.Channel | None = None
    _process_id = 0

    def tool(
        self,
        name: str,
        *,
        resource: Callable[..., Resource | None] | None = None,
        cost: Callable[[Any], Sequence[Charge]] | None = None,
        omit: Collection[str] = (),
        audience: str | None = None,
    ) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
        """Guard a function as the tool ``name``.

        The function's arguments are what the policy sees and the permit binds, so
        they must be JSON; the function gets copies. ``omit`` names parameters that
        are not arguments of the tool (``self``, a connection): they are passed on
        unseen. ``resource`` takes the arguments and says what the call is done to.
        ``cost`` takes the result and says what the call cost, where the policy
        held a budget for it: ``[(budget, unit, amount), ...]``.

        The guarded function raises PermitDenied when the tool did not run.
        """

        def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
            if inspect.iscoroutinefunction(function):
                raise TypeError(f"{name} is a coroutine function: guard it with AsyncGuard")
            tool = self._tool(function, name, resource, cost, omit, audience)

            @functools.wraps(function)
            def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
                with _blocking(name):
                    call, bound = tool.describe(args, kwargs)
                    permit = self._walk(self._desk.obtain(call))
                with running_under(permit):
                    try:
                        result = function(*bound.args, **bound.kwargs)
                    except BaseException as error:
                        self._report(report_failed(permit, error))
                        raise
                if _is_unfinished(result):
                    self._report(report_failed(permit, TypeError()))
                    raise _unfinished(result, name)
                self._report(report_executed(permit, _costs(tool, result)))
                return result

            return guarded

        return decorate

    def authorize(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        *,
        resource: Resource | None = None,
        request_id: str = "",
        audience: str | None = None,
    ) -> Permit:
        """A permit for one call, for code that can not use :meth:`tool`.

        The same ``request_id`` with the same call gets the same permit again.
        Raises PermitDenied. The caller runs the tool with exactly ``arguments`` and
        then calls :meth:`executed` or :meth:`failed`.
        """
        with _blocking(tool):
            call = self._call(tool, arguments, resource, request_id, audience)
            return self._walk(self._desk.obtain(call))

    def executed(self, permit: Permit, charges: Sequence[Charge] = ()) -> None:
        """Report that the permit's call ran, and what it cost."""
        self._report(report_executed(permit, charges))

    def failed(self, permit: Permit, error: BaseException) -> None:
        """Report that the permit's call raised."""
        self._report(report_failed(permit, error))

    def close(self) -> None:
        """Close the connection; guarded tools open it again."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _walk(self, steps: Generator[Ask, Any, Permit]) -> Permit:
        import grpc  # noqa: PLC0415 - importing the stub stays cheap until it is used

        try:
            ask = next(steps)
            while True:
                try:
                    response = self._send(ask)
                except grpc.RpcError as error:
                    ask = steps.throw(call_error(error))
                else:
                    ask = steps.send(response)
        except StopIteration as done:
            permit: Permit = done.value
            return permit

    def _report(self, ask: Ask) -> None:
        try:
            self._send(ask)
        except Exception as error:  # noqa: BLE001 - the tool has run; its result must not be lost
            _log_unreported(error)

    def _send(self, ask: Ask) -> Any:  # noqa: ANN401 - as many kinds as methods
        if self._channel is None or self._process_id != os.getpid():
            # A channel does not survive a fork.
            self._channel, self._process_id = connect(self._target, self._credentials), os.getpid()
        return _method(self._channel, ask)(
            ask.request, timeout=self._timeout_seconds, metadata=ask.metadata
        )


class AsyncGuard(_Face):
    """The same face for coroutine functions. Belongs to one event loop."""

    _channel: grpc.aio.Channel | None = None

    def tool(
        self,
        name: str,
        *,
        resource: Callable[..., Resource | None] | None = None,
        cost: Callable[[Any], Sequence[Charge]] | None = None,
        omit: Collection[str] = (),
        audience: str | None = None,
    ) -> Callable[[Callable[_P, Awaitable[_R]]], Callable[_P, Awaitable[_R]]]:
        """As :meth:`Guard.tool`, for a coroutine function."""

        def decorate(function: Callable[_P, Awaitable[_R]]) -> Callable[_P, Awaitable[_R]]:
            if not inspect.iscoroutinefunction(function):
                raise TypeError(f"{name} is not a coroutine function: guard it with Guard")
            tool = self._tool(function, name, resource, cost, omit, audience)

            @functools.wraps(function)
            async def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
                with _blocking(name):
                    call, bound = tool.describe(args, kwargs)
                    permit = await self._walk(self._desk.obtain(call))
                with running_under(permit):
                    try:
                        result: _R = await function(*bound.args, **bound.kwargs)
                    except BaseException as error:
                        await self._report(report_failed(permit, error))
                        raise
                await self._report(report_executed(permit, _costs(tool, result)))
                return result

            return guarded

        return decorate

    async def authorize(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        *,
        resource: Resource | None = None,
        request_id: str = "",
        audience: str | None = None,
    ) -> Permit:
        """As :meth:`Guard.authorize`."""
        with _blocking(tool):
            call = self._call(tool, arguments, resource, request_id, audience)
            return await self._walk(self._desk.obtain(call))

    async def executed(self, permit: Permit, charges: Sequence[Charge] = ()) -> None:
        """As :meth:`Guard.executed`."""
        await self._report(report_executed(permit, charges))

    async def failed(self, permit: Permit, error: BaseException) -> None:
        """As :meth:`Guard.failed`."""
        await self._report(report_failed(permit, error))

    async def close(self) -> None:
        """Close the connection; guarded tools open it again."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _walk(self, steps: Generator[Ask, Any, Permit]) -> Permit:
        import grpc  # noqa: PLC0415 - as in Guard

        try:
            ask = next(steps)
            while True:
                try:
                    response = await self._send(ask)
                except grpc.RpcError as error:
                    ask = steps.throw(call_error(error))
                else:
                    ask = steps.send(response)
        except StopIteration as done:
            permit: Permit = done.value
            return permit

    async def _report(self, ask: Ask) -> None:
        # Shielded: a tool that was cancelled is reported on all the same.
        report = asyncio.ensure_future(self._send(ask))
        try:
            await asyncio.shield(report)
        except Exception as error:  # noqa: BLE001 - as in Guard
            _log_unreported(error)

    async def _send(self, ask: Ask) -> Any:  # noqa: ANN401 - as many kinds as methods
        if self._channel is None:
            self._channel = connect_async(self._target, self._credentials)
        return await _method(self._channel, ask)(
            ask.request, timeout=self._timeout_seconds, metadata=ask.metadata
        )


@contextlib.contextmanager
def _blocking(tool: str) -> Iterator[None]:
    """Whatever goes wrong inside comes out as PermitDenied: the tool does not run."""
    try:
        yield
    except PermitDenied:
        raise
    except CallError as error:
        raise PermitDenied(
            error.reason_code,
            error.message,
            tool=tool,
            retry_after_seconds=error.retry_after_seconds,
        ) from None
    except Exception as error:
        raise PermitDenied(
            ReasonCode.GUARD_FAILED, f"the guard failed with {type(error).__name__}", tool=tool
        ) from error


def _method(channel: Any, ask: Ask) -> Any:  # noqa: ANN401 - a channel of either kind
    from pdp.api.v1 import authorization_pb2_grpc, execution_pb2_grpc  # noqa: PLC0415

    if ask.method == "Authorize":
        return authorization_pb2_grpc.AuthorizationServiceStub(channel).Authorize
    return getattr(execution_pb2_grpc.ExecutionServiceStub(channel), ask.method)


def _costs(tool: Tool, result: object) -> Sequence[Charge]:
    try:
        return [
            (str(budget), str(unit), operator.index(amount))
            for budget, unit, amount in tool.costs(result)
        ]
    except Exception as error:  # noqa: BLE001 - the tool has run; then all that is held is spent
        _log.warning("%s: its cost function raised %s", tool.name, type(error).__name__)
        return ()


def _is_unfinished(result: object) -> bool:
    """Whether the work of a tool is still to be done, so that it would run after
    its permit was reported on.
    """
    return inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result)


def _unfinished(result: object, tool: str) -> PermitDenied:
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        result.close()
    return PermitDenied(
        ReasonCode.GUARD_FAILED,
        "it returned something that is still to run; guard the function that does the work",
        tool=tool,
    )


def _log_unreported(error: Exception) -> None:
    _log.warning(
        "the outcome of a call could not be reported (%s); what it held expires by itself",
        type(error).__name__,
    )
