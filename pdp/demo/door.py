"""The door of a tool server: nobody acts here without a permit."""

from __future__ import annotations

from pdp.canonical import JsonObject
from pdp.permit import Permit, PermitRedeemer, PermitVerifier


class PermitDoor:
    """Lets a call in once, if its permit is for exactly this call."""

    def __init__(
        self, verifier: PermitVerifier, redeemer: PermitRedeemer, *, only_tenant: str | None = None
    ) -> None:
        """``only_tenant`` is for a server that serves one tenant."""
        self._verifier = verifier
        self._redeemer = redeemer
        self._only_tenant = only_tenant

    def admit(self, permit: str, *, tool: str, arguments: JsonObject) -> Permit:
        """The permit, verified and used up. Whose call it is stands in it, and
        nowhere else. Raises PermitError.
        """
        verified = self._verifier.verify(
            permit, tool=tool, arguments=arguments, tenant=self._only_tenant
        )
        self._redeemer.redeem(verified)
        return verified
