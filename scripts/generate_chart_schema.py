"""Generate values.schema.json of the chart from values.yaml and its comments.

A comment that begins with "--" describes the key below it. At the end of it, or of the
key's own line, may stand: ``@free`` (any keys may stand in it), ``@items a, b`` (a list
of objects with these texts), ``@enum a, b``, ``@minimum N`` and ``@pattern REGEX``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parent.parent
VALUES: Final = ROOT / "deploy" / "helm" / "pdp" / "values.yaml"
SCHEMA: Final = VALUES.with_name("values.schema.json")

_MARK: Final = re.compile(r"@(free|items|enum|minimum|pattern)\b ?([^@]*)")
_TYPES: Final = {"str": "string", "int": "integer", "bool": "boolean", "float": "number"}


def generate(text: str) -> str:
    """The schema, as JSON."""
    lines = text.splitlines()
    node = yaml.compose(text, yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)  # noqa: S101 - the chart's own file
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        # Helm puts "global" there for charts that this one is a part of.
        **_object(node, lines, others={"global": {"type": "object"}}),
    }
    return json.dumps(schema, indent=2) + "\n"


def _object(
    node: yaml.MappingNode, lines: list[str], others: dict[str, Any] | None = None
) -> dict[str, Any]:
    properties = {
        key.value: _property(value, *_comment(lines, key.start_mark.line), lines)
        for key, value in node.value
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties | (others or {}),
    }


def _property(
    node: yaml.Node, description: str, marks: dict[str, str], lines: list[str]
) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": description}
    if isinstance(node, yaml.MappingNode):
        schema |= {"type": "object"} if "free" in marks else _object(node, lines)
    elif isinstance(node, yaml.SequenceNode):
        schema["type"] = "array"
        if "items" in marks:
            names = _words(marks["items"])
            schema["items"] = {
                "type": "object",
                "additionalProperties": False,
                "required": names,
                "properties": {name: {"type": "string", "minLength": 1} for name in names},
            }
    else:
        schema["type"] = _TYPES[node.tag.rpartition(":")[2]]
    if "enum" in marks:
        schema["enum"] = _words(marks["enum"])
    if "minimum" in marks:
        schema["minimum"] = int(marks["minimum"])
    if "pattern" in marks:
        schema["pattern"] = marks["pattern"].strip()
    return schema


def _comment(lines: list[str], line: int) -> tuple[str, dict[str, str]]:
    """The description above a key, and the marks in it and behind the key. Raises
    SystemExit where there is none.
    """
    above: list[str] = []
    for text in reversed(lines[:line]):
        stripped = text.strip()
        if not stripped.startswith("#"):
            break
        above.insert(0, stripped.removeprefix("#").strip())
        if above[0].startswith("--"):
            break
    comment = " ".join(above)
    if not comment.startswith("--"):
        raise SystemExit(f"{VALUES.name}:{line + 1}: has no description (# -- ...) above it")
    behind = lines[line].partition(" #")[2]
    marks = {match[1]: match[2] for match in _MARK.finditer(f"{comment} {behind}")}
    return _MARK.sub("", comment).removeprefix("--").strip(), marks


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def main() -> int:
    """Write the schema, or say that it is not current."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    schema = generate(VALUES.read_text(encoding="utf-8"))
    if not arguments.check:
        SCHEMA.write_text(schema, encoding="utf-8")
    elif not SCHEMA.exists() or SCHEMA.read_text(encoding="utf-8") != schema:
        print("values.schema.json is not current: run make chart", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
