"""Calls that are to be made at the same time: each decided on its own, or all or none."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from pdp.audit.record import AuditRecord, Outcome
from pdp.budget.ledger import IdempotencyKey, LedgerError, Receipt
from pdp.canonical import sha256_hex
from pdp.decision import Answer, Asked, Recorded, authorize_as
from pdp.errors import PdpError
from pdp.identity.resolver import Credentials
from pdp.identity.subject import Subject
from pdp.permit.claims import Permit
from pdp.reason import ReasonCode
from pdp.rooms import Rooms, StepWatch, charges_json, identify, identity_json, isolate

MAX_QUESTIONS: Final = 32

_ACTION: Final = "batch"
_ALLOWED: Final = "allowed"
_REFUSED: Final = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What is asked for together."""

    questions: tuple[Asked | PdpError, ...]
    """1 to MAX_QUESTIONS, no two with the same request id; or why one can not be asked, for
    the one alone. There is none of those in a batch of all or nothing."""
    digest: str = ""
    """For all or nothing: see :func:`digest_of`. Empty where each stands on its own."""
    trace_id: str | None = None


def digest_of(request_ids: Sequence[str]) -> str:
    """What makes a batch of all or nothing the same batch when it is asked again."""
    return sha256_hex({"batch": list(request_ids)})


Result = Recorded | Exception
"""What came of one question: its answer, or why there is none."""


async def authorize_batch(
    rooms: Rooms, credentials: Credentials, batch: Batch
) -> tuple[Result, ...]:
    """Decide every question, in their order; each is let in, and on record, as if it was
    asked alone, and one that fails hides no other.

    For all or nothing, either all answers have a permit, or none has, and then nothing
    stays held: what was allowed is a refusal with batch_refused, on record. Which of the
    two it is, is remembered before anything follows from it, so that the same batch asked
    again comes to the same, wherever it was cut off.

    Raises IdentityError and AuditError, and for all or nothing also LedgerError, PermitError
    and whatever keeps a batch that was allowed from being answered again: nothing is undone
    then, nothing has left, and asking again goes on from there.
    """
    subject = await identify(rooms, credentials, action=_ACTION, trace_id=batch.trace_id)
    results = await _decided(rooms, subject, batch)
    if not batch.digest:
        return results
    allowed = all(_permit_of(result) is not None for result in results)
    if await _first_verdict(rooms, subject, batch, allowed=allowed):
        return tuple(map(_answered_again, results))
    return tuple(
        [
            await _refused(rooms, question, result)
            for question, result in zip(batch.questions, results, strict=True)
        ]
    )


async def _decided(rooms: Rooms, subject: Subject, batch: Batch) -> tuple[Result, ...]:
    """All at the same time, and none holds a place while it waits for another."""

    async def decide(question: Asked | PdpError) -> Recorded:
        if isinstance(question, PdpError):
            raise question
        return await authorize_as(rooms, subject, question, StepWatch())

    tasks = [asyncio.create_task(decide(question)) for question in batch.questions]
    with rooms.admission.together(tasks):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    return tuple(
        result if isinstance(result, Recorded | Exception) else _left(result) for result in results
    )


def _left(why: BaseException) -> PdpError:
    """It waited to be let in, and its caller has gone."""
    if not isinstance(why, asyncio.CancelledError):
        raise why
    return PdpError(ReasonCode.DEADLINE_EXCEEDED, "The call was not waited for any more.")


def _permit_of(result: Result) -> Permit | None:
    return result.answer.permit if isinstance(result, Recorded) else None


async def _first_verdict(rooms: Rooms, subject: Subject, batch: Batch, *, allowed: bool) -> bool:
    """Whether the batch is allowed: what was found when it was first asked."""
    receipt = await rooms.ledger.reserve(
        isolate(subject, tool=""),
        IdempotencyKey(
            operation="authorize",
            key=f"batch {batch.digest}",  # no request id has a space
            content_sha256=batch.digest,
            note=_ALLOWED if allowed else _REFUSED,
        ),
        charges=(),
        limits=(),
        ttl_seconds=1,
    )
    return receipt.note == _ALLOWED


def _answered_again(result: Result) -> Recorded:
    """An answer of a batch that is allowed. Raises what stands in its way, when it is asked
    for once more: permits that were used meanwhile do not.
    """
    if isinstance(result, Exception):
        raise result
    answer = result.answer
    if answer.permit is None and not _is_closed(result):
        raise PdpError(
            answer.reason_code,
            "The batch was allowed before, and can not be answered again now.",
        )
    return result


def _is_closed(recorded: Recorded) -> bool:
    """Whether its permit was given before, or undone, and is used up."""
    answer = recorded.answer
    return answer.replayed and answer.reason_code == ReasonCode.PERMIT_USED


async def _refused(rooms: Rooms, question: Asked | PdpError, result: Result) -> Result:
    """An answer of a batch that is refused: what was allowed is undone, on record."""
    if isinstance(result, Exception) or isinstance(question, PdpError):
        return result
    permit = result.answer.permit
    if permit is None and not _is_closed(result):
        return result
    answer = replace(
        result.answer,
        reason_code=ReasonCode.BATCH_REFUSED.value,
        permit=None,
        charges=(),
        hold_expires_at=0,
    )
    # The permit is closed last: while it is not, asking again finds it, and does the rest.
    released = await _release(rooms, answer.subject, permit) if permit is not None else None
    receipt = await rooms.audit.append(_record(question, answer, permit, released))
    if permit is not None:
        await rooms.permit_uses.close_permit(permit)
    return replace(result, answer=answer, receipt=receipt)


def _record(
    question: Asked, answer: Answer, permit: Permit | None, released: Receipt | None
) -> AuditRecord:
    subject = answer.subject
    return AuditRecord(
        type="decision",
        tenant_id=subject.tenant,
        actor_id=subject.actor,
        identity=identity_json(subject),
        action=question.tool,
        outcome=Outcome.DENIED,
        reason_code=answer.reason_code,
        decision_id=answer.decision_id,
        request_id=question.request_id,
        trace_id=question.trace_id,
        policy_revision=answer.policy_revision,
        permit_id=permit.id if permit else None,
        hold_id=(permit.hold_id or None) if permit else None,
        detail={"released": list(charges_json(released.charges))} if released else None,
        replayed=answer.replayed or None,
    )


async def _release(rooms: Rooms, subject: Subject, permit: Permit) -> Receipt | None:
    """Let go of what is held for a call that will not be made; None where nothing is."""
    if not permit.hold_id:
        return None
    try:
        return await rooms.ledger.release(
            isolate(subject, tool=permit.tool),
            IdempotencyKey(
                operation="outcome",
                key=permit.id,
                content_sha256=sha256_hex({"undone": ReasonCode.BATCH_REFUSED}),
            ),
            hold_id=permit.hold_id,
        )
    except LedgerError as error:
        if error.reason_code != ReasonCode.HOLD_EXPIRED:
            raise
        return None
