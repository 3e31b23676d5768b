"""Delegate on the wire: every bound of its messages."""

from __future__ import annotations

import math
import re
from typing import Final

from pdp.api.v1 import authorization_pb2
from pdp.canonical import JsonError, JsonObject, JsonValue, parse_object
from pdp.delegating import Delegated, DelegationRequest
from pdp.errors import RequestError
from pdp.identity.claims import MAX_NAME_LENGTH
from pdp.server.wire import charges_from, key_from, receipt_out, tool_named

MAX_TOOLS: Final = 128
MAX_RULES_BYTES: Final = 2 * 1024
MAX_TTL_SECONDS: Final = 86_400

_ARGUMENT: Final = re.compile(r"[^\x00-\x1f\x7f]{1,128}")


def delegation_from(
    request: authorization_pb2.DelegateRequest, *, trace_id: str | None
) -> DelegationRequest:
    """The narrower identity that is asked for. Raises RequestError."""
    agent = request.delegate
    if not 0 < len(agent) <= MAX_NAME_LENGTH or not agent.isprintable():
        raise RequestError("delegate", f"must be 1 to {MAX_NAME_LENGTH} printable characters")
    if not 0 < len(request.tools) <= MAX_TOOLS:
        raise RequestError("tools", f"must name 1 to {MAX_TOOLS} tools")
    if not 0 <= request.ttl_seconds <= MAX_TTL_SECONDS:
        raise RequestError("ttl_seconds", f"must be 0 to {MAX_TTL_SECONDS}")
    tools = {tool_named(f"tools[{number}]", tool) for number, tool in enumerate(request.tools)}
    if len(tools) != len(request.tools):
        raise RequestError("tools", "must name each tool once")
    return DelegationRequest(
        request_id=key_from("request_id", request.request_id),
        delegate=agent,
        tools=tuple(sorted(tools)),
        arguments=_rules(request.arguments_json, tools),
        ttl_seconds=request.ttl_seconds,
        budget=charges_from(request.budget, least=1, field="budget"),
        trace_id=trace_id,
    )


def delegate_response(delegated: Delegated) -> authorization_pb2.DelegateResponse:
    """The narrower identity on the wire."""
    subject = delegated.subject
    response = authorization_pb2.DelegateResponse(
        token=delegated.token,
        delegation_id=subject.token_id,
        agents=subject.delegation.agents if subject.delegation else (),
        audit=receipt_out(delegated.receipt),
        replayed=delegated.replayed,
    )
    response.expires_at.seconds = int(subject.expires_at)
    return response


def _rules(data: bytes, tools: set[str]) -> JsonObject:
    field = "arguments_json"
    try:
        rules = parse_object(data or b"{}", max_bytes=MAX_RULES_BYTES)
    except JsonError as error:
        raise RequestError(field, str(error)) from None
    for tool, arguments in rules.items():
        if tool not in tools:
            raise RequestError(field, "must name only tools that stand in tools")
        if not isinstance(arguments, dict):
            raise RequestError(field, "must hold for each tool an object of arguments")
        for name, rule in arguments.items():
            if not _ARGUMENT.fullmatch(name) or not isinstance(rule, dict) or not rule:
                raise RequestError(field, "must hold for each argument an object of rules")
            for kind, bound in rule.items():
                _check_rule(field, kind, bound)
    return rules


def _check_rule(field: str, kind: str, bound: JsonValue) -> None:
    match kind:
        case "one_of":
            if not isinstance(bound, list) or not bound or not all(map(_is_scalar, bound)):
                raise RequestError(field, "must give one_of a list of texts, numbers or booleans")
        case "min" | "max":
            if not _is_number(bound):
                raise RequestError(field, f"must give {kind} a number")
        case "prefix":
            if not isinstance(bound, str) or not bound:
                raise RequestError(field, "must give prefix a text")
        case _:
            raise RequestError(field, "knows the rules one_of, min, max and prefix")


def _is_number(value: JsonValue) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_scalar(value: JsonValue) -> bool:
    return isinstance(value, str | bool) or _is_number(value)
