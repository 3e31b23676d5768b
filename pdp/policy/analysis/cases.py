"""The cases file: which calls are asked about, where the bundle alone can not say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import yaml

from pdp.canonical import JsonError, JsonObject, JsonValue, check
from pdp.errors import PdpError
from pdp.reason import ReasonCode

MAX_CASES_BYTES: Final = 4 * 1024 * 1024
MAX_DEPTH: Final = 64
DEFAULT_TIME: Final = datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()
"""The time of every question unless the cases file says another, so that two runs agree."""
_NAME: Final = re.compile(r"[ -~]{1,128}")


class CasesError(PdpError):
    """A cases file can not be used; the message names file, line and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(ReasonCode.REQUEST_INVALID, message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to call a tool."""

    name: str
    arguments: JsonObject = field(repr=False)
    resource: JsonObject | None = None
    context: JsonObject = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cases:
    """What a cases file says; without one, nothing."""

    tools: Mapping[str, tuple[Case, ...]] = field(default_factory=dict)
    roles: tuple[str, ...] | None = None
    """None: the roles that the tenant's data names."""
    scopes: tuple[str, ...] | None = None
    """None: the tenant's own."""
    time: float = DEFAULT_TIME
    """Unix seconds."""


def read_cases(path: Path) -> Cases:
    """Read a cases file (YAML). Raises CasesError."""
    try:
        content = path.read_bytes()[: MAX_CASES_BYTES + 1]
    except OSError as error:
        raise CasesError(f"{path} can not be read: {error.strerror}.") from None
    if len(content) > MAX_CASES_BYTES:
        raise CasesError(f"{path} is larger than {MAX_CASES_BYTES} bytes.")
    return parse_cases(content, place=str(path))


def parse_cases(content: bytes, *, place: str) -> Cases:
    """The cases in a YAML text. Raises CasesError."""
    try:
        root = yaml.compose(content, Loader=yaml.CSafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise CasesError(f"{place}:{line}: is not YAML: {error.problem}.") from None
    except (yaml.YAMLError, RecursionError):
        raise CasesError(f"{place}:1: is not YAML.") from None
    return _Reader(place).cases(root) if root is not None else Cases()


class _Reader:
    """Turns YAML nodes, which know their lines, into cases."""

    def __init__(self, place: str) -> None:
        self._place = place

    def cases(self, root: yaml.Node) -> Cases:
        keys = self._mapping(root, "the file", known=("tools", "roles", "scopes", "time"))
        tools: dict[str, tuple[Case, ...]] = {}
        if "tools" in keys:
            for tool, node in self._mapping(keys["tools"], "tools").items():
                tools[tool] = self._tool(tool, node)
        return Cases(
            tools=tools,
            roles=self._names(keys["roles"], "roles") if "roles" in keys else None,
            scopes=self._names(keys["scopes"], "scopes") if "scopes" in keys else None,
            time=self._time(keys["time"]) if "time" in keys else DEFAULT_TIME,
        )

    def _tool(self, tool: str, node: yaml.Node) -> tuple[Case, ...]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self._fault(node, f"tools.{tool} must be a list of at least one case")
        cases = [self._case(item, number) for number, item in enumerate(node.value, 1)]
        names = [case.name for case in cases]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise self._fault(node.value[number], f"the case {name!r} stands twice")
        return tuple(cases)

    def _case(self, node: yaml.Node, number: int) -> Case:
        keys = self._mapping(node, "a case", known=("name", "arguments", "resource", "context"))
        name = self._text(keys["name"], "name") if "name" in keys else str(number)
        resource = None
        if "resource" in keys:
            parts = self._mapping(keys["resource"], "resource", known=("type", "id"))
            if len(parts) != 2:  # noqa: PLR2004 - both of them
                raise self._fault(keys["resource"], "resource must have both type and id")
            resource = {key: self._text(part, key) for key, part in parts.items()}
        return Case(
            name=name,
            arguments=self._json_object(keys.get("arguments"), "arguments"),
            resource=dict(resource) if resource is not None else None,
            context=self._json_object(keys.get("context"), "context"),
        )

    def _mapping(
        self, node: yaml.Node, what: str, *, known: Iterable[str] | None = None
    ) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            raise self._fault(node, f"{what} must be a mapping")
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = self._text(key, "a key")
            if known is not None and name not in known:
                raise self._fault(key, f"{name!r} is not known; {what} has {', '.join(known)}")
            if name in found:
                raise self._fault(key, f"{name!r} stands twice")
            found[name] = value
        return found

    def _names(self, node: yaml.Node, what: str) -> tuple[str, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise self._fault(node, f"{what} must be a list")
        return tuple(dict.fromkeys(self._text(item, f"an item of {what}") for item in node.value))

    def _text(self, node: yaml.Node, what: str) -> str:
        value = self._value(node, depth=1)
        if not isinstance(value, str) or not _NAME.fullmatch(value):
            raise self._fault(node, f"{what} must be a text of 1 to 128 ASCII characters")
        return value

    def _time(self, node: yaml.Node) -> float:
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        try:
            time = datetime.fromisoformat(text)
        except ValueError:
            time = None
        if time is None or time.tzinfo is None:
            raise self._fault(
                node, "time must be RFC 3339 with an offset, such as 2026-01-01T12:00:00Z"
            )
        return time.timestamp()

    def _json_object(self, node: yaml.Node | None, what: str) -> JsonObject:
        if node is None:
            return {}
        value = self._value(node, depth=MAX_DEPTH)
        if not isinstance(value, dict):
            raise self._fault(node, f"{what} must be a mapping")
        return value

    def _value(self, node: yaml.Node, *, depth: int) -> JsonValue:
        """The JSON value of a node. Dates stay the text that they are written as."""
        if depth == 0:
            raise self._fault(node, f"is nested more than {MAX_DEPTH} deep")
        if isinstance(node, yaml.MappingNode):
            pairs = self._mapping(node, "it").items()
            return {key: self._value(value, depth=depth - 1) for key, value in pairs}
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, depth=depth - 1) for item in node.value]
        text: str = node.value
        read = _SCALARS.get(node.tag.removeprefix("tag:yaml.org,2002:"))
        try:
            value = read(text) if read is not None else None
            check(value)
        except (ValueError, JsonError):
            value, read = None, None
        if read is None:
            raise self._fault(node, "is not a value that JSON has")
        return value

    def _fault(self, node: yaml.Node, what: str) -> CasesError:
        return CasesError(f"{self._place}:{node.start_mark.line + 1}: {what}.")


def _yaml_boolean(text: str) -> bool:
    return text.lower() in {"true", "yes", "on"}


def _yaml_null(_text: str) -> None:
    return None


_SCALARS: Final[Mapping[str, Callable[[str], JsonValue]]] = {
    "str": str,
    "timestamp": str,
    "int": int,
    "float": float,
    "bool": _yaml_boolean,
    "null": _yaml_null,
}
"""How the scalars of YAML's core schema are read; int takes decimal digits only."""
