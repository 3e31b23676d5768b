"""A configuration of tenants, routes and workloads that says too little or too much is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdp.config import ConfigError, load_config

ISSUER = {"issuer": "https://id.example", "audiences": ["agents"], "jwks_file": "id.json"}
SPIRE = {"trust_domain": "example.org", "audiences": ["pdp"], "jwks_file": "spire.json"}
CLUSTER = {"issuer": "https://cluster.example", "audiences": ["pdp"], "jwks_file": "cluster.json"}
TLS = {"certificate_file": "s.pem", "key_file": "s.key", "client_ca_file": "ca.pem"}
MTLS = {"tcp": {"address": "0.0.0.0:8443", "tls": TLS}}


def load(tmp_path: Path, *, listen: dict[str, Any] | None = None, **identity: Any) -> None:
    file = tmp_path / "pdp.yaml"
    usual = {} if "mode" in identity else {"mode": "jwt", "issuers": [ISSUER]}
    sections = {
        "identity": {**usual, **identity},
        "listen": listen or {},
        "policy": {"bundle": "bundle.tar.gz"},
    }
    file.write_text(json.dumps(sections))  # which is YAML too
    load_config(file, {})


def fault(tmp_path: Path, **sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **sections)
    return caught.value.message.removeprefix(f"{tmp_path}/")


def of_tenant(**rule: Any) -> dict[str, Any]:
    return {"issuers": [{**ISSUER, "tenant": rule}]}


@pytest.mark.parametrize(
    ("rule", "expected"),
    (
        ({"fixed": "tenant_acme", "claim": "tenant_id"}, "exclude each other"),
        ({"fixed": "tenant_acme", "by_route": True}, "exclude each other"),
        ({"by_route": True, "organisations": {"o": "tenant_acme"}}, "exclude each other"),
        (
            {"organisations": {"o": "tenant_acme"}, "organisations_file": "o.json"},
            "exclude each other",
        ),
        ({"fixed": "tenant_acme", "tenants": ["tenant_acme"]}, "nothing to say beside fixed"),
        ({"fixed": "tenant/acme"}, "is not a tenant id"),
        ({"tenants": ["*"]}, "is not a tenant id"),
        ({"tenants": []}, "tenants: expected a list of 1 to 10000 entries"),
        ({"by_route": True}, "needs identity.routes"),
    ),
)
def test_an_issuer_has_one_rule(tmp_path: Path, rule: dict[str, Any], expected: str) -> None:
    assert expected in fault(tmp_path, **of_tenant(**rule))


ACME = {"listener": "acme", "tenant": "tenant_acme"}
NAMED = {"named": {"acme": {"unix": "acme.sock"}}}
OF_WORKLOAD = {"workload": "spiffe://example.org/{tenant}/agent"}
SERVER_NAME = {"server_name": "acme.pdp.example", "tenant": "tenant_acme"}


@pytest.mark.parametrize(
    ("routes", "listen", "expected"),
    (
        ([ACME], {}, "identity.routes: identity.routes names the listener acme"),
        ([{"listener": "acme"}], NAMED, "name the tenant"),
        ([{"tenant": "tenant_acme"}], {}, "set exactly one of listener, workload and server_name"),
        ([{**ACME, **SERVER_NAME}], NAMED, "set exactly one of listener, workload and server_name"),
        ([ACME, {**ACME, "tenant": "tenant_globex"}], NAMED, "a listener has two routes"),
        ([SERVER_NAME, SERVER_NAME], {}, "a server_name has two routes"),
        ([{**SERVER_NAME, "server_name": "Acme.pdp.example"}], {}, "a text that matches ^"),
        ([OF_WORKLOAD], {}, "a route of a workload needs identity.workload"),
        ([{**OF_WORKLOAD, "tenant": "tenant_acme"}], {}, "name the tenant once"),
    ),
)
def test_a_route_leads_from_one_place_to_one_tenant(
    tmp_path: Path, routes: list[Any], listen: dict[str, Any], expected: str
) -> None:
    assert expected in fault(tmp_path, routes=routes, listen=listen)


def test_a_server_name_can_not_be_where_a_tenant_comes_from(tmp_path: Path) -> None:
    by_route = of_tenant(by_route=True)
    assert "needs identity.routes" in fault(tmp_path, routes=[SERVER_NAME], **by_route)
    load(tmp_path, routes=[SERVER_NAME, ACME], listen=NAMED, **by_route)


@pytest.mark.parametrize(
    ("workload", "listen", "expected"),
    (
        ({}, {}, "set certificates or issuers"),
        ({"required": True}, {}, "set certificates or issuers"),
        ({"certificates": True}, {}, "identity.workload.certificates needs a listener"),
        ({"issuers": [SPIRE], "trust_domains": ["example.org"]}, {}, "set certificates"),
        ({"issuers": [SPIRE, SPIRE]}, {}, "two issuers have the same trust_domain"),
        ({"issuers": [CLUSTER, CLUSTER]}, {}, "two issuers have the same issuer"),
        (
            {"issuers": [CLUSTER, {**CLUSTER, "issuer": "https://eu.example"}]},
            {},
            "two issuers have the same cluster",
        ),
        ({"issuers": [{**SPIRE, **CLUSTER}]}, {}, "set exactly one of trust_domain and issuer"),
        ({"issuers": [{**SPIRE, "cluster": "eu"}]}, {}, "cluster goes with issuer"),
        ({"issuers": [{**SPIRE, "trust_domain": "Example.org"}]}, {}, "a text that matches ^"),
        ({"issuers": [ISSUER]}, {}, "is an issuer of users and of workloads"),
        ({"certificates": True, "trust_domains": []}, MTLS, "a list of 1 to 64 entries"),
    ),
)
def test_what_is_said_of_workloads_fits_together(
    tmp_path: Path, workload: dict[str, Any], listen: dict[str, Any], expected: str
) -> None:
    assert expected in fault(tmp_path, workload=workload, listen=listen)


def test_several_clusters_have_names(tmp_path: Path) -> None:
    eu = {**CLUSTER, "issuer": "https://eu.example", "cluster": "eu"}
    load(tmp_path, workload={"issuers": [SPIRE, CLUSTER, eu]})


def test_a_single_tenant_is_reached_from_nowhere_else_by_any_listener(tmp_path: Path) -> None:
    single = {"mode": "single_tenant"}
    load(tmp_path, **single, listen=NAMED)
    assert "must be loopback" in fault(tmp_path, **single, listen={"named": {"open": MTLS}})
