"""Identify by a delegation: the token of an agent, made by a sidecar, that says for whom it
acts and what it may do at most.

A compact JWS of a type of its own. Claims are named after RFC 7519 (registered claims),
RFC 8693 (act) and RFC 9396 (authorization_details). One that is not known is refused, not
ignored: it may be a restriction.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pdp import base64url
from pdp.canonical import JsonObject, JsonValue, parse_object
from pdp.identity.claims import MAX_NAME_LENGTH, invalid
from pdp.identity.resolver import Credentials, IdentityError, IdentityResolver
from pdp.identity.signature import MAX_TOKEN_LENGTH
from pdp.identity.subject import TENANT_PATTERN, Delegation, Link, Subject
from pdp.reason import ReasonCode

TYPE: Final = "tool-delegation+jwt"
DETAIL_TYPE: Final = "tool_delegation"
MAX_LINKS: Final = 16
"""Most agents that act one for another."""
MAX_ID_LENGTH: Final = 40
"""Of a delegation: a UUID, and a little more."""
LEEWAY_SECONDS: Final = 30
"""How far the clock of the sidecar that made it may be ahead. None is given at its end."""
_MAX_HEADER_LENGTH: Final = 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class DelegationIssuer:
    """The sidecars of one trust domain, whose delegations count here."""

    name: str
    """The exact iss claim, and aud: they are for the sidecars of that domain, and whoever
    trusts them."""
    verify: Callable[[str], JsonObject]
    """The payload of a token that a key of theirs has signed as a delegation. Raises
    ValueError, which says what the token does wrong and shows nothing of it."""
    keys_version: Callable[[], object]
    """Another value whenever their keys change."""
    tenants: frozenset[str] | None = None
    """Those that they may name; None for all."""
    check: Callable[[Subject], None] = lambda _: None
    """Raises IdentityError where the subject could not be of its tenant by now. Asked with
    every call, as a delegation outlives what it was made by."""


class DelegatedIdentity:
    """Resolves delegations, and leaves every other credential to ``otherwise``.

    A token's type only says who verifies it, and whoever does pins the type. Those that
    were verified are remembered, by digest, while they last and their keys do.
    """

    def __init__(
        self,
        otherwise: IdentityResolver,
        issuers: Sequence[DelegationIssuer],
        *,
        clock: Callable[[], float] = time.time,
        cache_entries: int = 2_000,
    ) -> None:
        self._otherwise = otherwise
        self._issuers = {issuer.name: issuer for issuer in issuers}
        self._clock = clock
        self._cache: OrderedDict[bytes, tuple[Subject, DelegationIssuer]] = OrderedDict()
        self._cache_entries = cache_entries
        self._keys_version = self._version()

    async def resolve(self, credentials: Credentials) -> Subject:
        """The caller. Raises IdentityError."""
        token = credentials.bearer
        if token is None or not is_delegation(token):
            return await self._otherwise.resolve(credentials)
        if len(token) > MAX_TOKEN_LENGTH or not token.isascii():
            raise invalid("is too long, or not ASCII")
        version = self._version()
        if version != self._keys_version:
            self._cache.clear()
            self._keys_version = version
        digest = hashlib.sha256(token.encode("ascii")).digest()
        known = self._cache.get(digest)
        if known is None:
            known = self._cache[digest] = self._verified(token)
            if len(self._cache) > self._cache_entries:
                self._cache.popitem(last=False)
        subject, issuer = known
        if self._clock() >= subject.expires_at:
            self._cache.pop(digest, None)
            raise IdentityError(
                ReasonCode.TOKEN_EXPIRED,
                "The delegation has expired; ask whoever delegated for a new one.",
            )
        issuer.check(subject)
        self._cache.move_to_end(digest)
        return subject

    def _version(self) -> tuple[object, ...]:
        return tuple(issuer.keys_version() for issuer in self._issuers.values())

    def _verified(self, token: str) -> tuple[Subject, DelegationIssuer]:
        issuer = self._issuers.get(_issuer_name(token))
        if issuer is None:
            raise invalid("is of an issuer that is not trusted here")
        try:
            claims = issuer.verify(token)
        except ValueError as error:
            raise invalid(str(error)) from None
        subject = subject_of(claims)
        if issuer.tenants is not None and subject.tenant not in issuer.tenants:
            raise IdentityError(
                ReasonCode.TENANT_UNKNOWN,
                "The delegation is for a tenant that its issuer may not name here.",
                actor=subject.actor,
            )
        issued_at = claims["iat"]
        if isinstance(issued_at, int) and self._clock() < issued_at - LEEWAY_SECONDS:
            raise invalid("is not valid yet (nbf)")
        return subject, issuer


def is_delegation(token: str) -> bool:
    """Whether the token says that it is one. Nothing is verified."""
    header, _, rest = token.partition(".")
    return bool(rest) and len(header) <= _MAX_HEADER_LENGTH and _type_of(header) == TYPE


@functools.lru_cache(maxsize=1_024)
def _type_of(header: str) -> str:
    try:
        kind = parse_object(base64url.decode(header), max_bytes=_MAX_HEADER_LENGTH).get("typ")
    except ValueError:
        return ""
    return kind.lower().removeprefix("application/") if isinstance(kind, str) else ""


def _issuer_name(token: str) -> str:
    """Whose keys are to verify it. Nothing is verified yet."""
    try:
        _, claims, _ = token.split(".")
        name = parse_object(base64url.decode(claims), max_bytes=MAX_TOKEN_LENGTH).get("iss")
    except ValueError:
        raise invalid("is not a signed JWT") from None
    return name if isinstance(name, str) else ""


def claims_of(subject: Subject, *, issuer: str, issued_at: int) -> JsonObject:
    """The payload to be signed for a subject that acts under a delegation."""
    delegation = subject.delegation
    assert delegation is not None  # noqa: S101 - the caller's part
    act: JsonObject = {}
    for agent in delegation.agents:
        act = {"sub": agent, **({"act": act} if act else {})}
    last = delegation.links[-1]
    tools: list[JsonValue] = [*sorted(delegation.tools)]
    return {
        "iss": issuer,
        "aud": issuer,
        "iat": issued_at,
        "nbf": issued_at,
        "exp": last.expires_at,
        "jti": last.id,
        "sub": subject.actor,
        "act": act,
        "scopes": list(subject.scopes),
        "roles": list(subject.roles),
        "authorization_details": [
            {
                "type": DETAIL_TYPE,
                "actions": tools,
                "arguments": delegation.arguments,
            }
        ],
        "tctx": {
            "tenant": subject.tenant,
            "organisation": subject.organisation,
            "team": subject.team,
            "session": subject.session,
            "issuer": subject.issuer,
            "root_token_id": delegation.root_token_id,
            "ledger": delegation.ledger,
            "links": [
                {
                    "id": link.id,
                    "exp": link.expires_at,
                    "budget": [list(each) for each in link.budget],
                }
                for link in delegation.links
            ],
        },
    }


def subject_of(claims: JsonObject) -> Subject:
    """The subject that a verified payload names. Raises IdentityError unless it is, to the
    letter, what :func:`claims_of` makes of that subject.
    """
    try:
        subject = _read(claims)
        same = claims_of(subject, issuer=_text(claims["iss"]), issued_at=_whole(claims["iat"]))
    except (KeyError, TypeError, ValueError):
        raise _malformed() from None
    if not _same(claims, same):
        raise _malformed()
    return subject


def _read(claims: JsonObject) -> Subject:
    """Raises KeyError, TypeError and ValueError."""
    context = _object(claims["tctx"])
    [detail] = map(_object, _list(claims["authorization_details"]))
    links = _links(claims["act"], _list(context["links"]))
    tenant = _text(context["tenant"])
    if not TENANT_PATTERN.fullmatch(tenant):
        raise ValueError
    return Subject(
        tenant=tenant,
        actor=_text(claims["sub"]),
        roles=tuple(map(_text, _list(claims["roles"]))),
        scopes=tuple(map(_text, _list(claims["scopes"]))),
        organisation=_text(context["organisation"], least=0),
        team=_text(context["team"], least=0),
        session=_text(context["session"], least=0),
        issuer=_text(context["issuer"], least=0),
        token_id=links[-1].id,
        expires_at=float(links[-1].expires_at),
        delegation=Delegation(
            links=links,
            tools=frozenset(map(_text, _list(detail["actions"]))),
            arguments=_rules(detail["arguments"]),
            root_token_id=_text(context["root_token_id"], least=0),
            ledger=_text(context["ledger"]),
        ),
    )


def _links(act: JsonValue, fields: list[JsonValue]) -> tuple[Link, ...]:
    agents: list[str] = []
    while act is not None and len(agents) <= MAX_LINKS:
        actor = _object(act)
        agents.insert(0, _text(actor["sub"]))
        act = actor.get("act")
    if not 1 <= len(agents) <= MAX_LINKS:
        raise ValueError
    links = tuple(
        Link(
            id=_text(link["id"], most=MAX_ID_LENGTH),
            agent=agent,
            budget=tuple(map(_slice, _list(link["budget"]))),
            expires_at=_whole(link["exp"]),
        )
        for agent, link in zip(agents, map(_object, fields), strict=True)
    )
    ends = [link.expires_at for link in links]
    if ends != sorted(ends, reverse=True):
        raise ValueError
    return links


def _slice(value: JsonValue) -> tuple[str, str, int]:
    budget, unit, amount = _list(value)
    return _text(budget), _text(unit), _whole(amount)


def _rules(value: JsonValue) -> JsonObject:
    for arguments in map(_object, _object(value).values()):
        for rules in map(_list, arguments.values()):
            list(map(_object, rules))
    return _object(value)


def _object(value: JsonValue) -> JsonObject:
    if not isinstance(value, dict):
        raise TypeError
    return value


def _list(value: JsonValue) -> list[JsonValue]:
    if not isinstance(value, list):
        raise TypeError
    return value


def _text(value: JsonValue, *, least: int = 1, most: int = MAX_NAME_LENGTH) -> str:
    if not isinstance(value, str) or not least <= len(value) <= most or not value.isprintable():
        raise TypeError
    return value


def _whole(value: JsonValue) -> int:
    if type(value) is not int or value < 1:
        raise TypeError
    return value


def _same(one: JsonValue, other: JsonValue) -> bool:
    """Whether both are the same JSON, true and 1 being different as 1.0 and 1 are."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


def _malformed() -> IdentityError:
    return invalid("does not have the claims of a delegation")
