"""Bundles of any size: the rules that the product ships, with as many tenants, tools and
further rules as a measurement needs, and budgets that never run out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

from pdp.policy.archive import pack, read_archive, read_directory
from pdp.policy.compile import build_files

ROOT: Final = Path(__file__).parents[1]
POLICIES: Final = ROOT / "policies"
READ, WRITE = "orders.read", "orders.update"
"""A tool that charges nothing, and one that holds a call under two limits."""
ROLE: Final = "support_agent"
SCOPES: Final = ("orders:read", "orders:write")
AMPLE: Final = 10**12
NO_RATE: Final = {
    "tenants": {"calls_per_second": 100_000, "burst": 100_000, "max_concurrent_calls": 1_000}
}
"""The section ``limits`` of a sidecar that is measured: it is cost that counts, not refusal."""


def tenant(number: int) -> str:
    return f"tenant_{number:06}"


def blocked_order(number: int) -> str:
    """Which order the rule of that number forbids."""
    return f"{900_000_000_000 + number}"


def write_bundle(
    file: Path,
    *,
    tenants: int = 1,
    tools: int = 2,
    rules: int = 0,
    reusable_reads: bool = False,
    longest_text: int | None = None,
) -> Path:
    """A bundle in ``file``.

    ``tools`` are all on each tenant's allowlist; the first two are ours to call. Each of
    ``rules`` is one more in Rego that is asked before a call is allowed, and forbids one order;
    the bundle is built anew then, which needs opa.
    With ``reusable_reads`` one permit is good for a thousand reads. ``longest_text`` lets
    the read take a text of so many characters.
    """
    files = _built_with(rules) if rules else read_archive(_shipped().read_bytes(), place="shipped")
    data = json.loads(files["data.json"])
    more = {f"tool_{number:04}": data["tools"][READ] for number in range(tools - 2)}
    data["tools"] = {READ: data["tools"][READ], WRITE: data["tools"][WRITE], **more}
    if reusable_reads:
        data["tools"][READ]["permit"] = {"binds": ["tool"], "max_uses": 1_000}
    if longest_text is not None:
        text = {"type": "string", "max_length": longest_text, "required": False}
        data["tools"][READ]["arguments"]["text"] = text
    data["tenants"] = {tenant(number): _tenant(list(data["tools"])) for number in range(tenants)}
    file.write_bytes(pack({**files, "data.json": json.dumps(data).encode()}))
    return file


def _shipped() -> Path:
    return POLICIES / "bundle.tar.gz"


def _tenant(tools: list[str]) -> dict[str, Any]:
    limit = {"budget": "tools", "unit": "calls", "limit": AMPLE}
    return {
        "status": "active",
        "scopes": list(SCOPES),
        "allowlist": tools,
        "roles": {ROLE: {"tools": tools}},
        "limits": [
            {**limit, "id": "calls-per-day", "window": "day", "scope": "tenant"},
            {**limit, "id": "calls-per-actor", "window": "minute", "scope": "actor"},
        ],
    }


_LAST_RUNG: Final = b'} else := "ok" if {\n\targuments_allowed\n}'
_LONGER: Final = (
    b'} else := "ok" if {\n\targuments_allowed\n\tcount(data.pdp.grown.blocked) == 0\n}'
)


def _built_with(rules: int) -> dict[str, bytes]:
    """The shipped rules and so many more, compiled."""
    files = dict(read_directory(POLICIES))
    authz = files["pdp/authz/authz.rego"]
    assert _LAST_RUNG in authz, "the ladder has changed"
    files["pdp/authz/authz.rego"] = authz.replace(_LAST_RUNG, _LONGER)
    texts = [
        f'blocked contains "rule_{number}" if {{\n'
        f'\tinput.action.name in {{"{READ}", "{WRITE}"}}\n'
        f'\tinput.action.properties.arguments.order_id == "{blocked_order(number)}"\n}}\n'
        for number in range(rules)
    ]
    files["pdp/grown/grown.rego"] = ("package pdp.grown\n\n" + "\n".join(texts)).encode()
    opa = Path(shutil.which("opa") or ROOT / ".tools" / "opa")
    return dict(build_files(files, opa=opa, revision=None, sequence=None))
