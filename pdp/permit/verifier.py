"""Verify permits: what a tool server does before it acts."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable

from pdp.canonical import JsonError, JsonObject, check, sha256_hex
from pdp.permit import jws
from pdp.permit.claims import Permit, PermitError, from_claims
from pdp.permit.keys import PublicKeys
from pdp.reason import ReasonCode


class PermitVerifier:
    """Checks that a permit allows the call that is about to be made.

    Needs no network. A permit may still have been used before: redeem it
    (:class:`pdp.permit.PermitRedeemer`) before acting on anything that must not
    happen twice.
    """

    def __init__(
        self,
        keys: PublicKeys,
        *,
        issuer: str,
        audience: str,
        leeway_seconds: int = 5,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Accept permits of ``issuer`` that are meant for ``audience``, this tool
        server. Clocks may differ by ``leeway_seconds``.
        """
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._leeway_seconds = leeway_seconds
        self._clock = clock

    def verify(
        self,
        permit: str,
        *,
        tool: str,
        arguments: JsonObject,
        tenant: str | None = None,
        certificate_sha256: str = "",
    ) -> Permit:
        """The permit, if it allows this call of ``tool`` with these ``arguments``.

        ``tenant`` is for a tool that serves one tenant only: the permit must be
        that tenant's. A tool that serves several takes the tenant from the result
        and from nowhere else. ``certificate_sha256`` is of the client certificate
        that the caller has shown, as in :attr:`Permit.certificate_sha256`.

        Raises PermitError: permit_missing, permit_invalid, permit_expired,
        permit_mismatch.
        """
        found = self.authenticate(permit)
        try:
            check(arguments)
            digest = sha256_hex(arguments)
        except JsonError:
            raise PermitError(
                ReasonCode.PERMIT_MISMATCH,
                "The arguments are not JSON, so no permit can be for them.",
            ) from None
        self.check_binding(found, tool=tool, arguments_sha256=digest, audience=self._audience)
        if tenant is not None and not _equal(found.tenant, tenant):
            raise PermitError(ReasonCode.PERMIT_MISMATCH, "The permit is another tenant's.")
        self.check_sender(found, certificate_sha256)
        self.check_time(found)
        return found

    def authenticate(self, permit: str) -> Permit:
        """The permit, if a known key signed it for this issuer; neither its time
        nor what it is for is checked. Raises permit_missing, permit_invalid.
        """
        if not permit:
            raise PermitError(ReasonCode.PERMIT_MISSING, "No permit was given.")
        try:
            claims = jws.verify(permit, find_key=self._keys.find)
        except jws.JwsError as error:
            raise PermitError(ReasonCode.PERMIT_INVALID, f"The permit {error}.") from None
        found = from_claims(claims, token=permit)
        if not _equal(found.issuer, self._issuer):
            raise PermitError(ReasonCode.PERMIT_INVALID, "The permit is another issuer's.")
        return found

    def check_binding(
        self, permit: Permit, *, tool: str, arguments_sha256: str, audience: str
    ) -> None:
        """Raises permit_mismatch unless the permit is for this."""
        for name, allowed, asked in (
            ("audience", permit.audience, audience),
            ("tool", permit.tool, tool),
            # One that names no arguments is for all: the policy has said so.
            ("call's arguments", permit.arguments_sha256 or arguments_sha256, arguments_sha256),
        ):
            if not _equal(allowed, asked):
                raise PermitError(ReasonCode.PERMIT_MISMATCH, f"The permit is not for this {name}.")

    def check_sender(self, permit: Permit, certificate_sha256: str) -> None:
        """Raises permit_mismatch where the permit is bound to a client certificate, and
        it was not shown with that one.
        """
        bound = permit.certificate_sha256
        if bound and not _equal(bound, certificate_sha256):
            raise PermitError(
                ReasonCode.PERMIT_MISMATCH,
                "The permit is bound to the client certificate of another caller.",
            )

    def check_time(self, permit: Permit) -> None:
        """Raises permit_expired unless the permit is valid now."""
        now = self._clock()
        early = now < permit.issued_at - self._leeway_seconds
        if early or not now < permit.expires_at + self._leeway_seconds:
            raise PermitError(
                ReasonCode.PERMIT_EXPIRED, "The permit has expired, or is not valid yet."
            )


def _equal(one: str, other: str) -> bool:
    # What a call is for may hold what no permit can: a path of bytes that are no UTF-8.
    texts = (text.encode("utf-8", "surrogatepass") for text in (one, other))
    return hmac.compare_digest(*texts)
