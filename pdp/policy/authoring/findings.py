"""What a check finds, and where in the author's files it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import yaml

from pdp.policy.archive import Files
from pdp.policy.data import is_data
from pdp.policy.manifest import MANIFEST

MAX_READ_FOR_LINES_BYTES: Final = 4 * 1024 * 1024
"""Lines are not looked up in larger data files, as it would take too long."""

DataPath = tuple[str | int, ...]
"""Where something stands in the data document: keys of objects, indices of lists."""


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """The sidecar would refuse the bundle, or deny calls because of it."""
    WARNING = "warning"
    """Most likely a slip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or seems so."""

    severity: Severity
    message: str
    file: str = ""
    """Relative to the bundle; empty when it is the bundle as a whole."""
    row: int = 0
    """Line in the file, from 1; 0 when it is not known."""

    @property
    def place(self) -> str:
        """File and line, as far as they are known."""
        return f"{self.file}:{self.row}" if self.row else self.file


def broken_json(files: Files) -> Iterator[Finding]:
    """Where JSON that the bundle is read from is none, or names a key twice in an object."""
    for name in sorted(files):
        if name != MANIFEST and not (is_data(name) and name.endswith(".json")):
            continue
        try:
            json.loads(files[name])
        except json.JSONDecodeError as error:
            message = f"is not JSON: {error.msg} (column {error.colno})"
            yield Finding(severity=Severity.ERROR, message=message, file=name, row=error.lineno)
        except (ValueError, RecursionError):
            continue  # text or numbers that no file may hold; the reader says what it is
        else:
            yield from _repeated_keys(name, _composed(files[name]))


def _repeated_keys(name: str, node: yaml.Node | None) -> Iterator[Finding]:
    if node is None:
        return
    seen = set()
    for key, row, value in _children(node):
        if key in seen:
            message = f"the key {key} stands twice in one object"
            yield Finding(severity=Severity.ERROR, message=message, file=name, row=row)
        seen.add(key)
        yield from _repeated_keys(name, value)


class DataPlaces:
    """Finds in which file, and on which line, a value of the data document stands."""

    def __init__(self, files: Files) -> None:
        self._files = {name: content for name, content in files.items() if is_data(name)}
        self._roots: dict[str, yaml.Node | None] = {}

    def find(self, path: DataPath) -> tuple[str, int]:
        """File and line of a value, or of the closest thing around it. Line 0: not known."""
        best, deepest, line = "", -1, 0
        for name in self._files:
            folders = tuple(name.split("/")[:-1])
            if path[: len(folders)] != folders:
                continue
            depth, row = self._descend(name, path[len(folders) :])
            if len(folders) + depth > deepest:
                best, deepest, line = name, len(folders) + depth, row
        return best, line

    def _descend(self, name: str, path: Sequence[str | int]) -> tuple[int, int]:
        """How much of a path leads through a file, and the line where it ends."""
        node = self._root(name)
        if node is None:
            return 0, 0
        line = node.start_mark.line + 1
        for depth, step in enumerate(path):
            found = next((pair for pair in _children(node) if pair[0] == step), None)
            if found is None:
                return depth, line
            _, line, node = found
        return len(path), line

    def _root(self, name: str) -> yaml.Node | None:
        if name not in self._roots:
            self._roots[name] = _composed(self._files[name])
        return self._roots[name]


def _composed(content: bytes) -> yaml.Node | None:
    """The nodes of JSON or YAML, which know their lines."""
    if len(content) > MAX_READ_FOR_LINES_BYTES:
        return None
    try:
        # JSON may be indented with tabs, and holds no other.
        text = content.decode("utf-8").replace("\t", " ")
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.CSafeLoader)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError):
        return None
    return node


def _children(node: yaml.Node) -> Iterator[tuple[str | int, int, yaml.Node]]:
    """Key or index, line and node of what stands in a node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield key.value, key.start_mark.line + 1, value
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield index, item.start_mark.line + 1, item
