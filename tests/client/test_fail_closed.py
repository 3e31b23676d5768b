"""Whatever fails: the body of the tool does not run."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from pdp.client import Guard, PermitDenied
from pdp.permit.signing import SigningKey
from pdp.testing import SidecarProcess, TokenIssuer
from tests.client.faces import Face
from tests.client.stand_in import Context, Request, Response, StandIn

TOKEN = "the.secret.token"
ARGUMENT = "the-secret-argument"
Attempt = Callable[..., PermitDenied]


def attempt(face: Face, token: str | None = TOKEN, **options: Any) -> PermitDenied:
    """Call a guarded tool, which must be refused; the refusal."""
    ran = []

    @face.tool("orders.update", **options)
    def update_order(order_id: str) -> None:
        ran.append(order_id)

    scope = nullcontext() if token is None else face.acting_for(token)
    with scope, pytest.raises(PermitDenied) as caught:
        update_order(ARGUMENT)
    assert not ran
    denied = caught.value
    assert denied.tool == "orders.update"
    shown = f"{denied} {denied!r} {denied.args}"
    assert denied.__suppress_context__ or denied.__context__ is None
    assert denied.__cause__ is None
    assert ARGUMENT not in shown
    assert TOKEN not in shown
    assert "eyJ" not in shown  # how every permit begins
    return denied


def test_outside_acting_for_nothing_is_asked(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    assert attempt(face_of(stand_in.target), token=None).reason_code == "identity_missing"
    assert not stand_in.asked


@pytest.mark.parametrize("token", ("", None))
def test_acting_for_no_token_is_acting_for_nobody(
    face_of: Callable[..., Face], stand_in: StandIn, token: Any
) -> None:
    face = face_of(stand_in.target)
    with face.acting_for(token):
        assert attempt(face, token=None).reason_code == "identity_missing"


@pytest.mark.parametrize(
    "token", ("Bearer abc", "abc\r\nx-admin: 1", "abc\x00", "\u0430bc", "a b", "=")
)
def test_what_is_no_token_is_refused_before_it_is_sent(
    face_of: Callable[..., Face], stand_in: StandIn, token: str
) -> None:
    assert attempt(face_of(stand_in.target), token=token).reason_code == "token_invalid"
    assert not stand_in.asked


def test_a_token_that_is_no_text_is_refused(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    assert attempt(face_of(stand_in.target), token=b"abc").reason_code == "guard_failed"  # type: ignore[arg-type]
    assert not stand_in.asked


def test_without_a_sidecar(face_of: Callable[..., Face], tmp_path: Path) -> None:
    denied = attempt(face_of(f"unix://{tmp_path}/nobody.sock"))
    assert denied.reason_code == "pdp_unavailable"
    assert "see that it runs" in str(denied)


def test_a_sidecar_that_hangs_meets_the_deadline(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    def hang(request: Request, _context: Context) -> Response:
        stand_in.released.wait()
        return stand_in.allow(request)

    stand_in.answer = hang
    started = time.monotonic()
    denied = attempt(face_of(stand_in.target, timeout_seconds=0.2))
    assert denied.reason_code == "deadline_exceeded"
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "greeting",
    (b"", b"HTTP/1.1 200 OK\r\n\r\n{}", b"\x00" * 64),
    ids=("silent", "http/1.1", "zeros"),
)
def test_something_else_at_the_socket(face_of: Callable[..., Face], greeting: bytes) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="pdp-") as directory,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = f"{directory}/other.sock"
        listener.bind(path)
        listener.listen()
        accepted: list[socket.socket] = []

        def greet() -> None:
            with suppress(OSError):
                while True:
                    accepted.append(listener.accept()[0])
                    accepted[-1].sendall(greeting)

        greeter = threading.Thread(target=greet)
        greeter.start()
        started = time.monotonic()
        denied = attempt(face_of(f"unix://{path}", timeout_seconds=0.5))
        assert denied.reason_code in {"deadline_exceeded", "pdp_unavailable"}
        assert time.monotonic() - started < 3
        listener.shutdown(socket.SHUT_RDWR)
        greeter.join()
        for connection in accepted:
            connection.close()


def test_ctrl_c_while_the_sidecar_is_asked_runs_nothing(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    def interrupt(request: Request, _context: Context) -> Response:
        os.kill(os.getpid(), signal.SIGINT)
        stand_in.released.wait()
        return stand_in.allow(request)

    stand_in.answer = interrupt
    face = face_of(stand_in.target, timeout_seconds=20)
    ran = []

    @face.tool("orders.read")
    def read_order() -> None:
        ran.append(1)

    with face.acting_for(TOKEN), pytest.raises(KeyboardInterrupt):
        read_order()
    assert not ran


@pytest.mark.parametrize("timeout_seconds", (0, -1, 61, float("inf"), float("nan")))
def test_a_guard_has_a_deadline(timeout_seconds: float) -> None:
    with pytest.raises(ValueError, match="timeout_seconds"):
        Guard("unix:///nowhere.sock", timeout_seconds=timeout_seconds)


@pytest.mark.parametrize(
    "target",
    (
        "pdp.example:443",
        "10.0.0.7:50051",
        "dns:///localhost.example:443",
        "localhost.example:1",
        "127.0.0.1.example:1",
        "",
    ),
)
def test_beyond_this_machine_a_connection_is_encrypted(target: str) -> None:
    with pytest.raises(ValueError, match="credentials"):
        Guard(target)
    Guard(target, credentials=grpc.ssl_channel_credentials())


@pytest.mark.parametrize("target", ("localhost:1", "127.0.0.1:50051", "[::1]:1", "unix:pdp.sock"))
def test_on_this_machine_it_need_not_be(target: str) -> None:
    Guard(target)


def test_a_proxy_of_the_environment_sees_nothing(
    face_of: Callable[..., Face], stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    face = face_of(f"127.0.0.1:{stand_in.port}")
    with face.acting_for(TOKEN):
        face.authorize("orders.read", {})


def deny(**fields: Any) -> Callable[[StandIn, Request], Any]:
    return lambda _stand_in, _request: Response(**fields)


def allow(**changes: Any) -> Callable[[StandIn, Request], Any]:
    return lambda stand_in, request: stand_in.allow(request, **changes)


def edited(**fields: Any) -> Callable[[StandIn, Request], Any]:
    def answer(stand_in: StandIn, request: Request) -> Response:
        response = stand_in.allow(request)
        for name, value in fields.items():
            setattr(response, name, value)
        return response

    return answer


def tampered(stand_in: StandIn, request: Request) -> Response:
    response = stand_in.allow(request)
    header, payload, signature = response.permit.split(".")
    response.permit = f"{header}.{payload[:-2]}AA.{signature}"
    return response


ANSWERS: dict[str, tuple[Callable[[StandIn, Request], Any], str]] = {
    "empty": (deny(), "permit_missing"),
    "garbage": (lambda _stand_in, _request: b"\xff\xff\xff", "internal"),
    "no": (deny(reason_code="scope_missing"), "scope_missing"),
    "no, with a permit": (edited(decision=False, reason_code="scope_missing"), "scope_missing"),
    "no, called ok": (edited(decision=False), "permit_missing"),
    "no, with a code that is none": (deny(reason_code=f"Bearer {TOKEN}"), "permit_missing"),
    "yes, without a permit": (edited(permit=""), "permit_missing"),
    "yes, with garbage": (edited(permit="eyJ.eyJ.eyJ"), "permit_invalid"),
    "yes, with the token": (edited(permit=TOKEN), "permit_invalid"),
    "yes, far too long": (edited(permit="eyJ" * 100_000), "permit_invalid"),
    "yes, tampered with": (tampered, "permit_invalid"),
    "yes, by another key": (allow(signed_by=SigningKey.generate()), "permit_invalid"),
    "yes, by another issuer": (allow(issuer="other-pdp"), "permit_invalid"),
    "yes, for another tool": (allow(tool="orders.delete"), "permit_mismatch"),
    "yes, for other arguments": (allow(arguments_sha256="0" * 64), "permit_mismatch"),
    "yes, for another question": (allow(transaction="req-0"), "permit_mismatch"),
    "yes, for another resource": (allow(resource="order/919"), "permit_mismatch"),
    "yes, for another tenant": (allow(tenant="tenant_globex"), "permit_mismatch"),
    "yes, for another audience": (allow(audience="mail"), "permit_mismatch"),
    "yes, by another decision": (edited(decision_id="d-0"), "permit_mismatch"),
    "yes, long ago": (allow(issued_at=1000, expires_at=2000), "permit_expired"),
    "yes, tomorrow": (
        allow(issued_at=int(time.time()) + 86400, expires_at=int(time.time()) + 90000),
        "permit_expired",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_no_permit_for_this_call(
    face_of: Callable[..., Face], stand_in: StandIn, name: str
) -> None:
    answer, reason_code = ANSWERS[name]
    stand_in.answer = lambda request, _context: answer(stand_in, request)
    face = face_of(stand_in.target, audience="orders")
    assert attempt(face, resource=lambda **_: ("order", "918")).reason_code == reason_code
    assert not stand_in.reports


def test_the_right_permit_runs_the_body(face_of: Callable[..., Face], stand_in: StandIn) -> None:
    face = face_of(stand_in.target, audience="orders")

    @face.tool("orders.update", resource=lambda order_id: ("order", order_id))
    def update_order(order_id: str) -> str:
        return order_id

    with face.acting_for(TOKEN):
        assert update_order("918") == "918"
    assert stand_in.tokens == [f"Bearer {TOKEN}"]


def test_an_earlier_permit_is_no_answer(face_of: Callable[..., Face], stand_in: StandIn) -> None:
    """Not even for the same call: each is asked for by itself."""
    first: list[Response] = []

    def answer(request: Request, _context: Context) -> Response:
        first.append(stand_in.allow(request))
        return first[0]

    stand_in.answer = answer
    face = face_of(stand_in.target)
    with face.acting_for(TOKEN):
        face.authorize("orders.update", {"order_id": ARGUMENT})
    assert attempt(face).reason_code == "permit_mismatch"


def test_pinned_keys_are_the_only_ones(face_of: Callable[..., Face], stand_in: StandIn) -> None:
    pinned = SigningKey.generate().public_set
    assert attempt(face_of(stand_in.target, permit_keys=pinned)).reason_code == "permit_invalid"
    assert stand_in.keys_asked == 0


def test_a_new_key_of_the_sidecar_is_fetched_once(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)
    with face.acting_for(TOKEN):
        for _ in range(3):
            face.authorize("orders.read", {})
        stand_in.key = SigningKey.generate()
        for _ in range(3):
            face.authorize("orders.read", {})
    assert stand_in.keys_asked == 2


def status(code: grpc.StatusCode, *details: Any, text: str = "It failed.") -> Any:
    message = Status(code=code.value[0], message=text)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        message.details.append(packed)
    return (("grpc-status-details-bin", message.SerializeToString()),)


OWN = ErrorInfo(reason="budget_unavailable", domain="agent-pdp")
STATUSES: dict[str, tuple[Any, str, float | None]] = {
    "its own reason": (status(grpc.StatusCode.INTERNAL, OWN), "budget_unavailable", None),
    "and when to ask again": (
        status(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            RetryInfo(retry_delay=Duration(seconds=3, nanos=500_000_000)),
            ErrorInfo(reason="rate_limited", domain="agent-pdp"),
        ),
        "rate_limited",
        3.5,
    ),
    "another's reason": (
        status(grpc.StatusCode.INTERNAL, ErrorInfo(reason="ok", domain="proxy"), text=TOKEN),
        "internal",
        None,
    ),
    "a reason that is none": (
        status(grpc.StatusCode.INTERNAL, ErrorInfo(reason=TOKEN, domain="agent-pdp"), text=TOKEN),
        "internal",
        None,
    ),
    "garbage": ((("grpc-status-details-bin", b"\xff\xff"),), "internal", None),
    "garbage within": (
        (
            (
                "grpc-status-details-bin",
                Status(
                    details=[
                        AnyMessage(
                            type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff"
                        )
                    ]
                ).SerializeToString(),
            ),
        ),
        "internal",
        None,
    ),
    "nothing": ((), "internal", None),
}


@pytest.mark.parametrize("name", STATUSES)
def test_a_status_is_read_for_its_reason(
    face_of: Callable[..., Face], stand_in: StandIn, name: str
) -> None:
    trailers, reason_code, retry_after_seconds = STATUSES[name]

    def answer(_request: Request, context: Context) -> Response:
        context.set_trailing_metadata(trailers)
        context.abort(grpc.StatusCode.INTERNAL, f"said {TOKEN}")
        raise AssertionError

    stand_in.answer = answer
    denied = attempt(face_of(stand_in.target))
    assert denied.reason_code == reason_code
    assert denied.retry_after_seconds == retry_after_seconds


def test_a_call_too_many_is_asked_once_and_told_when_to_ask_again(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    trailers, *_ = STATUSES["and when to ask again"]

    def answer(_request: Request, context: Context) -> Response:
        context.set_trailing_metadata(trailers)
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Try again later.")
        raise AssertionError

    stand_in.answer = answer
    denied = attempt(face_of(stand_in.target))
    assert (denied.reason_code, denied.retry_after_seconds) == ("rate_limited", 3.5)
    assert len(stand_in.asked) == 1, "waiting is the caller's choice, not the stub's"


def raising(error: BaseException) -> Callable[..., Any]:
    def resource(**_arguments: Any) -> Any:
        raise error

    return resource


@pytest.mark.parametrize(
    "resource",
    (
        raising(ValueError(ARGUMENT)),
        raising(StopIteration("a result")),
        raising(StopAsyncIteration()),
        raising(RecursionError()),
        lambda: ("order", "918"),
        lambda **_: "order/918",
        lambda **_: ("order",),
        lambda **_: ("order", 918),
        lambda **_: ("order", ""),
        lambda **_: ("order", "918", "more"),
        lambda **_: {"type": "order"},
        lambda **_: True,
    ),
)
def test_a_resource_that_is_none(
    face_of: Callable[..., Face], stand_in: StandIn, resource: Callable[..., Any]
) -> None:
    assert attempt(face_of(stand_in.target), resource=resource).reason_code == "guard_failed"
    assert not stand_in.asked


def test_a_fault_in_the_guard_is_told_by_kind_and_place(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    denied = attempt(face_of(stand_in.target), resource=raising(KeyError(ARGUMENT)))
    assert "KeyError at test_fail_closed.py:" in str(denied)


def test_an_observer_that_stops_an_iteration_gives_no_permit(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    def observe(_decision: object) -> None:
        raise StopIteration

    assert attempt(face_of(stand_in.target, observe=observe)).reason_code == "guard_failed"


@pytest.mark.parametrize("kind", (StopIteration, StopAsyncIteration, ValueError, OSError))
def test_whatever_the_transport_raises_gives_no_permit(
    face_of: Callable[..., Face],
    stand_in: StandIn,
    kind: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A StopIteration that ended the walk would count as its result."""

    def fail(*_args: object) -> None:
        raise kind(ARGUMENT)

    monkeypatch.setattr("pdp.channel.connect", fail)
    monkeypatch.setattr("pdp.channel.connect_async", fail)
    assert attempt(face_of(stand_in.target)).reason_code == "guard_failed"


@pytest.mark.parametrize("kind", (KeyboardInterrupt, SystemExit))
def test_an_interrupt_while_asking_stays_one(
    face_of: Callable[..., Face], stand_in: StandIn, kind: type[BaseException]
) -> None:
    ran = []

    def observe(_decision: object) -> None:
        raise kind

    face = face_of(stand_in.target, observe=observe)

    @face.tool("orders.read")
    def read_order() -> None:
        ran.append(1)

    with face.acting_for(TOKEN), pytest.raises(kind):
        read_order()
    assert not ran


def test_an_identity_that_ends_while_it_is_asked_for_gives_nothing(stand_in: StandIn) -> None:
    asked = threading.Event()

    def answer(request: Request, _context: Context) -> Response:
        asked.set()
        ended.wait()
        return stand_in.allow(request)

    ended = threading.Event()
    stand_in.answer = answer
    with Guard(stand_in.target) as guard:
        acting = guard.acting_for(TOKEN)

        def end() -> None:
            asked.wait()
            acting.__exit__(None, None, None)
            ended.set()

        ran = []

        @guard.tool("orders.read")
        def read_order() -> None:
            ran.append(1)

        ender = threading.Thread(target=end)
        ender.start()
        acting.__enter__()
        with pytest.raises(PermitDenied) as caught:
            read_order()
        ender.join()
    assert caught.value.reason_code == "identity_ended"
    assert not ran


def test_a_refusal_survives_pickling_and_copying() -> None:
    denied = PermitDenied(
        "rate_limited", "wait", tool="t", decision_id="d-1", retry_after_seconds=2.0
    )
    for copied in (pickle.loads(pickle.dumps(denied)), copy.copy(denied)):  # noqa: S301 - our own bytes
        assert str(copied) == str(denied) == "t did not run: wait (rate_limited)"
        assert (copied.tool, copied.decision_id) == ("t", "d-1")
        assert copied.retry_after_seconds == 2.0


def test_a_refusal_carries_its_decision(face: Face, token: str) -> None:
    @face.tool("orders.delete")
    def delete_order(order_id: str) -> str:
        return order_id

    with face.acting_for(token), pytest.raises(PermitDenied) as caught:
        delete_order("918")
    assert caught.value.reason_code == "tool_not_allowed"
    assert len(caught.value.decision_id) == 36
    assert caught.value.retry_after_seconds is None


def test_a_killed_sidecar_blocks_and_a_new_one_is_found_again(
    face_of: Callable[..., Face], issuer: TokenIssuer, token: str, tmp_path: Path
) -> None:
    bundle = Path(__file__).parents[2] / "policies" / "bundle.tar.gz"
    with SidecarProcess(tmp_path, issuer=issuer, bundle=bundle) as sidecar:
        face = face_of(sidecar.target)
        ran = []

        @face.tool("orders.read")
        def read_order(order_id: str) -> None:
            ran.append(order_id)

        with face.acting_for(token):
            read_order("1")
            sidecar.kill()
            with pytest.raises(PermitDenied) as caught:
                read_order("2")
            assert caught.value.reason_code == "pdp_unavailable"
            assert ran == ["1"]
            sidecar.start()
            ready = time.monotonic()
            while "3" not in ran:
                try:
                    read_order("3")
                except PermitDenied:
                    assert time.monotonic() - ready < 3
