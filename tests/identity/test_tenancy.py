"""Where the tenant comes from, and that all that name one agree."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdp.identity.organisations import OrganisationFile, OrganisationFileError
from pdp.identity.principals import Principals
from pdp.identity.resolver import Credentials, IdentityError, Peer
from pdp.identity.subject import Subject
from pdp.identity.tenancy import Routes, TenantRule, WorkloadRoute
from pdp.identity.workloads import Workloads, WorkloadTokens

PATTERN = "spiffe://example.org/tenant/{tenant}/**"


def tenant_by(rule: TenantRule, named: str = "", *, route: str = "") -> str:
    return rule.tenant_of(named, route_tenant=route, actor="alice")


def code_of(rule: TenantRule, named: str = "", *, route: str = "") -> str:
    with pytest.raises(IdentityError) as caught:
        tenant_by(rule, named, route=route)
    assert caught.value.actor == "alice"
    assert caught.value.tenant is None
    return caught.value.reason_code


# Rules of issuers


def test_an_issuer_speaks_only_for_its_tenants() -> None:
    rule = TenantRule(claim="tenant_id", tenants=frozenset({"tenant_acme"}))
    assert tenant_by(rule, "tenant_acme") == "tenant_acme"
    for named in ("tenant_globex", "Tenant_acme", "tenant_acme ", "tenant_acm"):
        assert code_of(rule, named) == "tenant_unknown"


def test_an_issuer_of_one_tenant_speaks_for_no_other() -> None:
    rule = TenantRule(fixed="tenant_acme")
    for named, route in (("", ""), ("tenant_globex", ""), ("", "tenant_globex")):
        assert tenant_by(rule, named, route=route) == "tenant_acme"


def test_a_list_of_tenants_bounds_organisations_and_routes_too() -> None:
    listed = frozenset({"tenant_acme"})
    organisations = {"org-1": "tenant_acme", "org-2": "tenant_globex"}
    by_map = TenantRule(claim="org", organisations=organisations, tenants=listed)
    assert tenant_by(by_map, "org-1") == "tenant_acme"
    assert code_of(by_map, "org-2") == "tenant_unknown"
    assert code_of(by_map, "tenant_acme") == "tenant_unknown"
    by_route = TenantRule(by_route=True, tenants=listed)
    assert tenant_by(by_route, route="tenant_acme") == "tenant_acme"
    assert code_of(by_route, route="tenant_globex") == "tenant_unknown"


def test_without_a_route_there_is_no_tenant_by_route() -> None:
    assert code_of(TenantRule(by_route=True), "tenant_acme") == "tenant_missing"


def test_a_route_gives_no_tenant_to_a_token_that_should_name_one() -> None:
    assert code_of(TenantRule(claim="tenant_id"), route="tenant_acme") == "tenant_missing"


def test_a_rule_that_says_nothing_gives_no_tenant() -> None:
    assert code_of(TenantRule(), route="tenant_acme") == "tenant_missing"


# Routes


def of_workload(pattern: str, tenant: str, workload: str) -> str | None:
    return WorkloadRoute.of(pattern, tenant).tenant_of(workload)


@pytest.mark.parametrize(
    ("pattern", "tenant", "workload", "expected"),
    (
        (PATTERN, "", "spiffe://example.org/tenant/acme/agent", "acme"),
        (PATTERN, "", "spiffe://example.org/tenant/acme/agent/1", "acme"),
        (PATTERN, "", "spiffe://example.org/tenant/acme", None),
        (PATTERN, "", "spiffe://example.org/other/tenant/acme/agent", None),
        (PATTERN, "", "spiffe://example.org.evil.example/tenant/acme/agent", None),
        (PATTERN, "", "spiffe://exampleXorg/tenant/acme/agent", None),
        ("spiffe://example.org/{tenant}/*/agent", "", "spiffe://example.org/a/b/agent", "a"),
        ("spiffe://example.org/{tenant}/*/agent", "", "spiffe://example.org/a/b/c/agent", None),
        ("spiffe://example.org/ns/*/sa/x", "acme", "spiffe://example.org/ns/any/sa/x", "acme"),
        ("spiffe://example.org/agent", "acme", "spiffe://example.org/agent", "acme"),
        ("spiffe://example.org/agent", "acme", "spiffe://example.org/agent/1", None),
        ("system:serviceaccount:acme:*", "acme", "system:serviceaccount:acme:agent", "acme"),
        ("system:serviceaccount:acme:*", "acme", "system:serviceaccount:acme2:agent", None),
        ("system:serviceaccount:{tenant}:agent", "", "system:serviceaccount:acme:agent", "acme"),
        ("system:serviceaccount:{tenant}:agent", "", "eu/system:serviceaccount:acme:agent", None),
        ("eu/system:serviceaccount:{tenant}:a", "", "eu/system:serviceaccount:acme:a", "acme"),
        ("agent.acme.example", "acme", "agent.acme.example", "acme"),
        ("agent.acme.example", "acme", "agentXacme.example", None),
        ("https://acme.example/agent?a=1", "acme", "https://acme.example/agent?a=1", "acme"),
        ("https://acme.example/agent?a=1", "acme", "https://acme.example/agena=1", None),
    ),
)
def test_a_route_is_that_of_the_workloads_that_it_describes(
    pattern: str, tenant: str, workload: str, expected: str | None
) -> None:
    assert of_workload(pattern, tenant, workload) == expected


@pytest.mark.parametrize(
    ("pattern", "tenant"),
    (
        ("spiffe://example.org/agent", ""),
        (PATTERN, "acme"),
        ("spiffe://example.org/{tenant}/{tenant}", ""),
        ("spiffe://{tenant}/agent", ""),
        ("spiffe://*/agent", "acme"),
        ("spiffe://example.org", ""),
        ("spiffe://example.org/**/agent", "acme"),
        ("spiffe://example.org/t-{tenant}", ""),
        ("spiffe://example.org/a*", "acme"),
        ("*", "acme"),
        ("**", "acme"),
        ("{tenant}.example.org", ""),
        ("*.example.org", "acme"),
        ("https://example.org/{tenant}", ""),
        ("system:*:acme:agent", "acme"),
    ),
)
def test_a_route_that_could_mean_more_than_it_says_is_refused(pattern: str, tenant: str) -> None:
    with pytest.raises(ValueError, match=r"wildcard|name the tenant once"):
        WorkloadRoute.of(pattern, tenant)


def test_a_workload_whose_name_holds_no_tenant_id_is_of_no_tenant() -> None:
    for part in ("_acme", "-", "a" * 129, ".acme"):
        with pytest.raises(IdentityError) as caught:
            of_workload(PATTERN, "", f"spiffe://example.org/tenant/{part}/agent")
        assert caught.value.reason_code == "tenant_unknown"


@given(st.text(st.sampled_from("a./:*{}-"), max_size=30), st.text(max_size=30))
def test_whatever_a_route_says_it_never_names_a_tenant_that_is_no_whole_part(
    pattern: str, workload: str
) -> None:
    try:
        route = WorkloadRoute.of(f"spiffe://example.org/{{tenant}}/{pattern}", "")
    except ValueError:
        return
    tenant = route.tenant_of(f"spiffe://example.org/acme/{workload}")
    assert tenant in {None, "acme"}


# What all of them say


class Alice:
    """Whoever asks is Alice, at the tenant that her token names, or else her route."""

    def __init__(self, tenant: str) -> None:
        self._tenant = tenant

    async def resolve(self, credentials: Credentials) -> Subject:
        return Subject(tenant=self._tenant or credentials.route_tenant, actor="alice")


ROUTES = Routes(
    listeners={"acme": "tenant_acme", "globex": "tenant_globex"},
    workloads=[
        WorkloadRoute.of("agent.acme.example", "tenant_acme"),
        WorkloadRoute.of("agent.both.example", "tenant_acme"),
        WorkloadRoute.of("agent.both.example", "tenant_globex"),
    ],
    server_names={"acme.pdp.example": "tenant_acme"},
)


def resolved(
    tenant: str, *, listener: str = "", dns_name: str = "", server_name: str = ""
) -> Subject:
    peer = Peer(
        listener=listener,
        server_name=server_name,
        certificate_sha256="c" * 43 if dns_name else "",
        dns_names=(dns_name,) if dns_name else (),
    )
    workloads = Workloads(required=False, certificates=True, tokens=WorkloadTokens([]))
    principals = Principals(Alice(tenant), workloads=workloads, routes=ROUTES)
    return asyncio.run(principals.resolve(Credentials(bearer="t", peer=peer)))


def test_a_route_names_the_tenant_where_the_token_leaves_it_to_it() -> None:
    assert resolved("", listener="acme").tenant == "tenant_acme"
    assert resolved("", dns_name="agent.acme.example").tenant == "tenant_acme"


def test_a_token_and_routes_of_the_same_tenant_agree() -> None:
    assert resolved("tenant_acme").tenant == "tenant_acme"
    assert resolved("tenant_acme", listener="acme").tenant == "tenant_acme"
    both = resolved("tenant_acme", listener="acme", dns_name="agent.acme.example")
    assert both.tenant == "tenant_acme"
    assert both.workload == "agent.acme.example"
    # A way in without a route says nothing.
    other = resolved("tenant_globex", listener="other", dns_name="agent.other.example")
    assert other.tenant == "tenant_globex"


@pytest.mark.parametrize(
    ("listener", "dns_name", "token", "sources"),
    (
        ("acme", "", "globex", (("token", "tenant_globex"), ("listener", "tenant_acme"))),
        (
            "",
            "agent.acme.example",
            "globex",
            (("token", "tenant_globex"), ("workload", "tenant_acme")),
        ),
        (
            "globex",
            "agent.acme.example",
            "globex",
            (("listener", "tenant_globex"), ("workload", "tenant_acme")),
        ),
        (
            "",
            "agent.both.example",
            "acme",
            (("workload", "tenant_acme"), ("workload", "tenant_globex")),
        ),
    ),
)
def test_two_sources_that_disagree_are_refused_and_both_are_told_to_nobody_but_the_record(
    listener: str, dns_name: str, token: str, sources: tuple[tuple[str, str], ...]
) -> None:
    with pytest.raises(IdentityError) as caught:
        resolved(f"tenant_{token}", listener=listener, dns_name=dns_name)
    assert caught.value.reason_code == "tenant_mismatch"
    assert caught.value.sources == sources
    assert caught.value.tenant is None
    assert "acme" not in caught.value.message
    assert "globex" not in caught.value.message


def test_a_server_name_must_agree_but_names_no_tenant() -> None:
    assert resolved("tenant_acme", server_name="acme.pdp.example").tenant == "tenant_acme"
    assert resolved("tenant_globex", server_name="other.pdp.example").tenant == "tenant_globex"
    assert resolved("", server_name="acme.pdp.example", listener="acme").tenant == "tenant_acme"
    for name in ("acme.pdp.example", "ACME.pdp.example"):
        with pytest.raises(IdentityError) as caught:
            resolved("tenant_globex", server_name=name)
        assert caught.value.sources == (
            ("token", "tenant_globex"),
            ("server_name", "tenant_acme"),
        )


def test_a_caller_can_not_choose_its_tenant_by_a_server_name() -> None:
    rule = TenantRule(by_route=True)

    class Routed:
        async def resolve(self, credentials: Credentials) -> Subject:
            tenant = rule.tenant_of("", route_tenant=credentials.route_tenant, actor="alice")
            return Subject(tenant=tenant, actor="alice")

    principals = Principals(Routed(), workloads=None, routes=ROUTES)
    shown = Credentials(bearer="t", peer=Peer(server_name="acme.pdp.example"))
    with pytest.raises(IdentityError) as caught:
        asyncio.run(principals.resolve(shown))
    assert caught.value.reason_code == "tenant_missing"


# A file of organisations


def written(path: Path, organisations: object) -> Path:
    """In one step, as a mounted file is changed."""
    beside = path.with_name("beside")
    beside.write_text(json.dumps(organisations))
    beside.replace(path)
    return path


def test_a_changed_file_of_organisations_is_taken_up(tmp_path: Path) -> None:
    path = written(tmp_path / "organisations.json", {"org-1": "tenant_acme"})
    organisations = OrganisationFile(path)
    rule = TenantRule(claim="org", organisations=organisations)
    assert tenant_by(rule, "org-1") == "tenant_acme"
    written(path, {"org-2": "tenant_globex"})
    asyncio.run(organisations.look())
    assert tenant_by(rule, "org-2") == "tenant_globex"
    assert code_of(rule, "org-1") == "tenant_unknown"


def test_a_link_that_leads_to_another_file_is_a_change(tmp_path: Path) -> None:
    for name, tenant in (("before", "tenant_acme"), ("after", "tenant_globex")):
        written(tmp_path / name, {"org-1": tenant})
        os.utime(tmp_path / name, (1, 1))
    path = tmp_path / "organisations.json"
    path.symlink_to("before")
    organisations = OrganisationFile(path)
    path.unlink()
    path.symlink_to("after")
    asyncio.run(organisations.look())
    assert organisations.get("org-1") == "tenant_globex"


def test_a_file_that_can_not_be_used_leaves_what_was_read_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "organisations.json", {"org-1": "tenant_acme"})
    organisations = OrganisationFile(path)

    async def look_twice() -> None:
        await organisations.look()
        await organisations.look()

    for damage in (lambda: path.write_text('{"org-1": '), path.unlink):
        damage()
        with caplog.at_level(logging.ERROR):
            asyncio.run(look_twice())
        assert organisations.get("org-1") == "tenant_acme"
    assert len(caplog.records) == 1, "said once, until it can be used again"
    written(path, {"org-1": "tenant_globex"})
    asyncio.run(organisations.look())
    assert organisations.get("org-1") == "tenant_globex"


@pytest.mark.parametrize(
    "content",
    (
        "",
        "[]",
        "{}",
        '{"org-1": 1}',
        '{"org-1": ""}',
        '{"org-1": "a/b"}',
        '{"": "tenant_acme"}',
        '{"org-1": "tenant_acme", "org-1": "tenant_globex"}',
        json.dumps({"o" * 129: "tenant_acme"}),
    ),
)
def test_a_file_that_maps_no_organisations_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "organisations.json"
    path.write_text(content)
    with pytest.raises(OrganisationFileError, match=r"organisations\.json"):
        OrganisationFile(path)
