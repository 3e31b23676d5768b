"""The reference of the configuration, made from the models and their docstrings."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from pdp import config
from pdp.storage import Durability

TITLE: Final = "Configuration of the agent-pdp sidecar"


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of the configuration file, with descriptions."""
    made = msgspec.json.schema(config.Config, schema_hook=_path_schema)
    sections = made["$defs"]
    schema: dict[str, Any] = {**sections.pop("Config"), "$defs": dict(sorted(sections.items()))}
    for part in (schema, *sections.values()):
        part["description"] = inspect.cleandoc(part["description"])
    documented = _docstrings()
    for name, section in _sections(schema):
        for key, member in section["properties"].items():
            member["description"] = documented[name][key]
        for field in msgspec.structs.fields(getattr(config, name)):
            if field.default_factory is not msgspec.NODEFAULT:
                default = msgspec.to_builtins(field.default_factory(), enc_hook=str)
                section["properties"][field.name]["default"] = default
    schema["title"] = TITLE
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return schema


def _path_schema(_: type) -> dict[str, Any]:
    return {"type": "string", "format": "path"}


def markdown() -> str:
    """docs/configuration.md: every section, key, type, default and meaning."""
    schema = json_schema()
    lines = [
        "# Configuration",
        "",
        "<!-- Generated from pdp/config.py by `make docs`; edit the docstrings there. -->",
        "",
        "`pdp serve --config FILE` reads one YAML file. A variable of the environment lays a value",
        "over it: `PDP_` and the key, with `__` between levels (`PDP_LISTEN__UNIX`,",
        "`PDP_BUDGET__DURABILITY`); its value is read as YAML. An unknown key, a wrong type or a",
        "missing key is refused with file, line and what was expected, and exit code 2.",
        "`pdp config check FILE` only checks; `pdp config schema` prints the JSON Schema for editors.",
        "Relative paths are taken from the file's directory.",
        "",
    ]
    for name, section in _sections(schema):
        lines += [f"## {name}", "", section.get("description", ""), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        required = section.get("required", [])
        for key, member in section.get("properties", {}).items():
            default = "required" if key in required else f"`{json.dumps(member.get('default'))}`"
            meaning = " ".join(member["description"].split())
            lines.append(f"| `{key}` | {_type(member)} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def _sections(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "Config", schema
    for name, section in schema["$defs"].items():
        if section.get("type") == "object":
            yield name, section


def _docstrings() -> dict[str, dict[str, str]]:
    """Class to field to the docstring under the field."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        fields = found.setdefault(node.name, {})
        for base in node.bases:
            fields.update(found.get(ast.unparse(base), {}))
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                fields[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _type(member: dict[str, Any]) -> str:  # noqa: PLR0911 - one return for each form
    if "$ref" in member:
        name = member["$ref"].rpartition("/")[2]
        if name == Durability.__name__:
            return " or ".join(f"`{value}`" for value in Durability)
        return f"[{name}](#{name.lower()})"
    for union in ("anyOf", "oneOf"):
        if union in member:
            return " or ".join(_type(option) for option in member[union])
    if "enum" in member:
        return " or ".join(f"`{value}`" for value in member["enum"])
    if "const" in member:
        return f"`{member['const']}`"
    kind = str(member.get("type", "any"))
    if kind == "array":
        return f"list of {_type(member['items'])}"
    if kind == "object":
        return "mapping"
    bounds = [
        f"{word} {member[key]}"
        for key, word in (("exclusiveMinimum", "over"), ("minimum", "from"), ("maximum", "to"))
        if key in member
    ]
    return " ".join([kind, *bounds])
