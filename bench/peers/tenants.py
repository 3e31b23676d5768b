"""The shipped rules with the 1,000 tenants of :mod:`bench.peers.question`, and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from bench.peers.ask_ours import READ_TOOL, holder
from bench.peers.policies import tenants
from bench.peers.question import ASKING, CASES, ROLES, SCOPES, STATUSES, call
from pdp.policy.archive import pack, read_archive
from pdp.testing import TokenIssuer

SHIPPED: Final = Path(__file__).parents[2] / "policies" / "bundle.tar.gz"
AMPLE: Final = 10**12


def bundle(file: Path) -> Path:
    """``orders.update`` holds one call under two limits; ``orders.read`` may be called a
    thousand times under one permit.
    """
    files = read_archive(SHIPPED.read_bytes(), place=str(SHIPPED))
    data = json.loads(files["data.json"])
    limit = {"budget": "tools", "unit": "calls", "limit": AMPLE}
    data["tenants"] = {
        name: {
            "status": "active",
            "scopes": list(SCOPES),
            "allowlist": list(allowlist),
            "roles": {role: {"tools": list(tools)} for role, tools in ROLES.items()},
            "limits": [
                {**limit, "id": "calls-per-day", "window": "day", "scope": "tenant"},
                {**limit, "id": "calls-per-actor", "window": "minute", "scope": "actor"},
            ],
        }
        for name, allowlist in tenants()
    }
    data["tools"] = {name: data["tools"][name] for name in ("orders.read", "orders.update")}
    data["tools"]["orders.update"]["arguments"]["status"]["enum"] = list(STATUSES)
    data["tools"][READ_TOOL]["permit"] = {"binds": ["tool"], "max_uses": 1_000}
    file.write_bytes(pack({**files, "data.json": json.dumps(data).encode()}))
    return file


def tokens(issuer: TokenIssuer) -> dict[str, str]:
    """By whom each call and each case is made."""
    calls = [call(number) for number in range(ASKING)] + [case.call for case in CASES]
    return {
        holder(each): issuer.token(
            each.tenant,
            "alice",
            roles=[each.role],
            scopes=each.scopes,
            lifetime_seconds=3_600,
        )
        for each in calls
    }
