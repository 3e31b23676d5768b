"""Which runtime asks: certificates, JWT-SVIDs, service accounts' tokens, and tricks with each."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from pdp.identity.key_source import FixedKeys
from pdp.identity.keys import parse_jwks
from pdp.identity.principals import Principals
from pdp.identity.resolver import Credentials, IdentityError, Peer, SingleTenant
from pdp.identity.subject import Subject
from pdp.identity.tenancy import Routes, TenantRule
from pdp.identity.tokens import Issuer, TokenIdentity
from pdp.identity.workloads import (
    MAX_LIFETIME_SECONDS,
    WorkloadIssuer,
    Workloads,
    WorkloadTokens,
)
from pdp.testing.issuer import TokenIssuer

NOW = 1_800_000_000
AGENT = "spiffe://example.org/agent"
ACCOUNT = "system:serviceaccount:acme:agent"
CLUSTER = "https://kubernetes.default.svc"


def keys_of(issuer: TokenIssuer, directory: Path) -> FixedKeys:
    jwks = issuer.write_jwks(directory / f"{issuer.kid}.json")
    return FixedKeys(parse_jwks(jwks.read_bytes(), strict=True))


class Parties:
    """Who issues what: users' tokens, JWT-SVIDs of two trust domains, and a cluster's."""

    def __init__(self, directory: Path) -> None:
        self.now = float(NOW)
        self._directory = directory
        self.users = self._party("https://id.example", "agent-service", "users")
        self.spire = self._party("https://spire.example.org", "pdp", "spire")
        self.partner = self._party("https://spire.partner.example", "pdp", "partner")
        self.cluster = self._party(CLUSTER, "pdp", "cluster")
        self.tokens = WorkloadTokens(
            [
                self._of_trust_domain("example.org", self.spire),
                self._of_trust_domain("partner.example", self.partner),
                WorkloadIssuer(issuer=self._issuer(CLUSTER, self.cluster)),
            ],
            clock=lambda: self.now,
        )

    def _party(self, issuer: str, audience: str, kid: str) -> TokenIssuer:
        return TokenIssuer(issuer, audience=audience, kid=kid, clock=lambda: self.now)

    def _issuer(self, name: str, party: TokenIssuer, **changes: Any) -> Issuer:
        usual: dict[str, Any] = {
            "issuer": name,
            "audiences": frozenset({party.audience}),
            "types": frozenset({"", "jwt", "jose"}),
            "algorithms": frozenset({"EdDSA"}),
            "keys": keys_of(party, self._directory),
        }
        return Issuer(**{**usual, **changes})

    def _of_trust_domain(self, domain: str, party: TokenIssuer) -> WorkloadIssuer:
        return WorkloadIssuer(issuer=self._issuer(f"spiffe://{domain}", party), trust_domain=domain)

    def svid(self, party: TokenIssuer, subject: Any = AGENT, **claims: Any) -> str:
        """As SPIRE makes one: no jti, and iss at will."""
        usual = {"lifetime_seconds": 300, "scope": None}
        return party.token(None, subject, **{**usual, **claims})

    def account_token(self, party: TokenIssuer, *, header: Any = None, **changes: Any) -> str:
        """As a kubelet has one made for a pod: without typ, bound to the pod."""
        claims = {
            "iss": party.issuer,
            "aud": [party.audience],
            "sub": ACCOUNT,
            "iat": int(self.now),
            "nbf": int(self.now),
            "exp": int(self.now) + 3_600,
            "jti": "6d6d4e6b-7f4f-4a4c-9f53-5d5a1f4ea2ac",
            "kubernetes.io": {
                "namespace": "acme",
                "node": {"name": "node-1", "uid": "8d44"},
                "pod": {"name": "agent-7d9c", "uid": "5a1f"},
                "serviceaccount": {"name": "agent", "uid": "9f53"},
            },
            **changes,
        }
        return party.sign(json.dumps(claims).encode(), header=header or {"typ": None})

    def users_identity(self) -> TokenIdentity:
        issuer = self._issuer(
            "https://id.example",
            self.users,
            types=frozenset({"jwt", "at+jwt"}),
            tenant=TenantRule(claim="tenant_id"),
        )
        return TokenIdentity([issuer], clock=lambda: self.now)


@pytest.fixture
def parties(tmp_path: Path) -> Parties:
    return Parties(tmp_path)


def by_token(parties: Parties, token: str) -> str:
    return asyncio.run(parties.tokens.workload_of(token))


def refused(parties: Parties, token: str) -> str:
    with pytest.raises(IdentityError) as caught:
        by_token(parties, token)
    assert caught.value.reason_code == "workload_invalid"
    assert caught.value.actor is None
    assert token not in caught.value.message
    return caught.value.message


# JWT-SVIDs


def test_a_jwt_svid_names_a_workload(parties: Parties) -> None:
    assert by_token(parties, parties.svid(parties.spire)) == AGENT
    assert by_token(parties, parties.svid(parties.spire, iss=None)) == AGENT
    for kind in (None, "JWT", "JOSE"):
        claims = {"sub": AGENT, "aud": ["pdp", "other"], "exp": NOW + 300}
        token = parties.spire.sign(json.dumps(claims).encode(), header={"typ": kind})
        assert by_token(parties, token) == AGENT


def test_a_trust_domain_speaks_for_its_own_workloads_alone(parties: Parties) -> None:
    refused(parties, parties.svid(parties.partner))
    refused(parties, parties.svid(parties.spire, "spiffe://partner.example/agent"))
    refused(parties, parties.svid(parties.spire, "spiffe://elsewhere.example/agent"))
    # Not even where the token says that another one issued it.
    refused(parties, parties.svid(parties.partner, iss="spiffe://example.org"))


@pytest.mark.parametrize(
    "subject",
    (
        None,
        "",
        7,
        [AGENT],
        "agent",
        "spiffe://example.org",
        "spiffe://example.org/",
        "spiffe://example.org//agent",
        "spiffe://example.org/agent/",
        "spiffe://example.org/a/../agent",
        "spiffe://example.org/./agent",
        "spiffe://example.org/..",
        "spiffe://example.org/%61gent",
        "spiffe://example.org/a%2e%2e",
        "spiffe://example.org/agent?x=1",
        "spiffe://example.org/agent#x",
        "spiffe://example.org:443/agent",
        "spiffe://user@example.org/agent",
        "spiffe://EXAMPLE.org/agent",
        "SPIFFE://example.org/agent",
        "spiffe://example.org/agent\n",
        "spiffe://example.org/agent\x00",
        "spiffe://example.org/ag ent",
        "spiffe://example.org/\u0430gent",
        "spiffe:///agent",
        f"spiffe://example.org/{'a' * 255}",
    ),
)
def test_what_is_no_spiffe_id_of_a_workload_is_refused(parties: Parties, subject: Any) -> None:
    refused(parties, parties.svid(parties.spire, subject))
    certificate = Peer(certificate_sha256="c" * 43, uris=(str(subject),))
    with pytest.raises(IdentityError) as caught:
        by_peer(certificate, trust_domains=frozenset({"example.org"}))
    assert caught.value.reason_code == "workload_invalid"


@pytest.mark.parametrize(
    "claims",
    (
        {"aud": "agent-service"},
        {"aud": None},
        {"aud": ["PDP"]},
        {"exp": None},
        {"exp": NOW - 31},
        {"exp": NOW + MAX_LIFETIME_SECONDS + 1},
        {"exp": "1800000300"},
        {"nbf": NOW + 60},
    ),
)
def test_a_workloads_token_is_for_here_and_for_a_short_time(
    parties: Parties, claims: dict[str, Any]
) -> None:
    refused(parties, parties.svid(parties.spire, **claims))
    changes = {name: value for name, value in claims.items() if value is not None}
    if changes:
        refused(parties, parties.account_token(parties.cluster, **changes))


def test_a_token_that_was_accepted_ends_when_it_expires(parties: Parties) -> None:
    token = parties.svid(parties.spire)
    assert by_token(parties, token) == AGENT
    parties.now += 331
    assert "expired" in refused(parties, token)


# Service accounts


def test_a_projected_token_names_a_service_account(parties: Parties) -> None:
    assert by_token(parties, parties.account_token(parties.cluster)) == ACCOUNT


def test_one_clusters_accounts_are_not_anothers(parties: Parties, tmp_path: Path) -> None:
    other = TokenIssuer("https://eu.example", audience="pdp", kid="eu", clock=lambda: NOW)
    issuer = Issuer(
        issuer=other.issuer,
        audiences=frozenset({"pdp"}),
        types=frozenset({""}),
        algorithms=frozenset({"EdDSA"}),
        keys=keys_of(other, tmp_path),
    )
    tokens = WorkloadTokens([WorkloadIssuer(issuer=issuer, cluster="eu")], clock=lambda: NOW)
    workload = asyncio.run(tokens.workload_of(parties.account_token(other)))
    assert workload == f"eu/{ACCOUNT}"
    refused(parties, parties.account_token(other))


def bound(**changes: Any) -> dict[str, Any]:
    usual = {
        "namespace": "acme",
        "pod": {"name": "agent-7d9c"},
        "serviceaccount": {"name": "agent"},
    }
    return {"kubernetes.io": {**usual, **changes}}


@pytest.mark.parametrize(
    "changes",
    (
        {"sub": "system:serviceaccount:globex:agent"},
        {"sub": "system:serviceaccount:acme:other"},
        {"sub": "system:serviceaccount:acme"},
        {"sub": "system:serviceaccount:acme:agent:more"},
        {"sub": "system:serviceaccount:acme:*"},
        {"sub": "system:serviceaccount:acme/x:agent"},
        {"sub": "system:node:acme:agent"},
        {"sub": "eu/system:serviceaccount:acme:agent"},
        {"sub": AGENT},
        {"kubernetes.io": None},
        {"kubernetes.io": "acme"},
        bound(namespace="globex"),
        bound(namespace=None),
        bound(serviceaccount={"name": "other"}),
        bound(serviceaccount="agent"),
        bound(pod=None),
        bound(pod={}),
        bound(pod={"name": ""}),
        bound(pod={"name": ["agent"]}),
    ),
)
def test_a_token_that_is_not_wholly_of_one_account_is_refused(
    parties: Parties, changes: dict[str, Any]
) -> None:
    refused(parties, parties.account_token(parties.cluster, **changes))


# One kind of token is not taken for another


def test_a_users_token_is_no_workloads(parties: Parties) -> None:
    refused(parties, parties.users.token("tenant_acme", "alice"))
    refused(parties, parties.users.token("tenant_acme", AGENT, aud="pdp"))
    refused(parties, parties.users.token("tenant_acme", ACCOUNT, aud="pdp", iss=CLUSTER))


def test_a_workloads_token_is_no_users(parties: Parties) -> None:
    identity = parties.users_identity()
    for token in (
        parties.svid(parties.spire, tenant_id="tenant_acme"),
        parties.svid(parties.spire, tenant_id="tenant_acme", aud="agent-service"),
        parties.svid(parties.spire, aud="agent-service", iss="https://id.example"),
        parties.account_token(parties.cluster, tenant_id="tenant_acme", aud="agent-service"),
        parties.account_token(parties.cluster, header={"typ": "JWT"}, aud="agent-service"),
    ):
        with pytest.raises(IdentityError) as caught:
            asyncio.run(identity.resolve(Credentials(bearer=token)))
        assert caught.value.reason_code == "token_invalid"


@pytest.mark.parametrize("kind", ("tool-permit+jwt", "tool-delegation+jwt", "at+jwt"))
def test_a_token_of_another_type_is_refused(parties: Parties, kind: Any) -> None:
    refused(parties, parties.account_token(parties.cluster, header={"typ": kind}))


@pytest.mark.parametrize("token", ("malformed", "a.b.c", "x" * 9_000, "t\u00f6ken", ".."))
def test_what_is_no_token_is_refused(parties: Parties, token: str) -> None:
    refused(parties, token)


# Certificates


def by_peer(
    peer: Peer, *, required: bool = False, trust_domains: frozenset[str] | None = None
) -> str:
    workloads = Workloads(
        required=required,
        certificates=True,
        trust_domains=trust_domains,
        tokens=WorkloadTokens([]),
    )
    return asyncio.run(workloads.workload_of(Credentials(bearer=None, peer=peer)))


def certificate(*, uris: tuple[str, ...] = (), dns_names: tuple[str, ...] = ()) -> Peer:
    return Peer(certificate_sha256="c" * 43, uris=uris, dns_names=dns_names)


def test_a_certificate_names_a_workload_by_its_one_uri_or_else_its_one_dns_name() -> None:
    assert by_peer(certificate(uris=(AGENT,), dns_names=("a.example", "b.example"))) == AGENT
    assert by_peer(certificate(uris=("https://a.example/x",))) == "https://a.example/x"
    assert by_peer(certificate(dns_names=("agent.a.example",))) == "agent.a.example"
    assert by_peer(certificate(uris=(AGENT,)), trust_domains=frozenset({"example.org"})) == AGENT


@pytest.mark.parametrize(
    "peer",
    (
        certificate(),
        certificate(uris=(AGENT, AGENT)),
        certificate(uris=(AGENT, "spiffe://example.org/other")),
        certificate(uris=(AGENT, "https://a.example/x")),
        certificate(uris=("",), dns_names=("a.example",)),
        certificate(uris=("spiffe://example.org/a/../b",), dns_names=("a.example",)),
        certificate(uris=("SpIfFe://example.org/agent",)),
        certificate(uris=("spiffe:agent",)),
        certificate(uris=("a.example",)),
        certificate(uris=(ACCOUNT,)),
        certificate(uris=("https://a.example/\x00",)),
        certificate(uris=("https://a.example/ x",)),
        certificate(uris=(f"https://a.example/{'x' * 255}",)),
        certificate(dns_names=("a.example", "b.example")),
        certificate(dns_names=("*.example",)),
        certificate(dns_names=("a.example.",)),
        certificate(dns_names=("A.example",)),
        certificate(dns_names=("a..example",)),
        certificate(dns_names=(".example",)),
        certificate(dns_names=("-a.example",)),
        certificate(dns_names=("a.example\x00.evil.example",)),
        certificate(dns_names=("a%2eexample",)),
        certificate(dns_names=("a.example:443",)),
        certificate(dns_names=("user@a.example",)),
        certificate(dns_names=("b\u00fccher.example",)),
        certificate(dns_names=(AGENT,)),
    ),
    ids=repr,
)
def test_a_certificate_that_does_not_name_one_workload_is_refused(peer: Peer) -> None:
    with pytest.raises(IdentityError) as caught:
        by_peer(peer)
    assert caught.value.reason_code == "workload_invalid"


def test_trust_domains_leave_no_other_names() -> None:
    for peer in (
        certificate(uris=("spiffe://partner.example/agent",)),
        certificate(uris=("https://example.org/agent",)),
        certificate(dns_names=("example.org",)),
    ):
        with pytest.raises(IdentityError) as caught:
            by_peer(peer, trust_domains=frozenset({"example.org"}))
        assert caught.value.reason_code == "workload_invalid"


# Both, or neither


def test_who_shows_nothing_is_refused_only_where_something_must_be_shown() -> None:
    assert by_peer(Peer()) == ""
    with pytest.raises(IdentityError) as caught:
        by_peer(Peer(), required=True)
    assert caught.value.reason_code == "workload_missing"


def test_certificate_and_token_must_name_the_same_workload(parties: Parties) -> None:
    workloads = Workloads(required=True, certificates=True, tokens=parties.tokens)
    peer = certificate(uris=(AGENT,))

    def both(token: str) -> str:
        shown = Credentials(bearer=None, workload_token=token, peer=peer)
        return asyncio.run(workloads.workload_of(shown))

    assert both(parties.svid(parties.spire)) == AGENT
    for token in (
        parties.svid(parties.spire, f"{AGENT}/1"),
        parties.account_token(parties.cluster),
        "malformed",
    ):
        with pytest.raises(IdentityError) as caught:
            both(token)
        assert caught.value.reason_code == "workload_invalid"


def test_a_certificate_is_not_looked_at_where_certificates_name_nobody(parties: Parties) -> None:
    workloads = Workloads(required=True, certificates=False, tokens=parties.tokens)
    peer = certificate(uris=("spiffe://example.org/other",))
    with pytest.raises(IdentityError) as caught:
        asyncio.run(workloads.workload_of(Credentials(bearer=None, peer=peer)))
    assert caught.value.reason_code == "workload_missing"
    shown = Credentials(bearer=None, workload_token=parties.svid(parties.spire), peer=peer)
    assert asyncio.run(workloads.workload_of(shown)) == AGENT


def test_the_same_users_token_by_two_workloads_gives_two_subjects(parties: Parties) -> None:
    principals = Principals(
        parties.users_identity(),
        workloads=Workloads(required=False, certificates=True, tokens=parties.tokens),
        routes=Routes(),
    )
    token = parties.users.token("tenant_acme", "alice")

    def by(workload: str | None, sha256: str) -> Subject:
        peer = Peer(certificate_sha256=sha256, uris=(workload,) if workload else ())
        return asyncio.run(principals.resolve(Credentials(bearer=token, peer=peer)))

    seen = [by(AGENT, "c" * 43), by(f"{AGENT}/2", "d" * 43), by(None, ""), by(AGENT, "c" * 43)]
    assert [each.workload for each in seen] == [AGENT, f"{AGENT}/2", "", AGENT]
    assert [each.certificate_sha256 for each in seen] == ["c" * 43, "d" * 43, "", "c" * 43]
    assert {(each.tenant, each.actor) for each in seen} == {("tenant_acme", "alice")}


def test_a_workload_is_nobody_without_an_actor(parties: Parties) -> None:
    principals = Principals(
        parties.users_identity(),
        workloads=Workloads(required=False, certificates=True, tokens=parties.tokens),
        routes=Routes(listeners={"acme": "tenant_acme"}),
    )
    peer = Peer(listener="acme", certificate_sha256="c" * 43, uris=(AGENT,))
    with pytest.raises(IdentityError) as caught:
        asyncio.run(principals.resolve(Credentials(bearer=None, peer=peer)))
    assert caught.value.reason_code == "token_missing"


def test_a_single_tenant_can_ask_for_a_workload_too(parties: Parties) -> None:
    principals = Principals(
        SingleTenant(actor="local", roles=(), scopes=()),
        workloads=Workloads(required=True, certificates=False, tokens=parties.tokens),
        routes=Routes(),
    )
    shown = Credentials(bearer=None, workload_token=parties.svid(parties.spire))
    subject = asyncio.run(principals.resolve(shown))
    assert (subject.tenant, subject.workload) == ("default", AGENT)
    with pytest.raises(IdentityError) as caught:
        asyncio.run(principals.resolve(Credentials(bearer=None)))
    assert caught.value.reason_code == "workload_missing"
