"""The guard: no tool runs without a permit. One face blocks, the other awaits."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager
from pathlib import PurePath
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, Self, TypeVar

from pdp.canonical import JsonObject
from pdp.channel import AsyncConnection, CallError, Connection
from pdp.client.acting import Identity, RunningUnder
from pdp.client.batch import Call, Outcome, check_number, obtain_all
from pdp.client.call import Costs, Resource, Tool, ToolCall, check_tool_name, tool_call
from pdp.client.decision import Decision
from pdp.client.delegation import Carrier, Delegation, delegate, token_in
from pdp.client.desk import (
    Grant,
    PermitDesk,
    Steps,
    Use,
    Wait,
    Walk,
    log_unreported,
    report_executed,
    report_failed,
    walk,
)
from pdp.client.errors import (
    BudgetRefused,
    DelegationRefused,
    IdentityLacking,
    ListingRefused,
    PermitDenied,
)
from pdp.client.hold import Hold, TellingTask, TellingThread
from pdp.client.keeper import Keeper
from pdp.client.spend import Charge, Reservation, Usage
from pdp.client.tools import ToolInfo, list_tools
from pdp.closing import Closing
from pdp.permit.claims import Permit
from pdp.permit.keys import PermitKeySet
from pdp.reason import ReasonCode

if TYPE_CHECKING:
    import asyncio

    import grpc

    from pdp.client.meter import Meter

_log: Final = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_T = TypeVar("_T")
_E = TypeVar("_E", bound=Exception)
_C = TypeVar("_C", Connection, AsyncConnection)

_PAUSES_SECONDS: Final = (0.1, 0.5)
"""Between the tries of a hold's end."""


class _Face(Generic[_C]):
    """What both faces share: everything but how a message travels."""

    _connect: type[_C]

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
        observe_reservation: Callable[[Reservation], None] | None = None,
        keep_permits: bool = True,
        workload_token: Callable[[], str] | None = None,
    ) -> None:
        """Guard tools through the sidecar at ``target`` (``unix:///path`` or
        ``host:port``, with ``credentials`` for TLS).

        ``audience`` is the tool server that is to accept the permits; empty leaves
        it to the sidecar. ``timeout_seconds`` bounds each question: at most 60.
        ``permit_keys`` pins the keys that permits must be signed with; without them
        the sidecar's own are fetched once, so the connection must be one to trust.
        ``observe`` is shown every answer of the sidecar, on the caller's thread and
        before the tool runs; if it raises, the tool does not run. In the same way
        ``observe_reservation`` is shown what :meth:`reserve` has been granted.

        Where the policy permits several calls of a tool at once, they are made under
        the one permit without asking again, and so without ``observe`` being shown any
        more than the first; ``keep_permits=False`` has each of them asked for.

        ``workload_token`` gives the token of the runtime itself, such as a JWT-SVID or a
        service account's, as it is now: it is called for every question.

        Raises ValueError for a target beyond this machine without ``credentials``.
        """
        self._connection: _C = self._connect(
            target,
            timeout_seconds=timeout_seconds,
            credentials=credentials,
            workload_token=workload_token,
        )
        self._audience = audience
        self._reports: set[asyncio.Task[None]] = set()  # under way; an AsyncGuard's only
        self._identity = Identity()
        self._desk = PermitDesk(
            self._identity, issuer=permit_issuer, keys=permit_keys, observe=observe
        )
        self._observe_reservation = observe_reservation
        self._keeper = Keeper(
            self._desk,
            self._identity,
            Connection(
                target,
                timeout_seconds=timeout_seconds,
                credentials=credentials,
                workload_token=workload_token,
            ),
            keeps=keep_permits,
            wait_seconds=timeout_seconds,
        )

    def acting_for(
        self, token: str, *, context: JsonObject | None = None, traceparent: str = ""
    ) -> AbstractContextManager[None]:
        """Act for the bearer of ``token``, the verified token of this request,
        inside the ``with``. Nothing else names the tenant.

        ``context`` is shown to the policy as input.context.client; it is read once,
        here. ``traceparent`` is a W3C trace context, for the audit record.
        """
        return self._identity.acting_for(token, context=context, traceparent=traceparent)

    def accept(
        self, carrier: Carrier, *, context: JsonObject | None = None, traceparent: str = ""
    ) -> AbstractContextManager[None]:
        """Act inside the ``with`` under the delegation in ``carrier``: the headers of an HTTP
        request, the metadata of a gRPC call or of an A2A message, or a queue's message. As
        :meth:`acting_for` otherwise. Raises DelegationRefused where it holds none, several,
        or anything else in its place, such as a user's token.
        """
        return self.acting_for(token_in(carrier), context=context, traceparent=traceparent)

    def _reserving(
        self, what: Usage | Sequence[Charge], tool: str, ttl_seconds: int
    ) -> Steps[Meter]:
        from pdp.client.meter import reserve  # noqa: PLC0415 - many runtimes never reserve

        return reserve(
            self._identity,
            what,
            tool=tool,
            ttl_seconds=ttl_seconds,
            observe=self._observe_reservation,
        )

    def _tool(
        self,
        function: Callable[..., Any],
        name: str,
        resource: Callable[..., Resource | None] | None,
        costs: Costs,
        omit: Collection[str],
        audience: str | None,
    ) -> Tool:
        return Tool(
            function,
            name=name,
            audience=self._audience if audience is None else audience,
            resource=resource,
            costs=costs,
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

    def _obtaining_all(
        self,
        calls: Sequence[Call],
        all_or_nothing: bool,  # noqa: FBT001 - as it was said to either face
    ) -> Steps[list[Outcome]]:
        def describe(call: Call) -> ToolCall:
            return self._call(
                call.tool, call.arguments, call.resource, call.request_id, call.audience
            )

        return obtain_all(
            self._desk,
            self._identity,
            [functools.partial(describe, call) for call in calls],
            all_or_nothing=all_or_nothing,
        )


class Guard(_Face[Connection], Closing):
    """Blocks every tool call that lacks a permit. Threads may share it, and it
    survives a fork.
    """

    _connect = Connection

    def tool(
        self,
        name: str,
        *,
        resource: Callable[..., Resource | None] | None = None,
        cost: Callable[[Any], Sequence[Charge]] | None = None,
        cost_of_failure: Callable[[BaseException], Sequence[Charge]] | None = None,
        estimate: Callable[..., Sequence[Charge]] | None = None,
        omit: Collection[str] = (),
        audience: str | None = None,
    ) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
        """Guard a function as the tool ``name``.

        The function's arguments are what the policy sees and the permit binds, so
        they must be JSON; the function gets copies. ``omit`` names parameters that
        are not arguments of the tool (``self``, a connection): they are passed on
        unseen. ``resource`` takes the arguments and says what the call is done to.
        ``cost`` takes the result and says what the call cost, where the policy
        held a budget for it: ``[(budget, unit, amount), ...]``. ``cost_of_failure``
        takes what the function raised and says what that cost; without it a failure
        costs nothing. ``estimate`` takes the arguments, and what it says is shown to the
        policy as input.context.client.estimate; the policy alone sets what is held.

        The guarded function raises PermitDenied when the tool did not run, and
        TypeError for arguments that the function does not take.
        """
        check_tool_name(name)
        costs = Costs(estimate=estimate, cost=cost, cost_of_failure=cost_of_failure)

        def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
            if inspect.iscoroutinefunction(function):
                raise TypeError(f"{name} is a coroutine function: guard it with AsyncGuard")
            tool = self._tool(function, name, resource, costs, omit, audience)

            @functools.wraps(function)
            def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
                use: Use | None = self._keeper.take(tool)
                if use is None:
                    bound = tool.bind(args, kwargs)
                    use = _granted(self._obtain_use(tool, bound))
                    args, kwargs = bound.args, bound.kwargs  # type: ignore[assignment]
                try:
                    with RunningUnder(use.permit):
                        result = tool.finished(function(*args, **kwargs))
                except BaseException as error:
                    cost_of_raised = functools.partial(tool.cost_of_failure, error)
                    self._report(use.failed(error, cost_of_raised))
                    raise
                self._report(use.executed(functools.partial(tool.cost, result)))
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
        return _granted(
            self._obtain(tool, lambda: self._call(tool, arguments, resource, request_id, audience))
        ).permit

    def authorize_all(
        self, calls: Sequence[Call], *, all_or_nothing: bool = False
    ) -> list[Permit | PermitDenied]:
        """Permits for calls that are to be made at the same time, at most 32, in one round
        trip: for each its permit, or why it has none, in the order of the calls.

        With ``all_or_nothing`` either all have a permit or none has; what would have been
        allowed is denied with batch_refused. The same calls with the same request ids get
        the same permits again. The caller goes on as after :meth:`authorize`.
        """
        check_number(calls)
        try:
            outcomes = self._walk(self._obtaining_all(calls, all_or_nothing))
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing runs
            outcomes = [error] * len(calls)
        return _permits(calls, outcomes)

    def tools(self) -> tuple[ToolInfo, ...]:
        """Which tools there are for whoever the code acts for, by name, to show a model
        those that are callable. Each call is authorized all the same. Raises ListingRefused.
        """
        try:
            outcome: tuple[ToolInfo, ...] | ListingRefused = self._walk(list_tools(self._identity))
        except Exception as error:  # noqa: BLE001 - whatever it is, no tool is shown
            outcome = _not_listed(error)
        return _granted(outcome)

    def executed(self, permit: Permit, charges: Sequence[Charge] = ()) -> None:
        """Report that the permit's call ran, and what it cost."""
        self._report(report_executed(permit, lambda: charges))

    def failed(self, permit: Permit, error: BaseException, charges: Sequence[Charge] = ()) -> None:
        """Report that the permit's call raised, and what it cost all the same."""
        self._report(report_failed(permit, error, lambda: charges, held=None))

    @contextlib.contextmanager
    def reserve(
        self,
        what: Usage | Sequence[Charge],
        *,
        tool: str = "",
        ttl_seconds: int = 0,
        report_every_seconds: float = 1.0,
    ) -> Iterator[Hold]:
        """Hold what is spent inside the ``with``, at most, by no tool call of its own.

        ``what`` is the usage of a model, which the policy prices, or charges. ``tool``
        is what it is spent for, if any. The hold expires after ``ttl_seconds``, 1 to
        3600; 0 leaves that to the sidecar. What :meth:`Hold.spent` counts is reported
        every ``report_every_seconds``, earlier where it is a tenth of what is held.

        The end of the ``with`` settles what was counted and lets the rest go, also when
        it raised. Where nothing was counted, a block that raised has spent nothing, and
        any other has spent all that is held. That the end could not be reported is
        logged.

        Raises BudgetRefused when nothing is held; the block then does not run.
        """
        meter = _granted(self._obtain_hold(what, tool, ttl_seconds))
        telling = TellingThread(lambda: self._tell(meter), every_seconds=report_every_seconds)
        failed = True
        try:
            yield Hold(meter, telling.wake)
            failed = False
        finally:
            telling.stop()
            self._end(meter, failed=failed)

    def delegate(
        self,
        agent: str,
        *,
        tools: Sequence[str],
        arguments: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
        ttl_seconds: int = 0,
        budget: Sequence[Charge] = (),
        request_id: str = "",
    ) -> Delegation:
        """A narrower identity for ``agent``, which is to act on behalf of whoever the code
        acts for now: these ``tools`` and no others, for ``ttl_seconds`` (0 leaves that to the
        sidecar), and of the budget no more than ``budget`` (all that the caller may, where
        it is empty). ``arguments`` says what the tools' arguments must be besides, by tool
        and argument: ``{"refunds.create": {"amount": {"max": 500}}}``, with the rules
        ``one_of``, ``min``, ``max`` and ``prefix``.

        The same ``request_id`` with the same request gets the same delegation again. Raises
        DelegationRefused.
        """
        try:
            outcome: Delegation | DelegationRefused = self._walk(
                delegate(
                    self._identity,
                    agent,
                    tools=tools,
                    arguments=arguments,
                    ttl_seconds=ttl_seconds,
                    budget=budget,
                    request_id=request_id,
                )
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing is delegated
            outcome = _not_delegated(error)
        return _granted(outcome)

    def close(self) -> None:
        """Report on the permits that are kept, and close the connection; guarded tools
        open it again.
        """
        self._keeper.close()
        self._connection.close()

    def _obtain(self, tool: str, describe: Callable[[], ToolCall]) -> Grant | PermitDenied:
        try:
            return self._walk(self._desk.obtain(describe()))
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing runs
            return _denial(error, tool)

    def _obtain_use(self, tool: Tool, bound: inspect.BoundArguments) -> Use | PermitDenied:
        try:
            return self._walk(self._keeper.obtain(tool, bound))
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing runs
            return _denial(error, tool.name)

    def _obtain_hold(
        self, what: Usage | Sequence[Charge], tool: str, ttl_seconds: int
    ) -> Meter | BudgetRefused:
        try:
            return self._walk(self._reserving(what, tool, ttl_seconds))
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing is spent
            return _refusal(error)

    def _walk(self, steps: Steps[_T]) -> _T:
        return walk(self._connection, steps)

    def _report(self, steps: Steps[None] | None) -> None:
        if steps is None:
            return
        try:
            self._walk(steps)
        except Exception as error:  # noqa: BLE001 - the tool has run; its result must not be lost
            log_unreported(error)

    def _tell(self, meter: Meter) -> None:
        try:
            self._walk(meter.part())
        except Exception as error:  # noqa: BLE001 - the stream goes on; it is told again
            _log_untold(meter, error)

    def _end(self, meter: Meter, *, failed: bool) -> None:
        for pause_seconds in (*_PAUSES_SECONDS, None):
            try:
                self._walk(meter.end(failed=failed))
            except Exception as error:  # noqa: BLE001 - what was done must not be lost
                if pause_seconds is None or not meter.may_be_told_again(error):
                    _log_unended(meter, error)
                    return
                time.sleep(pause_seconds)
            else:
                return


class AsyncGuard(_Face[AsyncConnection]):
    """The same face for coroutine functions. Belongs to one event loop at a time."""

    _connect = AsyncConnection

    def tool(
        self,
        name: str,
        *,
        resource: Callable[..., Resource | None] | None = None,
        cost: Callable[[Any], Sequence[Charge]] | None = None,
        cost_of_failure: Callable[[BaseException], Sequence[Charge]] | None = None,
        estimate: Callable[..., Sequence[Charge]] | None = None,
        omit: Collection[str] = (),
        audience: str | None = None,
    ) -> Callable[[Callable[_P, Awaitable[_R]]], Callable[_P, Coroutine[Any, Any, _R]]]:
        """As :meth:`Guard.tool`, for a coroutine function."""
        check_tool_name(name)
        costs = Costs(estimate=estimate, cost=cost, cost_of_failure=cost_of_failure)

        def decorate(
            function: Callable[_P, Awaitable[_R]],
        ) -> Callable[_P, Coroutine[Any, Any, _R]]:
            if not inspect.iscoroutinefunction(function):
                raise TypeError(f"{name} is not a coroutine function: guard it with Guard")
            tool = self._tool(function, name, resource, costs, omit, audience)

            @functools.wraps(function)
            async def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
                use: Use | None = self._keeper.take(tool)
                if use is None:
                    bound = tool.bind(args, kwargs)
                    use = _granted(await self._obtain_use(tool, bound))
                    args, kwargs = bound.args, bound.kwargs  # type: ignore[assignment]
                try:
                    with RunningUnder(use.permit):
                        result = tool.finished(await function(*args, **kwargs))
                except BaseException as error:
                    cost_of_raised = functools.partial(tool.cost_of_failure, error)
                    await self._report(use.failed(error, cost_of_raised))
                    raise
                await self._report(use.executed(functools.partial(tool.cost, result)))
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
        grant = _granted(
            await self._obtain(
                tool, lambda: self._call(tool, arguments, resource, request_id, audience)
            )
        )
        return grant.permit

    async def authorize_all(
        self, calls: Sequence[Call], *, all_or_nothing: bool = False
    ) -> list[Permit | PermitDenied]:
        """As :meth:`Guard.authorize_all`."""
        check_number(calls)
        try:
            outcomes = await self._walk(self._obtaining_all(calls, all_or_nothing))
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing runs
            outcomes = [error] * len(calls)
        return _permits(calls, outcomes)

    async def tools(self) -> tuple[ToolInfo, ...]:
        """As :meth:`Guard.tools`."""
        try:
            outcome: tuple[ToolInfo, ...] | ListingRefused = await self._walk(
                list_tools(self._identity)
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, no tool is shown
            outcome = _not_listed(error)
        return _granted(outcome)

    async def executed(self, permit: Permit, charges: Sequence[Charge] = ()) -> None:
        """As :meth:`Guard.executed`."""
        await self._report(report_executed(permit, lambda: charges))

    async def failed(
        self, permit: Permit, error: BaseException, charges: Sequence[Charge] = ()
    ) -> None:
        """As :meth:`Guard.failed`."""
        await self._report(report_failed(permit, error, lambda: charges, held=None))

    @contextlib.asynccontextmanager
    async def reserve(
        self,
        what: Usage | Sequence[Charge],
        *,
        tool: str = "",
        ttl_seconds: int = 0,
        report_every_seconds: float = 1.0,
    ) -> AsyncIterator[Hold]:
        """As :meth:`Guard.reserve`, for ``async with``."""
        meter = _granted(await self._obtain_hold(what, tool, ttl_seconds))
        telling = TellingTask(lambda: self._tell(meter), every_seconds=report_every_seconds)
        failed = True
        try:
            yield Hold(meter, telling.wake)
            failed = False
        finally:
            await self._finish(self._end(meter, telling, failed=failed))

    async def delegate(
        self,
        agent: str,
        *,
        tools: Sequence[str],
        arguments: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
        ttl_seconds: int = 0,
        budget: Sequence[Charge] = (),
        request_id: str = "",
    ) -> Delegation:
        """As :meth:`Guard.delegate`."""
        try:
            outcome: Delegation | DelegationRefused = await self._walk(
                delegate(
                    self._identity,
                    agent,
                    tools=tools,
                    arguments=arguments,
                    ttl_seconds=ttl_seconds,
                    budget=budget,
                    request_id=request_id,
                )
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing is delegated
            outcome = _not_delegated(error)
        return _granted(outcome)

    async def close(self) -> None:
        """Finish the reports that are under way, report on the permits that are kept, and
        close the connection; guarded tools open it again.
        """
        import asyncio  # noqa: PLC0415 - importing the stub stays cheap until it is used

        loop = asyncio.get_running_loop()
        await asyncio.gather(*(report for report in self._reports if report.get_loop() is loop))
        await asyncio.to_thread(self._keeper.close)
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _obtain(self, tool: str, describe: Callable[[], ToolCall]) -> Grant | PermitDenied:
        try:
            return await self._walk(self._desk.obtain(describe()))
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing runs
            return _denial(error, tool)

    async def _obtain_use(self, tool: Tool, bound: inspect.BoundArguments) -> Use | PermitDenied:
        try:
            return await self._walk(self._keeper.obtain(tool, bound))
        except Exception as error:  # noqa: BLE001 - whatever it is, nothing runs
            return _denial(error, tool.name)

    async def _obtain_hold(
        self, what: Usage | Sequence[Charge], tool: str, ttl_seconds: int
    ) -> Meter | BudgetRefused:
        try:
            return await self._walk(self._reserving(what, tool, ttl_seconds))
        except Exception as error:  # noqa: BLE001 - as in Guard
            return _refusal(error)

    async def _walk(self, steps: Steps[_T]) -> _T:
        with contextlib.closing(Walk(steps)) as walk:
            while (ask := walk.ask) is not None:
                try:
                    if isinstance(ask, Wait):
                        answer = await _end_of(ask)
                    else:
                        answer = await self._connection.call(*ask.message)
                except CallError as error:
                    walk.fail(error)
                else:
                    walk.answer(answer)
            return walk.result()

    async def _report(self, steps: Steps[None] | None) -> None:
        if steps is not None:
            await self._finish(self._deliver(steps))

    async def _finish(self, work: Coroutine[Any, Any, None]) -> None:
        import asyncio  # noqa: PLC0415 - importing the stub stays cheap until it is used

        # A task of its own: what was cancelled is reported on all the same.
        report = asyncio.ensure_future(work)
        self._reports.add(report)
        report.add_done_callback(self._reports.discard)
        await asyncio.shield(report)

    async def _deliver(self, steps: Steps[None]) -> None:
        try:
            await self._walk(steps)
        except Exception as error:  # noqa: BLE001 - as in Guard
            log_unreported(error)

    async def _tell(self, meter: Meter) -> None:
        try:
            await self._walk(meter.part())
        except Exception as error:  # noqa: BLE001 - as in Guard
            _log_untold(meter, error)

    async def _end(self, meter: Meter, telling: TellingTask, *, failed: bool) -> None:
        import asyncio  # noqa: PLC0415 - as above

        await telling.stop()
        for pause_seconds in (*_PAUSES_SECONDS, None):
            try:
                await self._walk(meter.end(failed=failed))
            except Exception as error:  # noqa: BLE001 - as in Guard
                if pause_seconds is None or not meter.may_be_told_again(error):
                    _log_unended(meter, error)
                    return
                await asyncio.sleep(pause_seconds)
            else:
                return


async def _end_of(wait: Wait) -> bool:
    import asyncio  # noqa: PLC0415 - importing the stub stays cheap until it is used

    try:
        async with asyncio.timeout(wait.timeout_seconds):
            # Whoever is cancelled leaves the others waiting.
            return await asyncio.shield(asyncio.wrap_future(wait.end))
    except TimeoutError:
        return False


def _denial(error: Exception, tool: str) -> PermitDenied:
    """Whatever went wrong comes out as PermitDenied: the tool does not run.

    It is returned, to be raised where nothing else is being handled: the frames in
    which it arose hold the token, and error trackers record the locals of every
    frame that an exception, its cause or its context remembers.
    """
    if isinstance(error, PermitDenied):
        return _bare(error)
    if isinstance(error, IdentityLacking):
        return PermitDenied(error.reason_code, error.message, tool=tool)
    if isinstance(error, CallError):
        return PermitDenied(
            error.reason_code,
            error.message,
            tool=tool,
            retry_after_seconds=error.retry_after_seconds,
            refused_by=error.refused_by,
        )
    # Its text may hold an argument or the token, so only kind and place are told.
    return PermitDenied(
        ReasonCode.GUARD_FAILED,
        f"the guard failed with {type(error).__name__} at {_place(error)}",
        tool=tool,
    )


def _refusal(error: Exception) -> BudgetRefused:
    """Whatever went wrong comes out as BudgetRefused, as by :func:`_denial`."""
    if isinstance(error, BudgetRefused):
        return _bare(error)
    if isinstance(error, IdentityLacking):
        return BudgetRefused(error.reason_code, error.message)
    if isinstance(error, CallError):
        return BudgetRefused(
            error.reason_code,
            error.message,
            retry_after_seconds=error.retry_after_seconds,
            refused_by=error.refused_by,
        )
    return BudgetRefused(
        ReasonCode.GUARD_FAILED,
        f"the guard failed with {type(error).__name__} at {_place(error)}",
    )


def _not_delegated(error: Exception) -> DelegationRefused:
    """Whatever went wrong comes out as DelegationRefused, as by :func:`_denial`."""
    if isinstance(error, DelegationRefused):
        return _bare(error)
    if isinstance(error, IdentityLacking | CallError):
        return DelegationRefused(error.reason_code, error.message)
    return DelegationRefused(
        ReasonCode.GUARD_FAILED,
        f"the guard failed with {type(error).__name__} at {_place(error)}",
    )


def _not_listed(error: Exception) -> ListingRefused:
    """Whatever went wrong comes out as ListingRefused, as by :func:`_denial`."""
    if isinstance(error, IdentityLacking):
        return ListingRefused(error.reason_code, error.message)
    if isinstance(error, CallError):
        return ListingRefused(
            error.reason_code, error.message, retry_after_seconds=error.retry_after_seconds
        )
    return ListingRefused(
        ReasonCode.GUARD_FAILED,
        f"the guard failed with {type(error).__name__} at {_place(error)}",
    )


def _permits(calls: Sequence[Call], outcomes: Sequence[Outcome]) -> list[Permit | PermitDenied]:
    return [
        outcome.permit if isinstance(outcome, Grant) else _denial(outcome, call.tool)
        for call, outcome in zip(calls, outcomes, strict=True)
    ]


def _bare(error: _E) -> _E:
    """The error without the frames in which it arose."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _granted(
    outcome: _T | PermitDenied | BudgetRefused | DelegationRefused | ListingRefused,
) -> _T:
    """What was granted, or the refusal is raised."""
    if isinstance(outcome, PermitDenied | BudgetRefused | DelegationRefused | ListingRefused):
        raise outcome
    return outcome


def _place(error: Exception) -> str:
    """File and line that raised it."""
    traceback = error.__traceback__
    place = "an unknown place"
    while traceback is not None:
        code = traceback.tb_frame.f_code
        place = f"{PurePath(code.co_filename).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return place


def _log_untold(meter: Meter, error: Exception) -> None:
    _log.info(
        "hold %s: what is spent could not be reported (%s); it will be tried again",
        meter.reservation.hold_id,
        type(error).__name__,
    )


def _log_unended(meter: Meter, error: Exception) -> None:
    _log.warning(
        "hold %s: its end could not be reported (%s); it expires by itself",
        meter.reservation.hold_id,
        error.reason_code if isinstance(error, CallError) else type(error).__name__,
    )
