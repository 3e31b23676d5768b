"""Delegations on their way from one runtime to another."""

from __future__ import annotations

import asyncio
import json
import traceback
from email.message import Message
from typing import Any

import pytest

from pdp.api.v1 import authorization_pb2
from pdp.client import AsyncGuard, Delegation, DelegationRefused, Guard, PermitDenied
from pdp.client.acting import Identity
from pdp.client.delegation import A2A_KEY, TYPE, delegate, token_in
from pdp.permit.signing import SigningKey
from pdp.testing import SidecarProcess
from tests.delegation.parties import IDP

READ = {"order_id": "918"}
TOKEN = SigningKey.generate().sign({"a": "secret-claim"}, kind=TYPE)
OTHER = SigningKey.generate().sign({}, kind=TYPE)
DELEGATION = Delegation(token=TOKEN, id="d1", agents=("worker",), expires_at=2e9)


def user() -> str:
    return IDP.token("tenant_acme", "user-7", roles=["viewer"], scopes=["orders:read"])


def headers_of_http_server(*headers: tuple[str, str]) -> Message:
    """The class that http.server has them in is a Message, and no Mapping."""
    message = Message()
    for name, value in headers:
        message[name] = value
    return message


def test_it_arrives_by_every_carrier() -> None:
    bearer = f"Bearer {TOKEN}"
    carriers: list[Any] = [
        DELEGATION,
        DELEGATION.headers(),
        DELEGATION.metadata(),
        DELEGATION.a2a_metadata(),
        DELEGATION.to_message(),
        {"Authorization": bearer, "Content-Type": "application/json"},
        {"AUTHORIZATION": bearer.replace("Bearer", "bearer")},
        [(b"Authorization", bearer.encode()), (b"host", b"x")],  # ASGI
        [("authorization", bearer.encode())],  # Kafka
        [("authorization", bearer), ("grpc-trace-bin", b"\xff")],
        {**DELEGATION.a2a_metadata(), "traceparent": "x", "other": {"token": "y"}},
        json.dumps({**DELEGATION.a2a_metadata(), "order": "918"}).encode(),
        DELEGATION.to_message().decode(),  # a queue that gives texts
        headers_of_http_server(("Host", "x"), ("Authorization", bearer)),
    ]
    for carrier in carriers:
        assert token_in(carrier) == TOKEN


@pytest.mark.parametrize(
    "carrier",
    (
        {},
        [],
        (),
        {"x-authorization": "Bearer x"},
        b"{}",
        "{}",
        b'{"token":"x"}',
        {"": ""},
        headers_of_http_server(("Host", "x")),
    ),
)
def test_nobody_acts_where_there_is_none(carrier: Any) -> None:
    with pytest.raises(DelegationRefused) as refused:
        token_in(carrier)
    assert refused.value.reason_code == "identity_missing"


@pytest.mark.parametrize(
    "carrier",
    (
        # Several, the same one twice among them.
        [("authorization", f"Bearer {TOKEN}"), ("Authorization", f"Bearer {OTHER}")],
        [("authorization", f"Bearer {TOKEN}")] * 2,
        {**DELEGATION.headers(), **DELEGATION.a2a_metadata()},
        {"authorization": f"Bearer {TOKEN}", "Authorization": f"Bearer {OTHER}"},
        {"authorization": f"Bearer {TOKEN}, Bearer {OTHER}"},
        headers_of_http_server(
            ("Authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {OTHER}")
        ),
        {"authorization": [f"Bearer {TOKEN}"]},
        b'{"urn:agent-pdp:delegation":{"token":"a"},"urn:agent-pdp:delegation":{"token":"b"}}',
        # Something else.
        {"authorization": user()},
        {"authorization": f"Bearer {user()}"},
        {"authorization": f"Bearer {SigningKey.generate().sign({})}"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": TOKEN},
        {"authorization": "Bearer "},
        {"authorization": ""},
        {"authorization": None},
        {"authorization": f"Bearer {TOKEN}."},
        {"authorization": f"Bearer {TOKEN.replace('.', '..')}"},
        {"authorization": f"Bearer {TOKEN}{'A' * 9_000}"},
        {"authorization": "Bearer !.b.c"},
        {A2A_KEY: TOKEN},
        {A2A_KEY: {"token": 5}},
        {A2A_KEY: {"token": TOKEN, "more": 1}},
        {A2A_KEY: None},
        b"",
        b"[]",
        b"\xff",
        b'"x"',
        "\ud800",
        TOKEN,
        None,
        5,
        [("authorization",)],
    ),
)
def test_nobody_acts_under_several_or_something_else(carrier: Any) -> None:
    with pytest.raises(DelegationRefused) as refused:
        token_in(carrier)
    assert refused.value.reason_code == "token_invalid"
    assert "secret" not in str(refused.value)
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize(
    "answer",
    (
        {},
        {"token": user(), "agents": ["worker"]},
        {"token": TOKEN, "agents": ["worker", "another"]},
        {"token": TOKEN, "agents": []},
    ),
)
def test_an_answer_that_holds_no_such_delegation_gives_none(answer: dict[str, Any]) -> None:
    identity = Identity()
    with identity.acting_for(user(), context=None, traceparent=""):
        steps = delegate(
            identity,
            "worker",
            tools=["orders.read"],
            arguments=None,
            ttl_seconds=0,
            budget=(),
            request_id="",
        )
        next(steps)
        with pytest.raises(DelegationRefused) as refused:
            steps.send(authorization_pb2.DelegateResponse(**answer))
    assert refused.value.reason_code == "token_invalid"


def test_its_token_shows_nowhere_by_itself() -> None:
    assert TOKEN not in repr(DELEGATION)
    assert TOKEN not in str(DELEGATION)


def test_an_agent_acts_inside_the_with_and_nobody_does_after(sidecar: SidecarProcess) -> None:
    with Guard(sidecar.target) as guard:
        with guard.acting_for(user()):
            delegation = guard.delegate("worker", tools=["orders.read"])
        assert delegation.agents == ("worker",)
        with guard.accept(delegation.to_message()):
            assert guard.authorize("orders.read", READ).agents == ("worker",)
        with pytest.raises(PermitDenied) as denied:
            guard.authorize("orders.read", READ)
        assert denied.value.reason_code == "identity_missing"
        with pytest.raises(DelegationRefused), guard.accept({}):
            raise AssertionError


def test_both_faces_delegate(sidecar: SidecarProcess) -> None:
    async def run() -> tuple[str, ...]:
        async with AsyncGuard(sidecar.target) as guard:
            with guard.acting_for(user()):
                first = await guard.delegate("one", tools=["orders.read"], request_id="both-1")
                again = await guard.delegate("one", tools=["orders.read"], request_id="both-1")
                assert first.token == again.token
            with guard.accept(first):
                second = await guard.delegate("two", tools=["orders.read"])
                with pytest.raises(DelegationRefused) as refused:
                    await guard.delegate("three", tools=["mail.send"])
                assert refused.value.reason_code == "delegation_too_wide"
            with guard.accept(second.headers()):
                return (await guard.authorize("orders.read", READ)).agents

    assert asyncio.run(run()) == ("one", "two")


def test_what_can_not_be_asked_is_refused_and_tells_no_secret(sidecar: SidecarProcess) -> None:
    bearer = user()
    with Guard(sidecar.target) as guard:
        with pytest.raises(DelegationRefused) as refused:
            guard.delegate("worker", tools=["orders.read"])
        assert refused.value.reason_code == "identity_missing"
        asked: list[tuple[dict[str, Any], str]] = [
            ({"tools": []}, "request_invalid"),
            ({"tools": ["orders.read"], "arguments": {"orders.read": ["a"]}}, "request_invalid"),
            ({"tools": ["orders.read"], "budget": [("llm", "usd_micros", -1)]}, "request_invalid"),
            ({"tools": ["orders.read"], "budget": [("llm", "usd_micros", 1.5)]}, "request_invalid"),
            ({"tools": ["orders.read"], "ttl_seconds": 2**40}, "request_invalid"),
            (
                {"tools": ["orders.read"], "arguments": {"orders.read": {"a": {"max": {1}}}}},
                "request_invalid",
            ),
            (
                {"tools": ["orders.read"], "arguments": {"mail.send": {"a": {"max": 1}}}},
                "request_invalid",
            ),
        ]
        for fields, code in asked:
            with (
                guard.acting_for(bearer),
                pytest.raises(DelegationRefused) as refused,
            ):
                guard.delegate("worker", **fields)
            assert refused.value.reason_code == code
            assert refused.value.__cause__ is refused.value.__context__ is None
            for frame, _ in traceback.walk_tb(refused.value.__traceback__):
                if "pdp/client" in frame.f_code.co_filename:
                    assert bearer not in map(str, frame.f_locals.values())
    with Guard("unix:///nowhere/pdp.sock", timeout_seconds=0.2) as guard:
        with guard.acting_for(bearer), pytest.raises(DelegationRefused) as refused:
            guard.delegate("worker", tools=["orders.read"])
        assert refused.value.reason_code in ("pdp_unavailable", "deadline_exceeded")
