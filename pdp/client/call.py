"""A guarded function, and a call of it: what is asked for, and what then runs."""

from __future__ import annotations

import inspect
import json
import re
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from pdp.canonical import JsonError, JsonObject, check, parse_object
from pdp.client.errors import PermitDenied
from pdp.client.spend import Charge, checked_charges
from pdp.reason import ReasonCode

_TOOL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
MAX_ARGUMENTS_BYTES: Final = 1024 * 1024

Resource = tuple[str, str]
"""What a call is done to: type and id."""
_R = TypeVar("_R")


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
    estimate: tuple[Charge, ...] = ()
    """The most that it should cost, by the caller's own account."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What a tool says of its own cost: before it runs, after, and when it has failed."""

    estimate: Callable[..., Sequence[Charge]] | None = None
    cost: Callable[[Any], Sequence[Charge]] | None = None
    cost_of_failure: Callable[[BaseException], Sequence[Charge]] | None = None


class Tool:
    """A function that is guarded, and how its calls are described."""

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        audience: str,
        resource: Callable[..., Resource | None] | None,
        costs: Costs,
        omit: Collection[str],
    ) -> None:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{name} is a generator: it would run after its permit was reported on. Guard a"
                " function that returns its result."
            )
        self.name = name
        self._signature = inspect.signature(function)
        self.audience = audience
        self._resource = resource
        self._costs = costs
        self.asks_each_time = costs.estimate is not None
        """Whether a call says something of its own to the policy, besides its arguments."""
        self.permits_several = False
        """Whether the last permit for it was for several calls."""
        self._omit = frozenset(omit)
        unknown = self._omit - self._signature.parameters.keys()
        if unknown:
            raise TypeError(f"{name} has no parameter {', '.join(sorted(unknown))} to omit")

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """The arguments by name, defaults included. Raises TypeError, as the
        function would, for arguments that it does not take.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound

    def describe(self, bound: inspect.BoundArguments) -> ToolCall:
        """The call to ask for. Puts copies in the place of the arguments, so that
        what runs is what was allowed. Raises PermitDenied (arguments_invalid).
        """
        call = tool_call(self.name, self._named(bound), audience=self.audience)
        for name, parameter in self._signature.parameters.items():
            if name in self._omit:
                continue
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: call.arguments[key] for key in bound.arguments[name]}
            elif parameter.kind is parameter.VAR_POSITIONAL:
                values = call.arguments[name]
                bound.arguments[name] = tuple(values) if isinstance(values, list) else ()
            else:
                bound.arguments[name] = call.arguments[name]
        # They are given copies of their own, so that they can not change what is asked.
        if self._resource is not None:
            found = self._resource(**json.loads(call.encoded))
            call = replace(call, resource=checked_resource(found, tool=self.name))
        if self._costs.estimate is not None:
            estimate = checked_charges(self._costs.estimate(**json.loads(call.encoded)))
            call = replace(call, estimate=estimate)
        return call

    def finished(self, result: _R) -> _R:
        """The result, if there is nothing left to run. Raises TypeError: what runs
        later would run after the outcome was reported.
        """
        if inspect.iscoroutine(result) or inspect.isgenerator(result):
            result.close()
        elif not (inspect.isawaitable(result) or inspect.isasyncgen(result)):
            return result
        raise TypeError(
            f"{self.name} returned a {type(result).__name__}, which is still to run; guard the"
            " function that does the work"
        )

    def cost(self, result: Any) -> Sequence[Charge]:  # noqa: ANN401 - whatever the tool returns
        """What the call cost, by the tool's own account."""
        return self._costs.cost(result) if self._costs.cost is not None else ()

    def cost_of_failure(self, error: BaseException) -> Sequence[Charge]:
        """What the call cost although it raised, by the tool's own account."""
        costs = self._costs.cost_of_failure
        return costs(error) if costs is not None else ()

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


def check_tool_name(name: object) -> None:
    """Raises TypeError for what is no tool's name, such as the function itself under
    a bare @guard.tool.
    """
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise TypeError(
            'name the tool: @guard.tool("orders.update"), with 1 to 128 characters of'
            " [A-Za-z0-9._:/-], the first a letter or digit"
        )


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
    return ToolCall(
        tool,
        copied,
        encoded,
        checked_resource(resource, tool=tool),
        audience,
        request_id or str(uuid.uuid4()),
    )


def checked_resource(resource: object, *, tool: str) -> Resource | None:
    """The resource, if it is one. Raises PermitDenied (guard_failed)."""
    match resource:
        case None:
            return None
        case (str(kind), str(identifier)) if kind and identifier:
            return kind, identifier
    raise PermitDenied(
        ReasonCode.GUARD_FAILED,
        "its resource must be (type, id), two texts that are not empty, or None",
        tool=tool,
    )
