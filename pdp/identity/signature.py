"""Signed tokens (compact JWS, RFC 7515 7.1): who has signed, by keys of the issuer's alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Final

from joserfc import jws
from joserfc.errors import JoseError

from pdp import base64url
from pdp.canonical import JsonObject, parse_object
from pdp.identity.claims import invalid
from pdp.identity.key_source import KeySource, KeySourceError
from pdp.identity.keys import MAX_KID_LENGTH, IssuerKey
from pdp.identity.resolver import IdentityError
from pdp.reason import ReasonCode

MAX_TOKEN_LENGTH: Final = 8192
"""Longest token that is read, in characters."""
_REFUSED_HEADERS: Final = frozenset({"crit", "b64", "jwk", "jku", "x5u", "x5c"})
"""Extensions that change what is signed, and keys that the token itself brings."""


@dataclass(frozen=True, slots=True)
class SignedToken:
    """A token as it was read: nothing of it is verified."""

    text: str = field(repr=False)
    header: JsonObject = field(repr=False)
    payload: bytes = field(repr=False)

    @classmethod
    def read(cls, text: str) -> SignedToken:
        """Raises IdentityError."""
        segments = text.split(".")
        if len(text) > MAX_TOKEN_LENGTH or len(segments) != 3:  # noqa: PLR2004 - RFC 7515 7.1
            raise invalid("is not a signed JWT")
        try:
            header, payload, _ = (base64url.decode(segment) for segment in segments)
            return cls(text, parse_object(header, max_bytes=MAX_TOKEN_LENGTH), payload)
        except ValueError:
            raise invalid("is not a signed JWT") from None


@dataclass(frozen=True, slots=True)
class Signature:
    """The key that has signed a token, and its name."""

    kid: str
    key: IssuerKey

    async def still_counts(self, keys: KeySource) -> bool:
        """Whether it is the issuer's key by that name now. Raises IdentityError."""
        return await _find(keys, self.kid) == self.key


async def verified_signature(
    token: SignedToken, keys: KeySource, algorithms: frozenset[str]
) -> Signature:
    """Who has signed. The key says with what algorithm, and the token must say the same
    (RFC 8725 3.1). Raises IdentityError.
    """
    algorithm, kid = token.header.get("alg"), token.header.get("kid")
    if not isinstance(algorithm, str) or algorithm not in algorithms:
        raise invalid("is not signed with an accepted algorithm")
    if _REFUSED_HEADERS & token.header.keys():
        raise invalid("has a header that is not accepted")
    if not isinstance(kid, str) or not 0 < len(kid) <= MAX_KID_LENGTH:
        raise invalid("names no key (kid)")
    key = await _find(keys, kid)
    if key is None or key.algorithm != algorithm:
        raise invalid("is signed by an unknown key")
    try:
        with warnings.catch_warnings():
            # joserfc warns that the name EdDSA is being replaced by Ed25519.
            warnings.simplefilter("ignore")
            jws.deserialize_compact(token.text, key.key, algorithms=[algorithm])
    except (JoseError, ValueError):
        raise invalid("has a wrong signature") from None
    return Signature(kid, key)


async def _find(keys: KeySource, kid: str) -> IssuerKey | None:
    try:
        return await keys.find(kid)
    except KeySourceError:
        raise IdentityError(
            ReasonCode.KEYS_UNAVAILABLE,
            "The keys of the token's issuer can not be had now; try again.",
        ) from None
