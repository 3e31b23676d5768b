"""AuthorizeStream: each message is a call of its own."""

from __future__ import annotations

import asyncio
import json
import queue
import random
import signal
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from pdp.admission import Admission
from pdp.api.v1 import authorization_pb2, authorization_pb2_grpc, execution_pb2
from pdp.config import TenantLimits
from pdp.identity.resolver import Peer
from pdp.permit import PermitKeySet, PermitVerifier
from pdp.server.metrics import Metrics
from pdp.server.runner import CallRunner
from pdp.server.stream import MAX_STREAMS, MAX_UNDER_WAY, Streams
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
UNLIMITED = {"limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}}}
STREAM = "/pdp.v1.AuthorizationService/AuthorizeStream"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

Message = authorization_pb2.AuthorizeStreamRequest
Response = authorization_pb2.AuthorizeStreamResponse


class Stream:
    """One stream to a sidecar; ``metadata`` is the stream's own."""

    def __init__(self, target: str, *, metadata: tuple[tuple[str, str], ...] = ()) -> None:
        # As small a window as there is, so that what is not read is soon not sent either.
        self._channel = grpc.insecure_channel(target, options=[("grpc.http2.bdp_probe", 0)])
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = self._channel.stream_stream(
            STREAM, request_serializer=None, response_deserializer=Response.FromString
        )
        self.call = method(iter(self._messages.get, None), metadata=metadata, timeout=60)

    def send(self, message: Message | bytes) -> None:
        self._messages.put(message if isinstance(message, bytes) else message.SerializeToString())

    def read(self, count: int = 1) -> list[Response]:
        """The next answers, in the order in which they come."""
        return [next(self.call) for _ in range(count)]

    def answer(self, message: Message | bytes) -> Response:
        self.send(message)
        (response,) = self.read()
        return response

    def end(self) -> None:
        """There are no more questions."""
        self._messages.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()
        self._channel.close()


def token(tenant: str, actor: str = "user-7", **claims: Any) -> str:
    return ISSUER.token(tenant, actor, roles=["agent"], **claims)


def question(
    number: int,
    tenant: str = "tenant_acme",
    tool: str = "orders.read",
    *,
    request_id: str = "",
    **fields: Any,
) -> Message:
    asked = authorization_pb2.AuthorizeRequest(
        request_id=request_id or str(uuid.uuid4()),
        action=authorization_pb2.Action(name=tool),
    )
    return Message(id=number, question=asked, **{"bearer": token(tenant), **fields})


def cancel(number: int) -> Message:
    return Message(id=number, cancel=authorization_pb2.Cancel())


def seconds(value: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(value * 1e9))
    return duration


def failure(response: Response) -> tuple[str, str]:
    """Status and reason code."""
    assert response.WhichOneof("result") == "failure"
    names = {status.value[0]: status.name for status in grpc.StatusCode}
    return names[response.failure.code], response.failure.reason_code


def records(sidecar: SidecarProcess, **fields: str) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for line in segment.read_bytes().split(b"\n")[:-1]
    ]
    return [line for line in lines if all(line.get(key) == fields[key] for key in fields)]


def wait_for(condition: Callable[[], object], limit_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + limit_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("stream") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/server/policy", target, opa=ROOT / ".tools/opa")


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[SidecarProcess]:
    config = {**UNLIMITED, "listen": {"metrics": "127.0.0.1:0"}}
    directory = tmp_path_factory.mktemp("stream-sidecar")
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config) as process:
        yield process


@contextmanager
def patient(directory: Path, bundle: Path, **limits: object) -> Iterator[SidecarProcess]:
    """One on which tools.runaway takes half a second."""
    config = {
        "policy": {"bundle": str(bundle), "evaluation_timeout_ms": 500},
        "limits": {**UNLIMITED["limits"], **limits},
    }
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config) as process:
        yield process


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[SidecarProcess]:
    with patient(tmp_path_factory.mktemp("slow"), bundle) as process:
        yield process


@pytest.fixture
def stream(sidecar: SidecarProcess) -> Iterator[Stream]:
    with Stream(sidecar.target) as opened:
        yield opened


# Questions and answers


def test_a_question_on_a_stream_gets_the_answer_of_authorize(
    sidecar: SidecarProcess, stream: Stream
) -> None:
    request_id = str(uuid.uuid4())
    answer = stream.answer(question(7, tool="orders.update", request_id=request_id))
    assert answer.id == 7
    assert answer.answer.decision
    with Caller(sidecar.target, token=token("tenant_acme")) as caller:
        again = caller.authorize("orders.update", request_id=request_id)
    assert again.replayed
    assert (again.decision_id, again.permit) == (answer.answer.decision_id, answer.answer.permit)
    assert stream.answer(question(8, tool="tools.closed")).answer.reason_code == "closed_on_sundays"


def test_answers_come_as_they_are_ready(slow: SidecarProcess) -> None:
    with Stream(slow.target) as stream:
        stream.answer(question(1))
        stream.send(question(2, tool="tools.runaway"))
        for number in range(3, 33):
            stream.send(question(number))
        order = [response.id for response in stream.read(31)]
    assert sorted(order) == list(range(2, 33))
    assert order[-1] == 2


def test_a_stream_ends_with_its_last_answer(stream: Stream) -> None:
    for number in range(1, 21):
        stream.send(question(number))
    stream.end()
    assert {response.id for response in stream.call} == set(range(1, 21))
    assert stream.call.code() is grpc.StatusCode.OK


# Whose question it is


def test_on_a_stream_shared_by_fifty_tenants_each_answer_is_its_asker_s(
    sidecar: SidecarProcess, stream: Stream
) -> None:
    with Caller(sidecar.target) as caller:
        jwks = caller.execution.GetPermitKeys(execution_pb2.GetPermitKeysRequest()).jwks_json
    verifier = PermitVerifier(PermitKeySet.from_jwks(jwks), issuer="agent-pdp", audience="tools")
    run = uuid.uuid4().hex[:8]
    asked = {
        number: (f"tenant_{run}_{number % 50}", f"user-{number}", f"{run}-{number}")
        for number in range(1, 401)
    }
    for number, (tenant, actor, request_id) in asked.items():
        stream.send(
            question(
                number,
                tool="orders.update",
                request_id=request_id,
                bearer=token(tenant, actor),
            )
        )
    responses = stream.read(len(asked))
    recorded = {record.get("request_id"): record for record in records(sidecar)}
    for response in responses:
        tenant, actor, request_id = asked.pop(response.id)
        answer = response.answer
        assert (answer.tenant_id, answer.actor_id) == (tenant, actor)
        assert answer.namespace == f"tenant/{tenant}/"
        permit = verifier.authenticate(answer.permit)
        assert (permit.tenant, permit.actor) == (tenant, actor)
        assert permit.transaction == request_id
        record = recorded[request_id]
        assert (record["tenant_id"], record["actor_id"]) == (tenant, actor)
    assert asked == {}


def test_the_same_request_id_of_two_tenants_on_one_stream_does_not_meet(stream: Stream) -> None:
    request_id = str(uuid.uuid4())
    first = stream.answer(question(1, "tenant_one", request_id=request_id)).answer
    second = stream.answer(question(2, "tenant_two", request_id=request_id)).answer
    assert (first.tenant_id, second.tenant_id) == ("tenant_one", "tenant_two")
    assert not second.replayed
    assert first.decision_id != second.decision_id


def test_a_message_without_a_token_is_refused_though_the_stream_s_metadata_holds_one(
    sidecar: SidecarProcess,
) -> None:
    metadata = (("authorization", f"Bearer {token('tenant_acme')}"),)
    with Stream(sidecar.target, metadata=metadata) as stream:
        refused = stream.answer(question(1, bearer=""))
        assert failure(refused) == ("UNAUTHENTICATED", "token_missing")
        # Nor does the token of the message before.
        assert stream.answer(question(2)).answer.decision
        assert failure(stream.answer(question(3, bearer=""))) == failure(refused)


@pytest.mark.parametrize(
    ("bearer", "reason_code"),
    (
        ("not.a.token", "token_invalid"),
        ("Bearer " + token("tenant_acme"), "token_invalid"),
        ("x" * 100_000, "token_invalid"),
        ("\N{SNOWMAN}", "token_invalid"),
        (token("tenant_acme", exp=1), "token_expired"),
        (ISSUER.token(None, "user-7"), "tenant_missing"),
    ),
    ids=["no token", "with scheme", "long", "not ascii", "expired", "without tenant"],
)
def test_a_message_with_a_bad_token_fails_alone(
    stream: Stream, bearer: str, reason_code: str
) -> None:
    refused = stream.answer(question(1, bearer=bearer))
    assert failure(refused) == ("UNAUTHENTICATED", reason_code)
    assert bearer not in refused.failure.message
    assert stream.answer(question(2)).answer.decision


def test_each_message_has_a_trace_of_its_own(sidecar: SidecarProcess) -> None:
    ids = [str(uuid.uuid4()) for _ in range(3)]
    traces = (TRACEPARENT, "", "nonsense")
    with Stream(sidecar.target, metadata=(("traceparent", TRACEPARENT),)) as stream:
        for number, (request_id, traceparent) in enumerate(zip(ids, traces, strict=True), 1):
            stream.answer(question(number, request_id=request_id, traceparent=traceparent))
    found = [records(sidecar, request_id=request_id)[0].get("trace_id") for request_id in ids]
    assert found == ["0af7651916cd43dd8448eb211c80319c", None, None]


# What is wrong with one message ends only that question


@pytest.mark.parametrize(
    "message",
    (
        question(1, request_id="with space"),
        question(1, tool=""),
        question(1, timeout=seconds(0)),
        question(1, timeout=seconds(-1)),
        Message(id=1, bearer=token("tenant_acme")),
        question(0),
    ),
    ids=["request id", "tool", "no time", "negative time", "no question", "id 0"],
)
def test_a_malformed_message_ends_only_its_question(stream: Stream, message: Message) -> None:
    refused = stream.answer(message)
    assert refused.id == message.id
    assert failure(refused) == ("INVALID_ARGUMENT", "request_invalid")
    assert stream.answer(question(2)).answer.decision


def test_bytes_that_are_no_message_end_no_question_that_is_under_way(stream: Stream) -> None:
    good = question(1).SerializeToString()
    stream.send(good)
    stream.send(good[:-5])
    stream.send(b"\xff" * 40)
    stream.send(question(2))
    found = {response.id: response for response in stream.read(3)}
    last = stream.read()[0]
    found.setdefault(last.id, last)
    assert found[1].answer.decision
    assert found[2].answer.decision
    assert failure(found[0]) == ("INVALID_ARGUMENT", "request_invalid")


def test_a_second_question_under_the_same_id_is_refused_and_the_first_is_answered(
    slow: SidecarProcess,
) -> None:
    second = str(uuid.uuid4())
    with Stream(slow.target) as stream:
        stream.send(question(1, tool="tools.runaway"))
        stream.send(question(1, request_id=second))
        refused, answered = stream.read(2)
        assert (refused.id, answered.id) == (1, 1)
        assert failure(refused) == ("INVALID_ARGUMENT", "request_invalid")
        assert answered.answer.reason_code == "policy_timeout"
        assert records(slow, request_id=second) == []
        # Once it is answered, its id is free.
        assert stream.answer(question(1)).answer.decision


def test_a_question_too_many_is_told_when_to_come_back(tmp_path: Path, bundle: Path) -> None:
    config = {"limits": {"tenants": {"calls_per_second": 1, "burst": 1}}}
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=config) as narrow,
        Stream(narrow.target) as stream,
    ):
        assert stream.answer(question(1)).answer.decision
        refused = stream.answer(question(2))
        assert failure(refused) == ("RESOURCE_EXHAUSTED", "rate_limited")
        assert refused.failure.HasField("retry_after")
        # The other tenants of the stream have a rate of their own.
        assert stream.answer(question(3, "tenant_other")).answer.decision


def test_whatever_is_sent_each_question_gets_its_one_answer(sidecar: SidecarProcess) -> None:
    """Questions, cancels, repeated ids and rubbish, in any order."""
    chance = random.Random(11)  # noqa: S311 - to be done again alike
    tokens = {tenant: token(tenant) for tenant in ("tenant_a", "tenant_b", "tenant_c")}
    for _ in range(3):
        tenants: dict[int, str] = {}
        twice, cancelled = set(), set()
        rubbish = 0
        with Stream(sidecar.target) as stream:
            for number in range(1, 200):
                tenant = chance.choice(list(tokens))
                stream.send(question(number, bearer=tokens[tenant]))
                tenants[number] = tenant
                other = chance.randrange(1, number + 1)
                match chance.randrange(6):
                    case 0:
                        stream.send(cancel(other))
                        cancelled.add(other)
                    case 1:
                        # Another tenant's question under an id that may still be under way.
                        stream.send(question(other, "tenant_d", bearer=token("tenant_d")))
                        twice.add(other)
                    case 2:
                        stream.send(b"\x0a" + chance.randbytes(chance.randrange(1, 60)))
                        rubbish += 1
            stream.end()
            answers: dict[int, list[Response]] = {}
            for response in stream.call:
                answers.setdefault(response.id, []).append(response)
        assert len(answers.pop(0, ())) >= rubbish / 2  # some of it can be read
        for number, tenant in tenants.items():
            found = answers.pop(number, [])
            own = [each for each in found if each.answer.tenant_id == tenant]
            assert len(own) == 1 or (number in cancelled and not own)
            assert len(found) == 1 or number in twice | cancelled
            for each in found:
                assert each.answer.tenant_id in {tenant, "tenant_d"} or each.failure.code == 3


# Deadlines and cancelling


def test_each_question_has_a_deadline_of_its_own(slow: SidecarProcess) -> None:
    with Stream(slow.target) as stream:
        stream.answer(question(1))
        stream.send(question(2, tool="tools.runaway"))
        stream.send(question(3, tool="tools.runaway", timeout=seconds(0.05)))
        first, second = stream.read(2)
        assert first.id == 3
        assert failure(first) == ("DEADLINE_EXCEEDED", "deadline_exceeded")
        assert (second.id, second.answer.reason_code) == (2, "policy_timeout")


def test_the_sidecar_s_own_deadline_bounds_every_question(tmp_path: Path, bundle: Path) -> None:
    with (
        patient(tmp_path, bundle, call_timeout_seconds=0.05) as slow,
        Stream(slow.target) as stream,
    ):
        refused = stream.answer(question(1, tool="tools.runaway", timeout=seconds(50)))
        assert failure(refused) == ("DEADLINE_EXCEEDED", "deadline_exceeded")


def test_a_question_that_is_cancelled_gets_no_answer_and_is_finished_all_the_same(
    slow: SidecarProcess,
) -> None:
    begun = str(uuid.uuid4())
    with Stream(slow.target) as stream:
        stream.answer(question(1))
        stream.send(question(2, tool="tools.runaway", request_id=begun))
        stream.send(cancel(2))
        stream.send(cancel(77))  # nobody's
        assert stream.answer(question(3)).id == 3
        wait_for(lambda: records(slow, request_id=begun))
        assert stream.answer(question(4)).id == 4
        stream.end()
        assert list(stream.call) == []


def test_a_cancelled_question_that_waits_to_be_let_in_is_never_begun(
    tmp_path: Path, bundle: Path
) -> None:
    with (
        patient(tmp_path, bundle, max_concurrent_calls=1) as slow,
        Stream(slow.target) as stream,
    ):
        stream.send(question(1, tool="tools.runaway"))
        for number in range(2, 12):
            stream.send(question(number, "tenant_gone", request_id=f"waits-{number}"))
        for number in range(2, 12):
            stream.send(cancel(number))
        assert stream.read()[0].id == 1
        assert stream.answer(question(20)).id == 20
        assert records(slow, tenant_id="tenant_gone") == []


def test_when_the_client_has_gone_what_has_begun_is_finished(slow: SidecarProcess) -> None:
    begun = str(uuid.uuid4())
    with Stream(slow.target) as stream:
        stream.answer(question(1))
        stream.send(question(2, tool="tools.runaway", request_id=begun))
        stream.answer(question(3))
    wait_for(lambda: records(slow, request_id=begun))
    assert "Traceback" not in slow.log.read_text(encoding="utf-8")
    assert "never retrieved" not in slow.log.read_text(encoding="utf-8")


# Bounds


def test_a_client_that_does_not_read_holds_up_itself_alone(sidecar: SidecarProcess) -> None:
    tenant = f"tenant_{uuid.uuid4().hex[:12]}"
    count = 1_500
    with (
        Stream(sidecar.target) as slow,
        Stream(sidecar.target) as quick,
    ):
        one = token(tenant)
        for number in range(1, count + 1):
            slow.send(question(number, bearer=one))
        wait_for(lambda: len(records(sidecar, tenant_id=tenant)) >= MAX_UNDER_WAY)
        for number in range(1, 201):
            assert quick.answer(question(number)).id == number
        # Those that wait to leave, and those that flow control has let go.
        assert len(records(sidecar, tenant_id=tenant)) < count / 2
        assert {response.id for response in slow.read(count)} == set(range(1, count + 1))


def test_streams_that_do_nothing_keep_nobody_out(tmp_path: Path, bundle: Path) -> None:
    async def open_all(target: str) -> None:
        channels = [
            grpc.aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(2)
        ]
        stubs: Any = list(map(authorization_pb2_grpc.AuthorizationServiceStub, channels))
        calls = [stubs[number % 2].AuthorizeStream() for number in range(MAX_STREAMS)]
        for call in calls:
            await call.write(question(1, bearer=""))  # a stream is open once it is used
        for call in calls:
            assert (await call.read()).id == 1
        first, *others = calls  # whichever of them came first
        await first.write(question(2))
        assert (await first.read()).answer.decision
        one_more = stubs[0].AuthorizeStream()
        await one_more.write(question(1))
        assert (await one_more.read()).answer.decision
        reading = {asyncio.ensure_future(call.read()) for call in others}
        ended, left = await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
        assert [each.result() for each in ended] == [grpc.aio.EOF]
        await first.write(question(3))
        assert (await first.read()).answer.decision
        for each in left:
            each.cancel()
        for channel in channels:
            await channel.close()

    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle) as process:
        asyncio.run(open_all(process.target))


def test_where_every_stream_has_a_question_under_way_one_more_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pdp.server.stream.MAX_STREAMS", 1)

    class Context:
        """Of a client that asks one question and waits."""

        def __init__(self) -> None:
            self.messages = [question(1)]
            self.refused: list[grpc.StatusCode] = []

        async def read(self) -> Message:
            return self.messages.pop() if self.messages else await asyncio.Future()

        async def abort(self, code: grpc.StatusCode, *_: Any, **__: Any) -> None:
            self.refused.append(code)
            raise grpc.aio.AbortError

        def add_done_callback(self, _: object) -> None:
            """The test ends before the call does."""

    async def serve_two() -> list[grpc.StatusCode]:
        asked = asyncio.Event()

        async def decide(*_: Any) -> Any:
            asked.set()
            await asyncio.Future()

        service = TenantLimits().service_class
        admission = Admission(
            max_concurrent_calls=8, max_waiting_calls=8, classes=lambda _: service
        )
        metrics = Metrics()
        streams = Streams(
            CallRunner(metrics, admission, timeout_seconds=60), metrics, draining=asyncio.Event()
        )
        busy = asyncio.create_task(streams.serve(cast("Any", Context()), Peer(), decide))
        await asked.wait()
        one_more = Context()
        with pytest.raises(grpc.aio.AbortError):
            await streams.serve(cast("Any", one_more), Peer(), decide)
        assert not busy.done()
        busy.cancel()
        return one_more.refused

    assert asyncio.run(serve_two()) == [grpc.StatusCode.RESOURCE_EXHAUSTED]


@pytest.mark.slow
def test_ten_thousand_questions_on_one_stream_each_get_their_answer(
    sidecar: SidecarProcess, stream: Stream
) -> None:
    count = 10_000
    tokens = [token(f"tenant_many_{number}") for number in range(10)]

    def send() -> None:
        for number in range(1, count + 1):
            stream.send(question(number, bearer=tokens[number % 10], request_id=f"many-{number}"))

    sender = threading.Thread(target=send)
    sender.start()
    found = {response.id: response.answer for response in stream.read(count)}
    sender.join()
    assert len(found) == count
    assert all(
        answer.decision and answer.tenant_id == f"tenant_many_{number % 10}"
        for number, answer in found.items()
    )


# Draining


def test_at_the_end_questions_under_way_are_answered_and_new_ones_told_to_ask_again(
    tmp_path: Path, bundle: Path
) -> None:
    with (
        patient(tmp_path, bundle) as slow,
        Stream(slow.target) as stream,
        Stream(slow.target) as idle,
    ):
        assert stream.answer(question(1)).answer.decision
        assert idle.answer(question(1)).answer.decision
        stream.send(question(2, tool="tools.runaway"))
        assert stream.answer(question(3)).id == 3  # so that the one before has begun
        assert slow.process is not None
        slow.process.send_signal(signal.SIGTERM)
        assert list(idle.call) == []
        assert idle.call.code() is grpc.StatusCode.OK
        stream.send(question(4, request_id="late"))
        told, answered = stream.read(2)
        assert (told.id, failure(told)) == (4, ("UNAVAILABLE", "pdp_unavailable"))
        assert (answered.id, answered.answer.reason_code) == (2, "policy_timeout")
        assert list(stream.call) == []
        assert stream.call.code() is grpc.StatusCode.OK
        assert slow.process.wait(6) == 0
        assert records(slow, request_id="late") == []


# What is counted


def test_a_question_on_a_stream_is_counted_as_authorize(sidecar: SidecarProcess) -> None:
    def counted(line: str) -> float:
        for found in scraped(sidecar):
            if found.startswith(line):
                return float(found.rpartition(" ")[2])
        return 0.0

    ok = 'pdp_call_seconds_count{method="Authorize",status="OK"}'
    missing = 'pdp_errors_total{method="Authorize",reason_code="token_missing"}'
    before = counted(ok), counted(missing)
    with Stream(sidecar.target) as stream:
        stream.answer(question(1))
        stream.answer(question(2, bearer=""))
    assert (counted(ok), counted(missing)) == (before[0] + 1, before[1] + 1)


def scraped(sidecar: SidecarProcess) -> list[str]:
    log = sidecar.log.read_text(encoding="utf-8")
    port = log.rpartition("http://127.0.0.1:")[2].split()[0]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text: str = response.read().decode("utf-8")
    return text.splitlines()
