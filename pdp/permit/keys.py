"""The public keys that verify permits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pdp import base64url
from pdp.canonical import JsonError, JsonObject, canonical_bytes, parse_object
from pdp.permit import jws
from pdp.permit.claims import PermitError
from pdp.reason import ReasonCode

MAX_JWKS_BYTES: Final = 256 * 1024
MAX_KEYS: Final = 64


class PublicKeys(Protocol):
    """Whatever knows the public keys of a trust domain."""

    def find(self, kid: str) -> Ed25519PublicKey | None:
        """The key of that id."""
        ...


class PermitKeySet:
    """The public keys of one trust domain, by key id."""

    def __init__(self, keys: Mapping[str, Ed25519PublicKey]) -> None:
        self._keys = dict(keys)

    @classmethod
    def from_jwks(cls, jwks: str | bytes) -> PermitKeySet:
        """Read a JWK set (RFC 7517). Keys that are not Ed25519 are passed over, as
        such a set may serve others too. Raises PermitError (permit_unavailable)
        for one that can not be read, that holds a private key, a key id twice, or
        no Ed25519 key.
        """
        try:
            data = jwks.encode("utf-8") if isinstance(jwks, str) else jwks
            members = parse_object(data, max_bytes=MAX_JWKS_BYTES).get("keys")
        except (JsonError, UnicodeEncodeError):
            raise _unreadable("is not a JWK set") from None
        if not isinstance(members, list) or len(members) > MAX_KEYS:
            raise _unreadable(f"needs a list of at most {MAX_KEYS} keys")
        keys: dict[str, Ed25519PublicKey] = {}
        for jwk in members:
            if not isinstance(jwk, dict) or "d" in jwk or jwk.get("kty") == "oct":
                raise _unreadable("holds something that is not a public key")
            if jwk.get("kty") != "OKP" or jwk.get("crv") != "Ed25519":
                continue
            kid, x = jwk.get("kid"), jwk.get("x")
            if not isinstance(kid, str) or not isinstance(x, str) or not kid or kid in keys:
                raise _unreadable("holds a key without x, or without a kid of its own")
            try:
                keys[kid] = Ed25519PublicKey.from_public_bytes(base64url.decode(x))
            except ValueError:
                raise _unreadable("holds an Ed25519 key that is not 32 bytes") from None
        if not keys:
            raise _unreadable("holds no Ed25519 key")
        return cls(keys)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> PermitKeySet:
        """Read a JWK set from a file. Raises PermitError, or OSError."""
        with Path(path).open("rb") as file:
            return cls.from_jwks(file.read(MAX_JWKS_BYTES + 1))

    def find(self, kid: str) -> Ed25519PublicKey | None:
        """The key of that id."""
        return self._keys.get(kid)

    def to_jwks(self) -> str:
        """The set as a JWK set in JSON."""
        return json.dumps({"keys": [public_jwk(key, kid) for kid, key in self._keys.items()]})


_THUMBPRINT: Final = ("crv", "kty", "x")


def thumbprint(key: Ed25519PublicKey) -> str:
    """The key's id: its thumbprint (RFC 7638), in base64url."""
    jwk = public_jwk(key, "")
    members: JsonObject = {name: jwk[name] for name in _THUMBPRINT}
    return base64url.encode(hashlib.sha256(canonical_bytes(members)).digest())


def public_jwk(key: Ed25519PublicKey, kid: str) -> JsonObject:
    """The key as a JWK (RFC 8037 2)."""
    return {
        "kty": "OKP",
        "crv": "Ed25519",
        "x": base64url.encode(key.public_bytes_raw()),
        "kid": kid,
        "use": "sig",
        "alg": jws.ALGORITHM,
    }


def _unreadable(what: str) -> PermitError:
    return PermitError(ReasonCode.PERMIT_UNAVAILABLE, f"The set of permit keys {what}.")
