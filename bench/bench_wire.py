"""What a question costs on the wire, stage by stage, interleaved in one run: an empty call, an
empty exchange on an open stream, the same with a question and an answer of real size, the stub
against a server that knows the answer already, and the whole decision.

All but the whole decision are answered by an echo: a grpc.aio server with uvloop, as the sidecar
is, in a process of its own. It gives one recorded answer to whatever it is asked, so the stub
asks the same each time and still verifies all that it always does.

Run: python bench/bench_wire.py [rounds] [callers]
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import uvloop
from bench_stream import AsyncUnaryGuard, UnaryGuard
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pdp.api.v1 import (
    authorization_pb2,
    authorization_pb2_grpc,
    execution_pb2,
    execution_pb2_grpc,
)
from pdp.channel import connect, connect_async
from pdp.client import AsyncGuard, Guard
from pdp.testing import Caller, SidecarProcess, TokenIssuer

BUNDLE: Final = Path(__file__).parents[1] / "policies" / "bundle.tar.gz"
CALLS_PER_ROUND: Final = 256
TOOL: Final = "orders.read"
ARGUMENTS: Final = {"order_id": "918"}
EMPTY_STREAM: Final = "/bench.Echo/Empty"
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_orders: Final = itertools.count()


# The echo.


class Echo(
    authorization_pb2_grpc.AuthorizationServiceServicer,
    execution_pb2_grpc.ExecutionServiceServicer,
    health_pb2_grpc.HealthServicer,  # type: ignore[misc]
):
    """Answers all with what was recorded."""

    def __init__(self, answer: bytes, jwks: bytes) -> None:
        self._answer = authorization_pb2.AuthorizeResponse.FromString(answer)
        self._keys = execution_pb2.GetPermitKeysResponse.FromString(jwks)

    async def Authorize(self, request: object, context: object) -> object:  # noqa: ARG002, N802
        return self._answer

    async def AuthorizeStream(self, requests: object, context: Any) -> None:  # type: ignore[override]  # noqa: ANN401, ARG002, N802
        while isinstance(message := await context.read(), authorization_pb2.AuthorizeStreamRequest):
            await context.write(
                authorization_pb2.AuthorizeStreamResponse(id=message.id, answer=self._answer)
            )

    async def GetPermitKeys(self, request: object, context: object) -> object:  # noqa: ARG002, N802
        return self._keys

    async def Check(self, request: object, context: object) -> object:  # noqa: ARG002, N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


async def _empty(_requests: object, context: Any) -> None:  # noqa: ANN401
    while isinstance(message := await context.read(), Empty):
        await context.write(message)


async def serve_echo(address: str, directory: Path) -> None:
    server = grpc.aio.server()
    echo = Echo((directory / "answer").read_bytes(), (directory / "keys").read_bytes())
    authorization_pb2_grpc.add_AuthorizationServiceServicer_to_server(echo, server)
    execution_pb2_grpc.add_ExecutionServiceServicer_to_server(echo, server)
    health_pb2_grpc.add_HealthServicer_to_server(echo, server)
    handler = grpc.stream_stream_rpc_method_handler(
        _empty,
        request_deserializer=Empty.FromString,
        response_serializer=Empty.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("bench.Echo", {"Empty": handler})]
    )
    server.add_insecure_port(address)
    await server.start()
    print("serving", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


@contextlib.contextmanager
def echo_process(address: str, directory: Path) -> Iterator[int]:
    """The echo, which runs until the end of the ``with``; its process id."""
    with subprocess.Popen(
        [sys.executable, __file__, "--echo", address, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate()


# An open stream with no stub around it.


class PingPong:
    """One exchange at a time."""

    def __init__(self, method: Callable[..., Any], message: Message) -> None:
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._answers = method(iter(self._messages.get, None))
        self._message = message

    def __call__(self) -> object:
        self._messages.put(self._message)
        return next(self._answers)

    def close(self) -> None:
        self._messages.put(None)
        self._answers.cancel()


class AsyncPingPong:
    """The same, awaiting."""

    def __init__(self, method: Callable[..., Any], message: Message) -> None:
        self._call = method()
        self._message = message

    async def __call__(self) -> object:
        await self._call.write(self._message)
        return await self._call.read()

    def close(self) -> None:
        self._call.cancel()


def _empty_method(channel: Any) -> Callable[..., Any]:  # noqa: ANN401 - of either kind
    method: Callable[..., Any] = channel.stream_stream(
        EMPTY_STREAM,
        request_serializer=Empty.SerializeToString,
        response_deserializer=Empty.FromString,
    )
    return method


# What is measured.


@dataclass
class Stage:
    """A way to ask, and what it has taken so far."""

    server: int
    """Process id of who answers."""
    call: Callable[[], Any]
    alone: bool = False
    """Only ever one at a time."""
    seconds: list[float] = field(default_factory=list)
    client_cpu: float = 0.0
    server_cpu: float = 0.0


def cpu_of(process_id: int) -> float:
    fields = Path(f"/proc/{process_id}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def show(title: str, stages: dict[str, Stage]) -> None:
    print(title)
    empty = None
    for name, stage in stages.items():
        if not stage.seconds:
            continue
        cuts = statistics.quantiles(stage.seconds, n=100)
        empty = empty or cuts[49]
        calls = len(stage.seconds)
        print(
            f"  {name:34} p50 {cuts[49] * 1e6:6.0f}  p99 {cuts[98] * 1e6:6.0f} us"
            f"  {cuts[49] / empty:5.2f} x empty"
            f"   CPU client {stage.client_cpu / calls * 1e6:5.0f}"
            f"  server {stage.server_cpu / calls * 1e6:5.0f} us",
            flush=True,
        )


@contextlib.contextmanager
def counted(stage: Stage, *, counts: bool) -> Iterator[list[float]]:
    """What a turn takes."""
    seconds: list[float] = []
    before, client = cpu_of(stage.server), time.process_time()
    yield seconds
    if counts:
        stage.client_cpu += time.process_time() - client
        stage.server_cpu += cpu_of(stage.server) - before
        stage.seconds += seconds


def by_threads(stages: dict[str, Stage], rounds: int, callers: int) -> None:
    def ask(call: Callable[[], object], calls: int) -> list[float]:
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return times

    with ThreadPoolExecutor(callers) as threads:
        for turn in range(rounds + 1):
            for stage in stages.values():
                if stage.alone and callers > 1:
                    continue
                with counted(stage, counts=turn > 0) as seconds:
                    if callers == 1:
                        seconds.extend(ask(stage.call, CALLS_PER_ROUND))
                        continue
                    asking = [
                        threads.submit(copy_context().run, ask, stage.call, CALLS_PER_ROUND // 8)
                        for _ in range(callers)
                    ]
                    for each in asking:
                        seconds.extend(each.result())
    show(f"Guard, {callers} threads", stages)


async def by_tasks(stages: dict[str, Stage], rounds: int, callers: int) -> None:
    async def ask(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            await call()
            times.append(time.perf_counter() - began)
        return times

    for turn in range(rounds + 1):
        for stage in stages.values():
            if stage.alone and callers > 1:
                continue
            with counted(stage, counts=turn > 0) as seconds:
                calls = CALLS_PER_ROUND if callers == 1 else CALLS_PER_ROUND // 8
                for each in await asyncio.gather(*(ask(stage.call, calls) for _ in range(callers))):
                    seconds.extend(each)
    show(f"AsyncGuard, {callers} tasks", stages)


def distinct() -> dict[str, str]:
    return {"order_id": str(next(_orders))}


@dataclass(frozen=True)
class Place:
    """Who answers, and as whom they are asked."""

    echo: str
    echo_pid: int
    sidecar: str
    sidecar_pid: int
    token: str
    request_id: str
    """Of the recorded question."""

    @property
    def question(self) -> Message:
        return authorization_pb2.AuthorizeStreamRequest(
            id=1,
            bearer=self.token,
            question=_question(self.request_id),
        )


def _question(request_id: str) -> authorization_pb2.AuthorizeRequest:
    return authorization_pb2.AuthorizeRequest(
        request_id=request_id,
        action=authorization_pb2.Action(name=TOOL),
        arguments_json=b'{"order_id": "918"}',
    )


def blocking(place: Place, rounds: int, callers: int) -> None:
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(connect(place.echo))
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        streams = authorization_pb2_grpc.AuthorizationServiceStub(channel).AuthorizeStream
        empty = PingPong(_empty_method(channel), Empty())
        sized = PingPong(streams, place.question)
        stack.callback(empty.close)
        stack.callback(sized.close)
        known, known_unary = (stack.enter_context(kind(place.echo)) for kind in (Guard, UnaryGuard))
        whole, whole_unary = (
            stack.enter_context(kind(place.sidecar)) for kind in (Guard, UnaryGuard)
        )
        for guard in (known, known_unary, whole, whole_unary):
            stack.enter_context(guard.acting_for(place.token))

        def again(guard: Guard) -> object:
            return guard.authorize(TOOL, ARGUMENTS, request_id=place.request_id)

        stages = {
            "empty call": Stage(place.echo_pid, lambda: check(health_pb2.HealthCheckRequest())),
            "empty exchange": Stage(place.echo_pid, empty, alone=True),
            "exchange of real size": Stage(place.echo_pid, sized, alone=True),
            "stub, answer known, call": Stage(place.echo_pid, lambda: again(known_unary)),
            "stub, answer known, stream": Stage(place.echo_pid, lambda: again(known)),
            "whole decision, call": Stage(
                place.sidecar_pid, lambda: whole_unary.authorize(TOOL, distinct())
            ),
            "whole decision, stream": Stage(
                place.sidecar_pid, lambda: whole.authorize(TOOL, distinct())
            ),
        }
        by_threads(stages, rounds, callers)


async def awaiting(place: Place, rounds: int, callers: int) -> None:
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(connect_async(place.echo))
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        streams = authorization_pb2_grpc.AuthorizationServiceStub(channel).AuthorizeStream
        empty = AsyncPingPong(_empty_method(channel), Empty())
        sized = AsyncPingPong(streams, place.question)
        stack.callback(empty.close)
        stack.callback(sized.close)
        guards = [
            await stack.enter_async_context(kind(target))
            for target in (place.echo, place.sidecar)
            for kind in (AsyncGuard, AsyncUnaryGuard)
        ]
        known, known_unary, whole, whole_unary = guards
        for guard in guards:
            stack.enter_context(guard.acting_for(place.token))

        def again(guard: AsyncGuard) -> Awaitable[object]:
            return guard.authorize(TOOL, ARGUMENTS, request_id=place.request_id)

        stages = {
            "empty call": Stage(place.echo_pid, lambda: check(health_pb2.HealthCheckRequest())),
            "empty exchange": Stage(place.echo_pid, empty, alone=True),
            "exchange of real size": Stage(place.echo_pid, sized, alone=True),
            "stub, answer known, call": Stage(place.echo_pid, lambda: again(known_unary)),
            "stub, answer known, stream": Stage(place.echo_pid, lambda: again(known)),
            "whole decision, call": Stage(
                place.sidecar_pid, lambda: whole_unary.authorize(TOOL, distinct())
            ),
            "whole decision, stream": Stage(
                place.sidecar_pid, lambda: whole.authorize(TOOL, distinct())
            ),
        }
        await by_tasks(stages, rounds, callers)


@contextlib.contextmanager
def opened() -> Iterator[Place]:
    """A sidecar, and an echo that knows one of its answers."""
    issuer = TokenIssuer()
    token = issuer.token("tenant_acme", "alice", roles=["support_agent"], scopes=["orders:read"])
    limits = {
        "tenants": {"calls_per_second": 100_000, "burst": 100_000, "max_concurrent_calls": 1_000}
    }
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = {
            "limits": limits,
            "permit": {"ttl_seconds": 600},
            "budget": {"hold_ttl_seconds": 600},
        }
        sidecar = stack.enter_context(
            SidecarProcess(directory, issuer=issuer, bundle=BUNDLE, config=config)
        )
        assert sidecar.process is not None
        request_id = str(uuid.uuid4())
        with Caller(sidecar.target, token=token) as caller:
            answer = caller.authorization.Authorize(_question(request_id))
            keys = caller.execution.GetPermitKeys(execution_pb2.GetPermitKeysRequest())
        assert answer.decision, answer.reason_code
        (directory / "answer").write_bytes(answer.SerializeToString())
        (directory / "keys").write_bytes(keys.SerializeToString())
        echo = f"unix://{directory}/echo.sock"
        echo_pid = stack.enter_context(echo_process(echo, directory))
        yield Place(echo, echo_pid, sidecar.target, sidecar.process.pid, token, request_id)


def main(rounds: int, callers: int) -> None:
    with opened() as place:
        blocking(place, rounds, callers)
        asyncio.run(awaiting(place, rounds, callers))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--echo"]:
        uvloop.run(serve_echo(sys.argv[2], Path(sys.argv[3])))
    else:
        main(*[int(number) for number in [*sys.argv[1:], "6", "1"][:2]])
