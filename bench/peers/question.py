"""What every system is asked, in words of its own: may this call be made?

A call of ``orders.update`` by a support agent of one of 1,000 tenants, with an order that
no call before named. Every system knows the same of each tenant: its roles, its scopes, its
allowlist of tools; and the same of the tool: which scope it needs, and which arguments.

Nothing but the standard library is imported here: the peers' clients run in an environment
without ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TENANTS: Final = 1_000
ASKING: Final = 64
"""Tenants that calls are made for, turn by turn."""
TOOL: Final = "orders.update"
SCOPE_OF: Final = {"orders.read": "orders:read", "orders.update": "orders:write"}
ROLE: Final = "support_agent"
ROLES: Final = {ROLE: ("orders.read", "orders.update"), "analyst": ("orders.read",)}
ALLOWLIST: Final = ("orders.read", "orders.update")
SCOPES: Final = ("orders:read", "orders:write")
ORDER_ID: Final = "[0-9]{1,12}"
STATUSES: Final = ("pending", "processing", "packed", "shipped", "delivered")
RESTRICTED: Final = "tenant_restricted"
"""A tenant whose allowlist has no updates, beside the others."""


def tenant_name(number: int) -> str:
    return f"tenant_{number:06}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Who asks for what."""

    tenant: str
    role: str
    scopes: tuple[str, ...]
    order_id: str
    status: str


def call(number: int) -> Call:
    """The call of that number: no two have the same arguments."""
    return Call(
        tenant=tenant_name(number % ASKING),
        role=ROLE,
        scopes=SCOPES,
        order_id=str(number),
        status="shipped",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a system must answer before it is measured."""

    name: str
    call: Call
    allowed: bool


def _case(name: str, *, allowed: bool = False, **changed: object) -> Case:
    usual: dict[str, object] = {
        "tenant": tenant_name(7),
        "role": ROLE,
        "scopes": SCOPES,
        "order_id": "918",
        "status": "shipped",
    }
    return Case(name=name, call=Call(**{**usual, **changed}), allowed=allowed)  # type: ignore[arg-type]


CASES: Final = (
    _case("as it should be", allowed=True),
    _case("another tenant of the thousand", allowed=True, tenant=tenant_name(TENANTS - 1)),
    _case("a tenant that is not known", tenant="tenant_nowhere"),
    _case("a tool that is not on the tenant's allowlist", tenant=RESTRICTED),
    _case("a role that may not use the tool", role="analyst"),
    _case("a role that the tenant does not have", role="root"),
    _case("a scope that the token lacks", scopes=("orders:read",)),
    _case("an order that is no number", order_id="918 or 1=1"),
    _case("an order of too many digits", order_id="9" * 13),
    _case("a status that does not exist", status="gone"),
)
