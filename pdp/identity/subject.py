"""Whose call it is: the outcome of Identify."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

TENANT_PATTERN: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What a tenant id looks like; it is used in namespaces and ledger accounts."""

MAX_ORGANISATION_LENGTH: Final = 128
MAX_TEAM_LENGTH: Final = 128
MAX_SESSION_LENGTH: Final = 255


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

    @property
    def namespace(self) -> str:
        """Prefix for this tenant's memory and cache keys; no other tenant's
        namespace is a prefix of it, as tenant ids hold no slash.
        """
        return f"tenant/{self.tenant}/"
