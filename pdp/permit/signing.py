"""The private key that signs permits."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pdp.canonical import JsonObject
from pdp.permit import jws
from pdp.permit.keys import PermitKeySet, thumbprint


class SigningKey:
    """The private key, with its id (the RFC 7638 thumbprint)."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public = private.public_key()
        self.kid = thumbprint(self.public)

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key."""
        return cls(Ed25519PrivateKey.generate())

    @property
    def public_set(self) -> PermitKeySet:
        """Its public half, to verify with."""
        return PermitKeySet({self.kid: self.public})

    def to_pem(self) -> bytes:
        """The private key as PKCS 8 PEM. A secret."""
        return self._private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def sign(self, payload: JsonObject, *, kind: str = jws.TYPE) -> str:
        """A token of that type, a permit unless it is said, with this payload."""
        return jws.sign(payload, key=self._private, kid=self.kid, kind=kind)
