"""Bundles with any number of tenants: the rules that the product ships, and data of the
size that a tenant usually has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pdp.canonical import JsonObject
from pdp.policy.archive import pack, read_archive

SHIPPED: Final = Path(__file__).parents[2] / "policies" / "bundle.tar.gz"
AMPLE: Final = 1_000_000_000
"""A limit that no run comes near to."""
FREE_TOOL, CHARGED_TOOL = "orders.read", "orders.update"
"""One that the shipped policy lets be called for nothing, and one that costs a unit."""
BUDGET, UNIT = "tools", "calls"
ROLE: Final = "support_agent"
SCOPES: Final = ("orders:read", "orders:write")


def tenant_id(number: int) -> str:
    return f"tenant_{number:06}"


def bundle_of(tenants: int, *, limits: Mapping[int, int] | None = None, release: int = 1) -> bytes:
    """A .tar.gz for so many tenants. ``limits`` says how many units a tenant may ever spend,
    where that is not ample.
    """
    files = read_archive(SHIPPED.read_bytes(), place=str(SHIPPED))
    data = json.loads(files["data.json"])
    few = limits or {}
    draw = random.Random(1)  # noqa: S311 - the same each time
    data["tenants"] = {
        tenant_id(number): _tenant(few.get(number, AMPLE), draw) for number in range(tenants)
    }
    manifest = json.loads(files[".manifest"])
    manifest["revision"] = f"scale-{release}"
    for name, content in (("data.json", data), (".manifest", manifest)):
        files[name] = json.dumps(content).encode()
    return pack(files)


def _tenant(limit: int, draw: random.Random) -> JsonObject:
    """No two are quite alike, or they would pack as if they were one."""
    domain = f"{draw.getrandbits(32):08x}.example"
    tools = [FREE_TOOL, CHARGED_TOOL, "mail.send"]
    usual = {"budget": BUDGET, "unit": UNIT, "scope": "tenant"}
    return {
        "status": "active",
        "scopes": [*SCOPES, "mail:send"],
        "allowlist": [*tools],
        "roles": {
            ROLE: {"tools": [*tools]},
            "analyst": {"tools": [FREE_TOOL]},
            "agent": {"budgets": {"llm": ["tokens_in", "tokens_out", "usd_micros"]}},
        },
        "tools": {"mail.send": {"arguments": {"to": {"domains": [domain]}}}},
        "limits": [
            {**usual, "id": "calls-ever", "window": "lifetime", "limit": limit},
            {
                **usual,
                "id": "calls-per-day",
                "window": "day",
                "limit": AMPLE + draw.randrange(1_000),
            },
        ],
    }
