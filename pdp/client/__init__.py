"""The stub in a runtime: no tool runs without a permit.

::

    from pdp.client import Guard

    guard = Guard("unix:///run/pdp/pdp.sock")

    @guard.tool("orders.update", resource=lambda order_id, **_: ("order", order_id))
    def update_order(order_id: str, status: str) -> dict: ...

    with guard.acting_for(token):
        update_order("918", status="shipped")

Importing this package needs no server, and no connection is made before the
first call.
"""

from __future__ import annotations

from pdp.client.acting import current_permit
from pdp.client.batch import Call
from pdp.client.decision import Decision
from pdp.client.delegation import Delegation
from pdp.client.errors import BudgetRefused, DelegationRefused, ListingRefused, PermitDenied
from pdp.client.guard import AsyncGuard, Guard
from pdp.client.hold import Hold
from pdp.client.spend import Reservation, Usage
from pdp.client.tools import ToolInfo
from pdp.permit.claims import Permit

__all__ = [
    "AsyncGuard",
    "BudgetRefused",
    "Call",
    "Decision",
    "Delegation",
    "DelegationRefused",
    "Guard",
    "Hold",
    "ListingRefused",
    "Permit",
    "PermitDenied",
    "Reservation",
    "ToolInfo",
    "Usage",
    "current_permit",
]
