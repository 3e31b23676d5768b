"""What is malformed, forged or oversized is refused cleanly, and nothing runs."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of

ROOT: Final = Path(__file__).parents[2]
ISSUER: Final = TokenIssuer()
STRANGER: Final = TokenIssuer()
"""Says that it is ISSUER, and has another key."""

SERVICES: Final = [
    file.DESCRIPTOR.services_by_name[name]
    for file, name in (
        (authorization_pb2, "AuthorizationService"),
        (budget_pb2, "BudgetService"),
        (execution_pb2, "ExecutionService"),
    )
]
METHODS: Final = [method for service in SERVICES for method in service.methods]
NEEDS_TOKEN: Final = [
    method
    for method in METHODS
    # A message of a stream brings its own, which tests of the stream leave out.
    if method.containing_service.name != "ExecutionService" and not method.client_streaming
]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("bad-input")
    bundle = build_bundle(
        ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    config = {"audit": {"record_policy_input": True}}
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config) as process:
        yield process
        assert process.process is not None
        assert process.process.poll() is None, "the sidecar died of it"
        assert " failed with " not in process.log.read_text(encoding="utf-8")


@pytest.fixture
def tenant() -> str:
    """One that no other test has."""
    return f"tenant_{uuid.uuid4().hex[:12]}"


@pytest.fixture
def caller(sidecar: SidecarProcess, tenant: str) -> Iterator[Caller]:
    token = ISSUER.token(tenant, "user-7", roles=["agent"])
    with Caller(sidecar.target, token=token) as opened:
        yield opened


def records(sidecar: SidecarProcess, *, beyond: int = 0) -> list[dict[str, Any]]:
    """What is on record, beyond that many bytes."""
    (segment,) = (sidecar.state / "audit").glob("*.jsonl")
    with segment.open("rb") as log:
        log.seek(beyond)
        return [json.loads(line) for line in log]


def recorded_bytes(sidecar: SidecarProcess) -> int:
    (segment,) = (sidecar.state / "audit").glob("*.jsonl")
    return segment.stat().st_size


def asked(**changes: Any) -> authorization_pb2.AuthorizeRequest:
    fields = {
        "request_id": str(uuid.uuid4()),
        "action": authorization_pb2.Action(name="orders.update"),
        **changes,
    }
    return authorization_pb2.AuthorizeRequest(**fields)


def charged(*charges: common_pb2.Charge, **changes: Any) -> budget_pb2.ChargeBudgetRequest:
    fields = {"idempotency_key": str(uuid.uuid4()), "charges": charges, **changes}
    return budget_pb2.ChargeBudgetRequest(**fields)


def delegated(**changes: Any) -> authorization_pb2.DelegateRequest:
    fields = {
        "request_id": str(uuid.uuid4()),
        "delegate": "researcher",
        "tools": ["orders.read"],
        **changes,
    }
    return authorization_pb2.DelegateRequest(**fields)


def tokens(amount: int) -> common_pb2.Charge:
    return common_pb2.Charge(budget="llm", unit="tokens_out", amount=amount)


def unsigned(claims: dict[str, object]) -> str:
    parts = ({"alg": "none", "typ": "JWT", "kid": ISSUER.kid}, claims)
    encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    return b".".join([*encoded, b""]).decode()


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


GOOD: Final = ISSUER.token("tenant_acme", "user-7", roles=["agent"])
CLAIMS: Final = {
    "iss": ISSUER.issuer,
    "aud": ISSUER.audience,
    "sub": "user-7",
    "exp": int(time.time()) + 3_600,
    "tenant_id": "tenant_acme",
}
NO_IDENTITY: Final[dict[str, tuple[Sequence[tuple[str, str]], str]]] = {
    "none": ([], "token_missing"),
    "empty": ([("authorization", "")], "token_invalid"),
    "garbage": (bearer("garbage"), "token_invalid"),
    "wrong signature": (
        bearer(STRANGER.token("tenant_acme", "user-7", roles=["agent"])),
        "token_invalid",
    ),
    "alg none": (bearer(unsigned(CLAIMS)), "token_invalid"),
    "wrong audience": (bearer(ISSUER.token("tenant_acme", "u", aud="others")), "token_invalid"),
    "wrong issuer": (bearer(ISSUER.token("tenant_acme", "u", iss="others")), "token_invalid"),
    "expired": (bearer(ISSUER.token("tenant_acme", "u", lifetime_seconds=-60)), "token_expired"),
    "not yet valid": (bearer(ISSUER.token("tenant_acme", "u", nbf=2**33)), "token_invalid"),
    "no tenant": (bearer(ISSUER.token(None, "user-7")), "tenant_missing"),
    "no actor": (bearer(ISSUER.token("tenant_acme", "")), "token_invalid"),
    "two tokens": ([*bearer(GOOD), *bearer(GOOD)], "token_invalid"),
    "basic": ([("authorization", "Basic dXNlcjpwYXNz")], "token_invalid"),
    "no scheme": ([("authorization", GOOD)], "token_invalid"),
    "another header": ([("x-authorization", f"Bearer {GOOD}")], "token_missing"),
    "a tenant header": ([("x-tenant-id", "tenant_acme")], "token_missing"),
}


@pytest.mark.parametrize("method", NEEDS_TOKEN, ids=lambda method: str(method.name))
@pytest.mark.parametrize("case", NO_IDENTITY)
def test_no_method_answers_without_a_valid_identity(
    sidecar: SidecarProcess, method: Any, case: str
) -> None:
    metadata, reason_code = NO_IDENTITY[case]
    before = len(records(sidecar))
    with Caller(sidecar.target, metadata=metadata) as nobody:
        refusal = refusal_of(call, nobody, method, whole(method.input_type))

    assert refusal.status is grpc.StatusCode.UNAUTHENTICATED
    assert refusal.reason_code == reason_code
    assert GOOD not in refusal.message
    (record,) = records(sidecar)[before:]
    assert (record["reason_code"], record["outcome"]) == (reason_code, "denied")
    assert record["tenant_id"] is None


ARGUMENTS: Final = {
    "not JSON": b"order 918",
    "cut off": b'{"a":',
    "empty text": b" ",
    "two values": b"{}{}",
    "a list": b"[]",
    "a text": b'"{}"',
    "a number": b"1",
    "null": b"null",
    "duplicate keys": b'{"a":1,"a":2}',
    "duplicate keys, escaped": b'{"a":1,"\\u0061":2}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":-Infinity}',
    "a number beyond a double": b'{"a":1e999}',
    "2^53": b'{"a":9007199254740992}',
    "2^60": b'{"a":1152921504606846976}',
    "10,000 digits": b'{"a":' + b"9" * 10_000 + b"}",
    "1,000 deep": b'{"a":' + b"[" * 1_000 + b"]" * 1_000 + b"}",
    "100,000 deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "65 deep": b'{"a":' * 65 + b"1" + b"}" * 65,
    "a lone surrogate": b'{"a":"\\ud800"}',
    "not UTF-8": b'{"a":"\xff"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "2 MiB": b'{"a":"' + b"x" * (2 * 1024 * 1024) + b'"}',
}


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("field", ("arguments_json", "context_json"))
def test_what_is_not_one_json_object_of_the_agreed_form_is_refused(
    sidecar: SidecarProcess, caller: Caller, field: str, case: str
) -> None:
    before = len(records(sidecar))
    refusal = refusal_of(caller.authorization.Authorize, asked(**{field: ARGUMENTS[case]}))
    assert refusal.status is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.reason_code == "arguments_invalid"
    assert refusal.fields == (field,)
    assert "918" not in refusal.message
    (record,) = records(sidecar)[before:]
    assert (record["reason_code"], record["outcome"]) == ("arguments_invalid", "denied")


def test_arguments_are_not_even_read_for_a_caller_who_is_not_known(
    sidecar: SidecarProcess,
) -> None:
    with Caller(sidecar.target) as stranger:
        refusal = refusal_of(
            stranger.authorization.Authorize, asked(arguments_json=ARGUMENTS["not JSON"])
        )
    assert refusal.reason_code == "token_missing"


MALFORMED: Final[dict[str, tuple[Message, str]]] = {
    "no request id": (asked(request_id=""), "request_id"),
    "10 KB request id": (asked(request_id="x" * 10_240), "request_id"),
    "256 characters": (asked(request_id="x" * 256), "request_id"),
    "space in a key": (asked(request_id="a b"), "request_id"),
    "newline in a key": (asked(request_id="a\n"), "request_id"),
    "zero byte in a key": (asked(request_id="a\0"), "request_id"),
    "no action": (
        authorization_pb2.AuthorizeRequest(request_id="a", arguments_json=b"{}"),
        "action.name",
    ),
    "empty tool": (asked(action=authorization_pb2.Action(name="")), "action.name"),
    "control characters in a tool": (
        asked(action=authorization_pb2.Action(name="orders\x1b[2J")),
        "action.name",
    ),
    "homoglyph in a tool": (
        asked(action=authorization_pb2.Action(name="\u043erders.update")),
        "action.name",
    ),
    "empty resource": (asked(resource=authorization_pb2.Resource()), "resource.type"),
    "control characters in a resource": (
        asked(resource=authorization_pb2.Resource(type="order", id="9\r\n18")),
        "resource.id",
    ),
    "256 characters of resource": (
        asked(resource=authorization_pb2.Resource(type="order", id="9" * 256)),
        "resource.id",
    ),
    "bad audience": (asked(audience="tools mail"), "audience"),
    "negative amount": (charged(tokens(-1)), "charges[0].amount"),
    "zero amount": (charged(tokens(0)), "charges[0].amount"),
    "2^53": (charged(tokens(2**53)), "charges[0].amount"),
    "largest int64": (charged(tokens(2**63 - 1)), "charges[0].amount"),
    "smallest int64": (charged(tokens(-(2**63))), "charges[0].amount"),
    "second charge": (charged(tokens(1), common_pb2.Charge()), "charges[1].budget"),
    "no charge": (charged(), "charges"),
    "a budget twice": (charged(tokens(1), tokens(2)), "charges"),
    "10,000 charges": (charged(*[tokens(1)] * 10_000), "charges"),
    "bad budget": (
        charged(common_pb2.Charge(budget="LLM", unit="tokens_out", amount=1)),
        "charges[0].budget",
    ),
    "bad unit": (
        charged(common_pb2.Charge(budget="llm", unit="tokens out", amount=1)),
        "charges[0].unit",
    ),
    "no idempotency key": (charged(tokens(1), idempotency_key=""), "idempotency_key"),
    "10 KB idempotency key": (
        charged(tokens(1), idempotency_key="x" * 10_240),
        "idempotency_key",
    ),
    "bad tool": (charged(tokens(1), tool="a b"), "tool"),
    "negative time to live": (
        budget_pb2.ReserveBudgetRequest(idempotency_key="a", charges=[tokens(1)], ttl_seconds=-1),
        "ttl_seconds",
    ),
    "a hold for a day": (
        budget_pb2.ReserveBudgetRequest(
            idempotency_key="a", charges=[tokens(1)], ttl_seconds=86_400
        ),
        "ttl_seconds",
    ),
    "no hold id": (budget_pb2.SettleBudgetRequest(idempotency_key="a"), "hold_id"),
    "SQL in a hold id": (
        budget_pb2.ReleaseBudgetRequest(idempotency_key="a", hold_id="' OR 1=1 --"),
        "hold_id",
    ),
    "bad tool of a budget": (budget_pb2.GetBudgetRequest(tool="\x00"), "tool"),
    "10 KB permit": (
        execution_pb2.ReportOutcomeRequest(
            permit="x" * 10_240, outcome=execution_pb2.OUTCOME_EXECUTED
        ),
        "permit",
    ),
    "negative uses": (
        execution_pb2.ReportOutcomeRequest(
            permit="x", outcome=execution_pb2.OUTCOME_EXECUTED, uses=-1
        ),
        "uses",
    ),
    "2^31 uses": (
        execution_pb2.ReportOutcomeRequest(
            permit="x", outcome=execution_pb2.OUTCOME_EXECUTED, uses=2**31 - 1
        ),
        "uses",
    ),
    "no question": (authorization_pb2.AuthorizeBatchRequest(), "questions"),
    "33 questions": (
        authorization_pb2.AuthorizeBatchRequest(questions=[asked() for _ in range(33)]),
        "questions",
    ),
    "a question twice": (
        authorization_pb2.AuthorizeBatchRequest(questions=[asked(request_id="a")] * 2),
        "questions",
    ),
    "no agent": (delegated(delegate=""), "delegate"),
    "control characters in an agent": (delegated(delegate="a\x1b[2J"), "delegate"),
    "256 characters of agent": (delegated(delegate="a" * 256), "delegate"),
    "no tools": (delegated(tools=[]), "tools"),
    "129 tools": (delegated(tools=[f"t{number}" for number in range(129)]), "tools"),
    "bad tool of an agent": (delegated(tools=["orders read"]), "tools[0]"),
    "a tool twice": (delegated(tools=["t", "t"]), "tools"),
    "rules that are not JSON": (delegated(arguments_json=b"{"), "arguments_json"),
    "3 KiB of rules": (
        delegated(arguments_json=json.dumps({"t": {"a": {"prefix": "x" * 3_072}}}).encode()),
        "arguments_json",
    ),
    "an unknown rule": (
        delegated(arguments_json=b'{"orders.read":{"a":{"regex":".*"}}}'),
        "arguments_json",
    ),
    "rules of a tool that is not asked for": (
        delegated(arguments_json=b'{"orders.update":{"a":{"max":1}}}'),
        "arguments_json",
    ),
    "a delegation for two days": (delegated(ttl_seconds=172_800), "ttl_seconds"),
    "a delegation for less than no time": (delegated(ttl_seconds=-1), "ttl_seconds"),
    "a budget of nothing": (delegated(budget=[tokens(0)]), "budget[0].amount"),
    "17 budgets": (delegated(budget=[tokens(1)] * 17), "budget"),
    "no outcome": (execution_pb2.ReportOutcomeRequest(permit="x"), "outcome"),
    "unknown outcome": (
        execution_pb2.ReportOutcomeRequest.FromString(b"\x0a\x01x\x10\x63"),
        "outcome",
    ),
    "message as error type": (
        execution_pb2.ReportOutcomeRequest(
            permit="x", outcome=execution_pb2.OUTCOME_FAILED, error_type="no such order: 918"
        ),
        "error_type",
    ),
    "bad digest": (
        execution_pb2.RedeemPermitRequest(
            permit="x",
            idempotency_key="a",
            tool="t",
            arguments_sha256="A" * 64,
            audience="tools",
        ),
        "arguments_sha256",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_refused_with_the_field_that_is_wrong(
    sidecar: SidecarProcess, caller: Caller, case: str
) -> None:
    request, field = MALFORMED[case]
    (method,) = (each for each in METHODS if each.input_type is request.DESCRIPTOR)
    before = len(records(sidecar))

    refusal = refusal_of(call, caller, method, request)

    assert refusal.status is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.reason_code == "request_invalid"
    assert refusal.fields == (field,)
    assert refusal.message.startswith(field)
    assert len(refusal.message) < 200
    assert len(records(sidecar)) == before, "nothing was decided"


def test_a_sum_that_no_ledger_can_count_is_refused(caller: Caller) -> None:
    held = caller.budget.ReserveBudget(
        budget_pb2.ReserveBudgetRequest(idempotency_key="hold", charges=[tokens(1)])
    )
    most = budget_pb2.SettleBudgetRequest(
        idempotency_key="most", hold_id=held.hold_id, charges=[tokens(2**53 - 1)]
    )
    assert caller.budget.SettleBudget(most).over_hold
    refusal = refusal_of(caller.budget.ChargeBudget, charged(tokens(1)))
    assert refusal.reason_code == "tenant_budget_exceeded"


def test_a_message_of_5_mib_is_refused_by_grpc_itself(caller: Caller) -> None:
    refusal = refusal_of(
        caller.authorization.Authorize, asked(arguments_json=b" " * (5 * 1024 * 1024))
    )
    assert refusal.status is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caller.authorize("orders.read").decision


def test_metadata_of_20_kb_is_refused_by_grpc_itself(sidecar: SidecarProcess) -> None:
    with Caller(sidecar.target, token=GOOD, metadata=[("x-large", "x" * 20_480)]) as caller:
        refusal = refusal_of(caller.authorize, "orders.read")
    assert refusal.status is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_that_is_no_protobuf_is_refused(caller: Caller) -> None:
    # A message of a stream is answered on the stream, which goes on.
    for method in (each for each in METHODS if not each.client_streaming):
        service = method.containing_service.full_name
        raw: Any = caller.channel.unary_unary(f"/{service}/{method.name}")
        refusal = refusal_of(raw, b"\xff\xff\xff\xff")
        # gRPC's own word for it; what matters is that it is no OK.
        assert refusal.status in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}


def test_fields_that_the_contract_does_not_know_change_nothing(caller: Caller) -> None:
    # Field 100: "tenant_globex".
    unknown = b"\xa2\x06\x0dtenant_globex"
    request = asked(request_id="unknown")
    request.MergeFromString(unknown)
    first = caller.authorization.Authorize(request)
    assert first.decision
    assert caller.authorization.Authorize(asked(request_id="unknown")).permit == first.permit


def test_a_method_that_does_not_exist_is_refused(caller: Caller) -> None:
    missing: Any = caller.channel.unary_unary("/pdp.v1.AuthorizationService/Impersonate")
    assert refusal_of(missing, b"").status is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "garbage",
    (b"\x00" * 4096, b"GET / HTTP/1.1\r\nHost: pdp\r\n\r\n", bytes(range(256)) * 64, b""),
    ids=("zeros", "http 1", "bytes", "nothing"),
)
def test_garbage_on_the_socket_harms_nobody(
    sidecar: SidecarProcess, caller: Caller, garbage: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(sidecar.socket))
        raw.sendall(garbage)
        with contextlib.suppress(ConnectionError):
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(65_536):
                pass
    assert caller.authorize("orders.read").decision


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
def test_another_tenants_id_in_any_field_changes_no_tenant(
    sidecar: SidecarProcess, caller: Caller, tenant: str, method: Any
) -> None:
    """Field by field, by the descriptors: a field that is added later is tried too."""
    permit = caller.authorize("orders.read").permit
    token = ISSUER.token(tenant, "user-7", roles=["agent"])
    with untouched_globex(sidecar):
        for field in text_fields(method.input_type):
            request = whole(
                method.input_type, permit=permit, bearer=token, priced=field[0] in PRICED
            )
            put(request, field, "tenant_globex")
            only_of(sidecar, tenant, field, partial(call, caller, method, request))


METADATA: Final = (
    *("tenant", "tenant-id", "tenant_id", "x-tenant", "x-tenant-id", "x-pdp-tenant"),
    *("organisation", "x-organisation-id", "x-scope-orgid", "x-actor-id", "x-user", "x-workload"),
    *("workload-authorization", "x-authorization", "proxy-authorization", "authorization-bin"),
    *("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-client-cert"),
    *("x-ssl-client-cert", "x-real-ip", "host", "cookie", "baggage", "tracestate", "traceparent"),
    *("tool-permit", "delegation", "x-delegation", "impersonate-user", "x-impersonate"),
)
"""Where others take an identity from."""


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
def test_another_tenants_id_in_metadata_changes_no_tenant(
    sidecar: SidecarProcess, caller: Caller, tenant: str, method: Any
) -> None:
    permit = caller.authorize("orders.read").permit
    token = ISSUER.token(tenant, "user-7", roles=["agent"])
    foreign = ISSUER.token("tenant_globex", "user-7", roles=["agent"])
    with untouched_globex(sidecar):
        for key in METADATA:
            for value in ("tenant_globex", f"Bearer {foreign}"):
                raw = value.encode() if key.endswith("-bin") else value
                metadata: Any = [(key, raw)]
                request = whole(method.input_type, permit=permit, bearer=token)
                with Caller(sidecar.target, token=token, metadata=metadata) as fuzzed:
                    only_of(
                        sidecar,
                        tenant,
                        key,
                        partial(call, fuzzed, method, request),
                    )


@contextlib.contextmanager
def untouched_globex(sidecar: SidecarProcess) -> Iterator[None]:
    """What tenant_globex has spent and holds does not change meanwhile."""
    token = ISSUER.token("tenant_globex", "user-7", roles=["agent"])
    with Caller(sidecar.target, token=token) as globex:
        question = budget_pb2.GetBudgetRequest(tool="orders.read")
        before = [(each.spent, each.held) for each in globex.budget.GetBudget(question).limits]
        assert before, "there is something to be touched"
        yield
        after = [(each.spent, each.held) for each in globex.budget.GetBudget(question).limits]
    assert after == before


def only_of(sidecar: SidecarProcess, tenant: str, written: object, ask: Callable[[], Any]) -> None:
    """What is answered, recorded and shown to the policy is of that tenant alone, whatever
    was written where.
    """
    before = recorded_bytes(sidecar)
    with contextlib.suppress(grpc.RpcError):
        answer = ask()
        for message in messages(answer):
            for name in ("tenant_id", "namespace"):
                assert "globex" not in str(getattr(message, name, tenant)), written
    for record in records(sidecar, beyond=before):
        assert record["tenant_id"] in {tenant, None}, written
        if "input" in record:
            assert record["input"]["subject"]["properties"]["tenant"] == tenant, written


def messages(message: Message) -> Iterator[Message]:
    """A message, and all that are in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if not isinstance(value, Message) else [value]:
                yield from messages(inner)


def call(caller: Caller, method: Any, request: Message) -> Any:
    """Call a method by its descriptor."""
    service = method.containing_service
    stub = {
        "AuthorizationService": caller.authorization,
        "BudgetService": caller.budget,
        "ExecutionService": caller.execution,
    }[service.name]
    asked_with: Any = iter([request]) if method.client_streaming else request
    answer = getattr(stub, method.name)(asked_with)
    return next(answer) if method.server_streaming else answer


PRICED = {"usage", "quantities"}
"""Fields that stand in place of charges."""


def whole(
    kind: Descriptor, *, permit: str = "x", bearer: str = GOOD, priced: bool = False
) -> Message:
    """A well-formed request of that kind, with every field set that can be."""
    quantities = [common_pb2.Quantity(unit="tokens_in", amount=1)]
    question = asked(
        resource=authorization_pb2.Resource(type="order", id="918"),
        arguments_json=b"{}",
        context_json=b"{}",
        audience="tools",
    )
    values: dict[str, Any] = {
        "id": 1,
        "question": question,
        "questions": [question],
        "all_or_nothing": True,
        "bearer": bearer,
        "workload_token": "",
        "traceparent": "",
        "timeout": Duration(seconds=5),
        "delegate": "researcher",
        "tools": ["orders.read"],
        "budget": [tokens(1)],
        "request_id": str(uuid.uuid4()),
        "idempotency_key": str(uuid.uuid4()),
        "action": authorization_pb2.Action(name="orders.read"),
        "resource": authorization_pb2.Resource(type="order", id="918"),
        "arguments_json": b"{}",
        "context_json": b"{}",
        "audience": "tools",
        "charges": [tokens(1)],
        "usage": common_pb2.Usage(model="gpt-x", quantities=quantities),
        "quantities": quantities,
        "partial": True,
        "tool": "orders.read",
        "ttl_seconds": 5,
        "hold_id": str(uuid.uuid4()),
        "permit": permit,
        "arguments_sha256": "0" * 64,
        "outcome": execution_pb2.OUTCOME_FAILED,
        "error_type": "OSError",
        "uses": 1,
    }
    names = {field.name for field in kind.fields}
    left_out = ({"charges"} if priced else PRICED) | {"cancel"}
    return GetMessageClass(kind)(**{name: values[name] for name in names - left_out})


def text_fields(kind: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all fields, at any depth, that a tenant's id can be written into."""
    for field in kind.fields:
        if field.message_type is not None:
            yield from text_fields(field.message_type, (*path, field.name))
        elif field.type in {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES}:
            yield (*path, field.name)


def put(request: Message, path: tuple[str, ...], tenant: str) -> None:
    """Write a tenant's id into a field, as JSON where the field holds JSON."""
    message: Any = request
    for name in path[:-1]:
        member = getattr(message, name)
        message = member if isinstance(member, Message) else member[0]
    if path[-1].endswith("_json"):
        claims = {"tenant": tenant, "tenant_id": tenant, "subject": {"tenant": tenant}}
        setattr(message, path[-1], json.dumps(claims).encode())
    elif not isinstance(getattr(message, path[-1]), str | bytes):
        getattr(message, path[-1])[:] = [tenant]
    else:
        setattr(message, path[-1], tenant)
