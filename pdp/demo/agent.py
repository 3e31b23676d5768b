"""The agent service: one runtime for all tenants, with guarded tools.

This is all that a runtime has to do. No tenant is named anywhere: the token of
each request says whose it is, and the permit carries that on to the tools.
"""

from __future__ import annotations

from collections.abc import Callable

from pdp.canonical import JsonObject, JsonValue
from pdp.client import Guard, current_permit
from pdp.demo.mail import MailServer
from pdp.demo.orders import OrdersServer
from pdp.demo.planner import Plan, ToolCall


class Agent:
    """Carries out plans with tools that run only under a permit."""

    def __init__(self, guard: Guard, *, orders: OrdersServer, mail: MailServer) -> None:
        # `more` is whatever else a model puts into a call: for the policy to judge.
        @guard.tool("orders.update", resource=order_resource, audience="orders")
        def update_order(order_id: str, status: str, **more: JsonValue) -> JsonObject:
            return orders.update(
                current_permit().token, {"order_id": order_id, "status": status, **more}
            )

        @guard.tool("mail.send", audience="mail")
        def send_mail(to: str, subject: str, body: str, **more: JsonValue) -> JsonObject:
            return mail.send(
                current_permit().token, {"to": to, "subject": subject, "body": body, **more}
            )

        self._guard = guard
        self._tools: dict[str, Callable[..., JsonObject]] = {
            "orders.update": update_order,
            "mail.send": send_mail,
        }

    def run(self, token: str, plan: Plan) -> None:
        """Carry out the plan for the bearer of the token. Raises PermitDenied by
        the guard, PermitError by a tool server.
        """
        with self._guard.acting_for(token):
            order = self.call(plan.update())
            if plan.confirms:
                self.call(plan.confirmation(order))

    def call(self, call: ToolCall) -> JsonObject:
        """Make one call that a model proposed, inside ``acting_for``."""
        return self._tools[call.tool](**call.arguments)


def order_resource(order_id: str, **_: JsonValue) -> tuple[str, str]:
    """What a call of orders.update is done to."""
    return "order", order_id
