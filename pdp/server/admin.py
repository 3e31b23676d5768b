"""The admin socket: a server of its own, for the operators of this machine alone.

Whoever can open the socket may grant and refund for any tenant, so nobody can but the
sidecar's own user (and root): the socket has mode 0600, and the directory around it
lets nobody else in. Tenants' listeners do not know the service.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import grpc

from pdp import budget_admin
from pdp.admin_socket import make_admin_directory, target_of
from pdp.api.v1 import admin_pb2, admin_pb2_grpc
from pdp.private_files import NotPrivateError
from pdp.rooms import Rooms
from pdp.server import admin_wire
from pdp.server.locks import StartError
from pdp.server.runner import CallRunner

MAX_QUESTION_BYTES: Final = 64 * 1024
MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
"""A thousand holds with all that each may carry."""

_Context = grpc.aio.ServicerContext[object, object]


class BudgetAdminServicer(admin_pb2_grpc.BudgetAdminServiceServicer):
    """What stands, and what an operator changes."""

    def __init__(self, rooms: Rooms, runner: CallRunner) -> None:
        self._rooms = rooms
        self._runner = runner

    async def ListTenants(  # noqa: N802 - the contract's name
        self,
        request: admin_pb2.ListTenantsRequest,  # noqa: ARG002 - has no fields
        context: _Context,
    ) -> admin_pb2.ListTenantsResponse:
        """The tenants."""

        async def work() -> admin_pb2.ListTenantsResponse:
            return admin_pb2.ListTenantsResponse(tenants=await budget_admin.tenants(self._rooms))

        return await self._runner.run(context, "ListTenants", work)

    async def ListAccounts(  # noqa: N802 - the contract's name
        self, request: admin_pb2.ListAccountsRequest, context: _Context
    ) -> admin_pb2.ListAccountsResponse:
        """A tenant's accounts."""

        async def work() -> admin_pb2.ListAccountsResponse:
            tenant = admin_wire.tenant_from(request.tenant_id)
            found = await budget_admin.accounts(self._rooms, tenant)
            return admin_pb2.ListAccountsResponse(
                accounts=map(admin_wire.counted_account_out, found)
            )

        return await self._runner.run(context, "ListAccounts", work)

    async def ListHolds(  # noqa: N802 - the contract's name
        self, request: admin_pb2.ListHoldsRequest, context: _Context
    ) -> admin_pb2.ListHoldsResponse:
        """A tenant's open holds."""

        async def work() -> admin_pb2.ListHoldsResponse:
            tenant = admin_wire.tenant_from(request.tenant_id)
            found = await budget_admin.holds(self._rooms, tenant)
            return admin_pb2.ListHoldsResponse(holds=map(admin_wire.hold_out, found))

        return await self._runner.run(context, "ListHolds", work)

    async def GrantBudget(  # noqa: N802 - the contract's name
        self, request: admin_pb2.GrantBudgetRequest, context: _Context
    ) -> admin_pb2.GrantBudgetResponse:
        """Let more be spent."""

        async def work() -> admin_pb2.GrantBudgetResponse:
            done = await budget_admin.grant(self._rooms, admin_wire.grant_from(request))
            return admin_wire.grant_response(done)

        return await self._runner.run(context, "GrantBudget", work)

    async def RefundSpend(  # noqa: N802 - the contract's name
        self, request: admin_pb2.RefundSpendRequest, context: _Context
    ) -> admin_pb2.RefundSpendResponse:
        """Take back what was spent."""

        async def work() -> admin_pb2.RefundSpendResponse:
            done = await budget_admin.refund(self._rooms, admin_wire.refund_from(request))
            return admin_wire.refund_response(done)

        return await self._runner.run(context, "RefundSpend", work)

    async def ReleaseHold(  # noqa: N802 - the contract's name
        self, request: admin_pb2.ReleaseHoldRequest, context: _Context
    ) -> admin_pb2.ReleaseHoldResponse:
        """Let a hold expire now."""

        async def work() -> admin_pb2.ReleaseHoldResponse:
            done = await budget_admin.release(self._rooms, admin_wire.release_from(request))
            return admin_wire.release_response(done)

        return await self._runner.run(context, "ReleaseHold", work)


@contextlib.asynccontextmanager
async def admin_socket(path: Path, rooms: Rooms, runner: CallRunner) -> AsyncIterator[None]:
    """Serve operators on the socket. At the end no new calls are taken, and those under
    way are finished. The caller holds the lock of the state directory in which it lies.
    Raises StartError.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_QUESTION_BYTES),
            ("grpc.max_send_message_length", MAX_ANSWER_BYTES),
        ]
    )
    admin_pb2_grpc.add_BudgetAdminServiceServicer_to_server(
        BudgetAdminServicer(rooms, runner), server
    )
    _prepare(path)
    with target_of(path) as target:
        # Nobody else has access from the moment the socket exists.
        earlier = os.umask(0o177)
        try:
            server.add_insecure_port(target)
        except RuntimeError:
            raise StartError(
                f"The socket {path} can not be made; see the log, or turn it off (listen.admin)."
            ) from None
        finally:
            os.umask(earlier)
        try:
            await server.start()
            yield
        finally:
            await server.stop(_LAST_CALLS_SECONDS)
            await runner.drained()


def _prepare(path: Path) -> None:
    """A directory for the sidecar's user alone, without what a killed sidecar left."""
    try:
        make_admin_directory(path.parent)
        path.unlink(missing_ok=True)
    except NotPrivateError as error:
        raise StartError(f"The directory {path.parent} {error}.") from None
    except OSError as error:
        raise StartError(
            f"The socket {path} can not be made: {error.strerror}. Remove what is in its place,"
            " or turn it off (listen.admin)."
        ) from None


_LAST_CALLS_SECONDS: Final = 0.5
"""For answers that are on their way out; what has begun is finished in any case."""
