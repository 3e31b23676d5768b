"""A gRPC server whose methods need permits: an interceptor.

The permit comes in the metadata key ``tool-permit``. Every method of the server is
refused unless it is named, with its tool and how its request reads as arguments; what
needs no permit (health, reflection) is named as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from pdp import certificates
from pdp.canonical import JsonObject
from pdp.errors import PdpError
from pdp.reason import ReasonCode
from pdp.tool.current import current_permit, serving
from pdp.tool.door import PermitDoor

__all__ = ["METADATA_KEY", "Arguments", "PermitInterceptor", "current_permit"]

METADATA_KEY: Final = "tool-permit"
_STATUS: Final[dict[str, grpc.StatusCode]] = {
    ReasonCode.PERMIT_MISSING: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.PERMIT_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    ReasonCode.PERMIT_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.PDP_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonCode.REQUEST_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
}
"""Everything else is PERMISSION_DENIED."""

Arguments = Callable[[Any], JsonObject]
"""The arguments that a request stands for, as the runtime authorized them. KeyError and
ValueError refuse the request."""


class PermitInterceptor(grpc.ServerInterceptor):
    """Lets only unary calls in that have a permit for exactly what they ask."""

    def __init__(
        self,
        door: PermitDoor,
        tools: Mapping[str, tuple[str, Arguments]],
        *,
        open_methods: Collection[str] = (),
    ) -> None:
        """``tools``: by method ("/shop.Orders/Update") the tool and its arguments."""
        self._door = door
        self._tools = dict(tools)
        self._open_methods = frozenset(open_methods)

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler, behind the door."""
        method = handler_call_details.method
        handler = continuation(handler_call_details)
        if handler is None or method in self._open_methods:
            return handler
        found = self._tools.get(method)
        if found is None or handler.unary_unary is None:
            return _refusing(
                grpc.StatusCode.PERMISSION_DENIED, "No permit lets this method be called."
            )
        tool, arguments_of = found
        metadata = handler_call_details.invocation_metadata or ()
        permits = [value for key, value in metadata if key == METADATA_KEY]
        permit = str(permits[0]) if len(permits) == 1 else ""
        behind = handler.unary_unary

        def serve(request: Message, context: grpc.ServicerContext) -> Any:  # noqa: ANN401
            try:
                admitted = self._door.admit(
                    permit,
                    tool=tool,
                    arguments=_read(arguments_of, request),
                    certificate_sha256=_certificate_sha256(context),
                )
            except PdpError as error:
                code = _STATUS.get(error.reason_code, grpc.StatusCode.PERMISSION_DENIED)
                context.abort(code, f"{error.reason_code}: {error.message}")
            with serving(admitted):
                return behind(request, context)

        return grpc.unary_unary_rpc_method_handler(
            serve,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _read(arguments_of: Arguments, request: Message) -> JsonObject:
    try:
        return arguments_of(request)
    except (KeyError, ValueError):
        # gRPC would show the caller the error's own words, and with them arguments.
        raise PdpError(
            ReasonCode.REQUEST_INVALID, "The request stands for no tool's call."
        ) from None


def _certificate_sha256(context: grpc.ServicerContext) -> str:
    properties: Any = context.auth_context()  # its stubs forget that each may have several values
    return certificates.thumbprint(certificates.shown_to_grpc(properties))


def _refusing(code: grpc.StatusCode, message: str) -> grpc.RpcMethodHandler[Any, Any]:
    def refuse(request: Any, context: grpc.ServicerContext) -> None:  # noqa: ANN401, ARG001
        context.abort(code, message)

    return grpc.unary_unary_rpc_method_handler(refuse)
