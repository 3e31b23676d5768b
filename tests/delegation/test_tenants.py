"""A delegation is of a tenant that its user's token would still be of."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import grpc

from pdp.api.v1 import authorization_pb2
from pdp.testing import Caller, SidecarProcess, TokenIssuer, refusal_of
from tests.delegation.parties import BUNDLE, IDP
from tests.e2e.operating import records, soon

OTHER = TokenIssuer("https://other.example", kid="other")


def sidecar(folder: Path, **tenant: Any) -> SidecarProcess:
    """One with the keys of whichever was there before, and this rule for its issuer."""
    return of_issuer(folder, IDP, tenant)


def of_issuer(folder: Path, issuer: TokenIssuer, tenant: dict[str, Any]) -> SidecarProcess:
    settings = {
        "issuer": issuer.issuer,
        "audiences": [issuer.audience],
        "jwks_file": str(issuer.write_jwks(folder / "users.json")),
        "tenant": tenant,
    }
    config = {"identity": {"mode": "jwt", "issuers": [settings]}}
    return SidecarProcess(folder, issuer=issuer, bundle=BUNDLE, config=config)


def delegated(process: SidecarProcess, token: str) -> str:
    request = authorization_pb2.DelegateRequest(
        request_id=str(uuid.uuid4()), delegate="reader", tools=["orders.read"]
    )
    with Caller(process.target, token=token) as caller:
        return caller.authorization.Delegate(request).token


def reason(process: SidecarProcess, token: str) -> str:
    """Why the call is refused, or the tenant that it was decided for."""
    with Caller(process.target, token=token) as caller:
        try:
            return caller.authorize("orders.read", {"order_id": "1"}).tenant_id
        except grpc.RpcError:
            return refusal_of(caller.authorize, "orders.read").reason_code


def test_an_agent_of_an_organisation_that_has_moved_acts_for_its_old_tenant_no_more(
    tmp_path: Path,
) -> None:
    organisations = tmp_path / "organisations.json"
    organisations.write_text('{"org-1": "tenant_acme"}', encoding="utf-8")
    user = IDP.token(None, "user-7", roles=["support_agent"], scopes=["orders:read"], org="org-1")
    with sidecar(tmp_path, claim="org", organisations_file=str(organisations)) as process:
        agent = delegated(process, user)
        assert reason(process, agent) == "tenant_acme"
        beside = tmp_path / "beside.json"
        beside.write_text('{"org-1": "tenant_globex"}', encoding="utf-8")
        beside.replace(organisations)
        assert soon(lambda: reason(process, agent) == "tenant_mismatch")
        assert records(process)[-1]["detail"]["sources"] == [
            {"source": "token", "tenant": "tenant_acme"},
            {"source": "issuer", "tenant": "tenant_globex"},
        ]


def test_a_delegation_is_bound_by_what_its_users_issuer_may_say_here(tmp_path: Path) -> None:
    user = IDP.token("tenant_acme", "user-7", roles=["support_agent"], scopes=["orders:read"])
    with sidecar(tmp_path, claim="tenant_id") as process:
        agent = delegated(process, user)
    with sidecar(tmp_path, claim="tenant_id", tenants=["tenant_globex"]) as process:
        assert reason(process, user) == "tenant_unknown"
        assert reason(process, agent) == "tenant_unknown"
    with of_issuer(tmp_path, OTHER, {"claim": "tenant_id"}) as process:
        assert reason(process, user) == "token_invalid"
        assert reason(process, agent) == "token_invalid"
    config = {"identity": {"mode": "single_tenant"}}
    with SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE, config=config) as process:
        assert reason(process, agent) == "token_invalid"
