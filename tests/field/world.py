"""The starter policy, with a tenant of its own for each story in which something is spent."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from pdp.api.v1 import budget_pb2, common_pb2
from pdp.client import PermitDenied
from pdp.policy.archive import pack, read_archive
from pdp.testing import Caller, SidecarProcess, TokenIssuer

ROOT: Final = Path(__file__).parents[2]
STARTER: Final = read_archive((ROOT / "policies/bundle.tar.gz").read_bytes(), place="starter")
IDP: Final = TokenIssuer()
MANY: Final = 1_000
"""Calls at the same time, in the stories about bursts."""

_CALLS = {"id": "calls", "budget": "tools", "unit": "calls", "window": "lifetime"}
_MONEY = {"id": "money", "budget": "llm", "unit": "usd_micros", "window": "lifetime"}
_TOKENS = {"id": "tokens", "budget": "llm", "unit": "tokens_out", "window": "lifetime"}
_LIMITS: Final[dict[str, list[dict[str, Any]]]] = {
    "tenant_burst": [{**_CALLS, "limit": 50, "scope": "tenant"}],
    "tenant_actors": [{**_CALLS, "limit": 3, "scope": "actor"}],
    "tenant_capped": [{**_CALLS, "limit": 2, "scope": "tenant"}],
    "tenant_ruled": [{**_CALLS, "limit": 1, "scope": "tenant"}],
    "tenant_keyed": [{**_CALLS, "limit": 50, "scope": "tenant"}],
    "tenant_unlimited": [],
    "tenant_tokens": [{**_TOKENS, "limit": 100, "scope": "tenant"}],
    "tenant_master": [{**_MONEY, "limit": 1_000_000, "scope": "tenant"}],
    "tenant_died": [{**_MONEY, "limit": 25_000_000, "scope": "tenant"}],
    "tenant_late": [{**_MONEY, "limit": 1_000_000, "scope": "tenant"}],
    "tenant_worst": [{**_MONEY, "limit": 25_000_000, "scope": "tenant"}],
}


def write_bundle(path: Path, *, release: int = 1, change: Callable[[Any], object] = id) -> str:
    """Put the starter policy there, with these tenants besides its own and whatever is changed
    in its data; its revision.
    """
    data = json.loads(STARTER["data.json"])
    for name, limits in _LIMITS.items():
        data["tenants"][name] = {**data["tenants"]["tenant_acme"], "limits": limits}
    change(data)
    revision = f"field-{release}"
    manifest = json.loads(STARTER[".manifest"])
    manifest |= {"revision": revision, "metadata": {"pdp": {"sequence": release}}}
    files = {".manifest": json.dumps(manifest).encode(), "data.json": json.dumps(data).encode()}
    draft = path.with_suffix(".draft")
    draft.write_bytes(pack({**STARTER, **files}))
    draft.replace(path)
    return revision


def prepared(folder: Path, **config: Any) -> SidecarProcess:
    """A sidecar under that policy, in which no rate stands in a story's way. It follows
    ``folder / "bundle.tar.gz"``.
    """
    bundle = folder / "bundle.tar.gz"
    write_bundle(bundle)
    tenants = {"calls_per_second": 100_000, "burst": 100_000, "max_concurrent_calls": MANY}
    sections: dict[str, Any] = {
        "limits": {
            "max_concurrent_calls": MANY,
            "max_concurrent_streams": 1_024,
            "tenants": tenants,
        },
        "policy": {"bundles": {"main": {"path": str(bundle), "poll_seconds": 0.1}}},
        **config,
    }
    return SidecarProcess(folder, issuer=IDP, bundle=bundle, config=sections)


def token(
    tenant: str | None = "tenant_acme",
    actor: str = "",
    roles: Sequence[str] = ("support_agent", "agent"),
    **claims: Any,
) -> str:
    """Of somebody new, unless an actor is named: so stories share no key and no limit."""
    scopes = ["orders:read", "orders:write", "mail:send", "reports:generate"]
    return IDP.token(tenant, actor or f"user-{uuid.uuid4()}", roles=roles, scopes=scopes, **claims)


def reason(call: Callable[..., object], *arguments: Any, **named: Any) -> str:
    """Why a guarded call is refused; "ok" where it ran."""
    try:
        call(*arguments, **named)
    except PermitDenied as denied:
        return denied.reason_code
    return "ok"


def spent_and_held(sidecar: SidecarProcess, bearer: str, limit_id: str) -> tuple[int, int]:
    """What the ledger says of one limit of whoever the token names."""
    with Caller(sidecar.target, token=bearer) as caller:
        limit = of(caller, limit_id)
        return limit.spent, limit.held


def of(caller: Caller, limit_id: str) -> common_pb2.LimitStatus:
    """One of the caller's limits as it stands."""
    state = caller.budget.GetBudget(budget_pb2.GetBudgetRequest())
    (found,) = (limit for limit in state.limits if limit.limit_id == limit_id)
    return found


def usd_micros(amount: int) -> list[common_pb2.Charge]:
    """What the budget llm is charged in money."""
    return [common_pb2.Charge(budget="llm", unit="usd_micros", amount=amount)]
