"""The gRPC services: each method reads the request, asks, and writes the answer."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial

import grpc

from pdp import decision, execution, spending
from pdp.api.v1 import (
    authorization_pb2,
    authorization_pb2_grpc,
    budget_pb2,
    budget_pb2_grpc,
    execution_pb2,
    execution_pb2_grpc,
)
from pdp.batch import authorize_batch
from pdp.delegating import delegate
from pdp.identity.resolver import Credentials
from pdp.listing import list_tools
from pdp.permit.ring import LiveKeys
from pdp.rooms import Rooms, identify, verified
from pdp.server import wire
from pdp.server.batch import batch_from, batch_response
from pdp.server.caller import caller_of, peer_of, trace_id
from pdp.server.delegation_wire import delegate_response, delegation_from
from pdp.server.metrics import Metrics
from pdp.server.runner import CallRunner
from pdp.server.status import abort
from pdp.server.stream import Streams
from pdp.server.watch import Watchers

_Context = grpc.aio.ServicerContext[object, object]


class AuthorizationServicer(authorization_pb2_grpc.AuthorizationServiceServicer):
    """May this call be made?"""

    def __init__(
        self,
        rooms: Rooms,
        runner: CallRunner,
        metrics: Metrics,
        watchers: Watchers,
        streams: Streams,
        *,
        default_audience: str,
        listener: str,
    ) -> None:
        """``listener`` is the name of the one that it answers on, as in Peer.listener."""
        self._rooms = rooms
        self._runner = runner
        self._metrics = metrics
        self._watchers = watchers
        self._streams = streams
        self._listener = listener
        self._reader = wire.QuestionReader(default_audience=default_audience)

    async def Authorize(  # noqa: N802 - the contract's name
        self, request: authorization_pb2.AuthorizeRequest, context: _Context
    ) -> authorization_pb2.AuthorizeResponse:
        """Decide one call."""

        async def work() -> authorization_pb2.AuthorizeResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            return await self._decide(request, credentials, trace)

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

    async def AuthorizeStream(  # type: ignore[override]  # noqa: N802 - the contract's name
        self,
        request_iterator: object,  # noqa: ARG002 - one that ends with a message it can not read
        context: _Context,
    ) -> None:
        """Decide calls over one stream."""
        peer = peer_of(context, listener=self._listener)
        await self._streams.serve(context, peer, self._decide)

    async def _decide(
        self,
        request: authorization_pb2.AuthorizeRequest,
        credentials: Credentials,
        trace: str | None,
    ) -> authorization_pb2.AuthorizeResponse:
        asked = self._reader.asked(request, trace_id=trace)
        recorded = await decision.authorize(self._rooms, credentials, asked)
        self._metrics.decided(recorded)
        return wire.authorize_response(recorded)

    async def ListTools(  # noqa: N802 - the contract's name
        self, request: authorization_pb2.ListToolsRequest, context: _Context
    ) -> authorization_pb2.ListToolsResponse:
        """Tell which tools the caller may see."""

        async def work() -> authorization_pb2.ListToolsResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            listing = await list_tools(
                self._rooms,
                credentials,
                context=wire.context_from(request.context_json),
                trace_id=trace,
            )
            return wire.tools_response(listing)

        return await self._runner.run(context, "ListTools", work)

    async def Delegate(  # noqa: N802 - the contract's name
        self, request: authorization_pb2.DelegateRequest, context: _Context
    ) -> authorization_pb2.DelegateResponse:
        """Make a narrower identity."""

        async def work() -> authorization_pb2.DelegateResponse:
            credentials, trace = caller_of(context, listener=self._listener)
            asked = delegation_from(request, trace_id=trace)
            return delegate_response(await delegate(self._rooms, credentials, asked))

        return await self._runner.run(context, "Delegate", work)

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
            since = self._rooms.revocations.generation
            subject = await identify(self._rooms, credentials, action="watch", trace_id=trace)
            events = self._watchers.events(
                subject.tenant, since=since, check=partial(verified, self._rooms, credentials)
            )
            return await anext(events), events

        in_force, events = await self._runner.run(context, "Watch", first)
        async with contextlib.aclosing(events):
            yield in_force
            try:
                async for event in events:
                    yield event
            except Exception as error:  # noqa: BLE001 - as for a call
                await abort(context, self._runner.failure_of("Watch", error))


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

    def __init__(
        self,
        rooms: Rooms,
        runner: CallRunner,
        metrics: Metrics,
        keys: LiveKeys,
        *,
        route_tenant: str,
    ) -> None:
        """``route_tenant`` is the one whose listener it answers on; empty for everybody's."""
        self._rooms = rooms
        self._route_tenant = route_tenant
        self._runner = runner
        self._metrics = metrics
        self._keys = keys

    async def RedeemPermit(  # noqa: N802 - the contract's name
        self, request: execution_pb2.RedeemPermitRequest, context: _Context
    ) -> execution_pb2.RedeemPermitResponse:
        """Spend a use of the permit."""

        async def work() -> execution_pb2.RedeemPermitResponse:
            redemption = wire.redemption_from(
                request, route_tenant=self._route_tenant, trace_id=trace_id(context)
            )
            return wire.redeem_response(await execution.redeem(self._rooms, redemption))

        return await self._runner.run(context, "RedeemPermit", work)

    async def ReportOutcome(  # noqa: N802 - the contract's name
        self, request: execution_pb2.ReportOutcomeRequest, context: _Context
    ) -> execution_pb2.ReportOutcomeResponse:
        """Take in what became of a call."""

        async def work() -> execution_pb2.ReportOutcomeResponse:
            report = wire.report_from(
                request,
                certificate_sha256=peer_of(context, listener="").certificate_sha256,
                route_tenant=self._route_tenant,
                trace_id=trace_id(context),
            )
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
