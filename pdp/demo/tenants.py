"""The two tenants of the demonstration, as the starter policy knows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A customer of the agent service."""

    id: str
    agent_user: str
    """Who acts in the main job: a support agent."""
    customer: str
    """The mail address of the customer behind the order."""
    sender: str
    """The tenant's own mail address."""


@dataclass(frozen=True, slots=True)
class Login:
    """A tenant's own credential at one system behind a tool."""

    name: str
    password: str = field(repr=False)


TENANTS: Final = {
    tenant.id: tenant
    for tenant in (
        Tenant(
            id="tenant_acme",
            agent_user="maria",
            customer="ada@customers.example",
            sender="support@acme.example",
        ),
        Tenant(
            id="tenant_globex",
            agent_user="hank",
            customer="bo@customers.example",
            sender="help@globex.example",
        ),
    )
}


def other_than(tenant: Tenant) -> Tenant:
    """The other of the two."""
    return next(other for other in TENANTS.values() if other is not tenant)
