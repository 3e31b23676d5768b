"""Which tools there are for whoever the code acts for, to be shown to a model."""

from __future__ import annotations

from dataclasses import dataclass

from pdp.api.v1 import authorization_pb2
from pdp.client.acting import Identity
from pdp.client.desk import Ask, Steps


@dataclass(frozen=True, slots=True)
class ToolInfo:
    """A tool, as far as the subject may know of it."""

    name: str
    callable: bool
    """Whether a call can be allowed, if its arguments are. It is authorized all the same."""
    reason_code: str
    """"ok", or why it can not be called."""


def list_tools(identity: Identity) -> Steps[tuple[ToolInfo, ...]]:
    """Ask which tools there are. Raises IdentityLacking and CallError."""
    acting = identity.current()
    request = authorization_pb2.ListToolsRequest(context_json=acting.context_json)
    response = yield Ask("ListTools", request, acting.metadata)
    # The identity may have ended while the answer was under way.
    identity.current()
    return tuple(ToolInfo(tool.name, tool.callable, tool.reason_code) for tool in response.tools)
