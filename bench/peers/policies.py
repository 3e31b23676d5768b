"""The one policy of :mod:`bench.peers.question`, as each peer's users would write it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from bench.peers.question import (
    ALLOWLIST,
    ORDER_ID,
    RESTRICTED,
    ROLES,
    SCOPE_OF,
    SCOPES,
    STATUSES,
    TENANTS,
    tenant_name,
)


def tenants() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each tenant, and its allowlist."""
    for number in range(TENANTS):
        yield tenant_name(number), ALLOWLIST
    yield RESTRICTED, ("orders.read",)


def write_cerbos(folder: Path) -> None:
    """One resource policy that holds what each tenant allows as a constant. A policy scoped to
    each tenant, the other way that Cerbos' pages show, is slower there and takes twice the
    memory. It is written as JSON, which is YAML that parses fast.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {
        "orders.read": [f'R.attr.order_id.matches("^{ORDER_ID}$")'],
        "orders.update": [
            f'R.attr.order_id.matches("^{ORDER_ID}$")',
            f"R.attr.status in {json.dumps(STATUSES)}",
        ],
    }
    rules = []
    for tool in ALLOWLIST:
        conditions = [
            "P.attr.tenant in C.tenants",
            f'"{tool}" in C.tenants[P.attr.tenant].allowlist',
            f'"{SCOPE_OF[tool]}" in P.attr.scopes',
            f'"{SCOPE_OF[tool]}" in C.tenants[P.attr.tenant].scopes',
            *arguments[tool],
        ]
        rules.append(
            {
                "actions": [tool],
                "effect": "EFFECT_ALLOW",
                "roles": [role for role, tools in ROLES.items() if tool in tools],
                "condition": {
                    "match": {"all": {"of": [{"expr": condition} for condition in conditions]}}
                },
            }
        )
    known = {name: {"scopes": SCOPES, "allowlist": allowlist} for name, allowlist in tenants()}
    policy = {
        "resource": "orders",
        "version": "default",
        "constants": {"local": {"tenants": known}},
        "rules": rules,
    }
    (folder / "orders.json").write_text(
        json.dumps({"apiVersion": "api.cerbos.dev/v1", "resourcePolicy": policy}), encoding="utf-8"
    )


REGO: Final = """\
package authz

default allow := false

allow if {
	tenant := data.tenants[input.tenant]
	input.tool in tenant.allowlist
	input.tool in tenant.roles[input.role]
	scope := data.tools[input.tool].scope
	scope in input.scopes
	scope in tenant.scopes
	every name, value in input.arguments {
		kept(value, data.tools[input.tool].arguments[name])
	}
}

kept(value, rule) if regex.match(rule.pattern, value)

kept(value, rule) if value in rule.enum
"""


def write_opa(folder: Path) -> None:
    """Rego as short as it gets, with the tenants in data."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "authz.rego").write_text(REGO, encoding="utf-8")
    order_id = {"pattern": f"^{ORDER_ID}$"}
    data = {
        "tools": {
            "orders.read": {"scope": SCOPE_OF["orders.read"], "arguments": {"order_id": order_id}},
            "orders.update": {
                "scope": SCOPE_OF["orders.update"],
                "arguments": {"order_id": order_id, "status": {"enum": list(STATUSES)}},
            },
        },
        "tenants": {
            name: {
                "scopes": list(SCOPES),
                "allowlist": list(allowlist),
                "roles": {role: list(tools) for role, tools in ROLES.items()},
            }
            for name, allowlist in tenants()
        },
    }
    (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")


def agt_rules(allowlist: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rules of one tenant for the Agent Governance Toolkit. A rule of it has one
    condition, the first that matches decides, and fields are compared with constants: so
    refusals come first, and the caller joins tool with role and with scope.
    """
    may = [f"{role}/{tool}" for role, tools in ROLES.items() for tool in tools]
    refusals = (
        ("not-on-the-allowlist", "tool_name", "not_in", list(allowlist)),
        ("not-for-the-role", "role_tool", "not_in", may),
        ("no-such-order", "order_id", "matches", f"^(?!{ORDER_ID}$)"),
        ("no-such-status", "status", "not_in", list(STATUSES)),
    )
    rules = [
        {
            "name": name,
            "condition": {"field": field, "operator": operator, "value": value},
            "action": "deny",
            "priority": 100 - number,
        }
        for number, (name, field, operator, value) in enumerate(refusals)
    ]
    rules += [
        {
            "name": f"allow-{tool}",
            "condition": {
                "field": "tool_scopes",
                "operator": "contains",
                "value": f"{tool}/{SCOPE_OF[tool]}",
            },
            "action": "allow",
            "priority": 10,
        }
        for tool in allowlist
    ]
    return rules
