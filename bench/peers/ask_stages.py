"""The stages of :mod:`bench.peers.stages`, each caller over a stream of its own with nothing
around it; and an empty call, and an empty exchange, which is what gRPC itself costs in Python.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc

from bench.peers.ask_ours import arguments, holder
from bench.peers.question import TOOL, Call
from bench.peers.stages import EMPTY, SERVICE, UNARY
from pdp.api.v1 import authorization_pb2


class Questions:
    """Makes them as the stub does, and reads the answers."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self._tokens = tokens

    def asked(self, call: Call) -> bytes:
        question = authorization_pb2.AuthorizeRequest(
            request_id=f"bench-{call.order_id}", arguments_json=json.dumps(arguments(call)).encode()
        )
        question.action.name = TOOL
        message = authorization_pb2.AuthorizeStreamRequest(
            id=1, question=question, bearer=self._tokens[holder(call)]
        )
        return message.SerializeToString()


def allowed(answer: bytes) -> bool:
    return authorization_pb2.AuthorizeResponse.FromString(answer).decision


class PingPong:
    """One exchange at a time on one stream."""

    def __init__(self, method: grpc.StreamStreamMultiCallable) -> None:
        self._asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._answers = method(self._questions())

    def _questions(self) -> Iterator[bytes]:
        while True:
            yield self._asked.get()

    def __call__(self, asked: bytes) -> bytes:
        self._asked.put(asked)
        answer: bytes = next(self._answers)
        return answer


class Stage:
    """Blocks."""

    def __init__(self, target: str, stage: str, tokens: dict[str, str]) -> None:
        channel = grpc.insecure_channel(target)
        self._method = channel.stream_stream(f"/{SERVICE}/{stage}")
        self._questions = Questions(tokens)
        self._of_thread = threading.local()

    def ask(self, call: Call) -> bool:
        try:
            exchange = self._of_thread.exchange
        except AttributeError:
            exchange = self._of_thread.exchange = PingPong(self._method)
        return allowed(exchange(self._questions.asked(call)))


class AsyncEmpty:
    """The empty exchange, awaited."""

    def __init__(self, target: str, tokens: dict[str, str]) -> None:
        channel = grpc.aio.insecure_channel(target)
        self._method = channel.stream_stream(f"/{SERVICE}/{EMPTY}")
        self._questions = Questions(tokens)
        self._free: list[Any] = []

    async def ask(self, call: Call) -> bool:
        stream = self._free.pop() if self._free else self._method()
        await stream.write(self._questions.asked(call))
        answer = await stream.read()
        self._free.append(stream)
        return allowed(answer)


class Unary:
    """The empty call."""

    def __init__(self, target: str, tokens: dict[str, str]) -> None:
        self._method = grpc.insecure_channel(target).unary_unary(f"/{SERVICE}/{UNARY}")
        self._questions = Questions(tokens)

    def ask(self, call: Call) -> bool:
        return allowed(self._method(self._questions.asked(call)))


class AsyncUnary:
    """The empty call, awaited."""

    def __init__(self, target: str, tokens: dict[str, str]) -> None:
        self._method = grpc.aio.insecure_channel(target).unary_unary(f"/{SERVICE}/{UNARY}")
        self._questions = Questions(tokens)

    async def ask(self, call: Call) -> bool:
        return allowed(await self._method(self._questions.asked(call)))
