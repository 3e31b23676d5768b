"""Permits, and delegations, as compact JWS (RFC 7515), with everything pinned that could
be chosen.

One algorithm (EdDSA with Ed25519, RFC 8037), one type for each kind of token, a key id,
and no other header. A library for general JWTs is made to accept more than that, and costs
more to import than the whole stub; the signature itself is pyca/cryptography's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pdp import base64url
from pdp.canonical import JsonObject, canonical_bytes, parse_object

ALGORITHM: Final = "EdDSA"
TYPE: Final = "tool-permit+jwt"
"""Of a permit. What is signed as something else is none, whatever its claims."""
MAX_LENGTH: Final = 8192
"""Longest token that is read, in characters."""


class JwsError(ValueError):
    """Not a token of the kind, signed by a known key. Says nothing of its content."""


def sign(payload: JsonObject, *, key: Ed25519PrivateKey, kid: str, kind: str = TYPE) -> str:
    """The signed compact form, with ``kind`` as its type. Deterministic: the same payload
    and key give the same token, which is how a repeated question gets its first answer
    again.
    """
    signed = f"{_header(kid, kind)}.{base64url.encode(canonical_bytes(payload))}"
    return f"{signed}.{base64url.encode(key.sign(signed.encode('ascii')))}"


@functools.lru_cache(maxsize=16)
def _header(kid: str, kind: str) -> str:
    """The first segment, which is the same for all that a key signs."""
    return base64url.encode(canonical_bytes({"alg": ALGORITHM, "kid": kid, "typ": kind}))


def verify(
    token: str, *, find_key: Callable[[str], Ed25519PublicKey | None], kind: str = TYPE
) -> JsonObject:
    """The payload of a token of that type whose signature verifies. Raises JwsError.

    The header is read only to pin it and to find the key; the payload is parsed
    only after the signature holds.
    """
    if len(token) > MAX_LENGTH:
        raise JwsError("is too long")
    segments = token.split(".")
    if len(segments) != 3:  # noqa: PLR2004 - RFC 7515 7.1
        raise JwsError("is not a compact JWS")
    key = find_key(_kid(segments[0], kind))
    if key is None:
        raise JwsError("is signed by an unknown key")
    try:
        key.verify(base64url.decode(segments[2]), f"{segments[0]}.{segments[1]}".encode("ascii"))
    except (InvalidSignature, ValueError):
        raise JwsError("has a wrong signature") from None
    return _object(segments[1])


@functools.lru_cache(maxsize=16)
def _kid(header: str, kind: str) -> str:
    """The key id in a header segment in which nothing else is chosen. Raises JwsError."""
    members = _object(header)
    if members.keys() != {"alg", "kid", "typ"}:
        raise JwsError("has other header members than alg, kid and typ")
    if members["alg"] != ALGORITHM or members["typ"] != kind:
        raise JwsError(f"is not of algorithm {ALGORITHM} and type {kind}")
    kid = members["kid"]
    if not isinstance(kid, str):
        raise JwsError("is signed by an unknown key")
    return kid


def key_id(token: str) -> str:
    """The id of the key that a token says has signed it, which proves nothing. Raises
    JwsError.
    """
    kid = _object(token.partition(".")[0]).get("kid")
    if not isinstance(kid, str):
        raise JwsError("names no key")
    return kid


def _object(segment: str) -> JsonObject:
    try:
        return parse_object(base64url.decode(segment), max_bytes=MAX_LENGTH)
    except ValueError:
        raise JwsError("does not hold a JSON object in base64url") from None
