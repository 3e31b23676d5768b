"""The floor that smoke, workload and growth are held against: a server in Python that does
nothing, over unary calls and over open streams, with the loop that the sidecar runs on.

Run: python -m bench.floor ADDRESS
"""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from typing import Any, Final

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SERVICE: Final = "bench.Floor"
CALL: Final = f"/{SERVICE}/Call"
EXCHANGE: Final = f"/{SERVICE}/Exchange"


class Exchange:
    """One empty exchange at a time on an open stream."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(EXCHANGE)
        self._answers = method(self._questions())

    def _questions(self) -> Iterator[bytes]:
        while True:
            yield self._asked.get()

    def __call__(self) -> object:
        self._asked.put(b"")
        return next(self._answers)


async def _call(_asked: bytes, _context: object) -> bytes:
    return b""


async def _exchange(_requests: object, context: Any) -> None:  # noqa: ANN401 - gRPC's own shape
    while isinstance(await context.read(), bytes):
        await context.write(b"")


async def serve(address: str) -> None:
    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Call": grpc.unary_unary_rpc_method_handler(_call),
        "Exchange": grpc.stream_stream_rpc_method_handler(_exchange),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await checks.set("", health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1]))
