"""Sign permits, and what else goes out under the same keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from pdp.canonical import JsonObject
from pdp.permit import jws
from pdp.permit.claims import Permit


class Signer(Protocol):
    """Whatever has the key that signs."""

    def sign(self, payload: JsonObject, *, kind: str = jws.TYPE) -> str:
        """A token of that type with this payload."""
        ...


class PermitIssuer:
    """Signs for one trust domain."""

    def __init__(self, key: Signer, *, issuer: str) -> None:
        self._key = key
        self.issuer = issuer

    def sign(self, permit: Permit) -> Permit:
        """The permit with its token: the same for the same permit, as long as the same
        key signs.
        """
        return replace(permit, token=self._key.sign(permit.to_claims()))

    def sign_as(self, kind: str, payload: JsonObject) -> str:
        """A token of another type, which nobody takes for a permit."""
        return self._key.sign(payload, kind=kind)
