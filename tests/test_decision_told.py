"""All that one decision says, word by word: to the policy, in the permit, and on record."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from pdp import decision
from pdp.admission import Priority, ServiceClass
from pdp.audit.record import AuditError, AuditRecord, Outcome
from pdp.budget.ledger import Charge
from pdp.canonical import JsonObject, canonical_bytes, sha256_hex
from pdp.errors import RequestError
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.subject import Delegation, Link, Subject
from pdp.permit.claims import Permit
from pdp.policy.engine import Entrypoint, PolicyError, WalkedEngine
from pdp.policy.live import LivePolicy
from pdp.reason import ReasonCode
from tests.test_decision import ALLOWED, LIMITS, NOW, QUESTION, Policy, Steps, asked, opened
from tests.test_decision import unread as unread_of

SUBJECT = Subject(
    tenant="tenant_acme",
    actor="user-7",
    roles=("agent",),
    scopes=("orders:write",),
    issuer="https://id.example",
    workload="spiffe://acme/agent",
    expires_at=NOW + 30.5,
    delegation=Delegation(
        links=(
            Link(id="d-1", agent="planner", expires_at=int(NOW) + 50),
            Link(id="d-2", agent="worker", expires_at=int(NOW) + 30),
        ),
        tools=frozenset({"orders.update"}),
        arguments={},
        root_token_id="token-1",
        ledger="ledger-1",
    ),
)
ASKED = replace(QUESTION, context={"client": {"step": 1}}, trace_id="a" * 32)
IDENTITY: JsonObject = {
    "issuer": "https://id.example",
    "workload": "spiffe://acme/agent",
    "agents": ["planner", "worker"],
    "delegations": ["d-1", "d-2"],
}
CHARGE: JsonObject = {"budget": "tools", "unit": "calls", "amount": 1}


def said(record: AuditRecord) -> dict[str, Any]:
    """What a record holds, without what it leaves out."""
    named = {field.name: getattr(record, field.name) for field in fields(record)}
    return {name: value for name, value in named.items() if value is not None}


def told(**changes: Any) -> dict[str, Any]:
    """What every record of ASKED says, with these changes; None leaves one out."""
    usual = {
        "type": "decision",
        "tenant_id": "tenant_acme",
        "actor_id": "user-7",
        "identity": IDENTITY,
        "action": "orders.update",
        "request_id": "request-1",
        "trace_id": "a" * 32,
        "resource": {"type": "order", "id": "918"},
        "policy_revision": "revision-1",
    }
    return {name: value for name, value in {**usual, **changes}.items() if value is not None}


def test_an_allowed_call_is_told_in_full(tmp_path: Path) -> None:
    steps = Steps(subject=SUBJECT)
    steps.answers[Entrypoint.AUTHZ_DECISION] = {**ALLOWED, "scopes": ["orders:write"]}
    (recorded,) = asked(tmp_path, steps, ASKED)
    answer = recorded.answer
    assert replace(answer.permit, token="") == Permit(
        id="id-2",
        issuer="agent-pdp",
        audience="tools",
        tenant="tenant_acme",
        actor="user-7",
        tool="orders.update",
        arguments_sha256=QUESTION.arguments_sha256,
        scopes=("orders:write",),
        transaction="request-1",
        decision_id="id-1",
        policy_revision="revision-1",
        ledger="ledger-1",
        issued_at=int(NOW),
        expires_at=int(NOW) + 30,
        hold_id="hold-3",
        resource="order/918",
        agents=("planner", "worker"),
        delegations=("token-1", "d-1", "d-2"),
        workload="spiffe://acme/agent",
    )
    assert (answer.decision_id, answer.policy_revision) == ("id-1", "revision-1")
    assert answer.charges == (Charge("tools", "calls", 1),)
    assert answer.hold_expires_at == int(NOW) + 120
    digest = said(steps.records[0]).pop("arguments_digest")
    assert len(digest) == 64
    assert digest != QUESTION.arguments_sha256
    assert said(steps.records[0]) == told(
        outcome=Outcome.ALLOWED,
        reason_code="ok",
        decision_id="id-1",
        permit_id="id-2",
        hold_id="hold-3",
        charges=(CHARGE,),
        arguments_digest=digest,
        detail={"warnings": [{"limit_id": "day", "percent": each} for each in (50, 80, 95)]},
    )


def test_the_policy_is_shown_the_call_as_it_was_asked(tmp_path: Path) -> None:
    steps = Steps(subject=SUBJECT, records_policy_input=True)
    asked(tmp_path, steps, ASKED)
    shown, again = steps.documents
    assert shown is again
    assert steps.records[0].input == shown
    action: Any = shown["action"]
    subject: Any = shown["subject"]
    context: Any = shown["context"]
    assert action == {"name": "orders.update", "properties": {"arguments": {"order_id": "918"}}}
    assert shown["resource"] == {"type": "order", "id": "918"}
    assert (subject["id"], subject["properties"]["tenant"]) == ("user-7", "tenant_acme")
    assert (context["request_id"], context["client"]) == ("request-1", {"client": {"step": 1}})


@pytest.mark.parametrize("longer", (0, 1))
def test_an_input_is_on_record_up_to_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longer: int
) -> None:
    steps = Steps(subject=SUBJECT, records_policy_input=True)
    asked(tmp_path, steps, ASKED)
    size = len(canonical_bytes(steps.documents[0]))
    monkeypatch.setattr(decision, "MAX_INPUT_BYTES", size - longer)
    again = Steps(subject=SUBJECT, records_policy_input=True)
    asked(tmp_path, again, replace(ASKED, request_id="request-2"))
    (record,) = again.records
    assert (record.input is None) is bool(longer)
    assert record.detail == ({"input_omitted": True} if longer else None)


def test_a_call_that_the_policy_denies_is_told_in_full(tmp_path: Path) -> None:
    denial: JsonObject = {"allow": False, "reason_code": "closed"}
    steps = Steps(subject=SUBJECT, answers={Entrypoint.AUTHZ_DECISION: denial})
    (recorded,) = asked(tmp_path, steps, ASKED)
    answer = recorded.answer
    assert (answer.permit, answer.charges, answer.hold_expires_at) == (None, (), 0)
    record = said(steps.records[0])
    digest = record["arguments_digest"]
    assert record == told(
        outcome=Outcome.DENIED, reason_code="closed", decision_id="id-1", arguments_digest=digest
    )


def test_what_fails_on_the_way_is_told_with_the_policy_that_was_in_force(tmp_path: Path) -> None:
    error = PolicyError(ReasonCode.POLICY_TIMEOUT, "It took too long.")
    steps = Steps(subject=SUBJECT, failing={"pdp/authz/decision": error})
    (recorded,) = asked(tmp_path, steps, ASKED)
    assert recorded.answer.policy_revision == "revision-1"
    assert recorded.receipt.sequence == 1
    record = said(steps.records[0])
    assert record.pop("arguments_digest")
    assert record == told(outcome=Outcome.DENIED, reason_code="policy_timeout", decision_id="id-1")


def test_a_tool_that_was_not_delegated_is_told_before_the_policy_is_asked(tmp_path: Path) -> None:
    steps = Steps(subject=SUBJECT)
    (recorded,) = asked(tmp_path, steps, replace(ASKED, tool="orders.delete"))
    assert recorded.answer.reason_code == "tool_not_delegated"
    record = said(steps.records[0])
    assert record.pop("arguments_digest")
    assert record == told(
        action="orders.delete",
        outcome=Outcome.DENIED,
        reason_code="tool_not_delegated",
        decision_id="id-1",
    )
    assert "pdp/authz/decision" not in steps.done


async def unread(folder: Path, steps: Steps) -> None:
    async def read() -> decision.Question:
        raise RequestError("arguments_json", "These are none.")

    question = decision.Asked(
        request_id="request-1", tool="orders.update", trace_id="a" * 32, read=read
    )
    async with opened(folder, steps) as rooms:
        with pytest.raises(RequestError):
            await decision.authorize(rooms, Credentials(bearer="token"), question)


def test_a_call_whose_arguments_can_not_be_read_is_told_without_them(tmp_path: Path) -> None:
    steps = Steps(subject=SUBJECT)
    asyncio.run(unread(tmp_path, steps))
    (record,) = steps.records
    assert said(record) == told(
        outcome=Outcome.DENIED,
        reason_code="request_invalid",
        resource=None,
        policy_revision=None,
    )


def test_a_caller_who_is_not_known_is_told_with_what_was_asked(tmp_path: Path) -> None:
    error = IdentityError(ReasonCode.TOKEN_EXPIRED, "Sign in again.", actor="user-7")
    steps = Steps(failing={"identify": error})
    asked(tmp_path, steps, ASKED)
    (record,) = steps.records
    assert (record.action, record.request_id, record.trace_id) == (
        "orders.update",
        "request-1",
        "a" * 32,
    )


def test_a_call_too_many_is_told_with_its_trace(tmp_path: Path) -> None:
    steps = Steps(subject=SUBJECT, service=ServiceClass(
        priority=Priority.NORMAL, max_concurrent_calls=1, calls_per_second=1 / 60, burst=1
    ))  # fmt: skip
    asked(tmp_path, steps, ASKED, replace(ASKED, request_id="request-2"))
    refused = steps.records[-1]
    assert (refused.reason_code, refused.trace_id) == ("rate_limited", "a" * 32)


CHANGED: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("another tool", {"tool": "orders.read"}, {}),
    ("other arguments", {"arguments_sha256": "0" * 64}, {}),
    ("another resource", {"resource": {"type": "order", "id": "919"}}, {}),
    ("no resource", {"resource": None}, {}),
    ("another context", {"context": {}}, {}),
    ("another audience", {"audience": "mail"}, {}),
    ("part of a batch", {"batch": "b" * 64}, {}),
    ("other roles", {}, {"roles": ("viewer",)}),
    ("other scopes", {}, {"scopes": ()}),
    ("another workload", {}, {"workload": ""}),
    ("no agent", {}, {"delegation": None}),
)


@pytest.mark.parametrize(("_name", "of_question", "of_subject"), CHANGED)
def test_whatever_is_asked_otherwise_is_another_question(
    _name: str, of_question: dict[str, Any], of_subject: dict[str, Any]
) -> None:
    first = ASKED.content_sha256(SUBJECT)
    assert first == ASKED.content_sha256(SUBJECT)
    other = replace(ASKED, **of_question).content_sha256(replace(SUBJECT, **of_subject))
    assert other != first


def test_the_digest_of_a_question_is_the_one_that_ledgers_hold() -> None:
    """A sidecar that is upgraded finds the first answers of the one before it."""
    content: JsonObject = {
        "identity": IDENTITY,
        "roles": ["agent"],
        "scopes": ["orders:write"],
        "tool": "orders.update",
        "resource": {"type": "order", "id": "918"},
        "arguments_sha256": QUESTION.arguments_sha256,
        "context": {"client": {"step": 1}},
        "audience": "tools",
    }
    assert ASKED.content_sha256(SUBJECT) == sha256_hex(content)
    batch = replace(ASKED, batch="b" * 64).content_sha256(SUBJECT)
    assert batch == sha256_hex({**content, "batch": "b" * 64})


@pytest.mark.parametrize(
    ("max_uses", "key"),
    ((1, "request-1"), (2, f"once {sha256_hex({'request_id': 'request-1'})}")),
)
def test_a_call_that_fits_no_limit_is_tried_alone_only_where_more_were_wanted(
    tmp_path: Path, max_uses: int, key: str
) -> None:
    several: JsonObject = {**ALLOWED, "permit": {"binds": ["tool"], "max_uses": max_uses}}
    none_left = [{**LIMITS[0], "limit": 0}]  # type: ignore[dict-item]
    answers = {Entrypoint.AUTHZ_DECISION: several, Entrypoint.BUDGET_LIMITS: none_left}
    steps = Steps(subject=SUBJECT, answers=answers)  # type: ignore[arg-type]
    keys: list[str] = []

    async def scene() -> None:
        async with opened(tmp_path, steps) as rooms:
            reserve = rooms.ledger.reserve

            async def noted(account: Any, key: Any, **named: Any) -> Any:
                keys.append(key.key)
                return await reserve(account, key, **named)

            rooms.ledger.reserve = noted  # type: ignore[method-assign]
            await decision.authorize(rooms, Credentials(bearer="token"), unread_of(ASKED))

    asyncio.run(scene())
    assert keys[0] == "request-1"
    assert keys[-1] == key
    assert len(keys) == max_uses


def test_without_a_record_there_is_no_answer_to_what_could_not_be_read(tmp_path: Path) -> None:
    steps = Steps(failing={"record": AuditError(ReasonCode.AUDIT_UNAVAILABLE, "The disk is full.")})
    with pytest.raises(AuditError):
        asyncio.run(unread(tmp_path, steps))


def test_what_the_policy_was_asked_is_on_record_where_it_failed(tmp_path: Path) -> None:
    error = PolicyError(ReasonCode.POLICY_TIMEOUT, "It took too long.")
    failing = Steps(
        subject=SUBJECT, records_policy_input=True, failing={"pdp/authz/decision": error}
    )
    asked(tmp_path, failing, ASKED)
    working = Steps(subject=SUBJECT, records_policy_input=True)
    asked(tmp_path, working, replace(ASKED, request_id="request-2"))
    shown: Any = working.records[0].input
    shown["context"]["request_id"] = "request-1"
    assert failing.records[0].input == shown


def test_a_users_own_permit_stands_on_no_delegation_and_names_no_resource(tmp_path: Path) -> None:
    user = replace(SUBJECT, delegation=None, token_id="token-1")
    (recorded,) = asked(tmp_path, Steps(subject=user), replace(ASKED, resource=None))
    permit = recorded.answer.permit
    assert (permit.delegations, permit.agents, permit.resource) == ((), (), "")


@pytest.mark.parametrize("scope", ("tenant", "actor", "tool"))
def test_an_agents_slice_is_a_limit_of_the_call(tmp_path: Path, scope: str) -> None:
    (first, last) = SUBJECT.delegation.links if SUBJECT.delegation else ()
    assert SUBJECT.delegation is not None
    sliced = replace(last, budget=(("tools", "calls", 1),))
    delegation = replace(SUBJECT.delegation, links=(first, sliced))
    steps = Steps(subject=replace(SUBJECT, delegation=delegation))
    steps.answers[Entrypoint.BUDGET_LIMITS] = [{**LIMITS[0], "limit": 9, "scope": scope}]  # type: ignore[dict-item]
    recorded, refused = asked(tmp_path, steps, ASKED, replace(ASKED, request_id="request-2"))
    assert recorded.answer.permit
    assert refused.answer.reason_code == "tenant_budget_exceeded"
    assert refused.answer.result.refused_by.limit.limit == 1


def test_who_asks_is_found_out_by_what_was_shown(tmp_path: Path) -> None:
    seen: list[Credentials] = []

    class Identity:
        async def resolve(self, credentials: Credentials) -> Subject:
            seen.append(credentials)
            return SUBJECT

    shown = Credentials(bearer="the token")

    async def scene() -> None:
        async with opened(tmp_path, Steps()) as rooms:
            await decision.authorize(replace(rooms, identity=Identity()), shown, unread_of(ASKED))

    asyncio.run(scene())
    assert seen == [shown]


def test_where_no_thread_takes_the_policy_the_one_in_force_is_on_record(tmp_path: Path) -> None:
    class Busy(Policy, WalkedEngine):
        revision = "revision-2"

        async def walk(self, steps: object) -> Any:
            raise PolicyError(ReasonCode.POLICY_UNAVAILABLE, "Every thread is busy.")

    steps = Steps(subject=SUBJECT)

    async def scene() -> decision.Recorded:
        async with opened(tmp_path, steps) as rooms:
            disk: Any = object()  # whose threads are not come to
            busy = replace(rooms, policy=LivePolicy(Busy(steps)), disk=disk)
            return await decision.authorize(busy, Credentials(bearer="token"), unread_of(ASKED))

    recorded = asyncio.run(scene())
    assert recorded.answer.reason_code == "policy_unavailable"
    assert recorded.answer.policy_revision == "revision-2"
    assert steps.records[0].policy_revision == "revision-2"
