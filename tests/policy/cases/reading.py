"""Read the golden cases, and make the policy that the erring ones are about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from pdp.canonical import JsonObject, JsonValue
from tests.policy.cases.walk import Case

CASES: Final = Path(__file__).resolve().parent
ALL_ROLES: Final = ("support_agent", "analyst")
ALL_SCOPES: Final = ("orders:read", "orders:write", "mail:send", "reports:generate")
OPERATIONS: Final = ("charge", "reserve")
CURRENT_PRICES: Final = "2026-11-01"
SOMEONE: Final[Mapping[str, Any]] = {"tenant": "tenant_acme", "roles": ["r"], "scopes": ["a"]}
ALLOWED: Final[JsonObject] = {"allow": True, "reason_code": "ok"}
CHARGED: Final = (
    '{"allow": true, "reason_code": "ok", "charge": [{"budget": "b", "unit": "u", "amount": 1}]}'
)


def read(name: str) -> Any:
    return yaml.safe_load((CASES / name).read_text(encoding="utf-8"))


def refusal(reason_code: str) -> JsonObject:
    return {"allow": False, "reason_code": reason_code}


def starter_cases() -> list[Case]:
    """Those that are about the policy that the product ships."""
    return [*_authz_cases(), *_argument_cases(), *_budget_cases()]


def workload_data() -> tuple[JsonObject, JsonObject]:
    """data.workloads, and the workloads that tenants list, of the workload_cases()."""
    read_in = read("workloads.yaml")
    return read_in["workloads"], read_in["tenant_workloads"]


def workload_cases() -> Iterator[Case]:
    """Those that are about the same policy with other data."""
    for row in read("workloads.yaml")["cases"]:
        refused = row.get("refused")
        yield Case(
            name=row["name"],
            token=row["token"],
            workload=row.get("workload", ""),
            call=row.get("call"),
            spend=row.get("spend"),
            answer=refusal(refused) if refused else None,
            reason_code=refused or "ok",
        )


def _authz_cases() -> Iterator[Case]:
    for row in read("authz_decision.yaml"):
        unheard = row.get("unidentified")
        refused = row.get("refused")
        yield Case(
            name=row["name"],
            token=row["token"],
            call=row["call"],
            answer=None if unheard else row.get("decision") or refusal(refused),
            reason_code=unheard or refused or "ok",
        )


def _argument_cases() -> Iterator[Case]:
    for row in read("arguments.yaml"):
        reason_code = "ok" if row["allow"] else "argument_not_allowed"
        yield Case(
            name=row["name"],
            token={"tenant": row["tenant"], "roles": ALL_ROLES, "scopes": ALL_SCOPES},
            call={"tool": row["tool"], "arguments": row["arguments"]},
            answer=None if row["allow"] else refusal(reason_code),
            reason_code=reason_code,
        )


def _budget_cases() -> Iterator[Case]:
    for row in read("budget.yaml"):
        limited = row.get("limited_by")
        refused = row.get("refused")
        yield Case(
            name=row["name"],
            token=row["token"],
            spend=row["spend"],
            answer=refusal(refused) if refused else _priced(row.get("priced")),
            reason_code=refused
            or (row.get("reason_code", "tenant_budget_exceeded") if limited else "ok"),
            limit_id=limited,
            detail=row.get("detail", {}),
        )


def _priced(charges: list[Any] | None) -> JsonObject:
    if charges is None:
        return ALLOWED
    return price_answer([tuple(charge) for charge in charges], CURRENT_PRICES)


def price_answer(charges: list[tuple[str, str, int]], version: str) -> JsonObject:
    """What the policy says of usage that costs so much."""
    return {
        **ALLOWED,
        "charges": [
            {"budget": budget, "unit": unit, "amount": amount} for budget, unit, amount in charges
        ],
        "price_version": version,
    }


class Erring:
    """What goes wrong while a policy runs: a bundle of small policies, one to a case."""

    def __init__(self) -> None:
        self._read = read("errors.yaml")
        self.files: dict[str, str | JsonObject] = {}
        self.cases: list[Case] = []
        self.endless: list[Case] = []
        self.differing: list[tuple[Case, Mapping[str, JsonValue]]] = []
        """Cases that the engines are known to answer differently, each with what each
        engine answers."""
        self._authz: list[str] = []
        self._budget: list[str] = ['decision := {"allow": false, "reason_code": "policy_denied"}']
        self._make()

    def _make(self) -> None:
        for expression in self._read["undefined"]:
            self._add(expression, _when(expression), reason_code="policy_denied")
            self._add(f"not {expression}", _unless(expression))
        for expression in self._read["error"]:
            self._add(expression, _when(expression), reason_code="policy_error")
            self._add(f"not {expression}", _unless(expression), reason_code="policy_error")
        for row in self._read["answer"]:
            self._add(row["value"], f"decision := {row['value']}", reason_code=row["reason_code"])
        for row in self._read["rules"]:
            self._add(row["name"], row["rego"], reason_code=row["reason_code"])
        for row in self._read["limits"]:
            case = self._add(
                row["name"],
                f"decision := {CHARGED}\n{row['rego']}",
                reason_code=row["reason_code"],
                limit_id=row.get("limit_id"),
            )
            assert case.call is not None
            tool = case.call["tool"]
            self._budget.append(f'limits := data.cases.{tool}.limits if input.tool == "{tool}"')
        for row in self._read["endless"]:
            self.endless.append(self._add(row["name"], row["rego"], reason_code=row["reason_code"]))
            self.cases.pop()
        for row in self._read["differing"]:
            case = self._add(row["value"], f"decision := {row['value']}")
            self.cases.pop()
            self.differing.append((case, row))
        self.files["authz.rego"] = "\n".join(["package pdp.authz", *self._authz])
        self.files["budget.rego"] = "\n".join(["package pdp.budget", *self._budget])

    def _add(
        self, name: str, rego: str, *, reason_code: str = "ok", limit_id: str | None = None
    ) -> Case:
        tool = f"case_{len(self.files)}"
        self._authz.append(
            f'decision := data.cases.{tool}.decision if input.action.name == "{tool}"'
        )
        self.files[f"cases/{tool}.rego"] = "\n".join(
            [f"package cases.{tool}", "import input.action.properties.arguments", rego, CONFLICTS]
        )
        case = Case(
            name=name,
            token=SOMEONE,
            call={"tool": tool, "arguments": self._read["arguments"]},
            reason_code=reason_code,
            limit_id=limit_id,
        )
        self.cases.append(case)
        return case


def _when(expression: str) -> str:
    return f"""
default decision := {{"allow": false, "reason_code": "policy_denied"}}
decision := {{"allow": true, "reason_code": "ok"}} if {{ {expression} }}
"""


def _unless(expression: str) -> str:
    return f"""
default decision := {{"allow": false, "reason_code": "policy_denied"}}
decision := {{"allow": true, "reason_code": "ok"}} if {{ not holds }}
holds if {{ {expression} }}
"""


CONFLICTS: Final = """
conflicting := 1 if arguments.one
conflicting := 2 if arguments.truth
conflicting_function(x) := x
conflicting_function(x) := x + 1
conflicting_only_when_asked(x) := true if x
conflicting_only_when_asked(x) := false if x
conflicting_object[key] := value if { some value in arguments.list; key := "a" }
"""
