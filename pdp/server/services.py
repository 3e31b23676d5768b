"""The gRPC services: each method reads the request, asks, and writes the answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

import grpc

from pdp import decision, execution, spending
from pdp.admission import Admission, AdmissionError, Refusal
from pdp.api.v1 import (
    authorization_pb2,
    authorization_pb2_grpc,
    budget_pb2,
    budget_pb2_grpc,
    execution_pb2,
    execution_pb2_grpc,
)
from pdp.batch import authorize_batch
from pdp.errors import PdpError
from pdp.permit.ring import LiveKeys
from pdp.reason import ReasonCode
from pdp.rooms import Rooms, identify
from pdp.server import wire
from pdp.server.batch import batch_from, batch_response
from pdp.server.caller import caller_of, trace_id
from pdp.server.metrics import Metrics
from pdp.server.status import abort, status_code
from pdp.server.watch import Watchers

_log: Final = logging.getLogger(__name__)
_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[object, object]


MAX_CALLS_OF_NOBODY: Final = 1_024
"""Calls at the same time of whom it is not known yet, or never will be."""
_OVERFULL_SECONDS: Final = 1.0
"""When to ask again where not even that can be found out."""


class CallRunner:
    """Runs one call within its bounds: for how long, and how many at a time in all,
    beyond what is bounded by tenant.

    Work that has begun is finished even when its caller has gone, so that what
    was held or charged is always on record. A call that waits to be let in has not
    begun, and leaves with its caller.
    """

    def __init__(self, metrics: Metrics, admission: Admission, *, timeout_seconds: float) -> None:
        self._metrics = metrics
        self._admission = admission
        self._timeout_seconds = timeout_seconds
        self._max_calls = admission.max_calls + MAX_CALLS_OF_NOBODY
        self._under_way: set[asyncio.Task[object]] = set()

    async def run(self, context: _Context, method: str, work: Callable[[], Awaitable[_T]]) -> _T:
        """The result of ``work``; every failure ends the call with its status."""
        with self._metrics.timed(method) as timer:
            try:
                result = await self._bounded(context, work)
            except Exception as error:  # noqa: BLE001 - whatever it is, nothing is allowed
                failure = self.failure_of(method, error)
            else:
                timer.status = "OK"
                return result
            timer.status = status_code(failure).name
        # Counted before it leaves, so that whoever has the answer finds it counted.
        return await abort(context, failure)

    def failure_of(self, method: str, error: Exception) -> PdpError:
        """What the client learns of a failure, which is counted here."""
        if isinstance(error, PdpError):
            failure = error
        elif isinstance(error, TimeoutError):
            failure = PdpError(
                ReasonCode.DEADLINE_EXCEEDED,
                "The answer did not come in time; ask again with the same key.",
            )
        else:
            # The error's own text may quote data, so only its kind and the code
            # that it came from are logged; the client learns that it failed.
            places = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s failed with %s:\n%s", method, type(error).__name__, places)
            failure = PdpError(ReasonCode.INTERNAL, "The PDP failed; nothing was allowed.")
        if isinstance(failure, AdmissionError):
            self._metrics.admission_refused(failure.kind)
        if isinstance(failure, spending.SpendingError) and failure.refused_by is not None:
            self._metrics.budget_refused(method)
        self._metrics.failed(method, failure.reason_code)
        return failure

    async def drained(self) -> None:
        """Wait until all work that has begun is finished."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    async def _bounded(self, context: _Context, work: Callable[[], Awaitable[_T]]) -> _T:
        if len(self._under_way) >= self._max_calls:
            raise AdmissionError(Refusal.FULL, retry_after_seconds=_OVERFULL_SECONDS)
        remaining = context.time_remaining()
        timeout = min(self._timeout_seconds, remaining) if remaining else self._timeout_seconds
        task = asyncio.ensure_future(work())
        self._under_way.add(task)
        task.add_done_callback(self._finished)
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(task)
        finally:
            self._admission.abandon(task)

    def _finished(self, task: asyncio.Task[object]) -> None:
        self._under_way.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()  # marks it as seen when its caller has gone


class AuthorizationServicer(authorization_pb2_grpc.AuthorizationServiceServicer):
    """May this call be made?"""

    def __init__(
        self,
        rooms: Rooms,
        runner: CallRunner,
        metrics: Metrics,
        watchers: Watchers,
        *,
        default_audience: str,
        listener: str,
    ) -> None:
        """``listener`` is the name of the one that it answers on, as in Peer.listener."""
        self._rooms = rooms
        self._runner = runner
        self._metrics = metrics
        self._watchers = watchers
        self._listener = listener
        self._reader = wire.QuestionReader(default_audience=default_audience)

    async def Authorize(  # noqa: N802 - the contract's name
        self, request: authorization_pb2.AuthorizeRequest, context: _Context
    ) -> authorization_pb2.AuthorizeResponse:
        """Decide one call."""

        async def work() -> authorization_pb2.AuthorizeResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            asked = self._reader.asked(request, trace_id=trace)
            recorded = await decision.authorize(self._rooms, credentials, asked)
            self._metrics.decided(recorded)
            return wire.authorize_response(recorded)

        return await self._runner.run(context, "Authorize", work)

    async def AuthorizeBatch(  # noqa: N802 - the contract's name
        self, request: authorization_pb2.AuthorizeBatchRequest, context: _Context
    ) -> authorization_pb2.AuthorizeBatchResponse:
        """Decide several calls."""

        async def work() -> authorization_pb2.AuthorizeBatchResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            asked = batch_from(request, self._reader, trace_id=trace)
            results = await authorize_batch(self._rooms, credentials, asked)
            for result in results:
                if isinstance(result, decision.Recorded):
                    self._metrics.decided(result)
            return batch_response(
                results, failure_of=partial(self._runner.failure_of, "AuthorizeBatch")
            )

        return await self._runner.run(context, "AuthorizeBatch", work)

    def AuthorizeStream(  # noqa: N802 - the contract's name
        self,
        request_iterator: AsyncIterator[authorization_pb2.AuthorizeStreamRequest],
        context: _Context,
    ) -> AsyncIterator[authorization_pb2.AuthorizeStreamResponse]:
        """Decide calls over one stream."""
        raise NotImplementedError

    async def ListTools(  # noqa: N802 - the contract's name
        self, request: authorization_pb2.ListToolsRequest, context: _Context
    ) -> authorization_pb2.ListToolsResponse:
        """Tell which tools the caller may see."""
        return await context.abort(grpc.StatusCode.UNIMPLEMENTED)

    async def Delegate(  # noqa: N802 - the contract's name
        self, request: authorization_pb2.DelegateRequest, context: _Context
    ) -> authorization_pb2.DelegateResponse:
        """Make a narrower identity."""
        return await context.abort(grpc.StatusCode.UNIMPLEMENTED)

    async def Watch(  # noqa: N802 - the contract's name
        self,
        request: authorization_pb2.WatchRequest,  # noqa: ARG002 - has no fields
        context: _Context,
    ) -> AsyncIterator[authorization_pb2.WatchResponse]:
        """Tell what changes."""

        async def first() -> tuple[
            authorization_pb2.WatchResponse, AsyncGenerator[authorization_pb2.WatchResponse]
        ]:
            credentials, trace = caller_of(context, listener=self._listener)
            subject = await identify(self._rooms, credentials, action="watch", trace_id=trace)
            events = self._watchers.events(subject.tenant)
            return await anext(events), events

        in_force, events = await self._runner.run(context, "Watch", first)
        async with contextlib.aclosing(events):
            yield in_force
            async for event in events:
                yield event


class BudgetServicer(budget_pb2_grpc.BudgetServiceServicer):
    """May it still be spent?"""

    def __init__(
        self, rooms: Rooms, runner: CallRunner, metrics: Metrics, *, listener: str
    ) -> None:
        self._rooms = rooms
        self._runner = runner
        self._metrics = metrics
        self._listener = listener

    async def ChargeBudget(  # noqa: N802 - the contract's name
        self, request: budget_pb2.ChargeBudgetRequest, context: _Context
    ) -> budget_pb2.ChargeBudgetResponse:
        """Charge now."""

        async def work() -> budget_pb2.ChargeBudgetResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            spend = wire.spend_from(request, trace_id=trace)
            spent = await spending.charge(self._rooms, credentials, spend)
            self._metrics.spent(spent.result)
            return wire.charge_response(spent)

        return await self._runner.run(context, "ChargeBudget", work)

    async def ReserveBudget(  # noqa: N802 - the contract's name
        self, request: budget_pb2.ReserveBudgetRequest, context: _Context
    ) -> budget_pb2.ReserveBudgetResponse:
        """Hold amounts."""

        async def work() -> budget_pb2.ReserveBudgetResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            spend = wire.spend_from(request, trace_id=trace)
            spent = await spending.reserve(self._rooms, credentials, spend)
            self._metrics.spent(spent.result)
            return wire.reserve_response(spent)

        return await self._runner.run(context, "ReserveBudget", work)

    async def SettleBudget(  # noqa: N802 - the contract's name
        self, request: budget_pb2.SettleBudgetRequest, context: _Context
    ) -> budget_pb2.SettleBudgetResponse:
        """End a hold with what was spent."""

        async def work() -> budget_pb2.SettleBudgetResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            end = wire.hold_end_from(request, trace_id=trace)
            spent = await spending.settle(self._rooms, credentials, end)
            self._metrics.spent(spent.result)
            return wire.settle_response(spent)

        return await self._runner.run(context, "SettleBudget", work)

    async def ReleaseBudget(  # noqa: N802 - the contract's name
        self, request: budget_pb2.ReleaseBudgetRequest, context: _Context
    ) -> budget_pb2.ReleaseBudgetResponse:
        """End a hold with nothing spent."""

        async def work() -> budget_pb2.ReleaseBudgetResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            end = wire.hold_end_from(request, trace_id=trace)
            return wire.release_response(await spending.release(self._rooms, credentials, end))

        return await self._runner.run(context, "ReleaseBudget", work)

    async def RefundBudget(  # noqa: N802 - the contract's name
        self, request: budget_pb2.RefundBudgetRequest, context: _Context
    ) -> budget_pb2.RefundBudgetResponse:
        """Take back what was spent."""

        async def work() -> budget_pb2.RefundBudgetResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            refund = wire.refund_from(request, trace_id=trace)
            return wire.refund_response(await spending.refund(self._rooms, credentials, refund))

        return await self._runner.run(context, "RefundBudget", work)

    async def GetBudget(  # noqa: N802 - the contract's name
        self, request: budget_pb2.GetBudgetRequest, context: _Context
    ) -> budget_pb2.GetBudgetResponse:
        """The caller's limits as they stand."""

        async def work() -> budget_pb2.GetBudgetResponse:
            credentials, _ = caller_of(context, listener=self._listener)
            limits, revision = await spending.state(
                self._rooms, credentials, tool=wire.tool_from(request.tool)
            )
            return budget_pb2.GetBudgetResponse(
                limits=[wire.limit_status(state) for state in limits], policy_revision=revision
            )

        return await self._runner.run(context, "GetBudget", work)


class ExecutionServicer(execution_pb2_grpc.ExecutionServiceServicer):
    """What happens to a permit once it is issued."""

    def __init__(self, rooms: Rooms, runner: CallRunner, metrics: Metrics, keys: LiveKeys) -> None:
        self._rooms = rooms
        self._runner = runner
        self._metrics = metrics
        self._keys = keys

    async def RedeemPermit(  # noqa: N802 - the contract's name
        self, request: execution_pb2.RedeemPermitRequest, context: _Context
    ) -> execution_pb2.RedeemPermitResponse:
        """Spend the permit's one use."""

        async def work() -> execution_pb2.RedeemPermitResponse:
            redemption = wire.redemption_from(request, trace_id=trace_id(context))
            return wire.redeem_response(await execution.redeem(self._rooms, redemption))

        return await self._runner.run(context, "RedeemPermit", work)

    async def ReportOutcome(  # noqa: N802 - the contract's name
        self, request: execution_pb2.ReportOutcomeRequest, context: _Context
    ) -> execution_pb2.ReportOutcomeResponse:
        """Take in what became of a call."""

        async def work() -> execution_pb2.ReportOutcomeResponse:
            report = wire.report_from(request, trace_id=trace_id(context))
            reported = await execution.report(self._rooms, report)
            self._metrics.spent(reported.result)
            return wire.report_response(reported)

        return await self._runner.run(context, "ReportOutcome", work)

    async def GetPermitKeys(  # noqa: N802 - the contract's name
        self,
        request: execution_pb2.GetPermitKeysRequest,  # noqa: ARG002 - has no fields
        context: _Context,
    ) -> execution_pb2.GetPermitKeysResponse:
        """The public keys."""

        async def work() -> execution_pb2.GetPermitKeysResponse:
            return execution_pb2.GetPermitKeysResponse(jwks_json=self._keys.to_jwks())

        return await self._runner.run(context, "GetPermitKeys", work)
