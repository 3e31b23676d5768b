"""The questions of a bundle: every tenant x role x tool that its data knows.

Conventions, those of the starter bundle: tenants are the keys of ``data.tenants``,
roles those of ``data.tenants[tenant].roles``, tools those of ``data.tools``, workloads
those of ``data.workloads`` and ``data.tenants[tenant].workloads``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Final

from pdp.canonical import JsonObject, JsonValue
from pdp.identity.subject import Subject
from pdp.policy.analysis.arguments import NeedsCaseError, edge_arguments, made_arguments
from pdp.policy.analysis.cases import Case, Cases
from pdp.policy.question import authorize_input

ACTOR: Final = "analysis"
"""The actor of every question that is made here."""
REQUEST_ID: Final = "analysis"
NO_ROLE: Final = ""
"""The role of a caller who has none; asked about where a tenant names no role."""
MANY_ROLES: Final = 20
MANY_SCOPES: Final = 100
MADE: Final = "made"
"""The name of the case that is made from the tool's rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Only:
    """Names to which the questions are narrowed; none: all of them."""

    tenants: frozenset[str] = frozenset()
    roles: frozenset[str] = frozenset()
    tools: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Question:
    """May an actor of this tenant with this role call this tool so?"""

    tenant: str
    role: str
    tool: str
    case: str
    scopes: tuple[str, ...]
    arguments: JsonObject = field(repr=False)
    resource: JsonObject | None = field(repr=False)
    context: JsonObject = field(repr=False)
    time: float
    workload: str = ""
    """Which one asks: one that may, where the data lists any."""

    def document(self) -> JsonObject:
        """The input, just as the sidecar would ask."""
        return authorize_input(
            Subject(
                tenant=self.tenant,
                actor=ACTOR,
                roles=(self.role,) if self.role else (),
                scopes=self.scopes,
                workload=self.workload,
            ),
            tool=self.tool,
            arguments=self.arguments,
            resource=self.resource,
            time=self.time,
            request_id=REQUEST_ID,
            context=self.context,
        )


class Estate:
    """What a bundle's data names."""

    def __init__(self, data: bytes) -> None:
        self.document: JsonObject = json.loads(data)
        self.tenants = _object(self.document.get("tenants"))
        self.tools = _object(self.document.get("tools"))

    def roles(self, tenant: str) -> tuple[str, ...]:
        """The roles that a tenant defines, in the data's order."""
        return tuple(_object(_object(self.tenants.get(tenant)).get("roles")))

    def all_roles(self) -> set[tuple[str, str]]:
        """Every tenant with each of its roles."""
        return {(tenant, role) for tenant in self.tenants for role in self.roles(tenant)}

    def scopes(self, tenant: str) -> tuple[str, ...]:
        """The scopes that a tenant holds."""
        return tuple(dict.fromkeys(_names(_object(self.tenants.get(tenant)).get("scopes"))))

    def budgets(self, tenant: str, role: str) -> list[tuple[str, str]]:
        """Each (budget, unit) that the tenant's limits or the role name."""
        limits = _object(self.tenants.get(tenant)).get("limits")
        found = [
            (_object(limit).get("budget"), _object(limit).get("unit"))
            for limit in (limits if isinstance(limits, list) else [])
        ]
        roles = _object(_object(self.tenants.get(tenant)).get("roles"))
        budgets = _object(_object(roles.get(role)).get("budgets"))
        for budget, units in budgets.items():
            found += [(budget, unit) for unit in (units if isinstance(units, list) else [])]
        return [
            (budget, unit)
            for budget, unit in dict.fromkeys(found)
            if isinstance(budget, str) and isinstance(unit, str)
        ]

    def workload_for(self, tenant: str, tool: str) -> str:
        """The first workload that may use the tool for the tenant; empty if none is listed."""
        listed = _object(self.document.get("workloads"))
        own = _object(self.tenants.get(tenant)).get("workloads", [*listed])
        for name in _names(own):
            workload = _object(listed.get(name))
            if not listed or (
                tool in _names(workload.get("tools"))
                and tenant in _names(workload.get("tenants", [tenant]))
            ):
                return name
        return ""

    def tool_rules(self, tool: str) -> JsonObject:
        """The rules for a tool's arguments."""
        return _object(_object(self.tools.get(tool)).get("arguments"))

    def tenant_rules(self, tenant: str, tool: str) -> JsonObject:
        """What a tenant adds to them."""
        tools = _object(_object(self.tenants.get(tenant)).get("tools"))
        return _object(_object(tools.get(tool)).get("arguments"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that is most like an unknown one, in brackets; empty if none is."""
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


class Questionnaire:
    """Makes the questions about one or more versions of a bundle's data.

    With several versions a question is about whatever any of them names, and a token
    holds the scopes of all. ``edges`` adds, for a tool whose rules differ between them,
    arguments at the edges of its rules; ``all_edges`` does for every tool. ``widely`` asks
    for roles and with scopes that only other tenants have, too.
    """

    def __init__(
        self,
        estates: Sequence[Estate],
        cases: Cases,
        only: Only,
        *,
        edges: bool = False,
        all_edges: bool = False,
        widely: bool = False,
    ) -> None:
        self._estates = estates
        self._cases = cases
        self._only = only
        self._edges = edges
        self._all_edges = all_edges
        self._others_roles: list[str] = []
        self._others_scopes: list[str] = []
        if widely:
            self._others_roles = sorted({r for e in estates for _, r in e.all_roles()})
            self._others_scopes = sorted(
                {s for e in estates for t in e.tenants for s in e.scopes(t)}
            )

    @property
    def time(self) -> float:
        """The time of every question, in Unix seconds."""
        return self._cases.time

    def tenants(self) -> list[str]:
        """The tenants that are asked about, sorted."""
        return _wanted(
            sorted({t for estate in self._estates for t in estate.tenants}), self._only.tenants
        )

    def tools(self) -> list[str]:
        """The tools that are asked about, sorted: those of the data and of the cases."""
        names = {tool for estate in self._estates for tool in estate.tools} | {*self._cases.tools}
        return _wanted(sorted(names), self._only.tools)

    def roles(self, tenant: str) -> list[str]:
        """The roles that are asked about for one tenant."""
        named = self._cases.roles
        if named is None:
            own = dict.fromkeys(r for estate in self._estates for r in estate.roles(tenant))
            named = _and_others(own, self._others_roles, most=MANY_ROLES)
        return _wanted(named or (NO_ROLE,), self._only.roles)

    def scopes(self, tenant: str) -> tuple[str, ...]:
        """The scopes that a token of the tenant holds."""
        if self._cases.scopes is not None:
            return self._cases.scopes
        own = dict.fromkeys(s for estate in self._estates for s in estate.scopes(tenant))
        return _and_others(own, self._others_scopes, most=MANY_SCOPES)

    def without_case(self) -> dict[str, str]:
        """The tools that can be asked about only with a case, and why: no tenant's rules
        let arguments be made.
        """
        reasons = {}
        for tool in self.tools():
            if tool not in self._cases.tools:
                reason = self._why_not_made(tool)
                if reason is not None:
                    reasons[tool] = reason
        return reasons

    def unknown(self) -> list[str]:
        """What is asked for and neither the data nor the cases know, in words."""
        roles = {role for estate in self._estates for _, role in estate.all_roles()}
        roles |= {*(self._cases.roles or ())}
        tenants = {tenant for estate in self._estates for tenant in estate.tenants}
        tools = {tool for estate in self._estates for tool in estate.tools}
        tools |= {*self._cases.tools}
        return [
            f"{kind} {name}{did_you_mean(name, known)}"
            for kind, wanted, known in (
                ("tenant", self._only.tenants, tenants),
                ("role", self._only.roles, roles),
                ("tool", self._only.tools, tools),
            )
            for name in sorted(wanted.difference(known))
        ]

    def cases_without_tool(self) -> dict[str, str]:
        """The tools that only the cases name, each with the like of it in the data, in words.
        None where the data name no tools, as then only the Rego knows them.
        """
        known = {tool for estate in self._estates for tool in estate.tools}
        if not known:
            return {}
        return {tool: did_you_mean(tool, known) for tool in self._cases.tools if tool not in known}

    def _why_not_made(self, tool: str) -> str | None:
        reason = None
        for estate in self._estates_with(tool):
            for tenant in estate.tenants:
                try:
                    made_arguments(estate.tool_rules(tool), estate.tenant_rules(tenant, tool))
                except NeedsCaseError as error:
                    reason = str(error)
                else:
                    return None
        return reason

    def of(self, tenant: str) -> Iterator[Question]:
        """Every question about one tenant, the same in the same order every time."""
        scopes, roles = self.scopes(tenant), self.roles(tenant)
        for tool in self.tools():
            by = [estate.workload_for(tenant, tool) for estate in self._estates]
            workload = next(filter(None, by), "")
            for case in self._cases_of(tenant, tool):
                for role in roles:
                    yield Question(
                        tenant=tenant,
                        role=role,
                        tool=tool,
                        case=case.name,
                        scopes=scopes,
                        arguments=case.arguments,
                        resource=case.resource,
                        context=case.context,
                        time=self._cases.time,
                        workload=workload,
                    )

    def _cases_of(self, tenant: str, tool: str) -> list[Case]:
        cases = list(self._cases.tools.get(tool, ())) or self._made(tenant, tool)
        if not self._edges or not (self._all_edges or self._rules_differ(tenant, tool)):
            return cases
        found = {_content(case): case for case in cases}
        for case in cases:
            for estate in self._estates:
                edges = edge_arguments(
                    case.arguments, estate.tool_rules(tool), estate.tenant_rules(tenant, tool)
                )
                for name, arguments in edges:
                    edge = Case(
                        name=f"{case.name}, {name}",
                        arguments=arguments,
                        resource=case.resource,
                        context=case.context,
                    )
                    found.setdefault(_content(edge), edge)
        return list(found.values())

    def _made(self, tenant: str, tool: str) -> list[Case]:
        found: dict[str, Case] = {}
        for estate in self._estates_with(tool):
            try:
                arguments = made_arguments(
                    estate.tool_rules(tool), estate.tenant_rules(tenant, tool)
                )
            except NeedsCaseError:
                # Asked without: who may call the tool at all still shows.
                arguments = {}
            name = MADE if not found else f"{MADE} {len(found) + 1}"
            case = Case(name=name, arguments=arguments)
            found.setdefault(_content(case), case)
        return list(found.values())

    def _estates_with(self, tool: str) -> list[Estate]:
        return [estate for estate in self._estates if tool in estate.tools]

    def _rules_differ(self, tenant: str, tool: str) -> bool:
        first, *others = (
            (estate.tools.get(tool), estate.tenant_rules(tenant, tool)) for estate in self._estates
        )
        return any(other != first for other in others)


def _content(case: Case) -> str:
    return json.dumps([case.arguments, case.resource, case.context], sort_keys=True)


def _and_others(own: Iterable[str], others: Iterable[str], *, most: int) -> tuple[str, ...]:
    """All of the own names, and others until there are so many."""
    named = list(own)
    more = [name for name in others if name not in named]
    return (*named, *more[: max(0, most - len(named))])


def _wanted(names: Iterable[str], only: frozenset[str]) -> list[str]:
    return [name for name in names if not only or name in only]


def _object(value: JsonValue) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _names(value: JsonValue) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
