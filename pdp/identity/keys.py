"""Public keys of token issuers, as JWK sets hold them (RFC 7517)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey

from pdp import base64url
from pdp.canonical import JsonError, JsonObject, JsonValue, parse_object

MAX_JWKS_BYTES: Final = 1024 * 1024
MAX_KEYS: Final = 100
MAX_KID_LENGTH: Final = 255
_MIN_RSA_BITS: Final = 2048
_MAX_RSA_BITS: Final = 8192
"""Larger ones take long to verify with, and nobody has them."""
_MAX_RSA_EXPONENT_BITS: Final = 32

ALGORITHM_OF_KEY: Final[Mapping[tuple[str, str | None], str]] = {
    ("OKP", "Ed25519"): "EdDSA",
    ("EC", "P-256"): "ES256",
    ("RSA", None): "RS256",
}
"""The one algorithm that a key of this type and curve may verify. As the key
decides, a token can not choose (RFC 8725 3.1)."""
_SIGNING: Final = frozenset({"sig"})


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A public key, pinned to one algorithm. Equal to whatever is the same key."""

    algorithm: str
    thumbprint: str
    """Of RFC 7638."""
    key: OKPKey | ECKey | RSAKey = field(compare=False, repr=False)


class JwksError(ValueError):
    """The JWK set can not be used; the text follows the name of where it is from."""


def parse_jwks(
    data: bytes, *, strict: bool, uses: frozenset[str] = _SIGNING
) -> dict[str, IssuerKey]:
    """The keys of a JWK set by key id. Raises JwksError.

    Keys for other ``uses``, and of types that are not in ALGORITHM_OF_KEY, are passed
    over. ``strict`` refuses a set for each key that is meant to verify and can not: an
    operator has written it. In what others publish, such a key is passed over too (RFC
    7517 5). A private or symmetric key refuses the set whole: it has no business there.
    """
    try:
        members = parse_object(data, max_bytes=MAX_JWKS_BYTES).get("keys")
    except JsonError as error:
        raise JwksError(str(error)) from None
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise JwksError(f'needs "keys", a list of at most {MAX_KEYS} keys')
    keys: dict[str, IssuerKey] = {}
    for jwk in members:
        if not isinstance(jwk, dict):
            raise JwksError("holds a key that is not an object")
        if "d" in jwk or "k" in jwk:
            raise JwksError("holds a private or symmetric key; keep only public keys in it")
        found = _usable(jwk, uses, strict=strict)
        if found is None:
            continue
        kid, key = found
        if kid in keys:
            raise JwksError(_NO_KID)
        keys[kid] = key
    return keys


_NO_KID: Final = "holds a key without a kid of its own"


def _usable(jwk: JsonObject, uses: frozenset[str], *, strict: bool) -> tuple[str, IssuerKey] | None:
    """The key and its id; None where it is passed over. Raises JwksError."""
    algorithm = _algorithm_of(jwk)
    if (
        algorithm is None
        or not _is_among(uses, jwk.get("use", "sig"))
        or not _may_verify(jwk.get("key_ops", ["verify"]))
        or jwk.get("alg", algorithm) != algorithm
    ):
        return None
    try:
        return _imported(jwk, algorithm)
    except JwksError:
        if strict:
            raise
        return None


def _algorithm_of(jwk: JsonObject) -> str | None:
    kind, curve = jwk.get("kty"), jwk.get("crv")
    if not isinstance(kind, str) or not (curve is None or isinstance(curve, str)):
        return None
    return ALGORITHM_OF_KEY.get((kind, curve))


def _imported(jwk: JsonObject, algorithm: str) -> tuple[str, IssuerKey]:
    """Raises JwksError."""
    members: dict[str, str | list[str]] = {
        name: value
        for name, value in jwk.items()
        if name in _PUBLIC_MEMBERS and isinstance(value, str)
    }
    try:
        if algorithm == "RS256":
            _check_rsa(jwk)
        key = _CLASS_OF_ALGORITHM[algorithm].import_key(members)
    except JwksError:
        raise
    except (JoseError, ValueError, KeyError, TypeError):
        raise JwksError("holds a key that can not be read") from None
    kid = jwk.get("kid")
    if not isinstance(kid, str) or not 0 < len(kid) <= MAX_KID_LENGTH:
        raise JwksError(_NO_KID)
    return kid, IssuerKey(algorithm, key.thumbprint(), key)


_PUBLIC_MEMBERS: Final = frozenset({"kty", "crv", "x", "y", "n", "e"})
_CLASS_OF_ALGORITHM: Final[Mapping[str, type[OKPKey | ECKey | RSAKey]]] = {
    "EdDSA": OKPKey,
    "ES256": ECKey,
    "RS256": RSAKey,
}


def _is_among(uses: frozenset[str], use: JsonValue) -> bool:
    return isinstance(use, str) and use in uses | _SIGNING


def _may_verify(operations: JsonValue) -> bool:
    return isinstance(operations, list) and "verify" in operations


def _check_rsa(jwk: JsonObject) -> None:
    """Raises JwksError, ValueError, KeyError."""
    modulus, exponent = (int.from_bytes(base64url.decode(str(jwk[name]))) for name in ("n", "e"))
    if modulus.bit_length() < _MIN_RSA_BITS:
        raise JwksError(f"holds an RSA key of fewer than {_MIN_RSA_BITS} bits")
    if modulus.bit_length() > _MAX_RSA_BITS:
        raise JwksError(f"holds an RSA key of more than {_MAX_RSA_BITS} bits")
    if exponent.bit_length() > _MAX_RSA_EXPONENT_BITS:
        raise JwksError("holds an RSA key with a public exponent that is too large")
    if _is_from_roca(modulus):
        raise JwksError("holds an RSA key that can be factored (ROCA, CVE-2017-15361)")


def _is_from_roca(modulus: int) -> bool:
    """Whether a library of smart cards made the modulus in the way that gives its factors
    away: its remainders are then powers of 65537. By chance they are once in 2^167 times.
    Nemec et al., The Return of Coppersmith's Attack, CCS 2017.
    """
    return all(modulus % prime in powers for prime, powers in _powers_of_65537().items())


@functools.cache
def _powers_of_65537() -> dict[int, frozenset[int]]:
    """Modulo each of the primes that such a modulus of 2048 bits is made with."""
    found = {}
    for prime in (n for n in range(3, 702) if all(n % divisor for divisor in range(2, n))):
        powers, power = set(), 1
        while power not in powers:
            powers.add(power)
            power = power * 65537 % prime
        found[prime] = frozenset(powers)
    return found
