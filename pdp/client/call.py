"""One guarded call, without I/O: what is asked, and what an answer must be.

Both faces of the guard run these steps; they differ only in how a message
travels. A step that needs the sidecar yields an :class:`Ask` and is sent the
response.
"""

from __future__ import annotations

import inspect
import json
import time
import uuid
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from google.protobuf.message import Message

from pdp.api.v1 import authorization_pb2, common_pb2, execution_pb2
from pdp.canonical import JsonError, JsonObject, check, parse_object, sha256_hex
from pdp.client.acting import Identity
from pdp.client.decision import Decision
from pdp.client.errors import PermitDenied
from pdp.permit.claims import Permit, PermitError
from pdp.permit.keys import PermitKeySet
from pdp.permit.verifier import PermitVerifier
from pdp.reason import ReasonCode

MAX_ARGUMENTS_BYTES: Final = 1024 * 1024

Resource = tuple[str, str]
"""What a call is done to: type and id."""
Charge = tuple[str, str, int]
"""What a call cost: budget, unit, amount."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A message for the sidecar."""

    method: str
    """One of Authorize, ReportOutcome, GetPermitKeys."""
    request: Message
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)


Steps = Generator[Ask, Any, Permit]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool that is about to be asked for."""

    tool: str
    arguments: JsonObject = field(repr=False)
    """Exactly what the tool will be given: a copy that nobody else holds."""
    encoded: bytes = field(repr=False)
    resource: Resource | None
    audience: str
    request_id: str


class Tool:
    """A function that is guarded, and how its calls are described."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        audience: str,
        resource: Callable[..., Resource | None] | None,
        cost: Callable[[Any], Sequence[Charge]] | None,
        omit: Collection[str],
    ) -> None:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{name} is a generator: it would run after its permit was reported on. Guard a"
                " function that returns its result."
            )
        self.name = name
        self._signature = inspect.signature(function)
        self._audience = audience
        self._resource = resource
        self._cost = cost
        self._omit = frozenset(omit)
        unknown = self._omit - self._signature.parameters.keys()
        if unknown:
            raise TypeError(f"{name} has no parameter {', '.join(sorted(unknown))} to omit")

    def describe(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[ToolCall, inspect.BoundArguments]:
        """The call to ask for, and the arguments to run the function with: copies,
        so that what runs is what was allowed. Raises PermitDenied
        (arguments_invalid), and TypeError for arguments that the function does not
        take.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = self._named(bound)
        call = tool_call(self.name, named, audience=self._audience)
        for name, parameter in self._signature.parameters.items():
            if name in self._omit:
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[name] = {
                    key: call.arguments[key] for key in bound.arguments.get(name, {})
                }
            elif parameter.kind is parameter.VAR_POSITIONAL:
                values = call.arguments[name]
                bound.arguments[name] = tuple(values) if isinstance(values, list) else ()
            else:
                bound.arguments[name] = call.arguments[name]
        if self._resource is not None:
            call = with_resource(call, self._resource(**json.loads(call.encoded)))
        return call, bound

    def costs(self, result: Any) -> Sequence[Charge]:  # noqa: ANN401 - whatever the tool returns
        """What the call cost, by the tool's own account."""
        return self._cost(result) if self._cost is not None else ()

    def _named(self, bound: inspect.BoundArguments) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            if name in self._omit:
                continue
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                if named.keys() & value.keys():
                    raise PermitDenied(
                        ReasonCode.ARGUMENTS_INVALID, "an argument is named twice", tool=self.name
                    )
                named.update(value)
            else:
                named[name] = list(value) if kind is inspect.Parameter.VAR_POSITIONAL else value
        return named


def tool_call(
    tool: str,
    arguments: Mapping[str, Any],
    *,
    resource: Resource | None = None,
    audience: str = "",
    request_id: str = "",
) -> ToolCall:
    """A call with these arguments. Raises PermitDenied (arguments_invalid)."""
    plain = dict(arguments)
    try:
        check(plain)
        encoded = json.dumps(plain, ensure_ascii=False, allow_nan=False).encode("utf-8")
        # From here on only the copy counts: the caller's may still change.
        copied = parse_object(encoded, max_bytes=MAX_ARGUMENTS_BYTES)
    except (JsonError, ValueError, RecursionError, RuntimeError) as error:
        problem = str(error) if isinstance(error, JsonError) else "is not JSON"
        raise PermitDenied(
            ReasonCode.ARGUMENTS_INVALID,
            f"its arguments are no JSON object of the agreed form: it {problem}",
            tool=tool,
        ) from None
    return ToolCall(tool, copied, encoded, resource, audience, request_id or str(uuid.uuid4()))


def with_resource(call: ToolCall, resource: Resource | None) -> ToolCall:
    """The call, with what it is done to."""
    return ToolCall(
        call.tool, call.arguments, call.encoded, resource, call.audience, call.request_id
    )


class PermitDesk:
    """Obtains permits and checks them; remembers the sidecar's keys."""

    def __init__(
        self,
        identity: Identity,
        *,
        issuer: str,
        keys: PermitKeySet | None,
        observe: Callable[[Decision], None] | None,
    ) -> None:
        self._identity = identity
        self._observe = observe
        self._issuer = issuer
        self._keys = keys
        self._keys_are_pinned = keys is not None

    def obtain(self, call: ToolCall) -> Steps:
        """Ask for a permit and return it, verified. Raises PermitDenied."""
        acting = self._identity.current(call.tool)
        request = authorization_pb2.AuthorizeRequest(
            request_id=call.request_id,
            action=authorization_pb2.Action(name=call.tool),
            arguments_json=call.encoded,
            audience=call.audience,
        )
        if acting.context:
            request.context_json = json.dumps(acting.context).encode("utf-8")
        if call.resource is not None:
            kind, identifier = call.resource
            request.resource.type, request.resource.id = kind, identifier
        metadata = [("authorization", f"Bearer {acting.token}")]
        if acting.traceparent:
            metadata.append(("traceparent", acting.traceparent))
        response = yield Ask("Authorize", request, tuple(metadata))
        if self._observe is not None:
            self._observe(Decision.of(request, response))
        if response.decision is not True or not response.permit:
            raise PermitDenied(
                response.reason_code or ReasonCode.PERMIT_MISSING,
                "the decision was no",
                tool=call.tool,
                decision_id=response.decision_id,
                retry_after_seconds=(
                    response.retry_after.ToTimedelta().total_seconds()
                    if response.HasField("retry_after")
                    else None
                ),
            )
        try:
            permit = yield from self._verified(call, response.permit)
        except PermitError as error:
            raise PermitDenied(
                error.reason_code,
                "the answer held no permit for this call",
                tool=call.tool,
                decision_id=response.decision_id,
            ) from None
        # The identity may have ended while the answer was under way.
        self._identity.current(call.tool)
        return permit

    def _verified(self, call: ToolCall, token: str) -> Steps:
        if self._keys is None:
            yield from self._fetch_keys()
        try:
            permit = self._verifier(call).authenticate(token)
        except PermitError:
            if self._keys_are_pinned:
                raise
            # The sidecar may have been given a new key since.
            yield from self._fetch_keys()
            permit = self._verifier(call).authenticate(token)
        verifier = self._verifier(call)
        verifier.check_binding(
            permit,
            tool=call.tool,
            arguments_sha256=sha256_hex(call.arguments),
            audience=call.audience or permit.audience,
        )
        verifier.check_time(permit)
        if permit.transaction != call.request_id:
            raise PermitError(ReasonCode.PERMIT_MISMATCH, "The permit answers another question.")
        return permit

    def _fetch_keys(self) -> Generator[Ask, Any, None]:
        response = yield Ask("GetPermitKeys", execution_pb2.GetPermitKeysRequest())
        self._keys = PermitKeySet.from_jwks(response.jwks_json)

    def _verifier(self, call: ToolCall) -> PermitVerifier:
        assert self._keys is not None  # noqa: S101 - fetched before
        return PermitVerifier(
            self._keys, issuer=self._issuer, audience=call.audience, clock=time.time
        )


def report_executed(permit: Permit, charges: Sequence[Charge]) -> Ask:
    """The report that a tool ran, and what it cost."""
    return Ask(
        "ReportOutcome",
        execution_pb2.ReportOutcomeRequest(
            permit=permit.token,
            outcome=execution_pb2.OUTCOME_EXECUTED,
            charges=[
                common_pb2.Charge(budget=budget, unit=unit, amount=amount)
                for budget, unit, amount in charges
            ],
        ),
    )


def report_failed(permit: Permit, error: BaseException) -> Ask:
    """The report that a tool raised: the kind of error, never its text."""
    name = "".join(letter for letter in type(error).__name__ if letter.isalnum())
    return Ask(
        "ReportOutcome",
        execution_pb2.ReportOutcomeRequest(
            permit=permit.token,
            outcome=execution_pb2.OUTCOME_FAILED,
            error_type=name[:64] if name.isascii() else "",
        ),
    )
