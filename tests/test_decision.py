"""The five steps: their order, and what each leaves behind when the next one fails.

The rooms here are small ones in memory, for faults that can not be made for real;
tests/server runs the same steps against the real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from pdp import decision
from pdp.admission import (
    MAX_HELD_BACK_SECONDS,
    RECORDED_BURST,
    Admission,
    AdmissionError,
    Priority,
    ServiceClass,
)
from pdp.audit.record import AuditError, AuditReceipt, AuditRecord, Outcome
from pdp.budget.ledger import Account, Charge, IdempotencyKey, LedgerError, Limit, Receipt
from pdp.budget.sqlite import SqliteLedger
from pdp.canonical import JsonObject, JsonValue, sha256_hex
from pdp.config import TenantLimits
from pdp.errors import RequestError
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.subject import Delegation, Link, Subject
from pdp.permit.claims import Permit, PermitError
from pdp.permit.issuer import PermitIssuer
from pdp.permit.signing import SigningKey
from pdp.permit.uses import PermitUses
from pdp.permit.verifier import PermitVerifier
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.live import LivePolicy
from pdp.reason import ReasonCode
from pdp.revocation.file import RevocationFile
from pdp.revocation.revocations import Kind, Revocation, Revocations, Target
from pdp.rooms import Rooms, StepWatch
from pdp.server.wire import key_from
from pdp.storage import Durability
from pdp.strangers import Strangers

NOW = 1_800_000_000.0
KEY = SigningKey.generate()
SUBJECT = Subject(
    tenant="tenant_acme", actor="user-7", roles=("agent",), issuer="https://id.example"
)
CREDENTIALS = Credentials(bearer="token")
ARGUMENTS: JsonObject = {"order_id": "918"}


class Arguments(dict[str, JsonValue]):
    """Arguments that can be found out to be gone."""


QUESTION = decision.Question(
    request_id="request-1",
    tool="orders.update",
    resource={"type": "order", "id": "918"},
    arguments=ARGUMENTS,
    arguments_sha256=sha256_hex(ARGUMENTS),
    context={},
    audience="tools",
)


def unread(question: decision.Question) -> decision.Asked:
    async def read() -> decision.Question:
        return question

    return decision.Asked(
        request_id=question.request_id,
        tool=question.tool,
        trace_id=question.trace_id,
        read=read,
    )


ALLOWED: JsonObject = {
    "allow": True,
    "reason_code": "ok",
    "charge": [{"budget": "tools", "unit": "calls", "amount": 1}],
}
LIMITS: list[JsonValue] = [
    {
        "id": "day",
        "budget": "tools",
        "unit": "calls",
        "window": "day",
        "limit": 1,
        "scope": "tenant",
    }
]


@dataclass
class Steps:
    """What was done, in order; and what is to fail."""

    done: list[str] = field(default_factory=list)
    failing: dict[str, Exception] = field(default_factory=dict)
    records: list[AuditRecord] = field(default_factory=list)
    answers: dict[Entrypoint, JsonValue] = field(
        default_factory=lambda: {
            Entrypoint.AUTHZ_DECISION: ALLOWED,
            Entrypoint.BUDGET_LIMITS: LIMITS,
        }
    )
    documents: list[JsonObject] = field(default_factory=list)
    records_policy_input: bool = False
    service: ServiceClass = TenantLimits().service_class
    subject: Subject = SUBJECT
    binds_permits: bool = False
    revocations: Revocations = field(
        default_factory=lambda: Revocations(RevocationFile(Path("nowhere")))
    )

    slept: list[float] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def do(self, step: str) -> None:
        self.done.append(step)
        if step in self.failing:
            raise self.failing[step]


class Identity:
    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    async def resolve(self, credentials: Credentials) -> Subject:
        self.steps.do("identify")
        return self.steps.subject


class Policy:
    revision = "revision-1"

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        self.steps.do(entrypoint.value)
        self.steps.documents.append(document)
        return self.steps.answers[entrypoint]

    async def close(self) -> None: ...


class Ledger(SqliteLedger):
    """The real one, noted."""

    steps: Steps

    async def reserve(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int,
        memo: str = "",
    ) -> Receipt:
        self.steps.do("hold")
        return await super().reserve(
            account, key, charges=charges, limits=limits, ttl_seconds=ttl_seconds, memo=memo
        )


class Issuer(PermitIssuer):
    """The real one, noted."""

    steps: Steps

    def sign(self, permit: Permit) -> Permit:
        self.steps.do("sign")
        return super().sign(permit)


class Uses(PermitUses):
    """The real ones, noted."""

    steps: Steps

    async def is_closed(self, permit: Permit) -> bool:
        self.steps.do("is_closed")
        return await super().is_closed(permit)


class Audit:
    healthy = True

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    async def append(self, record: AuditRecord) -> AuditReceipt:
        self.steps.do("record")
        self.steps.records.append(record)
        return AuditReceipt(len(self.steps.records), "0" * 64)

    async def close(self) -> None: ...


@contextlib.asynccontextmanager
async def opened(directory: Path, steps: Steps) -> AsyncIterator[Rooms]:
    ids = itertools.count(1)
    ledger = Ledger(
        directory / "ledger.db",
        durability=Durability.PROCESS,
        clock=lambda: NOW,
        new_id=lambda: f"hold-{next(ids)}",
    )
    ledger.steps = steps
    issuer = Issuer(KEY, issuer="agent-pdp")
    issuer.steps = steps
    uses = Uses(directory / "permits.db", durability=Durability.PROCESS, clock=lambda: NOW)
    uses.steps = steps
    yield Rooms(
        identity=Identity(steps),
        admission=Admission(
            max_concurrent_calls=1,
            max_waiting_calls=0,
            classes=lambda _: steps.service,
            clock=lambda: NOW,
            sleep=steps.sleep,
            random=lambda: 0.0,
        ),
        policy=LivePolicy(Policy(steps)),
        ledger=ledger,
        permits=issuer,
        permit_verifier=PermitVerifier(KEY.public_set, issuer="agent-pdp", audience="tools"),
        permit_uses=uses,
        audit=Audit(steps),
        digest_key=b"k" * 32,
        binds_permits=steps.binds_permits,
        permit_ttl_seconds=60,
        hold_ttl_seconds=120,
        ledger_id="ledger-1",
        strangers=Strangers(),
        revocations=steps.revocations,
        records_policy_input=steps.records_policy_input,
        clock=lambda: NOW,
        new_id=lambda: f"id-{next(ids)}",
    )
    await ledger.close()
    await uses.close()


async def ask(
    directory: Path, steps: Steps, *questions: decision.Question
) -> list[decision.Recorded | Exception]:
    """Ask one after the other, in rooms that are opened for it."""
    answers: list[decision.Recorded | Exception] = []
    async with opened(directory, steps) as rooms:
        for question in questions:
            try:
                answers.append(await decision.authorize(rooms, CREDENTIALS, unread(question)))
            except Exception as error:  # noqa: BLE001 - the answer of this question
                answers.append(error)
    return answers


def asked(directory: Path, steps: Steps, *questions: decision.Question) -> list[Any]:
    return asyncio.run(ask(directory, steps, *(questions or (QUESTION,))))


def test_the_hold_comes_before_the_permit_and_the_record_before_the_answer(tmp_path: Path) -> None:
    steps = Steps()
    (recorded,) = asked(tmp_path, steps)
    assert steps.done == [
        "identify", "pdp/authz/decision", "pdp/budget/limits", "hold", "sign", "record",
    ]  # fmt: skip
    assert list(recorded.step_seconds) == ["identify", "isolate", "authorize", "execute", "audit"]
    assert recorded.answer.permit.token
    assert recorded.receipt.sequence == 1
    (record,) = steps.records
    assert (record.outcome, record.reason_code) == (Outcome.ALLOWED, "ok")


def test_without_identity_no_later_step_is_taken(tmp_path: Path) -> None:
    steps = Steps(failing={"identify": IdentityError(ReasonCode.TOKEN_EXPIRED, "Sign in again.")})
    (error,) = asked(tmp_path, steps)
    assert error.reason_code == "token_expired"
    assert steps.done == ["identify", "record"]
    assert (steps.records[0].tenant_id, steps.records[0].outcome) == (None, Outcome.DENIED)


class Meanwhile(Revocations):
    """In which the tenant is found only by whoever looks for a second time."""

    looked = False

    def find(self, **whom: Any) -> Revocation | None:
        if not self.looked:
            self.looked = True
            return None
        target = Target(kind=Kind.TENANT, tenant=whom["tenant"])
        return Revocation(target=target, by="ops", reason="left", at=1, until=0)


def test_who_is_revoked_while_the_call_waits_gets_no_permit(tmp_path: Path) -> None:
    steps = Steps(revocations=Meanwhile(RevocationFile(Path("nowhere"))))
    (error,) = asked(tmp_path, steps)
    assert (type(error), error.reason_code) == (IdentityError, "tenant_suspended")
    assert steps.done[-1] == "record"
    assert not {"hold", "sign"} & set(steps.done)
    [record] = steps.records
    assert (record.tenant_id, record.outcome) == ("tenant_acme", Outcome.DENIED)


def test_an_agent_whose_delegation_ends_while_its_call_waits_gets_no_permit(
    tmp_path: Path,
) -> None:
    delegation = Delegation(
        links=(Link(id="d", agent="reader", expires_at=int(NOW)),),
        tools=frozenset({"orders.update"}),
        arguments={},
        root_token_id="",
        ledger="ledger-1",
    )
    steps = Steps(subject=replace(SUBJECT, delegation=delegation, expires_at=NOW))
    (error,) = asked(tmp_path, steps)
    assert (type(error), error.reason_code) == (IdentityError, "token_expired")
    assert not {"hold", "sign"} & set(steps.done)


ONE_A_MINUTE = ServiceClass(
    priority=Priority.NORMAL, max_concurrent_calls=1, calls_per_second=1 / 60, burst=1
)


def test_a_call_too_many_is_on_record_as_its_tenant_s_and_takes_no_later_step(
    tmp_path: Path,
) -> None:
    steps = Steps(service=ONE_A_MINUTE)
    first, second = asked(tmp_path, steps, QUESTION, replace(QUESTION, request_id="request-2"))
    assert first.answer.permit is not None
    assert isinstance(second, AdmissionError)
    assert steps.slept == [MAX_HELD_BACK_SECONDS], "and is held back"
    assert second.retry_after_seconds == pytest.approx(60 - MAX_HELD_BACK_SECONDS)
    assert steps.done[-2:] == ["identify", "record"]
    record = steps.records[1]
    assert (record.tenant_id, record.actor_id) == ("tenant_acme", "user-7")
    assert (record.action, record.request_id) == ("orders.update", "request-2")
    assert (record.outcome, record.reason_code) == (Outcome.DENIED, "rate_limited")


def test_a_flood_of_calls_too_many_is_recorded_in_part(tmp_path: Path) -> None:
    steps = Steps(service=ONE_A_MINUTE)
    answers = asked(tmp_path, steps, *[QUESTION] * 50)
    assert [answer.reason_code for answer in answers[1:]] == ["rate_limited"] * 49
    assert len(steps.records) == 1 + RECORDED_BURST


def test_a_place_is_given_back_whatever_fails(tmp_path: Path) -> None:
    steps = Steps(failing={"hold": RuntimeError("a bug")})
    answers = asked(tmp_path, steps, QUESTION, QUESTION)
    assert [type(answer) for answer in answers] == [RuntimeError, RuntimeError]


@pytest.mark.parametrize("step", ("pdp/authz/decision", "pdp/budget/limits"))
def test_without_an_answer_of_the_policy_nothing_is_held_or_signed(
    tmp_path: Path, step: str
) -> None:
    steps = Steps(failing={step: PolicyError(ReasonCode.POLICY_TIMEOUT, "Too slow.")})
    (recorded,) = asked(tmp_path, steps)
    assert (recorded.answer.permit, recorded.answer.reason_code) == (None, "policy_timeout")
    assert "hold" not in steps.done
    assert "sign" not in steps.done
    assert list(recorded.step_seconds) == ["identify", "isolate", "authorize", "audit"]


def test_a_ledger_that_fails_is_an_error_on_record_and_signs_nothing(tmp_path: Path) -> None:
    steps = Steps(failing={"hold": LedgerError(ReasonCode.BUDGET_UNAVAILABLE, "Try again.")})
    (error,) = asked(tmp_path, steps)
    assert error.reason_code == "budget_unavailable"
    assert steps.done[-2:] == ["hold", "record"]
    assert steps.records[0].reason_code == "budget_unavailable"


def test_nothing_is_kept_of_a_question_that_was_refused_with_an_error(tmp_path: Path) -> None:
    async def play() -> None:
        steps = Steps()
        async with opened(tmp_path, steps) as rooms:
            for other in (False, True):
                arguments = Arguments(ARGUMENTS)
                kept = weakref.ref(arguments)
                asked = unread(
                    replace(
                        QUESTION,
                        arguments=arguments,
                        arguments_sha256=sha256_hex({"other": other}),
                    )
                )
                del arguments
                with contextlib.suppress(LedgerError):
                    recorded = await decision.authorize(rooms, CREDENTIALS, asked)
                    assert recorded.answer.permit is not None
                    assert not other
                del asked
                steps.documents.clear()
                await rooms.ledger.tenants(most=1)  # its thread has let go of it by then
                assert kept() is None

    gc.collect()
    gc.disable()
    try:
        asyncio.run(play())
    finally:
        gc.enable()


def test_without_a_record_there_is_no_answer(tmp_path: Path) -> None:
    steps = Steps(failing={"record": AuditError(ReasonCode.AUDIT_UNAVAILABLE, "Not written.")})
    (error,) = asked(tmp_path, steps)
    assert isinstance(error, AuditError)
    assert steps.done[-1] == "record"


def test_a_bug_in_signing_is_no_answer(tmp_path: Path) -> None:
    steps = Steps(failing={"sign": RuntimeError("a bug")})
    (error,) = asked(tmp_path, steps)
    assert isinstance(error, RuntimeError)


def test_a_question_whose_answer_was_lost_gets_it_when_it_is_asked_again(tmp_path: Path) -> None:
    steps = Steps(failing={"record": AuditError(ReasonCode.AUDIT_UNAVAILABLE, "Not written.")})
    (lost,) = asked(tmp_path, steps)
    steps.failing.clear()
    again, third = asked(tmp_path, steps, QUESTION, QUESTION)
    assert isinstance(lost, AuditError)
    assert again.answer.replayed
    assert again.answer.permit == third.answer.permit
    # The limit is 1: had the second try been held anew, it would have been refused.
    assert again.answer.charges == (Charge("tools", "calls", 1),)


def test_a_refusal_for_want_of_budget_names_the_limit_and_signs_nothing(tmp_path: Path) -> None:
    steps = Steps()
    first, second = asked(tmp_path, steps, QUESTION, replace(QUESTION, request_id="request-2"))
    assert first.answer.permit is not None
    assert second.answer.permit is None
    assert second.answer.reason_code == "tenant_budget_exceeded"
    assert second.answer.result.refused_by.limit.id == "day"
    assert steps.done.count("sign") == 1
    assert steps.records[1].limit_id == "day"


def test_a_denial_holds_nothing_even_where_the_policy_names_a_charge(tmp_path: Path) -> None:
    steps = Steps()
    steps.answers[Entrypoint.AUTHZ_DECISION] = {
        "allow": False,
        "reason_code": "policy_denied",
        "charge": [{"budget": "tools", "unit": "calls", "amount": 1}],
    }
    (denied,) = asked(tmp_path, steps)
    steps.answers[Entrypoint.AUTHZ_DECISION] = ALLOWED
    (allowed,) = asked(tmp_path, steps, replace(QUESTION, request_id="request-2"))
    assert denied.answer.permit is None
    assert denied.answer.charges == ()
    assert allowed.answer.permit is not None, "the limit of 1 was still free"


def test_the_policy_may_shorten_a_permit_and_not_lengthen_it(tmp_path: Path) -> None:
    steps = Steps()
    lives = []
    for number, ttl_seconds in enumerate((10, 3_600)):
        steps.answers[Entrypoint.AUTHZ_DECISION] = {
            "allow": True,
            "reason_code": "ok",
            "permit": {"ttl_seconds": ttl_seconds},
        }
        (recorded,) = asked(tmp_path, steps, replace(QUESTION, request_id=f"request-{number}"))
        lives.append(recorded.answer.permit.expires_at - NOW)
    assert lives == [10, 60]


def test_what_the_policy_calls_subject_comes_from_the_token_alone(tmp_path: Path) -> None:
    steps = Steps()
    forged: JsonObject = {"subject": {"properties": {"tenant": "tenant_globex"}}}
    asked(tmp_path, steps, replace(QUESTION, context=forged, arguments=forged))
    (subject,) = {str(document["subject"]) for document in steps.documents}
    assert "tenant_acme" in subject
    assert "tenant_globex" not in subject


def test_arguments_are_on_record_as_a_digest_keyed_by_tenant(tmp_path: Path) -> None:
    steps = Steps()
    asked(tmp_path, steps)
    digest = steps.records[0].arguments_digest
    assert digest is not None
    assert digest != QUESTION.arguments_sha256
    assert "order_id" not in repr(QUESTION)


@pytest.mark.parametrize(
    "change",
    (
        lambda question: replace(question, tool="orders.read"),
        lambda question: replace(question, resource=None),
        lambda question: replace(question, arguments_sha256="0" * 64),
        lambda question: replace(question, context={"a": 1}),
        lambda question: replace(question, audience="elsewhere"),
    ),
)
def test_whatever_is_asked_is_part_of_the_content_of_a_request_id(
    change: Callable[[decision.Question], decision.Question],
) -> None:
    assert change(QUESTION).content_sha256(SUBJECT) != QUESTION.content_sha256(SUBJECT)


@pytest.mark.parametrize(
    "change", ({"roles": ()}, {"scopes": ("orders:write",)}, {"issuer": "https://other.example"})
)
def test_a_subject_with_other_rights_asks_another_question(change: dict[str, Any]) -> None:
    assert QUESTION.content_sha256(replace(SUBJECT, **change)) != QUESTION.content_sha256(SUBJECT)


def test_the_content_of_a_request_id_does_not_depend_on_when_it_is_asked() -> None:
    later = replace(QUESTION, request_id="request-2", trace_id="0" * 31 + "1")
    assert later.content_sha256(SUBJECT) == QUESTION.content_sha256(SUBJECT)


# Permits for a tool and several calls

SEVERAL: JsonObject = {**ALLOWED, "permit": {"binds": ["tool"], "max_uses": 4}}


def with_limit(most: int) -> dict[Entrypoint, JsonValue]:
    (limit,) = LIMITS
    assert isinstance(limit, dict)
    return {
        Entrypoint.AUTHZ_DECISION: SEVERAL,
        Entrypoint.BUDGET_LIMITS: [{**limit, "limit": most}],
    }


def test_a_permit_for_several_calls_holds_for_all_of_them(tmp_path: Path) -> None:
    steps = Steps(answers=with_limit(4))
    (recorded,) = asked(tmp_path, steps)
    permit = recorded.answer.permit
    assert (permit.max_uses, permit.arguments_sha256, permit.resource) == (4, "", "")
    assert recorded.answer.charges == (Charge("tools", "calls", 4),)
    assert (steps.records[0].detail or {})["max_uses"] == 4
    signed = PermitVerifier(
        KEY.public_set, issuer="agent-pdp", audience="tools", clock=lambda: NOW
    ).verify(permit.token, tool="orders.update", arguments={"order_id": "another"})
    assert signed == permit


def test_where_all_calls_together_pass_a_limit_the_permit_is_for_the_one_call(
    tmp_path: Path,
) -> None:
    steps = Steps(answers=with_limit(3))
    first, again = asked(tmp_path, steps, QUESTION, QUESTION)
    permit = first.answer.permit
    assert (permit.max_uses, permit.resource) == (1, "order/918")
    assert permit.arguments_sha256 == QUESTION.arguments_sha256
    assert first.answer.charges == (Charge("tools", "calls", 1),)
    assert first.answer.result.refused_by is None
    assert again.answer.replayed
    assert again.answer.permit == permit
    assert [record.detail for record in steps.records] == [{"policy_max_uses": 4}] * 2


def test_where_not_even_one_call_fits_there_is_none(tmp_path: Path) -> None:
    steps = Steps(answers=with_limit(0))
    first, again = asked(tmp_path, steps, QUESTION, QUESTION)
    for recorded in (first, again):
        assert recorded.answer.reason_code == "tenant_budget_exceeded"
        assert recorded.answer.permit is None
    assert "sign" not in steps.done


def test_an_answer_that_was_lost_between_the_two_holds_is_found_again(tmp_path: Path) -> None:
    """Whatever the policy has come to say in between."""
    steps = Steps(answers=with_limit(3))
    ledgers_word = LedgerError(ReasonCode.BUDGET_UNAVAILABLE, "Try again.")

    class Lost(Steps):
        holds = 0

        def do(self, step: str) -> None:
            super().do(step)
            self.holds += step == "hold"
            if self.holds == 2:
                raise ledgers_word

    (lost,) = asked(tmp_path, Lost(answers=steps.answers))
    assert lost is ledgers_word
    steps.answers[Entrypoint.AUTHZ_DECISION] = ALLOWED
    first, again = asked(tmp_path, steps, QUESTION, QUESTION)
    assert first.answer.permit.max_uses == 1
    assert first.answer.charges == (Charge("tools", "calls", 1),)
    assert again.answer.permit == first.answer.permit


def test_no_request_id_can_be_taken_for_the_second_hold_of_another(tmp_path: Path) -> None:
    steps = Steps(answers=with_limit(3))
    asked(tmp_path, steps)
    key = f"once {sha256_hex({'request_id': QUESTION.request_id})}"
    with pytest.raises(RequestError):
        key_from("request_id", key)


def delegated(rules: JsonObject) -> Subject:
    return replace(
        SUBJECT,
        expires_at=NOW + 3_600,
        delegation=Delegation(
            links=(Link(id="delegation-1", agent="helper"),),
            tools=frozenset({"orders.update"}),
            arguments=rules,
            root_token_id="token-1",
            ledger="ledger-1",
        ),
    )


def test_a_tool_that_was_delegated_under_rules_is_looked_at_for_each_call(tmp_path: Path) -> None:
    rules: JsonObject = {"orders.update": {"order_id": [{"one_of": ["918"]}]}}
    steps = Steps(answers=with_limit(8), subject=delegated(rules))
    (recorded,) = asked(tmp_path, steps)
    permit = recorded.answer.permit
    assert (permit.max_uses, permit.arguments_sha256) == (1, QUESTION.arguments_sha256)
    assert steps.records[0].detail == {"policy_max_uses": 4}
    assert recorded.answer.charges == (Charge("tools", "calls", 1),)


@pytest.mark.parametrize("rules", ({}, {"orders.read": {"order_id": [{"one_of": ["918"]}]}}))
def test_a_tool_that_was_delegated_without_rules_is_as_reusable_as_before(
    tmp_path: Path, rules: JsonObject
) -> None:
    steps = Steps(answers=with_limit(8), subject=delegated(rules))
    (recorded,) = asked(tmp_path, steps)
    assert recorded.answer.permit.max_uses == 4


def test_a_later_policy_does_not_change_what_a_first_answer_was_for(tmp_path: Path) -> None:
    steps = Steps(answers=with_limit(8))
    (first,) = asked(tmp_path, steps)
    steps.answers[Entrypoint.AUTHZ_DECISION] = ALLOWED
    (again,) = asked(tmp_path, steps)
    assert again.answer.permit == first.answer.permit


# Once the outcome is reported


def close(directory: Path, permit: Permit) -> None:
    async def run() -> None:
        uses = PermitUses(directory / "permits.db", durability=Durability.PROCESS)
        await uses.close_permit(permit)
        await uses.close()

    asyncio.run(run())


def test_an_answer_whose_outcome_is_reported_gives_no_permit_again(tmp_path: Path) -> None:
    steps = Steps()
    (first,) = asked(tmp_path, steps)
    close(tmp_path, first.answer.permit)
    (again,) = asked(tmp_path, steps)
    assert (again.answer.permit, again.answer.reason_code) == (None, "permit_used")
    assert again.answer.replayed
    assert again.answer.decision_id == first.answer.decision_id
    assert (again.answer.charges, again.answer.hold_expires_at) == ((), 0)
    assert steps.done.count("sign") == 1
    record = steps.records[-1]
    assert (record.outcome, record.reason_code) == (Outcome.DENIED, "permit_used")
    assert record.replayed


def test_a_first_question_does_not_ask_whether_its_permit_is_closed(tmp_path: Path) -> None:
    steps = Steps(failing={"is_closed": RuntimeError("a first question")})
    first, again = asked(tmp_path, steps, QUESTION, QUESTION)
    assert first.answer.permit is not None
    assert isinstance(again, RuntimeError)


def test_where_it_can_not_be_told_whether_a_permit_is_closed_there_is_no_answer(
    tmp_path: Path,
) -> None:
    error = PermitError(ReasonCode.PERMIT_UNAVAILABLE, "Try again.")
    steps = Steps(failing={"is_closed": error})
    _, again = asked(tmp_path, steps, QUESTION, QUESTION)
    assert again is error
    record = steps.records[-1]
    assert (record.outcome, record.reason_code) == (Outcome.DENIED, "permit_unavailable")


# Permits that are bound to a client certificate

CERTIFICATE = "c" * 43


def test_a_permit_is_bound_to_the_certificate_of_whoever_asks(tmp_path: Path) -> None:
    steps = Steps(subject=replace(SUBJECT, certificate_sha256=CERTIFICATE), binds_permits=True)
    (recorded,) = asked(tmp_path, steps)
    assert recorded.answer.permit.certificate_sha256 == CERTIFICATE


def test_a_permit_is_bound_to_nothing_unless_the_operator_says_so(tmp_path: Path) -> None:
    steps = Steps(subject=replace(SUBJECT, certificate_sha256=CERTIFICATE))
    (recorded,) = asked(tmp_path, steps)
    assert recorded.answer.permit.certificate_sha256 == ""


def test_who_has_no_certificate_gets_no_permit_that_must_be_bound_to_one(tmp_path: Path) -> None:
    steps = Steps(binds_permits=True)
    (recorded,) = asked(tmp_path, steps)
    assert (recorded.answer.permit, recorded.answer.reason_code) == (None, "sender_unknown")
    assert steps.done == ["identify", "record"], "nothing is held"
    assert steps.records[0].reason_code == "sender_unknown"


def test_a_first_answer_stays_bound_to_whoever_got_it(tmp_path: Path) -> None:
    """A thief of the token, with a certificate of his own, gets nothing that he could use."""
    mine, stolen = (replace(SUBJECT, certificate_sha256=name * 43) for name in ("m", "s"))
    (first,) = asked(tmp_path, Steps(subject=mine, binds_permits=True))
    (again,) = asked(tmp_path, Steps(subject=stolen, binds_permits=True))
    assert again.answer.permit == first.answer.permit
    assert again.answer.permit.certificate_sha256 == "m" * 43


def test_a_step_watch_takes_the_time_of_each_step() -> None:
    watch = StepWatch()
    watch.done("first")
    watch.done("second")
    assert list(watch.seconds) == ["first", "second"]
    assert all(0 <= seconds < 5 for seconds in watch.seconds.values())


@pytest.mark.parametrize(
    ("recorded", "note", "input_kept"),
    ((False, "x", False), (True, "x", True), (True, "x" * 40_000, False)),
)
def test_what_the_policy_was_asked_is_recorded_only_where_that_is_wanted_and_fits(
    tmp_path: Path, *, recorded: bool, note: str, input_kept: bool
) -> None:
    steps = Steps(records_policy_input=recorded)
    asked(tmp_path, steps, replace(QUESTION, arguments={"note": note}))
    (record,) = steps.records
    assert (record.input == steps.documents[0]) is input_kept
    assert (record.detail or {}).get("input_omitted", False) is (recorded and not input_kept)
