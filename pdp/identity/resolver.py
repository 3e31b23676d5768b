"""The identity port, and the simplest resolver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from pdp.errors import PdpError
from pdp.identity.subject import Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What the transport itself knows of a call."""

    listener: str = ""
    """Name of the listener that it came in by; empty for the usual ones."""
    certificate_sha256: str = ""
    """As Subject.certificate_sha256. TLS has verified the certificate, as it has what
    stands in uris and dns_names."""
    uris: tuple[str, ...] = ()
    """The certificate's subject alternative names that are URIs, SPIFFE ids among them."""
    dns_names: tuple[str, ...] = ()
    server_name: str = ""
    """Whom the caller wanted to reach, by TLS's SNI: its own word, unlike all the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a caller shows, and how it came in. The tokens are secrets."""

    bearer: str | None = field(repr=False)
    """The bearer token, without the word Bearer; None when the call carries none."""
    workload_token: str | None = field(default=None, repr=False)
    """The token of the workload that asks; None when the call carries none."""
    peer: Peer = Peer()
    route_tenant: str = ""
    """The tenant whose route the call came by, where routes name one. Nobody shows it:
    Principals works it out."""


class IdentityError(PdpError):
    """There is no valid identity.

    Reason codes: token_missing, token_invalid, token_expired, tenant_missing,
    tenant_mismatch, tenant_unknown, workload_missing, workload_invalid. ``tenant`` and
    ``actor`` are set only where the token itself was verified. ``sources`` are, of a
    tenant_mismatch, those that disagree, each with the tenant that it names. ``workload``
    is who asked, where that was verified before something else failed.
    """

    def __init__(
        self,
        reason_code: str,
        message: str,
        *,
        tenant: str | None = None,
        actor: str | None = None,
        sources: tuple[tuple[str, str], ...] = (),
        workload: str = "",
    ) -> None:
        super().__init__(reason_code, message)
        self.tenant = tenant
        self.actor = actor
        self.sources = sources
        self.workload = workload


class IdentityResolver(Protocol):
    """Tells whose call it is, from nothing but verified credentials."""

    async def resolve(self, credentials: Credentials) -> Subject:
        """The caller. Raises IdentityError."""
        ...


class SingleTenant:
    """Every caller is the one tenant ``default``.

    For an installation that serves a single customer. Callers are trusted by the
    socket that they reach, so the configuration allows it only on a Unix socket
    or loopback.
    """

    TENANT = "default"

    def __init__(self, *, actor: str, roles: tuple[str, ...], scopes: tuple[str, ...]) -> None:
        self._subject = Subject(tenant=self.TENANT, actor=actor, roles=roles, scopes=scopes)

    async def resolve(self, credentials: Credentials) -> Subject:  # noqa: ARG002 - trusted by socket
        """The one subject, whatever the credentials."""
        return self._subject
