from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from pdp import certificates
from pdp.canonical import JsonObject
from pdp.tool import PermitDoor, current_permit
from pdp.tool.grpc_server import PermitInterceptor
from tests.tool.certificates import certificate
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
    if "secret" in request:
        raise ValueError(request["secret"])
    return {name: str(value) for name, value in request.items()}


def shop() -> grpc.Server:
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
    return server


@pytest.fixture
def channel() -> Iterator[grpc.Channel]:
    server = shop()
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


def test_a_request_that_reads_as_no_arguments_is_refused_without_a_word_of_it(
    channel: grpc.Channel,
) -> None:
    with pytest.raises(grpc.RpcError, match="request_invalid: The request stands") as caught:
        ask(channel, "Update", permit().token, secret="hunter2")
    assert "hunter2" not in str(caught.value)


def test_what_is_not_named_is_refused_and_what_needs_no_permit_is_served(
    channel: grpc.Channel,
) -> None:
    token = permit().token
    assert refused(channel, "Unnamed", token)[0] == "PERMISSION_DENIED"
    assert refused(channel, "Count", permit("orders.count").token)[0] == "PERMISSION_DENIED"
    assert refused(channel, "Absent", token)[0] == "UNIMPLEMENTED"
    assert dict(ask(channel, "Ping")) == ORDER


def test_a_permit_that_is_bound_to_a_certificate_is_no_good_without_it() -> None:
    server_side, owner, thief = certificate(), certificate("owner"), certificate("thief")
    server = shop()
    port = server.add_secure_port("127.0.0.1:0", server_side.to_server(owner, thief))
    bound = permit(certificate_sha256=certificates.thumbprint(owner.pem)).token
    server.start()
    name = [("grpc.ssl_target_name_override", "localhost")]

    def connect(with_certificate: grpc.ChannelCredentials) -> grpc.Channel:
        return grpc.secure_channel(f"127.0.0.1:{port}", with_certificate, name)

    with (
        connect(thief.to_client(server_side)) as stolen,
        connect(owner.to_client(server_side)) as rightful,
    ):
        assert refused(stolen, "Update", bound) == ("PERMISSION_DENIED", "permit_mismatch")
        assert dict(ask(rightful, "Update", bound))["tenant"] == "tenant_acme"
    server.stop(None).wait()


def test_over_plain_tcp_a_permit_that_is_bound_to_a_certificate_is_refused(
    channel: grpc.Channel,
) -> None:
    bound = permit(certificate_sha256=certificates.thumbprint(certificate().pem)).token
    assert refused(channel, "Update", bound) == ("PERMISSION_DENIED", "permit_mismatch")


def test_a_permit_for_any_arguments_is_served_for_each_and_not_for_another_tool(
    channel: grpc.Channel,
) -> None:
    token = permit(arguments_sha256="", max_uses=2).token
    assert dict(ask(channel, "Update", token, order_id="1"))["order_id"] == "1"
    assert dict(ask(channel, "Update", token, order_id="2"))["order_id"] == "2"
    assert refused(channel, "Update", token, order_id="3") == ("PERMISSION_DENIED", "permit_used")
    other = permit("mail.send", arguments_sha256="", max_uses=2).token
    assert refused(channel, "Update", other) == ("PERMISSION_DENIED", "permit_mismatch")
