"""Identify by a bearer token: JWT (RFC 7519), checked as RFC 8725 asks."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from pdp.canonical import JsonError, JsonObject, JsonValue, parse_object
from pdp.identity.claims import invalid, read_claims
from pdp.identity.key_source import KeySource
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.signature import (
    MAX_TOKEN_LENGTH,
    Signature,
    SignedToken,
    verified_signature,
)
from pdp.identity.subject import Subject
from pdp.identity.tenancy import TenantRule
from pdp.reason import ReasonCode

MAX_TIME: Final = 253_402_300_799
"""9999-12-31: a time beyond is in milliseconds, or made to last for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """A token issuer that is trusted, and for what."""

    issuer: str
    """The exact iss claim."""
    audiences: frozenset[str]
    """One of them must stand in the token's aud."""
    types: frozenset[str]
    """Accepted typ headers, in lower case; the empty one stands for none."""
    algorithms: frozenset[str]
    keys: KeySource
    tenant: TenantRule = field(default_factory=TenantRule)
    """Of a user's token."""
    actor_claim: str = "sub"
    actor_prefix: str = ""
    """Stands before the names of its actors."""
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
class VerifiedToken:
    """A token that its issuer has signed, for an audience here, and that has not expired."""

    issuer: Issuer
    claims: JsonObject = field(repr=False)
    expires_at: float
    """The exp claim: Unix seconds."""
    signature: Signature

    @property
    def used_until(self) -> float:
        """Until when it is accepted, as clocks may differ."""
        return self.expires_at + self.issuer.leeway_seconds


class TokenIdentity:
    """Resolves bearer tokens."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        *,
        clock: Callable[[], float] = time.time,
        cache_entries: int = 10_000,
    ) -> None:
        self._tokens = RememberedTokens(
            TokenVerifier(issuers, clock=clock), read_claims, clock=clock, entries=cache_entries
        )

    async def resolve(self, credentials: Credentials) -> Subject:
        """The subject of a valid token. Raises IdentityError."""
        if not credentials.bearer:
            raise IdentityError(
                ReasonCode.TOKEN_MISSING, "Send the user's token as metadata 'authorization'."
            )
        claimed = await self._tokens.verify(credentials.bearer)
        return claimed.subject(route_tenant=credentials.route_tenant)


_T = TypeVar("_T")


class RememberedTokens(Generic[_T]):
    """What verified tokens say, remembered by digest until they expire; the token itself
    is not kept.
    """

    def __init__(
        self,
        verifier: TokenVerifier,
        read: Callable[[VerifiedToken], _T],
        *,
        clock: Callable[[], float],
        entries: int,
    ) -> None:
        """``read`` may raise IdentityError, and is called once for each token."""
        self._verifier = verifier
        self._read = read
        self._clock = clock
        self._cache: OrderedDict[bytes, _Remembered[_T]] = OrderedDict()
        self._entries = entries

    async def verify(self, token: str) -> _T:
        """What a valid token says. Raises IdentityError."""
        if len(token) > MAX_TOKEN_LENGTH or not token.isascii():
            raise invalid("is too long, or not ASCII")
        digest = hashlib.sha256(token.encode("ascii")).digest()
        known = self._cache.get(digest)
        if known is not None:
            if self._clock() < known.used_until and await known.still_counts():
                if digest in self._cache:  # others came in between, if keys were asked for
                    self._cache.move_to_end(digest)
                return known.said
            self._cache.pop(digest, None)
        verified = await self._verifier.verify(token)
        said = self._read(verified)
        self._cache[digest] = _Remembered(
            said, verified.used_until, verified.signature, verified.issuer.keys
        )
        if len(self._cache) > self._entries:
            self._cache.popitem(last=False)
        return said


@dataclass(frozen=True, slots=True)
class _Remembered(Generic[_T]):
    said: _T
    used_until: float
    signature: Signature
    keys: KeySource

    async def still_counts(self) -> bool:
        """Whether the key that signed it is still the issuer's. Raises IdentityError."""
        return await self.signature.still_counts(self.keys)


class TokenVerifier:
    """Verifies tokens of trusted issuers, whatever they are for."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        *,
        clock: Callable[[], float],
        issuer_named: Callable[[JsonObject], JsonValue] = lambda claims: claims.get("iss"),
    ) -> None:
        """``issuer_named`` tells Issuer.issuer from claims that are not verified yet."""
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._clock = clock
        self._issuer_named = issuer_named

    async def verify(self, token: str) -> VerifiedToken:
        """The token's claims. Raises IdentityError."""
        signed = SignedToken.read(token)
        claims = _claims(signed)
        issuer = self._issuer(claims)
        kind = signed.header.get("typ", "")
        if not isinstance(kind, str) or kind.lower() not in issuer.types:
            raise invalid("is not of an accepted type (typ)")
        signature = await verified_signature(signed, issuer.keys, issuer.algorithms)
        return VerifiedToken(issuer, claims, self._check_claims(claims, issuer), signature)

    def _issuer(self, claims: JsonObject) -> Issuer:
        name = self._issuer_named(claims)
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise invalid("is of an issuer that is not trusted here")
        return issuer

    def _check_claims(self, claims: JsonObject, issuer: Issuer) -> float:
        """The time at which the token ends."""
        audience = claims.get("aud")
        named = audience if isinstance(audience, list) else [audience]
        if not any(isinstance(one, str) and one in issuer.audiences for one in named):
            raise invalid("is meant for another audience")
        now = self._clock()
        expires_at = _time(claims, "exp")
        if expires_at is None:
            raise invalid("has no expiry (exp)")
        if now >= expires_at + issuer.leeway_seconds:
            raise IdentityError(
                ReasonCode.TOKEN_EXPIRED, "The token has expired; sign in again for a new one."
            )
        for name in ("nbf", "iat"):
            valid_from = _time(claims, name)
            if valid_from is not None and now < valid_from - issuer.leeway_seconds:
                raise invalid(f"is not valid yet ({name})")
        return expires_at


def _claims(token: SignedToken) -> JsonObject:
    try:
        return parse_object(token.payload, max_bytes=MAX_TOKEN_LENGTH)
    except JsonError:
        raise invalid("is not a signed JWT") from None


def _time(claims: JsonObject, name: str) -> float | None:
    """A NumericDate (RFC 7519 2): a JSON number, never a text or a boolean, before MAX_TIME."""
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if type(value) not in (int, float) or not 0 <= value <= MAX_TIME:  # type: ignore[operator]
        raise invalid(f"has a time ({name}) that is not a number of seconds")
    return float(value)  # type: ignore[arg-type]
