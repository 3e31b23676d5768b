"""What a call leaves behind."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator

import grpc
import pytest

from pdp.admission import Admission, Priority, ServiceClass
from pdp.errors import PdpError
from pdp.reason import ReasonCode
from pdp.server.metrics import Metrics
from pdp.server.runner import CallRunner
from pdp.server.status import abort

CLASS = ServiceClass(
    priority=Priority.NORMAL, max_concurrent_calls=8, calls_per_second=100.0, burst=100
)


class Message:
    """Of a megabyte, in life."""


@pytest.fixture
def _uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def refused() -> PdpError:
    return PdpError(ReasonCode.TOKEN_INVALID, "The token is not a signed JWT.")


def failed() -> Exception:
    return ValueError("a fault")


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("make_error", (refused, failed))
def test_the_message_of_a_call_without_an_answer_is_let_go_of_at_once(
    make_error: Callable[[], Exception],
) -> None:
    admission = Admission(max_concurrent_calls=8, max_waiting_calls=8, classes=lambda _: CLASS)
    runner = CallRunner(Metrics(), admission, timeout_seconds=5.0)

    async def call() -> weakref.ref[Message]:
        message = Message()

        async def work(message: Message | None = message) -> Message | None:
            await asyncio.sleep(0)
            if message is not None:
                raise make_error()
            return message

        with pytest.raises(PdpError):
            await runner.result("Authorize", work, within_seconds=None)
        return weakref.ref(message)

    async def run() -> Message | None:
        watched = await call()
        await asyncio.sleep(0)
        return watched()

    assert asyncio.run(run()) is None


@pytest.mark.usefixtures("_uncollected")
def test_the_message_of_a_call_that_ended_with_a_status_is_let_go_of_at_once() -> None:
    watched: list[weakref.ref[Message]] = []

    def read(_: bytes) -> Message:
        message = Message()
        watched.append(weakref.ref(message))
        return message

    async def answer(message: Message, context: grpc.aio.ServicerContext[object, object]) -> bytes:
        try:
            raise refused()
        except PdpError as error:
            return await abort(context, error)

    async def run() -> None:
        server = grpc.aio.server()
        handler: grpc.RpcMethodHandler[Message, bytes] = grpc.unary_unary_rpc_method_handler(
            answer, request_deserializer=read
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test", {"Ask": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test/Ask")
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError):
                    await ask(b"large")
        await server.stop(None)

    asyncio.run(run())
    assert [message() for message in watched] == [None] * 3
