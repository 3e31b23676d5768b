"""Names of tools, roles, scopes and budgets that nothing defines, or nothing uses.

By the conventions of the starter bundle: tools are the keys of ``data.tools``, tenants
those of ``data.tenants``, and workloads those of ``data.workloads``. Where a bundle has neither there is nothing to find.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from pdp.canonical import JsonObject, JsonValue
from pdp.policy.archive import Files
from pdp.policy.authoring.findings import DataPath, DataPlaces, Finding, Severity
from pdp.policy.part import is_test

_STATUSES: Final = ("active", "suspended")
_KEYS_FOR_READERS: Final = frozenset({"description"})
_KEY_READ: Final = re.compile(r'\.(\w+)|"([^"\n\\]*)"', re.ASCII)
"""How Rego reads a key of an object: tenant.status, or object.get(tenant, "status", ...)."""

_Slip = tuple[DataPath, str]


def check_names(data: JsonObject, rego: Mapping[str, str], files: Files) -> list[Finding]:
    """What the data names and nothing defines, as warnings, in the order of the data."""
    places = DataPlaces(files)
    findings = []
    for path, message in _Names(data, rego).slips():
        file, row = places.find(path)
        findings.append(Finding(severity=Severity.WARNING, message=message, file=file, row=row))
    return findings


class _Names:
    def __init__(self, data: JsonObject, rego: Mapping[str, str]) -> None:
        self._tools = _object(data.get("tools"))
        self._tenants = _object(data.get("tenants"))
        self._workloads = _object(data.get("workloads"))
        rules = [text for name, text in rego.items() if not is_test(name)]
        self._keys_read = {
            step or quoted for text in rules for step, quoted in _KEY_READ.findall(text)
        }

    def slips(self) -> Iterator[_Slip]:
        """Where something is wrong, and what."""
        if not self._tools or not self._tenants:
            return
        for tool, definition in self._tools.items():
            yield from self._slips_of_tool(tool, definition)
        for tenant, told in self._tenants.items():
            if isinstance(told, dict):
                yield from self._slips_of_tenant(tenant, told)
            else:
                yield ("tenants", tenant), f"tenant {tenant} is no object: it counts as unknown"
        for workload, means in self._workloads.items():
            yield from self._slips_of_workload(workload, means)

    def _slips_of_tool(self, tool: str, definition: JsonValue) -> Iterator[_Slip]:
        path: DataPath = ("tools", tool)
        if not isinstance(definition, dict):
            yield path, f"tool {tool} is no object: it counts as unknown"
            return
        yield from self._unread_keys(path, f"tool {tool}", definition)
        yield from self._slips_of_rules((*path, "arguments"), f"tool {tool}", definition)
        tenants = list(map(_object, self._tenants.values()))
        if not any(tool in _texts(tenant.get("allowlist")) for tenant in tenants):
            yield path, f"tool {tool} is on no tenant's allowlist"
        granted = {scope for tenant in tenants for scope in _texts(tenant.get("scopes"))}
        for index, scope in enumerate(_list(definition.get("scopes"))):
            if scope not in granted:
                yield (
                    (*path, "scopes", index),
                    f"tool {tool} needs the scope {scope}, which no tenant has",
                )

    def _slips_of_tenant(self, tenant: str, told: JsonObject) -> Iterator[_Slip]:
        path: DataPath = ("tenants", tenant)
        name = f"tenant {tenant}"
        yield from self._unread_keys(path, name, told)
        status = told.get("status")
        if status not in _STATUSES:
            yield (
                (*path, "status") if "status" in told else path,
                f"{name} is suspended: its status is none of {', '.join(_STATUSES)}",
            )
        allowlist = _texts(told.get("allowlist"))
        yield from self._slips_of_allowlist((*path, "allowlist"), name, told)
        yield from self._slips_of_scopes((*path, "scopes"), name, told)
        for index, workload in enumerate(_list(told.get("workloads"))):
            # Where data.workloads lists none, a tenant may list whom it will.
            if self._workloads and workload not in self._workloads:
                yield (
                    (*path, "workloads", index),
                    f"{name} lets {workload} ask, which is not in data.workloads",
                )
        for role, means in _object(told.get("roles")).items():
            yield from self._slips_of_role((*path, "roles", role), name, role, means, told)
        for tool, narrowed in _object(told.get("tools")).items():
            own: DataPath = (*path, "tools", tool)
            if tool not in self._tools:
                yield own, f"{name} has rules for {tool}, which is not in data.tools"
                continue
            if tool not in allowlist:
                yield own, f"{name} has rules for {tool}, which is not on its allowlist"
            rules = _object(narrowed)
            known = _object(_object(self._tools[tool]).get("arguments"))
            for argument in _object(rules.get("arguments")):
                if argument not in known:
                    yield (
                        (*own, "arguments", argument),
                        f"{name} has a rule for the argument {argument}, which {tool} does not take",
                    )
            yield from self._slips_of_rules((*own, "arguments"), f"{tool} of {name}", rules)

    def _slips_of_workload(self, workload: str, means: JsonValue) -> Iterator[_Slip]:
        path: DataPath = ("workloads", workload)
        name = f"workload {workload}"
        if not isinstance(means, dict):
            yield path, f"{name} is no object: it counts as unknown"
            return
        yield from self._unread_keys(path, name, means)
        tools = _list(means.get("tools"))
        if not tools:
            yield path, f"{name} may use no tool"
        if "tenant" in means and "tenants" not in means:
            # Rules read a tenant of other objects, so _unread_keys does not see the slip.
            yield (*path, "tenant"), f"{name} has tenant, and no tenants: it may ask for all"
        for index, tool in enumerate(tools):
            if not isinstance(tool, str) or tool not in self._tools:
                yield (
                    (*path, "tools", index),
                    f"{name} may use {tool}, which is not in data.tools",
                )
        for index, tenant in enumerate(_list(means.get("tenants"))):
            if not isinstance(tenant, str) or tenant not in self._tenants:
                yield (
                    (*path, "tenants", index),
                    f"{name} may ask for {tenant}, which is not in data.tenants",
                )

    def _slips_of_rules(self, path: DataPath, name: str, definition: JsonObject) -> Iterator[_Slip]:
        for argument, rule in _object(definition.get("arguments")).items():
            yield from self._unread_keys(
                (*path, argument), f"the argument {argument} of {name}", _object(rule)
            )

    def _slips_of_allowlist(self, path: DataPath, name: str, told: JsonObject) -> Iterator[_Slip]:
        roles = list(map(_object, _object(told.get("roles")).values()))
        in_roles = {tool for role in roles for tool in _texts(role.get("tools"))}
        scopes = _texts(told.get("scopes"))
        limited = _limited(told)
        for index, tool in enumerate(_list(told.get("allowlist"))):
            here = (*path, index)
            if not isinstance(tool, str) or tool not in self._tools:
                yield here, f"{name} allows {tool}, which is not in data.tools"
                continue
            if tool not in in_roles:
                yield here, f"{name} allows {tool}, which none of its roles may use"
            definition = _object(self._tools[tool])
            for scope in _list(definition.get("scopes")):
                if scope not in scopes:
                    yield here, f"{name} allows {tool}, and lacks its scope {scope}"
            for charge in map(_object, _list(definition.get("charge"))):
                budget, unit = charge.get("budget"), charge.get("unit")
                if (budget, unit) not in limited:
                    yield (
                        here,
                        f"{name} allows {tool}, whose charge has no limit ({unit} of {budget})",
                    )

    def _slips_of_scopes(self, path: DataPath, name: str, told: JsonObject) -> Iterator[_Slip]:
        needed = {
            scope
            for definition in map(_object, self._tools.values())
            for scope in _texts(definition.get("scopes"))
        }
        for index, scope in enumerate(_list(told.get("scopes"))):
            if scope not in needed:
                yield (*path, index), f"{name} has the scope {scope}, which no tool needs"

    def _slips_of_role(
        self, path: DataPath, name: str, role: str, means: JsonValue, told: JsonObject
    ) -> Iterator[_Slip]:
        meaning = _object(means)
        yield from self._unread_keys(path, f"role {role} of {name}", meaning)
        tools, budgets = _list(meaning.get("tools")), _object(meaning.get("budgets"))
        if not tools and not budgets:
            yield path, f"role {role} of {name} may use no tool and charge no budget"
        allowlist = _texts(told.get("allowlist"))
        for index, tool in enumerate(tools):
            here = (*path, "tools", index)
            if not isinstance(tool, str) or tool not in self._tools:
                yield here, f"role {role} of {name} may use {tool}, which is not in data.tools"
            elif tool not in allowlist:
                yield here, f"role {role} of {name} may use {tool}, which is not on its allowlist"
        limited = _limited(told)
        for budget, units in budgets.items():
            for unit in _texts(units):
                if (budget, unit) not in limited:
                    yield (
                        (*path, "budgets", budget),
                        f"role {role} of {name} may charge what has no limit ({unit} of {budget})",
                    )

    def _unread_keys(self, path: DataPath, name: str, told: JsonObject) -> Iterator[_Slip]:
        """A key that the Rego does not even mention is most likely misspelt."""
        for key in told:
            if key not in _KEYS_FOR_READERS and key not in self._keys_read:
                yield (*path, key), f"{name} has {key}, which no rule reads"


def _limited(told: JsonObject) -> set[tuple[JsonValue, JsonValue]]:
    """Budget and unit of each limit that a tenant has."""
    limits = list(map(_object, _list(told.get("limits"))))
    return {
        (limit["budget"], limit["unit"])
        for limit in limits
        if isinstance(limit.get("budget"), str) and isinstance(limit.get("unit"), str)
    }


def _object(value: JsonValue) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _list(value: JsonValue) -> list[JsonValue]:
    return value if isinstance(value, list) else []


def _texts(value: JsonValue) -> frozenset[str]:
    return frozenset(item for item in _list(value) if isinstance(item, str))
