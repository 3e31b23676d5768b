"""How questions travel: over one stream where there can be one, or else by calls."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import queue
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
import pytest

from pdp.api.v1 import authorization_pb2
from pdp.channel import AsyncConnection, CallError, Connection, Metadata
from pdp.client import AsyncGuard, Guard, PermitDenied, current_permit
from pdp.stream import MAX_QUESTION_BYTES, MAX_UNDER_WAY
from pdp.testing import SidecarProcess, TokenIssuer, build_bundle
from tests.client.stand_in import StandIn

Request = authorization_pb2.AuthorizeRequest
Message = authorization_pb2.AuthorizeStreamRequest
Response = authorization_pb2.AuthorizeStreamResponse
Answers = queue.SimpleQueue[Response | grpc.StatusCode | None]
ROOT = Path(__file__).parents[2]
BEARER = (("authorization", "Bearer t0ken"),)


def answer(message: Message, **changes: Any) -> Response:
    """The question's own answer: it has the request id for its decision id."""
    said = authorization_pb2.AuthorizeResponse(
        reason_code="ok", decision_id=message.question.request_id
    )
    return Response(**{"id": message.id, "answer": said, **changes})


def at_once(message: Message, answers: Answers) -> None:
    if message.HasField("question"):
        answers.put(answer(message))


def never(_message: Message, _answers: Answers) -> None:
    pass


class StreamStandIn:
    """A sidecar whose stream does what ``react`` says with each message. Calls are answered
    at once, and their decision id is "by call <request id>".
    """

    def __init__(self) -> None:
        self.react: Callable[[Message, Answers], None] = at_once
        self.streams: list[Answers] = []
        self.messages: list[Message] = []
        self.calls: list[Request] = []
        self.left_seconds: list[float] = []
        """What was left of each call's deadline."""
        self.answers_calls = True
        self._ending = threading.Event()
        self._directory = tempfile.TemporaryDirectory(prefix="pdp-")
        self.target = f"unix://{self._directory.name}/pdp.sock"
        self._server = grpc.server(ThreadPoolExecutor(8))
        handlers: Any = {
            "Authorize": grpc.unary_unary_rpc_method_handler(
                self._call,
                request_deserializer=Request.FromString,
                response_serializer=authorization_pb2.AuthorizeResponse.SerializeToString,
            ),
            "AuthorizeStream": grpc.stream_stream_rpc_method_handler(
                self._stream,
                request_deserializer=Message.FromString,
                response_serializer=Response.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("pdp.v1.AuthorizationService", handlers),)
        )
        self._server.add_insecure_port(self.target)

    @property
    def cancelled(self) -> list[int]:
        return [message.id for message in self.messages if message.HasField("cancel")]

    def end_streams(self, how: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE) -> None:
        for answers in self.streams:
            answers.put(how)

    def _call(
        self, request: Request, context: grpc.ServicerContext
    ) -> authorization_pb2.AuthorizeResponse:
        self.calls.append(request)
        self.left_seconds.append(context.time_remaining())
        if not self.answers_calls:
            self._ending.wait(20)
        return authorization_pb2.AuthorizeResponse(decision_id=f"by call {request.request_id}")

    def _stream(
        self, messages: Iterator[Message], context: grpc.ServicerContext
    ) -> Iterator[Response]:
        answers: Answers = queue.SimpleQueue()
        self.streams.append(answers)

        def read() -> None:
            try:
                for message in messages:
                    self.messages.append(message)
                    self.react(message, answers)
            except grpc.RpcError:
                pass  # the client has gone
            answers.put(None)

        threading.Thread(target=read, daemon=True).start()
        for found in iter(answers.get, None):
            if isinstance(found, grpc.StatusCode):
                context.abort(found, "it is ended")
            assert isinstance(found, Response)
            yield found

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ending.set()
        self.end_streams()
        self._server.stop(None).wait()
        self._directory.cleanup()


class Asking(Protocol):
    """Either connection, called alike."""

    def __call__(self, request_id: str, *, metadata: Metadata = BEARER, **fields: Any) -> str: ...
    def start(self, request_id: str) -> Future[str]: ...
    def close(self) -> None: ...


class Blocking:
    def __init__(self, target: str, timeout_seconds: float) -> None:
        self._connection = Connection(target, timeout_seconds=timeout_seconds, credentials=None)
        self._threads = ThreadPoolExecutor(MAX_UNDER_WAY + 8)
        self.close = self._connection.close

    def __call__(self, request_id: str, *, metadata: Metadata = BEARER, **fields: Any) -> str:
        request = Request(request_id=request_id, **fields)
        decision_id: str = self._connection.call("Authorize", request, metadata).decision_id
        return decision_id

    def start(self, request_id: str) -> Future[str]:
        return self._threads.submit(self, request_id)

    def dispose(self) -> None:
        self.close()
        self._threads.shutdown()


class Awaiting:
    """Its event loop runs in a thread of its own."""

    def __init__(self, target: str, timeout_seconds: float) -> None:
        self._connection = AsyncConnection(
            target, timeout_seconds=timeout_seconds, credentials=None
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def __call__(self, request_id: str, *, metadata: Metadata = BEARER, **fields: Any) -> str:
        decision_id: str = self._begin(self._ask(request_id, metadata, fields)).result()
        return decision_id

    def start(self, request_id: str) -> Future[str]:
        return self._begin(self._ask(request_id, BEARER, {}))

    def close(self) -> None:
        self._begin(self._connection.close()).result()

    def dispose(self) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _ask(self, request_id: str, metadata: Metadata, fields: dict[str, Any]) -> str:
        request = Request(request_id=request_id, **fields)
        response = await self._connection.call("Authorize", request, metadata)
        decision_id: str = response.decision_id
        return decision_id

    def _begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


@pytest.fixture
def server() -> Iterator[StreamStandIn]:
    with StreamStandIn() as server:
        yield server


@pytest.fixture(params=(Blocking, Awaiting), ids=("blocking", "awaiting"))
def asking_at(request: pytest.FixtureRequest) -> Iterator[Callable[..., Asking]]:
    made: list[Any] = []

    def make(target: str, timeout_seconds: float = 10.0) -> Asking:
        made.append(request.param(target, timeout_seconds))
        asking: Asking = made[-1]
        return asking

    yield make
    for each in made:
        each.dispose()


@pytest.fixture
def ask(asking_at: Callable[..., Asking], server: StreamStandIn) -> Asking:
    return asking_at(server.target)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.002)


# What travels over the stream


def test_questions_share_one_stream(ask: Asking, server: StreamStandIn) -> None:
    started = [ask.start(f"r-{number}") for number in range(40)]
    assert [each.result() for each in started] == [f"r-{number}" for number in range(40)]
    assert len(server.streams) == 1
    assert server.calls == []
    ids = [message.id for message in server.messages]
    assert len(set(ids)) == 40


def test_what_a_call_s_metadata_holds_is_in_the_message(ask: Asking, server: StreamStandIn) -> None:
    ask(
        "r-1",
        metadata=(
            ("authorization", "Bearer a.b.c"),
            ("workload-authorization", "Bearer d.e.f"),
            ("traceparent", "00-1-2-01"),
        ),
        arguments_json=b"{}",
    )
    (message,) = server.messages
    assert (message.bearer, message.workload_token) == ("a.b.c", "d.e.f")
    assert message.traceparent == "00-1-2-01"
    assert message.question == Request(request_id="r-1", arguments_json=b"{}")
    assert message.timeout.ToTimedelta().total_seconds() == 10.0


@pytest.mark.parametrize(
    "metadata",
    (
        (*BEARER, ("x-other", "1")),
        (*BEARER, *BEARER),
        (("authorization", "Basic dXNlcjpwYXNz"),),
        (("authorization", "Bearer "),),
    ),
    ids=("other", "twice", "other scheme", "empty"),
)
def test_other_metadata_travels_as_a_call(
    ask: Asking, server: StreamStandIn, metadata: Metadata
) -> None:
    assert ask("r-1", metadata=metadata) == "by call r-1"
    assert server.messages == []


def test_a_large_question_travels_as_a_call(ask: Asking, server: StreamStandIn) -> None:
    assert ask("r-1", arguments_json=b" " * MAX_QUESTION_BYTES) == "by call r-1"
    assert server.messages == []


def test_a_question_too_many_for_the_stream_travels_as_a_call(
    ask: Asking, server: StreamStandIn
) -> None:
    server.react = never
    started = [ask.start(f"r-{number}") for number in range(MAX_UNDER_WAY)]
    wait_for(lambda: len(server.messages) == MAX_UNDER_WAY)
    assert ask("one-more") == "by call one-more"
    for message in list(server.messages):
        server.streams[0].put(answer(message))
    assert {each.result() for each in started} == {f"r-{number}" for number in range(MAX_UNDER_WAY)}


# Answers


def test_one_slow_question_delays_no_other_answer(ask: Asking, server: StreamStandIn) -> None:
    held: list[Message] = []

    def hold_slow(message: Message, answers: Answers) -> None:
        if message.question.request_id == "slow":
            held.append(message)
        else:
            at_once(message, answers)

    server.react = hold_slow
    slow = ask.start("slow")
    wait_for(lambda: held)
    assert [ask(f"r-{number}") for number in range(20)] == [f"r-{number}" for number in range(20)]
    assert not slow.done()
    server.streams[0].put(answer(held[0]))
    assert slow.result() == "slow"


def test_an_answer_that_nobody_asked_for_is_dropped(ask: Asking, server: StreamStandIn) -> None:
    def noisy(message: Message, answers: Answers) -> None:
        for other in (0, message.id + 1, message.id + 1_000, 2**64 - 1):
            answers.put(answer(message, id=other))
        answers.put(answer(message))
        answers.put(answer(message))

    server.react = noisy
    found = [ask(f"r-{number}") for number in range(10)]
    # The id that comes next was answered before it was asked, to nobody.
    assert found == [f"r-{number}" for number in range(10)]


def test_a_failure_is_the_error_of_the_call(ask: Asking, server: StreamStandIn) -> None:
    def refuse(message: Message, answers: Answers) -> None:
        failure = authorization_pb2.Failure(
            code=8, reason_code="rate_limited", message="Try again later."
        )
        failure.retry_after.FromMilliseconds(1_500)
        answers.put(Response(id=message.id, failure=failure))

    server.react = refuse
    with pytest.raises(CallError) as raised:
        ask("r-1")
    assert raised.value.reason_code == "rate_limited"
    assert raised.value.message == "Try again later."
    assert raised.value.retry_after_seconds == 1.5
    assert server.calls == []


@pytest.mark.parametrize(
    "result",
    ({}, {"failure": authorization_pb2.Failure(code=13, reason_code="Not A Code")}),
    ids=("none", "no code"),
)
def test_an_answer_that_says_nothing_is_an_error(
    ask: Asking, server: StreamStandIn, result: dict[str, Any]
) -> None:
    server.react = lambda message, answers: answers.put(Response(id=message.id, **result))
    with pytest.raises(CallError, match="can not be read") as raised:
        ask("r-1")
    assert raised.value.reason_code == "internal"


def test_what_is_unavailable_is_asked_again_by_a_call(ask: Asking, server: StreamStandIn) -> None:
    failure = authorization_pb2.Failure(code=14, reason_code="budget_unavailable")
    server.react = lambda message, answers: answers.put(Response(id=message.id, failure=failure))
    assert ask("r-1") == "by call r-1"
    assert server.calls == [server.messages[0].question]


def test_what_stays_unavailable_until_time_runs_out_says_what_it_is(
    asking_at: Callable[..., Asking], server: StreamStandIn
) -> None:
    failure = authorization_pb2.Failure(code=14, reason_code="budget_unavailable")
    server.react = lambda message, answers: answers.put(Response(id=message.id, failure=failure))
    server.answers_calls = False
    with pytest.raises(CallError) as raised:
        asking_at(server.target, 0.3)("r-1")
    assert raised.value.reason_code == "budget_unavailable"


# Deadlines and cancelling


def test_a_question_without_an_answer_ends_in_time_and_is_cancelled(
    asking_at: Callable[..., Asking], server: StreamStandIn
) -> None:
    ask = asking_at(server.target, 0.2)
    held: list[Message] = []

    def hold_first(message: Message, answers: Answers) -> None:
        if message.question.request_id == "late":
            held.append(message)
        elif message.HasField("cancel"):
            answers.put(answer(held[0]))
        else:
            at_once(message, answers)

    server.react = hold_first
    assert ask("r-1") == "r-1"
    late = ask.start("late")
    wait_for(lambda: held)
    assert ask("r-2") == "r-2"  # the stream is well
    with pytest.raises(CallError) as raised:
        late.result()
    assert raised.value.reason_code == "deadline_exceeded"
    wait_for(lambda: server.cancelled == [held[0].id])
    assert [ask(f"r-{number}") for number in range(3, 9)] == [f"r-{n}" for n in range(3, 9)]
    assert len(server.streams) == 1
    assert server.calls == []


def test_a_stream_that_has_gone_silent_is_given_up(
    asking_at: Callable[..., Asking], server: StreamStandIn
) -> None:
    server.react = never
    ask = asking_at(server.target, 0.2)
    began = time.monotonic()
    with pytest.raises(CallError) as raised:
        ask("r-1")
    assert raised.value.reason_code == "deadline_exceeded"
    assert time.monotonic() - began < 5
    wait_for(lambda: ask("r-2") == "by call r-2")


def test_a_task_that_is_cancelled_cancels_its_question(server: StreamStandIn) -> None:
    server.react = never

    async def run() -> None:
        connection = AsyncConnection(server.target, timeout_seconds=10, credentials=None)
        asked = Request(request_id="r-1")
        task = asyncio.create_task(connection.call("Authorize", asked, BEARER))
        await asyncio.to_thread(wait_for, lambda: server.messages)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(wait_for, lambda: server.cancelled)
        await connection.close()

    asyncio.run(run())
    assert server.cancelled == [server.messages[0].id]
    assert server.calls == []


# Where there is no stream


def test_a_sidecar_without_streams_is_asked_by_calls(
    asking_at: Callable[..., Asking], stand_in: StandIn
) -> None:
    ask = asking_at(stand_in.target)
    metadata = (("authorization", "Bearer t0ken"),)
    for number in range(5):
        request_id = f"r-{number}"
        action = authorization_pb2.Action(name="orders.read")
        assert ask(request_id, metadata=metadata, action=action, arguments_json=b"{}")
    assert [request.request_id for request in stand_in.asked] == [f"r-{n}" for n in range(5)]
    assert set(stand_in.tokens) == {"Bearer t0ken"}


def test_a_question_on_a_stream_that_breaks_is_asked_again_by_a_call(
    ask: Asking, server: StreamStandIn
) -> None:
    def break_it(message: Message, answers: Answers) -> None:
        if len(server.messages) == 12:
            answers.put(grpc.StatusCode.UNAVAILABLE)

    server.react = break_it
    started = [ask.start(f"r-{number}") for number in range(12)]
    assert {each.result() for each in started} == {f"by call r-{number}" for number in range(12)}
    # The very questions, and no more time than was left.
    questions = sorted(message.question.request_id for message in server.messages)
    assert sorted(request.request_id for request in server.calls) == questions
    assert all(seconds < 10 for seconds in server.left_seconds)


@pytest.mark.parametrize("how", (None, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL))
def test_after_a_rest_there_is_a_new_stream(
    ask: Asking,
    server: StreamStandIn,
    how: grpc.StatusCode | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pdp.stream.REST_SECONDS", 0.3)
    assert ask("r-1") == "r-1"
    server.end_streams(how)
    wait_for(lambda: ask("r-2") == "by call r-2")
    wait_for(lambda: ask("r-3") == "r-3")
    assert len(server.streams) == 2


def test_a_question_that_is_under_way_when_the_connection_is_closed_fails(
    ask: Asking, server: StreamStandIn
) -> None:
    server.react = never
    under_way = ask.start("r-1")
    wait_for(lambda: server.messages)
    ask.close()
    with pytest.raises(CallError) as raised:
        under_way.result()
    assert raised.value.reason_code == "pdp_unavailable"
    assert server.calls == []
    server.react = at_once
    assert ask("r-2") == "r-2"  # it is open again


# Threads and processes


def stream_threads() -> int:
    return sum(thread.name == "pdp-stream" for thread in threading.enumerate())


def test_closing_leaves_no_thread(server: StreamStandIn) -> None:
    connection = Connection(server.target, timeout_seconds=5, credentials=None)
    for _ in range(3):
        connection.call("Authorize", Request(request_id="r-1"), BEARER)
        assert stream_threads() == 1
        connection.close()
        assert stream_threads() == 0


def test_a_connection_that_nobody_has_any_more_leaves_no_thread(server: StreamStandIn) -> None:
    connection = Connection(server.target, timeout_seconds=5, credentials=None)
    connection.call("Authorize", Request(request_id="r-1"), BEARER)
    assert stream_threads() == 1
    del connection
    gc.collect()
    wait_for(lambda: stream_threads() == 0)


def test_where_no_thread_can_be_had_questions_travel_as_calls(
    server: StreamStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name == "pdp-stream":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none_left)
    connection = Connection(server.target, timeout_seconds=5, credentials=None)
    for number in range(3):
        request = Request(request_id=f"r-{number}")
        found = connection.call("Authorize", request, BEARER).decision_id
        assert found == f"by call r-{number}"
    connection.close()


def test_a_signal_handler_may_ask_while_its_thread_asks(server: StreamStandIn) -> None:
    connection = Connection(server.target, timeout_seconds=5, credentials=None)
    asked_by_handler: list[str] = []
    ended = threading.Event()

    def ask(request_id: str) -> str:
        found = connection.call("Authorize", Request(request_id=request_id), BEARER).decision_id
        assert found == request_id
        return request_id

    def handle(_number: int, _frame: object) -> None:
        asked_by_handler.append(ask(f"handler-{len(asked_by_handler)}"))

    def send_signals() -> None:
        while not ended.wait(0.003):
            os.kill(os.getpid(), signal.SIGUSR1)

    ask("first")  # which imports gRPC
    earlier = signal.signal(signal.SIGUSR1, handle)
    sender = threading.Thread(target=send_signals)
    sender.start()
    try:
        for number in range(300):
            ask(f"r-{number}")
    finally:
        ended.set()
        sender.join()
        signal.signal(signal.SIGUSR1, earlier)
        connection.close()
    assert asked_by_handler
    assert server.calls == []


def test_a_connection_that_no_task_has_any_more_leaves_no_task(server: StreamStandIn) -> None:
    async def run() -> None:
        connection = AsyncConnection(server.target, timeout_seconds=5, credentials=None)
        await connection.call("Authorize", Request(request_id="r-1"), BEARER)
        del connection
        gc.collect()
        await asyncio.to_thread(wait_for, lambda: len(asyncio.all_tasks(loop)) == 1)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(run())
    loop.close()


FORKING = """
import gc, os, sys
from pdp.api.v1 import authorization_pb2
from pdp.channel import Connection

connection = Connection(sys.argv[1], timeout_seconds=5, credentials=None)

def ask(request_id):
    request = authorization_pb2.AuthorizeRequest(request_id=request_id)
    metadata = (("authorization", "Bearer t0ken"),)
    print(connection.call("Authorize", request, metadata).decision_id, flush=True)

ask("before")
child = os.fork()
if child == 0:
    ask("in the child")
    connection.close()
    del connection
    gc.collect()  # lets go of the parent's too
    print("collected", flush=True)
    sys.exit()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
ask("after")
"""


def test_a_child_of_a_fork_has_a_stream_of_its_own(server: StreamStandIn) -> None:
    """And ends well, though it inherits what belongs to threads that it has not."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING, server.target],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert done.stdout.splitlines() == ["before", "in the child", "collected", "after"]
    assert len(server.streams) == 2
    assert server.calls == []


# At a real sidecar: no answer reaches another


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that knows every tenant."""
    target = tmp_path_factory.mktemp("bundle") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/server/policy", target, opa=ROOT / ".tools/opa")


@pytest.fixture(scope="module")
def busy(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path
) -> Iterator[tuple[SidecarProcess, TokenIssuer]]:
    issuer = TokenIssuer()
    directory = tmp_path_factory.mktemp("busy")
    with SidecarProcess(directory, issuer=issuer, bundle=bundle, config=UNLIMITED) as sidecar:
        yield sidecar, issuer


UNLIMITED = {
    "limits": {
        "tenants": {"calls_per_second": 100_000, "burst": 100_000, "max_concurrent_calls": 1_000}
    }
}
TENANTS = [f"tenant_{number}" for number in range(10)]


def token_of(issuer: TokenIssuer, tenant: str) -> str:
    return issuer.token(tenant, f"user-of-{tenant}")


def test_threads_of_many_tenants_each_get_their_own_answers(
    busy: tuple[SidecarProcess, TokenIssuer],
) -> None:
    sidecar, issuer = busy
    with Guard(sidecar.target) as guard, ThreadPoolExecutor(32) as threads:

        def work(number: int) -> None:
            tenant = TENANTS[number % len(TENANTS)]
            with guard.acting_for(token_of(issuer, tenant)):
                for turn in range(15):
                    request_id = f"{tenant}-{number}-{turn}"
                    permit = guard.authorize(
                        "orders.read", {"order_id": request_id}, request_id=request_id
                    )
                    assert (permit.tenant, permit.actor) == (tenant, f"user-of-{tenant}")
                    assert permit.transaction == request_id

        for done in [threads.submit(work, number) for number in range(32)]:
            done.result()


def test_when_tasks_are_cancelled_all_the_time_no_answer_reaches_another(
    busy: tuple[SidecarProcess, TokenIssuer],
) -> None:
    sidecar, issuer = busy
    chance = random.Random(7)  # noqa: S311 - to be done again alike
    answered: Counter[str] = Counter()

    async def work(guard: AsyncGuard, number: int) -> None:
        tenant = TENANTS[number % len(TENANTS)]
        with guard.acting_for(token_of(issuer, tenant)):
            for turn in range(12):
                request_id = f"{tenant}-{number}-{turn}-{uuid.uuid4()}"
                asking = asyncio.create_task(
                    guard.authorize("orders.read", {"order_id": "1"}, request_id=request_id)
                )
                await asyncio.wait({asking}, timeout=chance.choice((0, 0.001, 0.02, 5)))
                if not asking.done():
                    asking.cancel()
                try:
                    permit = await asking
                except asyncio.CancelledError:
                    continue
                assert (permit.tenant, permit.transaction) == (tenant, request_id)
                answered[tenant] += 1

    async def run() -> None:
        async with AsyncGuard(sidecar.target, timeout_seconds=20) as guard:
            await asyncio.gather(*(work(guard, number) for number in range(100)))

    asyncio.run(run())
    assert set(answered) == set(TENANTS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_sidecar_that_is_killed_under_load_costs_no_call_twice(
    tmp_path: Path, bundle: Path, seed: int
) -> None:
    """Each call runs once or is blocked, for its own tenant, and is on record before."""
    issuer = TokenIssuer()
    chance = random.Random(seed)  # noqa: S311 - as above
    ran: Counter[str] = Counter()
    blocked: Counter[str] = Counter()
    reasons: set[str] = set()
    stop = threading.Event()
    with (
        SidecarProcess(tmp_path, issuer=issuer, bundle=bundle, config=UNLIMITED) as sidecar,
        Guard(sidecar.target, timeout_seconds=5) as guard,
        ThreadPoolExecutor(16) as threads,
    ):

        @guard.tool("orders.read")
        def read_order(order_id: str) -> str:
            permit = current_permit()
            assert order_id.startswith(f"{permit.tenant}-")
            assert permit.actor == f"user-of-{permit.tenant}"
            ran[order_id] += 1
            return permit.id

        def work(number: int) -> list[str]:
            tenant = TENANTS[number % len(TENANTS)]
            ids = []
            with guard.acting_for(token_of(issuer, tenant)):
                for turn in range(100_000):
                    if stop.is_set():
                        break
                    order = f"{tenant}-{number}-{turn}"
                    try:
                        ids.append(read_order(order))
                    except PermitDenied as denied:
                        blocked[order] += 1
                        reasons.add(denied.reason_code)
            return ids

        working = [threads.submit(work, number) for number in range(16)]

        def wait_for_more(count: int) -> None:
            before = sum(ran.values())
            wait_for(lambda: sum(ran.values()) > before + count)

        for _ in range(3):
            wait_for_more(chance.randrange(50, 150))
            sidecar.kill()
            sidecar.start()
        wait_for_more(100)
        stop.set()
        permits = [permit for thread in working for permit in thread.result()]
    assert max(ran.values()) == 1
    assert reasons <= {"pdp_unavailable", "deadline_exceeded"}
    assert not ran.keys() & blocked.keys()
    assert len(set(permits)) == len(permits) == sum(ran.values())
    recorded = {
        record["permit_id"]: record["tenant_id"]
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for record in map(json.loads, segment.read_text(encoding="utf-8").splitlines())
        if record.get("permit_id")
    }
    assert set(permits) <= set(recorded)
