"""A small policy, and data for it, of which the tests change a part at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pdp.policy.bundle import Bundle

DATA: dict[str, Any] = {
    "workloads": {},
    "tenants": {
        "acme": {
            "status": "active",
            "scopes": ["notes:read", "notes:write"],
            "allowlist": ["notes.read", "notes.write"],
            "roles": {
                "reader": {"tools": ["notes.read"]},
                "writer": {"tools": ["notes.read", "notes.write"]},
            },
            "limits": [
                {
                    "id": "day",
                    "budget": "tools",
                    "unit": "calls",
                    "window": "day",
                    "limit": 10,
                    "scope": "tenant",
                }
            ],
        },
        "globex": {
            "status": "active",
            "scopes": ["notes:read", "notes:write"],
            "allowlist": ["notes.read"],
            "roles": {"reader": {"tools": ["notes.read"]}},
            "limits": [],
        },
    },
    "tools": {
        "notes.read": {"scopes": ["notes:read"], "arguments": {"id": {"type": "string"}}},
        "notes.write": {
            "scopes": ["notes:write"],
            "arguments": {
                "kind": {"type": "string", "enum": ["memo", "task"]},
                "pages": {"type": "integer", "minimum": 1, "maximum": 5, "required": False},
            },
            "charge": [{"budget": "tools", "unit": "calls", "amount": 1}],
        },
    },
}


def changed(bundle: Bundle, change: Callable[[Any], object] = lambda data: None) -> Bundle:
    """The bundle with the small data, of which ``change`` may change a copy."""
    data = copy.deepcopy(DATA)
    change(data)
    return replace(bundle, data=json.dumps(data).encode())


def no_progress(_done: int, _total: int) -> None:
    pass


LEAKY = {
    "pdp/authz/authz.rego": """package pdp.authz

default decision := {"allow": false, "reason_code": "policy_denied"}

decision := {"allow": true, "reason_code": "ok", "scopes": []} if allowed

allowed if {
	some role in input.subject.properties.roles
	input.action.name in data.tenants[input.subject.properties.tenant].roles[role].tools
}

# The leak: whoever any tenant calls a partner may read.
allowed if {
	input.action.name == "notes.read"
	some other in data.tenants
	input.subject.properties.tenant in other.partners
}
""",
    "pdp/budget/budget.rego": """package pdp.budget

default limits := []

limits := data.tenants[input.subject.properties.tenant].limits

decision := {"allow": false, "reason_code": "budget_not_allowed"}
""",
    "data.json": {
        "tenants": {
            "acme": {"roles": {"reader": {"tools": ["notes.write"]}}, "limits": []},
            "globex": {"roles": {"reader": {"tools": []}}, "limits": [], "partners": ["acme"]},
            "initech": {"roles": {"reader": {"tools": []}}, "limits": []},
        },
        "tools": {
            "notes.read": {"arguments": {}},
            "notes.write": {"arguments": {}},
        },
    },
}
"""A policy that lets one tenant's data decide over another."""
