"""What a policy is shown: the input documents, shaped after AuthZEN 1.0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pdp.budget.ledger import Charge
from pdp.canonical import JsonObject, JsonValue
from pdp.identity.subject import Subject


@dataclass(frozen=True, slots=True)
class Usage:
    """What a model is to be used for, or was, which the policy prices."""

    model: str
    quantities: tuple[tuple[str, int], ...]
    """Units, each at most once, and how many of them."""


def authorize_input(
    subject: Subject,
    *,
    tool: str,
    arguments: JsonObject,
    resource: JsonObject | None,
    time: float,
    request_id: str,
    context: JsonObject,
) -> JsonObject:
    """The input for pdp/authz/decision, and for the limits of the same call.

    Everything under ``subject`` is verified; everything else is the caller's word.
    ``time`` is Unix seconds.
    """
    action: JsonObject = {"name": tool, "properties": {"arguments": arguments}}
    return _document(
        subject, action, resource, time=time, request_id=request_id, context=context, tool=tool
    )


def tools_input(subject: Subject, *, time: float, context: JsonObject) -> JsonObject:
    """The input for pdp/tools/visible. ``time`` is Unix seconds."""
    action: JsonObject = {"name": "tools.list"}
    return _document(subject, action, None, time=time, request_id="", context=context, tool="")


def budget_input(
    subject: Subject,
    *,
    operation: str,
    charges: Sequence[Charge],
    tool: str,
    time: float,
    request_id: str,
    usage: Usage | None = None,
    price_version: str = "",
) -> JsonObject:
    """The input for pdp/budget/decision and pdp/budget/limits.

    ``operation`` is "charge", "reserve", "settle", "refund" or "get". ``tool`` is empty when
    the spend is for none. ``usage`` is what the policy is to price, for a settlement at the
    ``price_version`` that was answered when the hold was made.
    """
    listed: list[JsonValue] = [
        {"budget": charge.budget, "unit": charge.unit, "amount": charge.amount}
        for charge in charges
    ]
    document = _document(
        subject,
        {"name": f"budget.{operation}"},
        None,
        time=time,
        request_id=request_id,
        context={},
        tool=tool,
    )
    document["charges"] = listed
    if usage is not None:
        document["usage"] = {"model": usage.model, "quantities": dict(usage.quantities)}
    if price_version:
        document["price_version"] = price_version
    return document


def _document(
    subject: Subject,
    action: JsonObject,
    resource: JsonObject | None,
    *,
    time: float,
    request_id: str,
    context: JsonObject,
    tool: str,
) -> JsonObject:
    properties: JsonObject = {
        "tenant": subject.tenant,
        "roles": list(subject.roles),
        "scopes": list(subject.scopes),
    }
    for name, value in (
        ("organisation", subject.organisation),
        ("team", subject.team),
        ("session", subject.session),
        ("issuer", subject.issuer),
        ("workload", subject.workload),
    ):
        if value:
            properties[name] = value
    if subject.delegation is not None:
        agents: list[JsonValue] = [*subject.delegation.agents]
        tools: list[JsonValue] = [*sorted(subject.delegation.tools)]
        properties["delegation"] = {"agents": agents, "tools": tools}
    document: JsonObject = {
        "subject": {"type": "user", "id": subject.actor, "properties": properties},
        "action": action,
        "context": {
            "time": datetime.fromtimestamp(time, UTC).isoformat(timespec="milliseconds"),
            "request_id": request_id,
            "client": context,
        },
        "tool": tool,
    }
    if resource is not None:
        document["resource"] = resource
    return document
