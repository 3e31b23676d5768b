"""Identify by a bearer token: JWT (RFC 7519), checked as RFC 8725 asks."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from joserfc import jws
from joserfc.errors import JoseError

from pdp import base64url
from pdp.canonical import JsonObject, JsonValue, parse_object
from pdp.identity.keys import IssuerKey
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.subject import (
    MAX_ORGANISATION_LENGTH,
    MAX_SESSION_LENGTH,
    MAX_TEAM_LENGTH,
    TENANT_PATTERN,
    Subject,
)
from pdp.reason import ReasonCode

MAX_TOKEN_LENGTH: Final = 8192
"""Longest token that is read, in characters."""
MAX_NAMES: Final = 256
"""Most roles, and most scopes, of one token."""
MAX_NAME_LENGTH: Final = 255
_REFUSED_HEADERS: Final = frozenset({"crit", "b64", "jwk", "jku", "x5u"})
"""Extensions that change what is signed, and keys that the token itself brings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRule:
    """How an issuer's token names its tenant."""

    claim: str
    """The claim that holds the tenant id, or the organisation id."""
    organisations: Mapping[str, str] | None = None
    """Organisation id to tenant id; None when the claim is the tenant id itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A token issuer that is trusted, and for what."""

    issuer: str
    """The exact iss claim."""
    audiences: frozenset[str]
    """One of them must stand in the token's aud."""
    types: frozenset[str]
    """Accepted typ headers, in lower case."""
    algorithms: frozenset[str]
    keys: Mapping[str, IssuerKey]
    """By key id."""
    tenant: TenantRule
    actor_claim: str = "sub"
    roles_claim: str = "roles"
    scopes_claim: str = "scope"
    organisation_claim: str | None = None
    """None where tokens name none, and where the tenant rule maps organisations: the
    organisation is then the one that was mapped."""
    team_claim: str | None = None
    session_claim: str | None = None
    leeway_seconds: int = 30
    """How far clocks may differ."""


@dataclass(frozen=True, slots=True)
class _Verified:
    subject: Subject
    expires_at: float


class TokenIdentity:
    """Resolves bearer tokens. Verified ones are remembered, by digest, until they
    expire; the token itself is not kept.
    """

    def __init__(
        self,
        issuers: Sequence[Issuer],
        *,
        clock: Callable[[], float] = time.time,
        cache_entries: int = 10_000,
    ) -> None:
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._clock = clock
        self._cache: OrderedDict[bytes, _Verified] = OrderedDict()
        self._cache_entries = cache_entries

    async def resolve(self, credentials: Credentials) -> Subject:
        """The subject of a valid token. Raises IdentityError."""
        token = credentials.bearer
        if not token:
            raise IdentityError(
                ReasonCode.TOKEN_MISSING, "Send the user's token as metadata 'authorization'."
            )
        if len(token) > MAX_TOKEN_LENGTH or not token.isascii():
            raise _invalid("is too long, or not ASCII")
        digest = hashlib.sha256(token.encode("ascii")).digest()
        known = self._cache.get(digest)
        if known is not None:
            if self._clock() < known.expires_at:
                self._cache.move_to_end(digest)
                return known.subject
            del self._cache[digest]
        verified = self._verify(token)
        self._cache[digest] = verified
        if len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)
        return verified.subject

    def _verify(self, token: str) -> _Verified:
        header, claims = _read(token)
        issuer = self._issuer(claims)
        self._check_signature(token, header, issuer)
        expires_at = self._check_claims(claims, issuer)
        return _Verified(_subject(claims, issuer), expires_at)

    def _issuer(self, claims: JsonObject) -> Issuer:
        name = claims.get("iss")
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise _invalid("is of an issuer that is not trusted here")
        return issuer

    def _check_signature(self, token: str, header: JsonObject, issuer: Issuer) -> None:
        kind, algorithm, kid = header.get("typ"), header.get("alg"), header.get("kid")
        if not isinstance(kind, str) or kind.lower() not in issuer.types:
            raise _invalid("is not of an accepted type (typ)")
        if not isinstance(algorithm, str) or algorithm not in issuer.algorithms:
            raise _invalid("is not signed with an accepted algorithm")
        if _REFUSED_HEADERS & header.keys():
            raise _invalid("has a header that is not accepted")
        key = issuer.keys.get(kid) if isinstance(kid, str) else None
        if key is None or key.algorithm != algorithm:
            raise _invalid("is signed by an unknown key")
        try:
            with warnings.catch_warnings():
                # joserfc warns that the name EdDSA is being replaced by Ed25519.
                warnings.simplefilter("ignore")
                jws.deserialize_compact(token, key.key, algorithms=[algorithm])
        except (JoseError, ValueError):
            raise _invalid("has a wrong signature") from None

    def _check_claims(self, claims: JsonObject, issuer: Issuer) -> float:
        """The time until which the token may be used."""
        audience = claims.get("aud")
        named = audience if isinstance(audience, list) else [audience]
        if not any(isinstance(one, str) and one in issuer.audiences for one in named):
            raise _invalid("is meant for another audience")
        now = self._clock()
        expires_at = _time(claims, "exp")
        if expires_at is None:
            raise _invalid("has no expiry (exp)")
        if now >= expires_at + issuer.leeway_seconds:
            raise IdentityError(
                ReasonCode.TOKEN_EXPIRED, "The token has expired; sign in again for a new one."
            )
        for name in ("nbf", "iat"):
            valid_from = _time(claims, name)
            if valid_from is not None and now < valid_from - issuer.leeway_seconds:
                raise _invalid(f"is not valid yet ({name})")
        return expires_at + issuer.leeway_seconds


def _read(token: str) -> tuple[JsonObject, JsonObject]:
    segments = token.split(".")
    if len(segments) != 3:  # noqa: PLR2004 - RFC 7515 7.1
        raise _invalid("is not a signed JWT")
    try:
        header, claims, _ = (base64url.decode(segment) for segment in segments)
        return (
            parse_object(header, max_bytes=MAX_TOKEN_LENGTH),
            parse_object(claims, max_bytes=MAX_TOKEN_LENGTH),
        )
    except ValueError:
        raise _invalid("is not a signed JWT") from None


def _subject(claims: JsonObject, issuer: Issuer) -> Subject:
    actor = claims.get(issuer.actor_claim)
    if not _is_name(actor):
        raise _invalid(f"names no actor ({issuer.actor_claim})")
    token_id = claims.get("jti", "")
    if token_id and not _is_name(token_id):
        raise _invalid("has an id (jti) that is not a short text")
    return Subject(
        tenant=_tenant(claims, issuer, str(actor)),
        actor=str(actor),
        roles=_names(claims, issuer.roles_claim),
        scopes=_names(claims, issuer.scopes_claim),
        organisation=_optional_name(
            claims,
            issuer.organisation_claim
            if issuer.tenant.organisations is None
            else issuer.tenant.claim,
            MAX_ORGANISATION_LENGTH,
        ),
        team=_optional_name(claims, issuer.team_claim, MAX_TEAM_LENGTH),
        session=_optional_name(claims, issuer.session_claim, MAX_SESSION_LENGTH),
        issuer=issuer.issuer,
        token_id=str(token_id),
    )


def _tenant(claims: JsonObject, issuer: Issuer, actor: str) -> str:
    rule = issuer.tenant
    named = claims.get(rule.claim)
    if named is None or named == "":
        raise IdentityError(
            ReasonCode.TENANT_MISSING, f"The token names no tenant ({rule.claim}).", actor=actor
        )
    if not isinstance(named, str):
        raise _invalid(f"has a {rule.claim} that is not a text")
    if rule.organisations is not None:
        tenant = rule.organisations.get(named)
        if tenant is None:
            raise IdentityError(
                ReasonCode.TENANT_UNKNOWN,
                "The token's organisation is no tenant here.",
                actor=actor,
            )
        return tenant
    if not TENANT_PATTERN.fullmatch(named):
        raise _invalid(f"has a {rule.claim} that is not a tenant id")
    return named


def _optional_name(claims: JsonObject, claim: str | None, longest: int) -> str:
    value = claims.get(claim) if claim is not None else None
    if value is None or value == "":
        return ""
    if not _is_name(value, longest):
        raise _invalid(f"has a {claim} that is not a text of at most {longest} characters")
    return str(value)


def _names(claims: JsonObject, claim: str) -> tuple[str, ...]:
    """A list of texts, or one text with spaces between (RFC 8693 4.2)."""
    value = claims.get(claim)
    if value is None:
        return ()
    names: Sequence[JsonValue] = value.split(" ") if isinstance(value, str) else []
    if isinstance(value, list):
        names = value
    elif not isinstance(value, str):
        raise _invalid(f"has a {claim} that is neither a text nor a list")
    names = [name for name in names if name != ""]
    if len(names) > MAX_NAMES or not all(_is_name(name) for name in names):
        raise _invalid(f"has a {claim} that is too long, or not of short texts")
    return tuple(sorted({str(name) for name in names}))


def _is_name(value: JsonValue, longest: int = MAX_NAME_LENGTH) -> bool:
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def _time(claims: JsonObject, name: str) -> float | None:
    """A NumericDate (RFC 7519 2): a JSON number, never a text or a boolean."""
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise _invalid(f"has a time ({name}) that is not a number")
    return float(value)  # type: ignore[arg-type]


def _invalid(what: str) -> IdentityError:
    return IdentityError(ReasonCode.TOKEN_INVALID, f"The token {what}.")
