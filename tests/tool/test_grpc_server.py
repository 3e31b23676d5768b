from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from pdp.canonical import JsonObject
from pdp.tool import PermitDoor
from pdp.tool.grpc_server import PermitInterceptor, current_permit
from tests.tool.permits import ORDER, Register, permit, verifier


def update(request: Struct, context: grpc.ServicerContext) -> Struct:
    answer = Struct()
    answer.update({"tenant": current_permit().tenant, "order_id": request["order_id"]})
    return answer


def ping(request: Struct, context: grpc.ServicerContext) -> Struct:
    return request


def count(request: Struct, context: grpc.ServicerContext) -> Iterator[Struct]:
    yield request


def arguments_of(request: Struct) -> JsonObject:
    return {name: str(value) for name, value in request.items()}


@pytest.fixture
def channel() -> Iterator[grpc.Channel]:
    interceptor = PermitInterceptor(
        PermitDoor(verifier(), Register()),
        {
            "/shop.Orders/Update": ("orders.update", arguments_of),
            "/shop.Orders/Count": ("orders.count", arguments_of),
        },
        open_methods=["/shop.Orders/Ping"],
    )
    server = grpc.server(ThreadPoolExecutor(4), interceptors=[interceptor])
    wires: dict[str, Any] = {
        "request_deserializer": Struct.FromString,
        "response_serializer": Struct.SerializeToString,
    }
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "shop.Orders",
                {
                    "Update": grpc.unary_unary_rpc_method_handler(update, **wires),
                    "Unnamed": grpc.unary_unary_rpc_method_handler(update, **wires),
                    "Count": grpc.unary_stream_rpc_method_handler(count, **wires),
                    "Ping": grpc.unary_unary_rpc_method_handler(ping, **wires),
                },
            )
        ]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(None).wait()


def ask(channel: grpc.Channel, method: str, *permits: str, **changes: str) -> Struct:
    request = Struct()
    request.update({**ORDER, **changes})
    call = channel.unary_unary(
        f"/shop.Orders/{method}",
        request_serializer=Struct.SerializeToString,
        response_deserializer=Struct.FromString,
    )
    answer: Struct = call(
        request, metadata=tuple(("tool-permit", token) for token in permits), timeout=10
    )
    return answer


def refused(channel: grpc.Channel, method: str, *permits: str, **changes: str) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, method, *permits, **changes)
    error: Any = caught.value
    return error.code().name, (error.details() or "").partition(":")[0]


def test_a_call_with_a_permit_for_it_is_served_once(channel: grpc.Channel) -> None:
    token = permit().token
    assert dict(ask(channel, "Update", token)) == {"tenant": "tenant_acme", "order_id": "918"}
    assert refused(channel, "Update", token) == ("PERMISSION_DENIED", "permit_used")


def test_any_other_call_is_refused(channel: grpc.Channel) -> None:
    missing = ("UNAUTHENTICATED", "permit_missing")
    assert refused(channel, "Update") == missing
    assert refused(channel, "Update", permit().token, permit().token) == missing
    assert refused(channel, "Update", "nonsense") == ("UNAUTHENTICATED", "permit_invalid")
    mismatch = ("PERMISSION_DENIED", "permit_mismatch")
    assert refused(channel, "Update", permit("mail.send").token) == mismatch
    assert refused(channel, "Update", permit().token, order_id="919") == mismatch


def test_what_is_not_named_is_refused_and_what_needs_no_permit_is_served(
    channel: grpc.Channel,
) -> None:
    token = permit().token
    assert refused(channel, "Unnamed", token)[0] == "PERMISSION_DENIED"
    assert refused(channel, "Count", permit("orders.count").token)[0] == "PERMISSION_DENIED"
    assert refused(channel, "Absent", token)[0] == "UNIMPLEMENTED"
    assert dict(ask(channel, "Ping")) == ORDER
