"""The private key that signs permits."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from pdp import base64url
from pdp.canonical import JsonObject, canonical_bytes
from pdp.permit import jws
from pdp.permit.claims import PermitError
from pdp.permit.keys import PermitKeySet, public_jwk
from pdp.private_files import write_once
from pdp.reason import ReasonCode

_THUMBPRINT: Final = frozenset({"crv", "kty", "x"})


class SigningKey:
    """The private key, with its id (the RFC 7638 thumbprint)."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        public = private.public_key()
        thumbprint = {
            name: value for name, value in public_jwk(public, "").items() if name in _THUMBPRINT
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
        write_once(path, lambda: cls.generate().to_pem())
        return cls.from_file(path)

    def to_pem(self) -> bytes:
        """The private key as PKCS 8 PEM. A secret."""
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, payload: JsonObject) -> str:
        """A permit with this payload."""
        return jws.sign(payload, key=self._private, kid=self.kid)


def _unreadable_key(path: Path, what: str) -> PermitError:
    return PermitError(ReasonCode.PERMIT_UNAVAILABLE, f"The permit key {path} {what}.")
