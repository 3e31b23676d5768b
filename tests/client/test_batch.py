"""A model's parallel calls, asked for in one round trip."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from pdp.api.v1 import authorization_pb2
from pdp.client import Call, Permit, PermitDenied
from pdp.client.batch import MAX_CALLS
from pdp.permit.signing import SigningKey
from tests.client.faces import Face
from tests.client.stand_in import StandIn, refuse

UPDATE = Call("orders.update", {"order_id": "918", "status": "shipped"}, ("order", "918"))
READ = Call("orders.read", {"order_id": "918"})
REPORT = Call("reports.generate", {"topic": "sales", "pages": 1})
TOKEN = "the.secret.token"
Result = authorization_pb2.BatchResult
Response = authorization_pb2.AuthorizeBatchResponse


def codes(outcomes: list[Permit | PermitDenied]) -> list[str]:
    return ["ok" if isinstance(each, Permit) else each.reason_code for each in outcomes]


def test_each_call_has_its_permit_or_why_it_has_none(face: Face, token: str) -> None:
    with face.acting_for(token):
        outcomes = face.authorize_all([UPDATE, REPORT, READ])
    assert codes(outcomes) == ["ok", "role_not_allowed", "ok"]
    update, report, read = outcomes
    assert isinstance(update, Permit)
    assert isinstance(read, Permit)
    assert (update.tool, update.resource) == ("orders.update", "order/918")
    assert (read.tool, read.resource) == ("orders.read", "")
    assert isinstance(report, PermitDenied)
    assert report.tool == "reports.generate"
    assert report.decision_id
    face.executed(update)
    face.failed(read, RuntimeError())


def test_all_or_nothing_gives_all_or_none(
    face: Face, token: str, audit: Callable[[], list[dict[str, Any]]]
) -> None:
    with face.acting_for(token):
        assert codes(face.authorize_all([UPDATE, READ], all_or_nothing=True)) == ["ok", "ok"]
        outcomes = face.authorize_all([UPDATE, REPORT, READ], all_or_nothing=True)
    assert codes(outcomes) == ["batch_refused", "role_not_allowed", "batch_refused"]
    assert [record["reason_code"] for record in audit()][-2:] == ["batch_refused"] * 2


def test_the_same_request_ids_get_the_same_permits_and_what_is_used_stays_used(
    face: Face, token: str
) -> None:
    calls = [
        Call(call.tool, call.arguments, request_id=str(uuid.uuid4())) for call in (UPDATE, READ)
    ]
    with face.acting_for(token):
        first = face.authorize_all(calls, all_or_nothing=True)
        again = face.authorize_all(calls, all_or_nothing=True)
        assert first == again
        assert isinstance(first[0], Permit)
        face.executed(first[0])
        # A workflow that begins again finds what is still to be done.
        later = face.authorize_all(calls, all_or_nothing=True)
    assert codes(later) == ["permit_used", "ok"]
    assert later[1] == first[1]


def test_arguments_that_are_none_are_denied_to_their_call_alone(face: Face, token: str) -> None:
    bad = Call("orders.read", {"order_id": float("nan")})
    with face.acting_for(token):
        assert codes(face.authorize_all([bad, READ])) == ["arguments_invalid", "ok"]


def test_arguments_that_are_none_are_not_asked_for_where_all_or_nothing_is_wanted(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)
    bad = Call("orders.read", {"order_id": object()})
    with face.acting_for(TOKEN):
        outcomes = face.authorize_all([READ, bad], all_or_nothing=True)
    assert codes(outcomes) == ["batch_refused", "arguments_invalid"]
    assert not stand_in.asked


def test_none_asks_for_none_and_there_is_a_most(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)
    with face.acting_for(TOKEN):
        assert face.authorize_all([]) == []
        assert codes(face.authorize_all([READ] * MAX_CALLS)) == ["ok"] * MAX_CALLS
        with pytest.raises(ValueError, match="at most 32"):
            face.authorize_all([READ] * (MAX_CALLS + 1))
    assert len(stand_in.asked) == MAX_CALLS
    assert len({each.request_id for each in stand_in.asked}) == MAX_CALLS


def test_outside_acting_for_nothing_is_asked(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    outcomes = face_of(stand_in.target).authorize_all([READ, UPDATE])
    assert codes(outcomes) == ["identity_missing"] * 2
    assert not stand_in.asked


def test_every_answer_is_observed_and_one_that_can_not_be_is_no_permit(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    seen = []

    def observe(decision: Any) -> None:
        seen.append(decision.tool)
        if decision.tool == "orders.read":
            raise RuntimeError(TOKEN)

    face = face_of(stand_in.target, observe=observe)
    with face.acting_for(TOKEN):
        outcomes = face.authorize_all([UPDATE, READ])
    assert codes(outcomes) == ["ok", "guard_failed"]
    assert seen == ["orders.update", "orders.read"]
    assert TOKEN not in str(outcomes[1])


def test_a_failure_of_one_says_when_to_ask_again(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    def answer(request: authorization_pb2.AuthorizeBatchRequest, _context: Any) -> Response:
        response = stand_in.allow_all(request)
        failure = authorization_pb2.Failure(code=8, reason_code="rate_limited", message="Too many.")
        failure.retry_after.seconds = 3
        response.results[1].failure.CopyFrom(failure)
        return response

    stand_in.answer_batch = answer
    face = face_of(stand_in.target)
    with face.acting_for(TOKEN):
        outcomes = face.authorize_all([READ, UPDATE])
    assert codes(outcomes) == ["ok", "rate_limited"]
    assert isinstance(outcomes[1], PermitDenied)
    assert outcomes[1].retry_after_seconds == 3


def test_a_failure_of_the_whole_denies_each(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    stand_in.answer_batch = lambda _request, context: refuse(
        context, "rate_limited", retry_after_seconds=2
    )
    face = face_of(stand_in.target)
    with face.acting_for(TOKEN):
        outcomes = face.authorize_all([READ, UPDATE])
    for outcome, call in zip(outcomes, (READ, UPDATE), strict=True):
        assert isinstance(outcome, PermitDenied)
        assert (outcome.reason_code, outcome.tool) == ("rate_limited", call.tool)
        assert outcome.retry_after_seconds == 2
        assert outcome.__traceback__ is None


def swapped(response: Response) -> None:
    first, second = response.results[0], response.results[1]
    kept = Result()
    kept.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(kept)


def emptied(response: Response) -> None:
    response.results[0].Clear()
    response.results[1].Clear()


def wordless(response: Response) -> None:
    for result in response.results:
        result.failure.CopyFrom(authorization_pb2.Failure(reason_code="Not a code \u2028"))


@pytest.mark.parametrize(
    ("change", "code"),
    (
        (swapped, "permit_mismatch"),
        (emptied, "internal"),
        (wordless, "internal"),
        (lambda response: response.results.pop(), "internal"),
        (lambda response: response.results.add(), "internal"),
        (lambda response: response.Clear(), "internal"),
    ),
)
def test_answers_to_other_questions_are_no_permits(
    face_of: Callable[..., Face],
    stand_in: StandIn,
    change: Callable[[Response], object],
    code: str,
) -> None:
    def answer(request: authorization_pb2.AuthorizeBatchRequest, _context: Any) -> Response:
        response = stand_in.allow_all(request)
        change(response)
        return response

    stand_in.answer_batch = answer
    face = face_of(stand_in.target)
    with face.acting_for(TOKEN):
        assert codes(face.authorize_all([READ, UPDATE])) == [code, code]


@pytest.mark.parametrize("all_or_nothing", (False, True))
def test_a_permit_that_does_not_verify_is_none(
    face_of: Callable[..., Face],
    stand_in: StandIn,
    all_or_nothing: bool,  # noqa: FBT001 - what varies
) -> None:
    """With all or nothing the others are given back."""

    def answer(request: authorization_pb2.AuthorizeBatchRequest, _context: Any) -> Response:
        response = stand_in.allow_all(request)
        forged = stand_in.allow(request.questions[1], signed_by=SigningKey.generate())
        response.results[1].answer.CopyFrom(forged)
        return response

    stand_in.answer_batch = answer
    face = face_of(stand_in.target)
    with face.acting_for(TOKEN):
        outcomes = face.authorize_all([READ, UPDATE], all_or_nothing=all_or_nothing)
    if all_or_nothing:
        assert codes(outcomes) == ["batch_refused", "permit_invalid"]
        assert len(stand_in.reports) == 1
        (report,) = stand_in.reports
        assert list(report.charges) == []
    else:
        assert codes(outcomes) == ["ok", "permit_invalid"]
        assert not stand_in.reports


def test_a_batch_goes_out_under_the_identity_of_the_code_that_asks(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)
    with face.acting_for(TOKEN, context={"ticket": 7}):
        face.authorize_all([READ, UPDATE])
    assert stand_in.tokens == [f"Bearer {TOKEN}"]
    assert [each.context_json for each in stand_in.asked] == [b'{"ticket": 7}'] * 2
