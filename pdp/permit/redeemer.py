"""Redeem permits at the sidecar: how a tool server makes sure of once."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from pdp.closing import Closing
from pdp.permit.claims import Permit, PermitError
from pdp.permit.keys import PermitKeySet

if TYPE_CHECKING:
    import grpc
    from google.protobuf.message import Message


class PermitRedeemer(Closing):
    """A tool server's connection to the sidecar. Threads may share it, and it
    survives a fork.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_seconds: float = 2.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """``target`` is ``unix:///path`` or ``host:port``, with ``credentials`` for TLS."""
        from pdp.channel import Connection  # noqa: PLC0415 - verifying needs no connection

        self._connection = Connection(
            target, timeout_seconds=timeout_seconds, credentials=credentials
        )

    def keys(self) -> PermitKeySet:
        """The sidecar's public permit keys. Raises PermitError."""
        from pdp.api.v1 import execution_pb2  # noqa: PLC0415

        request = execution_pb2.GetPermitKeysRequest()
        return PermitKeySet.from_jwks(self._call("GetPermitKeys", request).jwks_json)

    def redeem(self, permit: Permit) -> None:
        """Spend a use of the permit; act only after this has returned.

        Every call is a redemption of its own; a lost reply is asked for again under
        the same key before it returns. Raises PermitError: permit_used,
        permit_expired, permit_mismatch, permit_invalid, or why the sidecar could
        not be asked.
        """
        from pdp.api.v1 import execution_pb2  # noqa: PLC0415

        self._call(
            "RedeemPermit",
            execution_pb2.RedeemPermitRequest(
                permit=permit.token,
                idempotency_key=str(uuid.uuid4()),
                tool=permit.tool,
                arguments_sha256=permit.arguments_sha256,
                audience=permit.audience,
            ),
        )

    def close(self) -> None:
        """Close the connection; the next call opens it again."""
        self._connection.close()

    def _call(self, method: str, request: Message) -> Any:  # noqa: ANN401 - as many as methods
        from pdp.channel import CallError  # noqa: PLC0415

        try:
            return self._connection.call(method, request)
        except CallError as error:
            raise PermitError(error.reason_code, error.message) from None
