"""Which tools a subject may see, as a policy answers it (pdp/tools/visible)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pdp.canonical import JsonValue
from pdp.policy.engine import PolicyError
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

MAX_TOOLS: Final = 1_024
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
_KEYS: Final = {"name", "callable", "reason_code"}


@dataclass(frozen=True, slots=True)
class VisibleTool:
    """A tool, as far as the subject may know of it."""

    name: str
    callable: bool
    """Whether a call can be allowed, if its arguments are."""
    reason_code: str
    """ReasonCode.OK exactly when callable."""


def parse_visible_tools(value: JsonValue) -> tuple[VisibleTool, ...]:
    """The value of pdp/tools/visible, by name. Raises PolicyError (policy_invalid)."""
    if not isinstance(value, list) or len(value) > MAX_TOOLS:
        raise _invalid(f"it must be a list of at most {MAX_TOOLS} tools")
    tools = sorted(map(_tool, value), key=lambda tool: tool.name)
    if len({tool.name for tool in tools}) != len(tools):
        raise _invalid("a tool stands twice")
    return tuple(tools)


def _tool(value: JsonValue) -> VisibleTool:
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise _invalid(f"a tool must be an object of {', '.join(sorted(_KEYS))}")
    name, is_callable, code = value["name"], value["callable"], value["reason_code"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _invalid(f"name must match {_NAME.pattern}")
    if not isinstance(is_callable, bool):
        raise _invalid("callable must be true or false")
    if not isinstance(code, str) or not REASON_CODE_PATTERN.fullmatch(code):
        raise _invalid(f"reason_code must match {REASON_CODE_PATTERN.pattern}")
    if is_callable is not (code == ReasonCode.OK):
        raise _invalid('reason_code must be "ok" exactly when callable is true')
    return VisibleTool(name, is_callable, code)


def _invalid(what: str) -> PolicyError:
    return PolicyError(
        ReasonCode.POLICY_INVALID, f"The policy's answer is not of the agreed form: {what}."
    )
