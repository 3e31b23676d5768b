"""What would have allowed a call: single changes, then pairs, each really evaluated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.analysis.arguments import (
    NeedsCaseError,
    edge_values,
    made_argument,
    shown_value,
)
from pdp.policy.analysis.evaluator import Evaluator, decide
from pdp.policy.analysis.questions import Estate

MAX_CHANGES: Final = 60
"""Single changes that are tried, and of which pairs are made."""
MAX_ANSWERS: Final = 8
MAX_ALIKE: Final = 2


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """Changes that together turn the decision into an allow."""

    changes: tuple[str, ...]
    """In words."""


@dataclass(frozen=True, slots=True)
class _Change:
    told: str
    of_call: Callable[[JsonObject], JsonObject] | None = field(default=None)
    of_data: Callable[[JsonObject], JsonObject] | None = field(default=None)


def counterfactuals(
    evaluator: Evaluator, data: bytes, document: JsonObject
) -> tuple[Counterfactual, ...]:
    """The smallest changes of the call, the caller or the tenant's data that would have
    allowed it; none when neither one nor two of those that are tried would have.

    Leaves the evaluator with the data that is given.
    """
    estate = Estate(data)
    changes = list(_changes(estate, document))[:MAX_CHANGES]
    search = _Search(evaluator, estate.document, document)
    try:
        for size in (1, 2):
            found = [
                tuple(change.told for change in some)
                for some in sorted(combinations(changes, size), key=_data_changes)
                if len(set(map(_target, some))) == size and search.would_allow(some)
            ]
            if found:
                return tuple(Counterfactual(told) for told in _few(found))
    finally:
        evaluator.set_data(data)
    return ()


class _Search:
    """Evaluates a changed call with changed data, and loads data only when it is other."""

    def __init__(self, evaluator: Evaluator, data: JsonObject, document: JsonObject) -> None:
        self._evaluator = evaluator
        self._data = data
        self._document = document
        self._loaded = data

    def would_allow(self, changes: tuple[_Change, ...]) -> bool:
        document, data = self._document, self._data
        for change in changes:
            document = change.of_call(document) if change.of_call else document
            data = change.of_data(data) if change.of_data else data
        if data != self._loaded:
            self._evaluator.set_data(json.dumps(data, ensure_ascii=False).encode())
            self._loaded = data
        return decide(self._evaluator, document).allow


def _data_changes(changes: tuple[_Change, ...]) -> tuple[str, ...]:
    """Groups what needs the same data, so that each is loaded once."""
    return tuple(change.told for change in changes if change.of_data)


def _target(change: _Change) -> str:
    """What is changed: two changes of the same argument do not go together."""
    return change.told.partition(" = ")[0]


def _few(found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The first ones; of those that differ only in an argument's value, two."""
    alike: Counter[tuple[str, ...]] = Counter()
    kept = []
    for told in found:
        targets = tuple(each.partition(" = ")[0] for each in told)
        alike[targets] += 1
        if alike[targets] <= MAX_ALIKE:
            kept.append(told)
    return kept[:MAX_ANSWERS]


def _changes(estate: Estate, document: JsonObject) -> Iterator[_Change]:
    call = _Call(document)
    yield from _of_caller(estate, call)
    yield from _of_arguments(estate, call)
    yield from _of_data(estate, call)


class _Call:
    """The parts of an input that is shaped as the sidecar's are."""

    def __init__(self, document: JsonObject) -> None:
        subject = _object(_object(document.get("subject")).get("properties"))
        action = _object(document.get("action"))
        self.tenant = _text(subject.get("tenant"))
        self.roles = _list(subject.get("roles"))
        self.scopes = _list(subject.get("scopes"))
        self.tool = _text(action.get("name"))
        self.arguments = _object(_object(action.get("properties")).get("arguments"))


def _of_caller(estate: Estate, call: _Call) -> Iterator[_Change]:
    for role in estate.roles(call.tenant):
        if role not in call.roles:
            yield _Change(f"the actor has the role {role}", _adding("roles", role))
    tool = _object(estate.tools.get(call.tool))
    for scope in dict.fromkeys([*_list(tool.get("scopes")), *estate.scopes(call.tenant)]):
        if scope not in call.scopes and isinstance(scope, str):
            yield _Change(f"the token holds the scope {scope}", _adding("scopes", scope))


def _of_arguments(estate: Estate, call: _Call) -> Iterator[_Change]:
    tool_rules = estate.tool_rules(call.tool)
    tenant_rules = estate.tenant_rules(call.tenant, call.tool)
    for name in call.arguments:
        yield _Change(f"the argument {name} is left out", _without_argument(name))
    for name in dict.fromkeys([*tool_rules, *tenant_rules, *call.arguments]):
        for value in _other_values(call, name, tool_rules.get(name), tenant_rules.get(name)):
            if name not in call.arguments or call.arguments[name] != value:
                told = f"the argument {name} = {shown_value(value)}"
                yield _Change(told, _with_argument(name, value))


def _other_values(
    call: _Call, name: str, tool_rule: JsonValue, tenant_rule: JsonValue
) -> Iterator[JsonValue]:
    yield from edge_values(tool_rule, tenant_rule)
    now = call.arguments.get(name)
    for rule in (_object(tool_rule), _object(tenant_rule)):
        longest = rule.get("max_length")
        if isinstance(now, str) and isinstance(longest, int) and len(now) > longest:
            yield now[:longest]
        for domain in _list(rule.get("domains")):
            before = now.partition("@")[0] if isinstance(now, str) and "@" in now else "someone"
            yield f"{before}@{domain}"
    if name not in call.arguments and tool_rule is not None:
        try:
            yield made_argument(tool_rule, tenant_rule)
        except NeedsCaseError:
            return


def _of_data(estate: Estate, call: _Call) -> Iterator[_Change]:
    tenant = estate.tenants.get(call.tenant)
    if not isinstance(tenant, dict):
        return
    if tenant.get("status") != "active":
        yield _Change(
            "the tenant's status is active", None, _with_tenant(call.tenant, status="active")
        )
    allowed = _list(tenant.get("allowlist"))
    if call.tool in estate.tools and call.tool not in allowed:
        yield _Change(
            f"the tenant's allowlist names {call.tool}",
            None,
            _with_tenant(call.tenant, allowlist=[*allowed, call.tool]),
        )
    held = _list(tenant.get("scopes"))
    for scope in _list(_object(estate.tools.get(call.tool)).get("scopes")):
        if scope not in held:
            yield _Change(
                f"the tenant holds the scope {scope}",
                None,
                _with_tenant(call.tenant, scopes=[*held, scope]),
            )
    roles = _object(tenant.get("roles"))
    for name in call.roles:
        role = _object(roles.get(name)) if isinstance(name, str) else {}
        tools = _list(role.get("tools"))
        if isinstance(name, str) and call.tool in estate.tools and call.tool not in tools:
            changed: JsonObject = {**role, "tools": [*tools, call.tool]}
            yield _Change(
                f"the tenant's role {name} names the tool {call.tool}",
                None,
                _with_tenant(call.tenant, roles={**roles, name: changed}),
            )


def _adding(key: str, value: str) -> Callable[[JsonObject], JsonObject]:
    def change(document: JsonObject) -> JsonObject:
        subject = _object(document.get("subject"))
        properties = _object(subject.get("properties"))
        more: JsonObject = {**properties, key: [*_list(properties.get(key)), value]}
        return {**document, "subject": {**subject, "properties": more}}

    return change


def _with_argument(name: str, value: JsonValue) -> Callable[[JsonObject], JsonObject]:
    return lambda document: _with_arguments(document, {**_arguments(document), name: value})


def _without_argument(name: str) -> Callable[[JsonObject], JsonObject]:
    return lambda document: _with_arguments(
        document, {key: value for key, value in _arguments(document).items() if key != name}
    )


def _arguments(document: JsonObject) -> JsonObject:
    return _Call(document).arguments


def _with_arguments(document: JsonObject, arguments: JsonObject) -> JsonObject:
    action = _object(document.get("action"))
    properties = _object(action.get("properties"))
    changed: JsonObject = {**action, "properties": {**properties, "arguments": arguments}}
    return {**document, "action": changed}


def _with_tenant(tenant: str, **more: JsonValue) -> Callable[[JsonObject], JsonObject]:
    def change(data: JsonObject) -> JsonObject:
        tenants = _object(data.get("tenants"))
        changed: JsonObject = {**_object(tenants.get(tenant)), **more}
        return {**data, "tenants": {**tenants, tenant: changed}}

    return change


def _object(value: JsonValue) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _text(value: JsonValue) -> str:
    return value if isinstance(value, str) else ""
