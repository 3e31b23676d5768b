"""Hand a part of one's identity to another agent, and take up what was handed over."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from pdp import base64url
from pdp.api.v1 import authorization_pb2
from pdp.canonical import JsonObject, check, parse_object
from pdp.client.acting import Identity
from pdp.client.desk import Ask, Steps
from pdp.client.errors import DelegationRefused
from pdp.client.spend import Charge, charge_messages, checked_charges
from pdp.reason import ReasonCode

A2A_KEY: Final = "urn:agent-pdp:delegation"
"""Under which a delegation stands in the metadata of an A2A message, and in a queue's."""
HEADER: Final = "authorization"
TYPE: Final = "tool-delegation+jwt"
MAX_MESSAGE_BYTES: Final = 64 * 1024
MAX_TOKEN_LENGTH: Final = 8_192
_HOW_TO_ASK: Final = (
    "tools are a list of names, arguments are {tool: {argument: {rule: bound}}} in JSON,"
    " ttl_seconds is a whole number, and budget a list of (budget, unit, amount) in whole units"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """A narrower identity for another agent. Whoever has the token acts under it."""

    token: str = field(repr=False)
    """A secret."""
    id: str
    """Its id, with which it can be revoked."""
    agents: tuple[str, ...]
    """Who acts for whom, the first that was delegated to first."""
    expires_at: float
    """Unix seconds."""

    def headers(self) -> dict[str, str]:
        """For an HTTP request."""
        return {HEADER: f"Bearer {self.token}"}

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """For a gRPC call."""
        return ((HEADER, f"Bearer {self.token}"),)

    def a2a_metadata(self) -> dict[str, dict[str, str]]:
        """To be merged into the metadata of an A2A message."""
        return {A2A_KEY: {"token": self.token}}

    def to_message(self) -> bytes:
        """For a queue: a JSON object of one member, beside which others can be put."""
        return json.dumps(self.a2a_metadata()).encode("utf-8")


@runtime_checkable
class Headers(Protocol):
    """What has headers and is no Mapping, as those of http.server."""

    def items(self) -> Iterable[tuple[str, str]]:
        """Each header, as often as it was received."""
        ...


Carrier: TypeAlias = (
    Delegation
    | bytes
    | str
    | Mapping[str, Any]
    | Headers
    | Iterable[tuple[str | bytes, str | bytes]]
)
"""What a delegation is found in: the headers of an HTTP request, the metadata of a gRPC
call, the metadata of an A2A message, or what :meth:`Delegation.to_message` has made."""


def delegate(
    identity: Identity,
    agent: str,
    *,
    tools: Sequence[str],
    arguments: Mapping[str, Mapping[str, Mapping[str, Any]]] | None,
    ttl_seconds: int,
    budget: Sequence[Charge],
    request_id: str,
) -> Steps[Delegation]:
    """Ask for a delegation. Raises IdentityLacking, and DelegationRefused for what can not
    be asked for.
    """
    acting = identity.current()
    try:
        rules = _plain(arguments or {})
        request = authorization_pb2.DelegateRequest(
            request_id=request_id or str(uuid.uuid4()),
            delegate=agent,
            tools=tools,
            arguments_json=json.dumps(rules).encode("utf-8") if rules else b"",
            ttl_seconds=ttl_seconds,
            budget=charge_messages(checked_charges(budget)),
        )
    except (AttributeError, TypeError, ValueError):
        raise DelegationRefused(ReasonCode.REQUEST_INVALID, _HOW_TO_ASK) from None
    response = yield Ask("Delegate", request, acting.metadata)
    if not _is_delegation(response.token) or response.agents[-1:] != [agent]:
        raise DelegationRefused(ReasonCode.TOKEN_INVALID, "the answer held no such delegation")
    # The identity may have ended while the answer was under way.
    identity.current()
    return Delegation(
        token=response.token,
        id=response.delegation_id,
        agents=tuple(response.agents),
        expires_at=response.expires_at.seconds + response.expires_at.nanos / 1e9,
    )


def token_in(carrier: Carrier) -> str:
    """The one delegation in what was received. Nothing of it is verified: the sidecar does
    that. Raises DelegationRefused where there is none, or several, or something else.
    """
    try:
        found = list(_tokens(carrier))
    except (TypeError, ValueError):
        raise DelegationRefused(
            ReasonCode.TOKEN_INVALID, "what was received is not headers, metadata or a message"
        ) from None
    if not found:
        raise DelegationRefused(ReasonCode.IDENTITY_MISSING, "what was received holds none")
    if len(found) > 1:
        raise DelegationRefused(ReasonCode.TOKEN_INVALID, "what was received holds several")
    if not isinstance(found[0], str) or not _is_delegation(found[0]):
        raise DelegationRefused(
            ReasonCode.TOKEN_INVALID, "what was received holds something else in its place"
        )
    return found[0]


def _tokens(carrier: Carrier) -> Iterator[str | None]:
    """Whatever stands in the place of one; None for what can not be read."""
    if isinstance(carrier, Delegation):
        yield carrier.token
    elif isinstance(carrier, bytes | str):
        message = carrier.encode("utf-8") if isinstance(carrier, str) else carrier
        yield from _under_key(parse_object(message, max_bytes=MAX_MESSAGE_BYTES))
    elif isinstance(carrier, Mapping):
        yield from _under_key(carrier)
        yield from _in_headers(carrier.items())
    elif isinstance(carrier, Headers):
        yield from _in_headers(carrier.items())
    else:
        yield from _in_headers(carrier)


def _under_key(members: Mapping[str, Any]) -> Iterator[str | None]:
    if A2A_KEY in members:
        value = members[A2A_KEY]
        token = value.get("token") if isinstance(value, Mapping) and len(value) == 1 else None
        yield token if isinstance(token, str) else None


def _in_headers(headers: Iterable[tuple[str | bytes, Any]]) -> Iterator[str | None]:
    """Names of headers know no case (RFC 9110 5.1), nor does the word Bearer (RFC 9110
    11.1); some servers give them as bytes.
    """
    for name, value in headers:
        if _text(name).lower() == HEADER:
            # Several in one header would be as good as several headers.
            scheme, _, token = _text(value).partition(" ")
            yield token if scheme.lower() == "bearer" and token else None


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    return value if isinstance(value, str) else ""


def _is_delegation(token: str) -> bool:
    """Whether it says that it is one."""
    segments = token.split(".")
    if len(token) > MAX_TOKEN_LENGTH or len(segments) != 3 or not all(segments):  # noqa: PLR2004 - RFC 7515 7.1
        return False
    try:
        header = parse_object(base64url.decode(segments[0]), max_bytes=MAX_TOKEN_LENGTH)
    except ValueError:
        return False
    return header.get("typ") == TYPE


def _plain(rules: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> JsonObject:
    """Raises ValueError for what is not JSON."""
    plain: JsonObject = {
        tool: {name: {**rule} for name, rule in arguments.items()}
        for tool, arguments in rules.items()
    }
    check(plain)
    return plain
