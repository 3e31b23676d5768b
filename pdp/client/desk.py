"""What the sidecar is asked for a call, and what its answer must be, without I/O.

Both faces of the guard walk these steps; they differ only in how a message
travels. A step that needs the sidecar yields an :class:`Ask` and is sent the
response, or thrown the CallError.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from google.protobuf.message import Message

from pdp.api.v1 import authorization_pb2, execution_pb2
from pdp.canonical import sha256_hex
from pdp.channel import CallError, Connection, Metadata, seconds_of
from pdp.client.acting import Acting, Identity
from pdp.client.call import ToolCall
from pdp.client.decision import Decision
from pdp.client.errors import PermitDenied
from pdp.client.spend import Charge, charge_messages, charges_of, checked_charges
from pdp.permit.claims import Permit, PermitError
from pdp.permit.keys import PermitKeySet
from pdp.permit.verifier import PermitVerifier
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

if TYPE_CHECKING:
    from concurrent.futures import Future

_log: Final = logging.getLogger(__name__)
_T = TypeVar("_T")

_CHARGES_REFUSED: Final = frozenset({ReasonCode.CHARGE_NOT_HELD, ReasonCode.REQUEST_INVALID})

ASK_AGAIN: Final = frozenset(
    {
        ReasonCode.PDP_UNAVAILABLE,
        ReasonCode.DEADLINE_EXCEEDED,
        ReasonCode.RATE_LIMITED,
        ReasonCode.BUDGET_UNAVAILABLE,
        ReasonCode.PERMIT_UNAVAILABLE,
        ReasonCode.AUDIT_UNAVAILABLE,
        ReasonCode.POLICY_UNAVAILABLE,
        ReasonCode.POLICY_TIMEOUT,
        ReasonCode.POLICY_STALE,
        ReasonCode.REVOCATIONS_UNAVAILABLE,
        ReasonCode.INTERNAL,
    }
)
"""What may pass: the same message can be sent again."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A message for the sidecar."""

    method: str
    """As the contract names it: Authorize, ReserveBudget, ..."""
    request: Message = field(repr=False)
    metadata: Metadata = field(default=(), repr=False)

    @property
    def message(self) -> tuple[str, Message, Metadata]:
        """What a connection's ``call`` is given."""
        return self.method, self.request, self.metadata


@dataclass(frozen=True, slots=True)
class Wait:
    """Another caller's question, whose end is awaited; True where it was of use."""

    end: Future[bool]
    timeout_seconds: float
    """After which it was of none."""


Steps = Generator[Ask | Wait, Any, _T]


class Walk(Generic[_T]):
    """Steps on their way. Nothing but their own end gives a result."""

    def __init__(self, steps: Steps[_T]) -> None:
        self._steps = steps
        self._results: list[_T] = []
        self.ask: Ask | Wait | None = None
        """What the sidecar is to be asked next, or is to be waited for; None when the
        steps are done.
        """
        self._advance(functools.partial(next, steps))

    def answer(self, response: Message | bool) -> None:  # noqa: FBT001 - it is what came
        """Go on with the sidecar's response, or with what the wait has come to."""
        self._advance(functools.partial(self._steps.send, response))

    def fail(self, error: CallError) -> None:
        """Go on without one."""
        self._advance(functools.partial(self._steps.throw, error))

    def close(self) -> None:
        """Go no further. Whoever walks says so in any case: who waits for what the steps
        do at their end would wait for as long as somebody keeps the exception.
        """
        self._steps.close()

    def result(self) -> _T:
        """What the steps came to. Raises ValueError while they are under way."""
        [result] = self._results
        return result

    def _advance(self, resume: Callable[[], Ask | Wait]) -> None:
        try:
            self.ask = resume()
        except StopIteration as done:
            self.ask = None
            self._results.append(done.value)


def walk(connection: Connection, steps: Steps[_T]) -> _T:
    """What the steps come to, over a blocking connection."""
    with contextlib.closing(Walk(steps)) as walk:
        while (ask := walk.ask) is not None:
            try:
                answer = _end_of(ask) if isinstance(ask, Wait) else connection.call(*ask.message)
            except CallError as error:
                walk.fail(error)
            else:
                walk.answer(answer)
        return walk.result()


def _end_of(wait: Wait) -> bool:
    try:
        return wait.end.result(wait.timeout_seconds)
    except TimeoutError:
        return False


class Use(Protocol):
    """Leave to make one call, under a permit that is for it alone or for several."""

    @property
    def permit(self) -> Permit:
        """The permit."""
        ...

    def executed(self, cost: Callable[[], Sequence[Charge]]) -> Steps[None] | None:
        """The call has run: the report to make, if it is time for one."""
        ...

    def failed(
        self, error: BaseException, cost: Callable[[], Sequence[Charge]]
    ) -> Steps[None] | None:
        """The call has raised: the report to make, if it is time for one."""
        ...


@dataclass(frozen=True, slots=True)
class Grant:
    """A permit, and what is held for its call."""

    permit: Permit
    held: tuple[Charge, ...]
    asked_by: Acting = field(repr=False)

    def executed(self, cost: Callable[[], Sequence[Charge]]) -> Steps[None]:
        """As :func:`report_executed`."""
        return report_executed(self.permit, cost)

    def failed(self, error: BaseException, cost: Callable[[], Sequence[Charge]]) -> Steps[None]:
        """As :func:`report_failed`."""
        return report_failed(self.permit, error, cost, held=self.held)


class PermitDesk:
    """Obtains permits and checks them; remembers the sidecar's keys."""

    def __init__(
        self,
        identity: Identity,
        *,
        issuer: str,
        keys: PermitKeySet | None,
        observe: Callable[[Decision], None] | None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._observe = observe
        self._issuer = issuer
        self._clock = clock
        self._verifier = self._verifier_with(keys) if keys is not None else None
        self._keys_are_pinned = keys is not None

    def obtain(self, call: ToolCall) -> Steps[Grant]:
        """Ask for a permit and return it, verified. Raises PermitDenied and
        IdentityLacking.
        """
        acting = self._identity.current()
        request = question(call, acting)
        response = yield Ask("Authorize", request, acting.metadata)
        return (yield from self.accept(call, request, response, acting))

    def accept(
        self,
        call: ToolCall,
        request: authorization_pb2.AuthorizeRequest,
        response: authorization_pb2.AuthorizeResponse,
        acting: Acting,
    ) -> Steps[Grant]:
        """The permit of an answer, verified. Raises PermitDenied and IdentityLacking."""
        if self._observe is not None:
            self._observe(Decision.of(request, response))
        if response.decision is not True:
            raise _denied(call, response)
        try:
            permit = yield from self._verified(call, response)
        except PermitError as error:
            raise PermitDenied(
                error.reason_code,
                "the answer held no permit for this call",
                tool=call.tool,
                decision_id=response.decision_id,
            ) from None
        # The identity may have ended while the answer was under way.
        self._identity.current()
        return Grant(permit, charges_of(response.hold.charges), acting)

    def _verified(
        self, call: ToolCall, response: authorization_pb2.AuthorizeResponse
    ) -> Steps[Permit]:
        verifier = self._verifier or (yield from self._fetch_keys())
        try:
            permit = verifier.authenticate(response.permit)
        except PermitError as error:
            if self._keys_are_pinned or error.reason_code == ReasonCode.PERMIT_MISSING:
                raise
            # The sidecar may have been given a new key since.
            verifier = yield from self._fetch_keys()
            permit = verifier.authenticate(response.permit)
        verifier.check_binding(
            permit,
            tool=call.tool,
            arguments_sha256=sha256_hex(call.arguments),
            audience=call.audience or permit.audience,
        )
        verifier.check_time(permit)
        # What names no arguments is for any, on any resource: only where the answer says
        # for how many calls, and it is for just as many.
        binds_arguments = bool(permit.arguments_sha256)
        resource = "/".join(call.resource) if call.resource and binds_arguments else ""
        max_uses = response.max_uses or int(binds_arguments)
        if (
            permit.transaction,
            permit.resource,
            permit.decision_id,
            permit.tenant,
            permit.max_uses,
        ) != (call.request_id, resource, response.decision_id, response.tenant_id, max_uses):
            raise PermitError(ReasonCode.PERMIT_MISMATCH, "The permit answers another question.")
        return permit

    def _fetch_keys(self) -> Steps[PermitVerifier]:
        response = yield Ask("GetPermitKeys", execution_pb2.GetPermitKeysRequest())
        self._verifier = self._verifier_with(PermitKeySet.from_jwks(response.jwks_json))
        return self._verifier

    def _verifier_with(self, keys: PermitKeySet) -> PermitVerifier:
        # The audience is that of each call, not one of the guard's.
        return PermitVerifier(keys, issuer=self._issuer, audience="", clock=self._clock)


def question(call: ToolCall, acting: Acting) -> authorization_pb2.AuthorizeRequest:
    """What the sidecar is asked for a call."""
    request = authorization_pb2.AuthorizeRequest(
        request_id=call.request_id,
        action=authorization_pb2.Action(name=call.tool),
        arguments_json=call.encoded,
        context_json=_context(acting, call),
        audience=call.audience,
    )
    if call.resource is not None:
        request.resource.type, request.resource.id = call.resource
    return request


def report_executed(permit: Permit, cost: Callable[[], Sequence[Charge]]) -> Steps[None]:
    """Report that a tool ran, once, and what it cost. Where ``cost`` fails, or names what
    was not held, all that is held for a call counts as spent: the tool has run.
    """
    request = execution_pb2.ReportOutcomeRequest(
        permit=permit.token, outcome=execution_pb2.OUTCOME_EXECUTED, uses=_one_use(permit)
    )
    # A report that names no charges settles all that is held.
    yield from report(permit.tool, request, charges=charges_by(permit.tool, cost), otherwise=())


def report_failed(
    permit: Permit,
    error: BaseException,
    cost: Callable[[], Sequence[Charge]],
    *,
    held: Sequence[Charge] | None,
) -> Steps[None]:
    """Report that a tool raised, the kind of error and never its text, and what it cost
    all the same: nothing, unless ``cost`` says so. Where that fails, or names what was
    not held, all that is ``held`` counts as spent, where it is known.
    """
    charges = charges_by(permit.tool, cost)
    request = execution_pb2.ReportOutcomeRequest(
        permit=permit.token,
        outcome=execution_pb2.OUTCOME_FAILED,
        error_type=error_type(error),
        # A use that is counted costs its share, where no charge is named.
        uses=0 if charges == () else _one_use(permit),
    )
    yield from report(permit.tool, request, charges=charges, otherwise=held)


def error_type(error: BaseException) -> str:
    """The kind of an error, as a report may name it."""
    name = "".join(letter for letter in type(error).__name__ if letter.isalnum())
    return name[:64] if name.isascii() else ""


def report(
    tool: str,
    request: execution_pb2.ReportOutcomeRequest,
    *,
    charges: Sequence[Charge] | None,
    otherwise: Sequence[Charge] | None,
) -> Steps[None]:
    """Report with these charges, or with the others where there are none or they are
    refused. Raises ValueError where there are no others either, and CallError.
    """
    if charges is None:
        charges, otherwise = otherwise, None
        if charges is None:
            raise ValueError("no charges")
    request.charges.extend(charge_messages(charges))
    try:
        yield Ask("ReportOutcome", request)
    except CallError as error:
        if not charges or otherwise is None or error.reason_code not in _CHARGES_REFUSED:
            raise
        _log.warning(
            "%s: what it says it cost was refused (%s); all that was held for it is spent",
            tool,
            error.reason_code,
        )
        request.ClearField("charges")
        request.charges.extend(charge_messages(otherwise))
        yield Ask("ReportOutcome", request)


def log_unreported(error: Exception) -> None:
    """A report is given up."""
    _log.warning(
        "the outcome of a call could not be reported (%s); what it held expires by itself",
        type(error).__name__,
    )


def _one_use(permit: Permit) -> int:
    """What a report says of uses, where one call was made: only of a permit for several
    need it be said.
    """
    return int(permit.max_uses > 1)


def _context(acting: Acting, call: ToolCall) -> bytes:
    """What the policy sees as input.context.client."""
    if not call.estimate:
        return acting.context_json
    estimate = [
        {"budget": budget, "unit": unit, "amount": amount} for budget, unit, amount in call.estimate
    ]
    context = json.loads(acting.context_json or b"{}")
    return json.dumps({**context, "estimate": estimate}).encode("utf-8")


def _denied(call: ToolCall, response: authorization_pb2.AuthorizeResponse) -> PermitDenied:
    reason_code = response.reason_code
    if not REASON_CODE_PATTERN.fullmatch(reason_code) or reason_code == ReasonCode.OK:
        reason_code = ReasonCode.PERMIT_MISSING
    return PermitDenied(
        reason_code,
        "the decision was no",
        tool=call.tool,
        decision_id=response.decision_id,
        retry_after_seconds=(
            seconds_of(response.retry_after) if response.HasField("retry_after") else None
        ),
        refused_by=response.refused_by.limit_id,
    )


def charges_by(tool: str, cost: Callable[[], Sequence[Charge]]) -> tuple[Charge, ...] | None:
    """What the tool says that it cost; None where it gives no usable answer."""
    try:
        return checked_charges(cost())
    except Exception as error:  # noqa: BLE001 - the tool has run; then all that is held is spent
        _log.warning(
            "%s: its cost function failed with %s; all that was held for it is spent",
            tool,
            type(error).__name__,
        )
        return None
