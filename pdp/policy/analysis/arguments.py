"""Arguments made from the rules that the data has for them (``data.tools[tool].arguments``,
the schema of the starter bundle), so that a tool without a case can be asked about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

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
    kind = rule.get("type")
    if kind == "string":
        return _made_text(name, rule)
    if kind == "boolean":
        return True
    if kind in {"integer", "number"}:
        return _made_number(rule, whole=kind == "integer")
    raise NeedsCaseError(f"the argument {name} has no type that is known here")


def _made_text(name: str, rule: JsonObject) -> str:
    """The first sample that keeps pattern, length and domains."""
    pattern, longest, domains = rule.get("pattern"), rule.get("max_length"), rule.get("domains")
    samples: Iterable[str] = _SAMPLES
    if isinstance(domains, list):
        samples = [f"someone@{domain}" for domain in domains]
    for sample in samples:
        fits = not isinstance(pattern, str) or _matches(pattern, sample)
        if fits and (not isinstance(longest, int) or len(sample) <= longest):
            return sample
    raise NeedsCaseError(f"the argument {name} has a pattern that no sample here fits")


def _matches(pattern: str, text: str) -> bool:
    """As OPA matches: with RE2."""
    import re2  # type: ignore[import-untyped]  # noqa: PLC0415 - only for a pattern

    try:
        return re2.fullmatch(pattern, text) is not None
    except re2.error:
        return False


_SAMPLES: Final = (
    "x",
    "1",
    "X",
    "someone@example.com",
    "https://example.com/",
    "2026-01-01",
    "2026-01-01T12:00:00Z",
    "00000000-0000-4000-8000-000000000000",
    "eur",
    "EUR",
    "de",
    "DE",
    "x-1",
    "X-1",
    "1.0",
    "12:00",
)
"""Texts of forms that tools often ask for."""


def _made_number(rule: JsonObject, *, whole: bool) -> JsonValue:
    least, most = rule.get("minimum"), rule.get("maximum")
    if isinstance(least, int | float):
        return math.ceil(least) if whole else least
    if isinstance(most, int | float):
        return min(1, math.floor(most) if whole else most)
    return 1
