"""Which tools a caller may see. It allows nothing: each call is authorized when it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from pdp.admission import Lane
from pdp.audit.record import AuditRecord, Outcome
from pdp.canonical import JsonObject
from pdp.identity.resolver import Credentials
from pdp.identity.subject import Subject
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.question import tools_input
from pdp.policy.tools import VisibleTool, parse_visible_tools
from pdp.reason import ReasonCode
from pdp.rooms import Rooms, admitted_as, identify, identity_json

_ACTION: Final = "tools.list"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The tools that the caller may see, on record."""

    tools: tuple[VisibleTool, ...]
    policy_revision: str


async def list_tools(
    rooms: Rooms, credentials: Credentials, *, context: JsonObject, trace_id: str | None
) -> Listing:
    """The tools, by name; none where the policy says nothing of it. What was not delegated
    to an agent is not callable by it, whatever the policy says.

    Raises IdentityError and PolicyError, on record, AdmissionError, on record within its
    bounds, and AuditError.
    """
    subject = await identify(rooms, credentials, action=_ACTION, trace_id=trace_id)
    async with admitted_as(
        rooms,
        Lane.QUESTIONS,
        subject,
        action=_ACTION,
        trace_id=trace_id,
    ):
        listing = Listing(tools=(), policy_revision=rooms.policy.revision)
        failure: PolicyError | None = None
        try:
            listing = await _listing(rooms, subject, context)
        except PolicyError as error:
            failure = error
        await rooms.audit.append(_record(subject, listing, failure, trace_id))
    if failure is not None:
        raise failure
    return listing


async def _listing(rooms: Rooms, subject: Subject, context: JsonObject) -> Listing:
    with rooms.policy.pin() as policy:
        document = tools_input(subject, time=rooms.clock(), context=context)
        try:
            tools = parse_visible_tools(await policy.evaluate(Entrypoint.TOOLS_VISIBLE, document))
        except PolicyError as error:
            if error.reason_code != ReasonCode.POLICY_UNDEFINED:
                raise
            tools = ()
        return Listing(
            tools=tuple(_within_delegation(subject, tool) for tool in tools),
            policy_revision=policy.revision,
        )


def _within_delegation(subject: Subject, tool: VisibleTool) -> VisibleTool:
    if subject.delegation is None or tool.name in subject.delegation.tools:
        return tool
    return replace(tool, callable=False, reason_code=ReasonCode.TOOL_NOT_DELEGATED.value)


def _record(
    subject: Subject, listing: Listing, failure: PolicyError | None, trace_id: str | None
) -> AuditRecord:
    detail: JsonObject = {
        "tools": len(listing.tools),
        "callable": sum(tool.callable for tool in listing.tools),
    }
    return AuditRecord(
        type="listing",
        tenant_id=subject.tenant,
        actor_id=subject.actor,
        identity=identity_json(subject),
        action=_ACTION,
        outcome=Outcome.DENIED if failure else Outcome.ALLOWED,
        reason_code=failure.reason_code if failure else ReasonCode.OK,
        trace_id=trace_id,
        policy_revision=listing.policy_revision,
        detail=None if failure else detail,
    )
