"""Arguments made from the rules that the data has for them (``data.tools[tool].arguments``,
the schema of the starter bundle), so that a tool without a case can be asked about.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pdp.canonical import JsonObject, JsonValue


class NeedsCaseError(Exception):
    """The rules alone do not say what an argument may be; a case must."""


def made_arguments(tool_rules: JsonObject, tenant_rules: JsonObject) -> JsonObject:
    """Arguments that keep the rules, the same every time: those that are required.

    Raises NeedsCaseError, whose text names the argument.
    """
    arguments: JsonObject = {}
    for name in sorted({*tool_rules, *tenant_rules}):
        rule = _both(tool_rules.get(name), tenant_rules.get(name))
        if rule.get("required") is not False:
            arguments[name] = _made(name, rule)
    return arguments


def made_argument(tool_rule: JsonValue, tenant_rule: JsonValue) -> JsonValue:
    """A value for one argument. Raises NeedsCaseError."""
    return _made("it", _both(tool_rule, tenant_rule))


def edge_arguments(
    base: JsonObject, tool_rules: JsonObject, tenant_rules: JsonObject
) -> Iterator[tuple[str, JsonObject]]:
    """The base with one argument at an edge of its rules, each with its description:
    every value of an enum, the least, the most, one without what is optional.
    """
    for name in sorted({*tool_rules, *tenant_rules, *base}):
        for value in edge_values(tool_rules.get(name), tenant_rules.get(name)):
            if name not in base or base[name] != value:
                yield f"{name} = {shown_value(value)}", {**base, name: value}
        if name in base:
            yield f"without {name}", {key: base[key] for key in base if key != name}


def edge_values(*rules: JsonValue) -> Iterator[JsonValue]:
    """Values at the edges of what rules for one argument say, tool's and tenant's."""
    for rule in rules:
        if not isinstance(rule, Mapping):
            continue
        enum = rule.get("enum")
        yield from enum if isinstance(enum, list) else ()
        if rule.get("type") == "boolean":
            yield from (True, False)
        for keyword in ("minimum", "maximum"):
            bound = rule.get(keyword)
            if isinstance(bound, int | float) and not isinstance(bound, bool):
                yield bound


def shown_value(value: JsonValue) -> str:
    """A value in a few characters."""
    import json  # noqa: PLC0415 - only where something is shown

    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004 - a width


def _both(tool_rule: JsonValue, tenant_rule: JsonValue) -> JsonObject:
    """Both rules as one: the tenant's can only tighten."""
    rule: JsonObject = dict(tool_rule) if isinstance(tool_rule, dict) else {}
    if not isinstance(tenant_rule, dict):
        return rule
    for keyword, bound in tenant_rule.items():
        rule[keyword] = _tighter(keyword, rule.get(keyword), bound)
    return rule


def _tighter(keyword: str, one: JsonValue, other: JsonValue) -> JsonValue:
    if isinstance(one, list) and isinstance(other, list):
        return [item for item in one if item in other]
    if isinstance(one, int | float) and isinstance(other, int | float):
        return max(one, other) if keyword == "minimum" else min(one, other)
    return other


def _made(name: str, rule: JsonObject) -> JsonValue:
    enum = rule.get("enum")
    if isinstance(enum, list) and enum:
        return enum[0]
    if "pattern" in rule or "domains" in rule or rule.get("tenant_rule_required"):
        raise NeedsCaseError(f"the argument {name} has to fit more than a type")
    kind = rule.get("type")
    if kind == "string":
        return "x"
    if kind == "boolean":
        return True
    if kind in {"integer", "number"}:
        return _made_number(rule, whole=kind == "integer")
    raise NeedsCaseError(f"the argument {name} has no type that is known here")


def _made_number(rule: JsonObject, *, whole: bool) -> JsonValue:
    least, most = rule.get("minimum"), rule.get("maximum")
    if isinstance(least, int | float):
        return math.ceil(least) if whole else least
    if isinstance(most, int | float):
        return min(1, math.floor(most) if whole else most)
    return 1
