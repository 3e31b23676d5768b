"""Sign permits."""

from __future__ import annotations

from dataclasses import replace

from pdp.permit.claims import Permit
from pdp.permit.signing import SigningKey


class PermitIssuer:
    """Signs for one trust domain."""

    def __init__(self, key: SigningKey, *, issuer: str) -> None:
        self._key = key
        self.issuer = issuer

    def sign(self, permit: Permit) -> Permit:
        """The permit with its token: the same for the same permit, at any time."""
        return replace(permit, token=self._key.sign(permit.to_claims()))
