"""Calls that are asked for together: a model's parallel tool calls in one round trip."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pdp.api.v1 import authorization_pb2
from pdp.channel import CallError, seconds_of
from pdp.client.acting import Acting, Identity
from pdp.client.call import Resource, ToolCall
from pdp.client.desk import Ask, Grant, PermitDesk, Steps, question
from pdp.client.errors import PermitDenied
from pdp.permit.claims import Permit
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

MAX_CALLS: Final = 32
"""In one batch."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is asked for with others."""

    tool: str
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)
    resource: Resource | None = None
    request_id: str = ""
    """Made where it is empty, so that nothing is asked twice."""
    audience: str | None = None
    """None for that of the guard."""


Outcome = Grant | Exception
"""What came of one call: leave to make it, or why not."""


def check_number(calls: Sequence[Call]) -> None:
    """Raises ValueError for more than can be asked for together."""
    if len(calls) > MAX_CALLS:
        raise ValueError(f"at most {MAX_CALLS} calls can be asked for together")


def obtain_all(
    desk: PermitDesk,
    identity: Identity,
    describe: Sequence[Callable[[], ToolCall]],
    *,
    all_or_nothing: bool,
) -> Steps[list[Outcome]]:
    """Ask for permits of all these calls, and verify each. Raises IdentityLacking, and
    CallError where none was answered.
    """
    acting = identity.current()
    described = [_described(each) for each in describe]
    calls = [call for call in described if isinstance(call, ToolCall)]
    if not calls or (all_or_nothing and len(calls) < len(described)):
        return [_refused(each) if isinstance(each, ToolCall) else each for each in described]
    questions = [question(call, acting) for call in calls]
    request = authorization_pb2.AuthorizeBatchRequest(
        questions=questions, all_or_nothing=all_or_nothing
    )
    response = yield Ask("AuthorizeBatch", request, acting.metadata)
    if len(response.results) != len(calls):
        raise CallError(ReasonCode.INTERNAL, "The sidecar has not answered each of the calls.")
    outcomes: list[Outcome] = []
    answered = iter(zip(calls, questions, response.results, strict=True))
    for each in described:
        if isinstance(each, ToolCall):
            outcomes.append((yield from _outcome(desk, acting, *next(answered))))
        else:
            outcomes.append(each)
    if all_or_nothing and any(map(_stands_in_the_way, outcomes)):
        return (yield from _all_refused(outcomes))
    return outcomes


def _described(describe: Callable[[], ToolCall]) -> ToolCall | Exception:
    try:
        return describe()
    except Exception as error:  # noqa: BLE001 - whatever it is, this call is not made
        return error


def _outcome(
    desk: PermitDesk,
    acting: Acting,
    call: ToolCall,
    asked: authorization_pb2.AuthorizeRequest,
    result: authorization_pb2.BatchResult,
) -> Steps[Outcome]:
    try:
        if not result.HasField("answer"):
            return _failed(call, result.failure)
        return (yield from desk.accept(call, asked, result.answer, acting))
    except Exception as error:  # noqa: BLE001 - as above
        return error


def _failed(call: ToolCall, failure: authorization_pb2.Failure) -> PermitDenied:
    code = failure.reason_code
    return PermitDenied(
        code if REASON_CODE_PATTERN.fullmatch(code) else ReasonCode.INTERNAL,
        failure.message or "it was not answered",
        tool=call.tool,
        retry_after_seconds=(
            seconds_of(failure.retry_after) if failure.HasField("retry_after") else None
        ),
    )


def _stands_in_the_way(outcome: Outcome) -> bool:
    """Whether the others may not be made without it. A batch that is asked for again, after
    some of its calls were made, has those as used, and the others are still to be made.
    """
    used = isinstance(outcome, PermitDenied) and outcome.reason_code == ReasonCode.PERMIT_USED
    return not isinstance(outcome, Grant) and not used


def _all_refused(outcomes: Sequence[Outcome]) -> Steps[list[Outcome]]:
    """None of them is made. The sidecar has allowed all of them where one of the permits is
    of no use here, and then it is told so.
    """
    refused: list[Outcome] = []
    for outcome in outcomes:
        if not isinstance(outcome, Grant):
            refused.append(outcome)
            continue
        denied = _refused(outcome.permit)
        # Where it can not be told, what is held expires by itself.
        with contextlib.suppress(CallError):
            yield from outcome.failed(denied, tuple)
        refused.append(denied)
    return refused


def _refused(call: ToolCall | Permit) -> PermitDenied:
    return PermitDenied(
        ReasonCode.BATCH_REFUSED, "another call of the batch is refused", tool=call.tool
    )
