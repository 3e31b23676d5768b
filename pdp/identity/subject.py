"""Whose call it is: the outcome of Identify."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pdp.canonical import JsonObject

TENANT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a tenant id looks like; it is used in namespaces and ledger accounts."""

MAX_ORGANISATION_LENGTH: Final = 128
MAX_TEAM_LENGTH: Final = 128
MAX_SESSION_LENGTH: Final = 255


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a delegation: an agent that was let act."""

    id: str
    """The delegation token's id (jti), which can be revoked."""
    agent: str
    budget: tuple[tuple[str, str, int], ...] = ()
    """Budget, unit and amount: the most that it may spend, with all whom it delegates to;
    and the only ones. Empty for no limit of its own."""
    expires_at: int = 0
    """Until when it holds, in Unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """What an agent may do at most. Each step is within the one before it."""

    links: tuple[Link, ...]
    """The one that was delegated to first is first; never empty."""
    tools: frozenset[str]
    arguments: JsonObject
    """By tool and argument, the list of the rules that it must keep, each as in
    DelegateRequest.arguments_json."""
    root_token_id: str
    """The id of the user's token that the delegation began with; empty where it had none."""
    ledger: str
    """Where the budgets of its links are counted, as in permits."""

    @property
    def agents(self) -> tuple[str, ...]:
        """Who acts for whom, the first that was delegated to first."""
        return tuple(link.agent for link in self.links)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A verified caller. Nothing in it comes from the request's body."""

    tenant: str
    """Matches TENANT_PATTERN."""
    actor: str
    """The user or service that acts: 1 to 255 printable characters."""
    roles: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    organisation: str = ""
    """The customer organisation that the tenant belongs to: printable, as are team and
    session; each is empty where the token names none."""
    team: str = ""
    """The actor's team within the tenant."""
    session: str = ""
    """The session that the token is of, within the tenant."""
    issuer: str = ""
    """Who vouches for it: the token's issuer, empty in single-tenant mode."""
    token_id: str = ""
    """The token's jti, if it has one."""
    expires_at: float = 0.0
    """Until when the identity holds, in Unix seconds; 0 where it does not end."""
    workload: str = ""
    """The runtime that asks, where it has shown who it is: a SPIFFE id, the name in its
    certificate, or its service account."""
    certificate_sha256: str = ""
    """Of the client certificate that the call came with: SHA-256 of its DER form, in
    base64url (RFC 8705 3.1); empty where there was none."""
    delegation: Delegation | None = None
    """Set where an agent acts for the actor: what it may do at most."""

    @property
    def token_ids(self) -> tuple[str, ...]:
        """Every token and delegation that this identity stands on: when one of them is
        revoked, it falls.
        """
        if self.delegation is None:
            return (self.token_id,) if self.token_id else ()
        root = self.delegation.root_token_id
        return (*((root,) if root else ()), *(link.id for link in self.delegation.links))

    @property
    def namespace(self) -> str:
        """Prefix for this tenant's memory and cache keys; no other tenant's
        namespace is a prefix of it, as tenant ids hold no slash.
        """
        return f"tenant/{self.tenant}/"
