"""Permit keys: the private one that signs, the public set that verifies."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from pdp import base64url
from pdp.canonical import JsonError, JsonObject, canonical_bytes, parse_object
from pdp.permit import jws
from pdp.permit.claims import PermitError
from pdp.reason import ReasonCode

MAX_JWKS_BYTES: Final = 256 * 1024
MAX_KEYS: Final = 64


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
        return json.dumps({"keys": [_jwk(key, kid) for kid, key in self._keys.items()]})


class SigningKey:
    """The private key, with its id (the RFC 7638 thumbprint)."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        public = private.public_key()
        thumbprint = {
            name: value for name, value in _jwk(public, "").items() if name in _THUMBPRINT
        }
        self.kid = base64url.encode(hashlib.sha256(canonical_bytes(thumbprint)).digest())
        self.public_set = PermitKeySet({self.kid: public})

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_file(cls, path: Path) -> SigningKey:
        """Read a PEM file (PKCS 8, not encrypted), which nobody but its owner may
        read. Raises PermitError (permit_unavailable) with what to do.
        """
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                pem = file.read(16 * 1024)
        except OSError as error:
            raise _unreadable_key(path, f"can not be read: {error.strerror}") from None
        if mode & 0o077:
            raise _unreadable_key(path, f"is open to others (mode {mode:04o}); run chmod 600 on it")
        try:
            private = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError):
            raise _unreadable_key(path, "is not an unencrypted PKCS 8 PEM file") from None
        if not isinstance(private, Ed25519PrivateKey):
            raise _unreadable_key(path, "is not an Ed25519 key")
        return cls(private)

    @classmethod
    def from_file_or_new(cls, path: Path) -> SigningKey:
        """Read the file, or make it with a new key, mode 0600."""
        if not path.exists():
            key = cls.generate()
            scratch = path.with_suffix(".new")
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key.to_pem())
                file.flush()
                os.fsync(file.fileno())
            scratch.rename(path)
        return cls.from_file(path)

    def to_pem(self) -> bytes:
        """The private key as PKCS 8 PEM. A secret."""
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, payload: JsonObject) -> str:
        """A permit with this payload."""
        return jws.sign(payload, key=self._private, kid=self.kid)


_THUMBPRINT: Final = frozenset({"crv", "kty", "x"})


def _jwk(key: Ed25519PublicKey, kid: str) -> JsonObject:
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


def _unreadable_key(path: Path, what: str) -> PermitError:
    return PermitError(ReasonCode.PERMIT_UNAVAILABLE, f"The permit key {path} {what}.")
