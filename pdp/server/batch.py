"""AuthorizeBatch on the wire: questions in, and what came of each out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdp.api.v1 import authorization_pb2
from pdp.batch import MAX_QUESTIONS, Batch, Result, digest_of
from pdp.decision import Asked, Recorded
from pdp.errors import PdpError, RequestError
from pdp.server import wire
from pdp.server.status import failure_out


def batch_from(
    request: authorization_pb2.AuthorizeBatchRequest,
    reader: wire.QuestionReader,
    *,
    trace_id: str | None,
) -> Batch:
    """The batch that is asked for. Raises RequestError, for all or nothing also for what is
    wrong with one question.
    """
    if not 1 <= len(request.questions) <= MAX_QUESTIONS:
        raise RequestError("questions", f"must be 1 to {MAX_QUESTIONS}")
    ids = [question.request_id for question in request.questions]
    if len(set(ids)) != len(ids):
        raise RequestError("questions", "must each have a request_id of its own")
    digest = digest_of(ids) if request.all_or_nothing else ""

    def asked(index: int) -> Asked | PdpError:
        try:
            return reader.asked(request.questions[index], trace_id=trace_id, batch=digest)
        except RequestError as error:
            if not digest:
                return error
            raise RequestError(f"questions[{index}].{error.field}", error.description) from None

    return Batch(questions=tuple(map(asked, range(len(ids)))), digest=digest, trace_id=trace_id)


def batch_response(
    results: Sequence[Result], *, failure_of: Callable[[Exception], PdpError]
) -> authorization_pb2.AuthorizeBatchResponse:
    """What came of each, on the wire."""
    return authorization_pb2.AuthorizeBatchResponse(
        results=[
            authorization_pb2.BatchResult(answer=wire.authorize_response(result))
            if isinstance(result, Recorded)
            else authorization_pb2.BatchResult(failure=failure_out(failure_of(result)))
            for result in results
        ]
    )
