"""Callers in a process of their own: ``python -m tests.faults.crowd PLAN``.

They ask until standard input ends, each in its turn as soon as it has an answer, or all of
them together so and so many times a second, whatever becomes of it. Then what came of it
is printed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import grpc

from pdp.api.v1 import authorization_pb2, authorization_pb2_grpc
from pdp.testing import refusal_of

ROOT: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a crowd is told on its command line."""

    target: str
    tokens: tuple[str, ...] = field(repr=False)
    """Of those who ask, in turn."""
    callers: int = 0
    """How many ask at the same time, one question after the other; or:"""
    per_second: float = 0.0
    """how many questions are asked a second, at even intervals."""


@dataclass(slots=True, kw_only=True)
class Heard:
    """What came of it."""

    seconds: float = 0.0
    allowed_seconds: list[float] = field(default_factory=list)
    """What each call took that was allowed."""
    refused_seconds: list[float] = field(default_factory=list)
    """And each that was refused with when to come back."""
    others: dict[str, int] = field(default_factory=dict)
    """How calls ended otherwise."""

    @property
    def allowed_per_second(self) -> float:
        return len(self.allowed_seconds) / self.seconds


@contextmanager
def crowd(plan: Plan) -> Iterator[Heard]:
    """A crowd for as long as the context lasts; what it has heard is known at its end."""
    heard = Heard()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.crowd", json.dumps(asdict(plan))],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        yield heard
        told = json.loads(process.communicate(timeout=60)[0])
    finally:
        process.kill()
        process.wait(20)
    for name, value in told.items():
        setattr(heard, name, value)


class _Crowd:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.heard = Heard()

    async def ask_until_the_input_ends(self) -> None:
        plan = self._plan
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(plan.target, options=options) for _ in range(4)]
        for channel in channels:
            await channel.channel_ready()
        self._stubs = [authorization_pb2_grpc.AuthorizationServiceStub(each) for each in channels]
        over = asyncio.Event()
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), over.set)
        sys.stdout.write("asking\n")
        sys.stdout.flush()
        began = time.perf_counter()
        if plan.callers:
            work = [self._one_after_the_other(number, over) for number in range(plan.callers)]
        else:
            work = [self._at_even_intervals(over)]
        await asyncio.gather(*work)
        self.heard.seconds = time.perf_counter() - began
        for channel in channels:
            await channel.close()

    async def _one_after_the_other(self, number: int, over: asyncio.Event) -> None:
        while not over.is_set():
            await self._ask(number)

    async def _at_even_intervals(self, over: asyncio.Event) -> None:
        began, asked = time.perf_counter(), 0
        asking: set[asyncio.Task[None]] = set()
        while not over.is_set():
            due = int((time.perf_counter() - began) * self._plan.per_second)
            for number in range(asked, due):
                task = asyncio.create_task(self._ask(number))
                asking.add(task)
                task.add_done_callback(asking.discard)
            asked = due
            await asyncio.sleep(0.005)
        await asyncio.gather(*asking)

    async def _ask(self, number: int) -> None:
        token = self._plan.tokens[number % len(self._plan.tokens)]
        request = authorization_pb2.AuthorizeRequest(
            request_id=str(uuid.uuid4()), action=authorization_pb2.Action(name="orders.update")
        )
        began = time.perf_counter()
        try:
            await self._stubs[number % len(self._stubs)].Authorize(
                request, metadata=[("authorization", f"Bearer {token}")], timeout=30
            )
        except grpc.RpcError as error:
            refused = refusal_of(_raise, error)
            if refused.retry_after_seconds is not None:
                self.heard.refused_seconds.append(time.perf_counter() - began)
            else:
                name = f"{refused.status.name} {refused.reason_code}"
                self.heard.others[name] = self.heard.others.get(name, 0) + 1
        else:
            self.heard.allowed_seconds.append(time.perf_counter() - began)


def _raise(error: grpc.RpcError) -> None:
    raise error


if __name__ == "__main__":
    told = _Crowd(Plan(**json.loads(sys.argv[1])))
    asyncio.run(told.ask_until_the_input_ends())
    sys.stdout.write(json.dumps(asdict(told.heard)))
