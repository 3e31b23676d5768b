"""Every message of the contract as bytes, through gRPC and all five steps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import grpc
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from pdp.api.v1 import authorization_pb2, budget_pb2, execution_pb2
from pdp.reason import ReasonCode
from tests.fuzz import jose
from tests.fuzz.choices import ODD_VALUES, Choices, edited_bytes
from tests.fuzz.contract import SECRET
from tests.fuzz.in_process import TENANT, sidecar, token

SECONDS: Final = 20.0
"""For an answer; more is a hang."""
METHODS: Final[Sequence[MethodDescriptor]] = [
    method
    for file, name in (
        (authorization_pb2, "AuthorizationService"),
        (budget_pb2, "BudgetService"),
        (execution_pb2, "ExecutionService"),
    )
    for method in file.DESCRIPTOR.services_by_name[name].methods
    if method.name != "Watch"  # which goes on for ever, and reads nothing
]
USUAL: Final[Mapping[str, Sequence[Any]]] = {
    "request_id": ["r-1", "r-2", "", "a b"],
    "idempotency_key": ["k-1", "k-2", ""],
    "name": ["orders.read", "orders.update", "mail.send", "\u043erders.read", ""],
    "tool": ["orders.read", "orders.update", ""],
    "type": ["order", "", "\n"],
    "id": ["918", "", "/"],
    "arguments_json": [
        b'{"note":"%s"}' % SECRET.encode(), b"{}", b"", b"[]", b'{"a":1e999}', b'{"a":1,"a":2}',
    ],
    "context_json": [b"{}", b'{"time":1}', b"x"],
    "audience": ["tools", "", "a b"],
    "budget": ["llm", "tools", "LLM"],
    "unit": ["tokens_out", "calls", "micro_usd", ""],
    "amount": [1, 10, 2**53, -1, 0, 2**63 - 1],
    "model": ["gpt-x", "", "x" * 300],
    "delegate": ["researcher", "", "\0"],
    "tools": ["orders.read", "*"],
    "ttl_seconds": [5, 0, -1, 2**31 - 1],
    "bearer": [token(), token(tenant_id="tenant_other"), "", "x.y.z"],
    "permit": ["x", "x.y.z", ""],
    "hold_id": ["4f7c0a8e-0000-4000-8000-000000000001", "", "'"],
    "arguments_sha256": ["0" * 64, ""],
    "traceparent": ["00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "", "x"],
    "error_type": ["OSError", ""],
    "uses": [1, 0, -1, 1000, 2**31 - 1],
    "seconds": [5, 0, -1, 2**62],
    "nanos": [0, -1, 2**31 - 1],
    "outcome": [1, 2, 0, 99, -1],
    "tenant_id": [TENANT, "tenant_other", "", "*"],
    "operator": ["sre", "", "a b"],
    "reason": ["because", "", "\u202e"],
    "limit_id": ["daily", "", "x" * 300],
    "counts_for": ["", "user-7", "\0"],
    "window": ["day", "", "year"],
}  # fmt: skip
"""What may stand in a field of that name; the first is sound."""
EXPECTED: Final = frozenset(grpc.StatusCode) - {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
MAX_MESSAGES: Final = 6
"""In one stream."""


def samples() -> Iterable[bytes]:
    for number, method in enumerate(METHODS):
        if method.name in {"Authorize", "AuthorizeStream", "AuthorizeBatch", "GetBudget"}:
            yield bytes([number])


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    method = choices.pick(METHODS)
    service = method.containing_service.full_name
    running = sidecar()
    running.errors.seen.clear()  # other targets have the product log errors too
    channel: Any = running.channel
    kind = channel.stream_stream if method.client_streaming else channel.unary_unary
    call = kind(f"/{service}/{method.name}")
    metadata = [("authorization", f"Bearer {token()}")]
    if method.client_streaming:
        taken = _stream(call, choices)
    else:
        taken = asked(call, message_of(method.input_type, choices), method, metadata)
    assert SECRET.encode() not in running.new_records(), "a raw argument is on record"
    assert not running.errors.seen, running.errors.seen
    return taken


def asked(call: Any, request: bytes, method: MethodDescriptor, metadata: Any = None) -> bool:
    """Whether a call that asks once is answered, and as it should be."""
    try:
        response = call(request, timeout=SECONDS, metadata=metadata)
    except grpc.RpcError as error:
        _check_refusal(error, is_readable=_readable(method.input_type, request))
        return False
    answer = GetMessageClass(method.output_type)()
    answer.ParseFromString(response)
    _check_answer(answer)
    return True


def _stream(call: Any, choices: Choices) -> bool:
    kind = authorization_pb2.AuthorizeStreamRequest
    messages = []
    for number in range(1, 1 + choices.number(MAX_MESSAGES) + 1):
        message = _built(kind.DESCRIPTOR, choices)
        assert isinstance(message, kind)
        message.id = choices.pick([number, 0, 1, 2**64 - 1])
        messages.append(_spoiled(message.SerializeToString(), choices))
    answers = []
    for response in call(iter(messages), timeout=SECONDS):
        answer = authorization_pb2.AuthorizeStreamResponse()
        answer.ParseFromString(response)
        answers.append(answer)
    _check_answers(messages, answers)
    return any(answer.HasField("answer") for answer in answers)


def _check_answers(
    messages: Sequence[bytes], answers: Sequence[authorization_pb2.AuthorizeStreamResponse]
) -> None:
    """Each question has one answer, unless it was cancelled; nothing else has any."""
    asked: list[int] = []
    cancelled: set[int] = set()
    for message in messages:
        request = authorization_pb2.AuthorizeStreamRequest()
        try:
            request.ParseFromString(message)
        except DecodeError:
            asked.append(0)
            continue
        if request.WhichOneof("message") == "cancel":
            cancelled.add(request.id)
        else:
            asked.append(request.id)
    answered = [answer.id for answer in answers]
    for number in set(asked) | set(answered):
        missing = asked.count(number) - answered.count(number)
        assert missing == 0 or (missing > 0 and number in cancelled), (asked, answered)
    for answer in answers:
        assert answer.WhichOneof("result") is not None
        _check_answer(answer)
        if answer.HasField("failure"):
            assert answer.failure.reason_code != ReasonCode.INTERNAL
            assert SECRET not in answer.failure.message


def _check_refusal(error: Any, *, is_readable: bool) -> None:
    assert SECRET not in str(error.details())
    if not is_readable:  # gRPC answers itself, before any of us is asked
        assert error.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
        return
    assert error.code() in EXPECTED, f"{error.code()}: {error.details()}"
    status = status_pb2.Status()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    assert info.reason in set(ReasonCode)
    assert info.reason != ReasonCode.INTERNAL


def _check_answer(answer: Message) -> None:
    """No answer is another tenant's, and every permit is for what was said."""
    for message in _all_in(answer):
        assert getattr(message, "tenant_id", TENANT) in {TENANT, "tenant_other"}
        permit = getattr(message, "permit", "")
        if permit:
            assert isinstance(message, authorization_pb2.AuthorizeResponse)
            assert message.decision
            claims = jose.said(permit)[1]
            assert claims["tctx"]["tenant"] == message.tenant_id  # type: ignore[call-overload,index]
            assert claims["sub"] == message.actor_id == "user-7"
            assert SECRET not in json.dumps(claims)
        elif isinstance(message, authorization_pb2.AuthorizeResponse):
            assert not message.decision


def _all_in(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for each in value if not isinstance(value, Message) else [value]:
                yield from _all_in(each)


def message_of(kind: Descriptor, choices: Choices) -> bytes:
    """A message, soundly made where nothing else was chosen."""
    return _spoiled(_built(kind, choices).SerializeToString(), choices)


def _spoiled(message: bytes, choices: Choices) -> bytes:
    """Changed in its bytes, one time in four."""
    return edited_bytes(message, choices) if choices.number(4) == 1 else message


def _built(kind: Descriptor, choices: Choices, depth: int = 0) -> Message:
    """A message with every field set, soundly where nothing else was chosen."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        if field.containing_oneof is not None and field.name == "cancel" and not choices.yes():
            continue
        if field.name in {"usage", "quantities"} and not choices.yes():
            continue  # they stand in place of charges
        if choices.number(16) == 1:
            continue
        count = choices.pick([1, 2, 40]) if field.is_repeated else 1
        for _ in range(count if depth < 2 else 1):
            _set(message, field, choices, depth)
    return message


def _set(message: Any, field: FieldDescriptor, choices: Choices, depth: int) -> None:
    value: Any
    if field.message_type is not None:
        below = _built(field.message_type, choices, depth + 1)
        if field.is_repeated:
            getattr(message, field.name).append(below)
        else:
            getattr(message, field.name).CopyFrom(below)
        return
    usual = USUAL.get(field.name, [1])
    at = choices.number(len(usual) + 2)
    if at < len(usual):
        value = usual[at]
    elif at == len(usual):
        value = choices.some() if field.type == FieldDescriptor.TYPE_BYTES else choices.text()
    else:
        value = choices.pick(ODD_VALUES)
    try:
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    except (OverflowError, TypeError, ValueError):
        pass  # no value of the field's type


def _readable(kind: Descriptor, request: bytes) -> bool:
    try:
        GetMessageClass(kind)().ParseFromString(request)
    except DecodeError:
        return False
    return True
