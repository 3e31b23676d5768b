"""Delegations as they are shown: what was signed to the letter, or nobody."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pdp.canonical import JsonObject
from pdp.delegating import issuer_of
from pdp.identity.delegation import (
    TYPE,
    DelegatedIdentity,
    DelegationIssuer,
    claims_of,
    subject_of,
)
from pdp.identity.resolver import Credentials, IdentityError, SingleTenant
from pdp.identity.subject import Delegation, Link, Subject
from pdp.permit.claims import Permit, PermitError
from pdp.permit.issuer import PermitIssuer
from pdp.permit.key_file import PublicKeyFile
from pdp.permit.ring import KeyRing, LiveKeys
from pdp.permit.signing import SigningKey
from pdp.permit.verifier import PermitVerifier
from pdp.testing import TokenIssuer

NOW = 1_795_521_600
KEY = SigningKey.generate()
SUBJECT = Subject(
    tenant="acme",
    actor="user-7",
    roles=("support_agent",),
    scopes=("orders:read", "a b"),
    organisation="acme-inc",
    team="sales",
    session="s1",
    issuer="https://id.example",
    token_id="d2",
    expires_at=NOW + 60.0,
    delegation=Delegation(
        links=(
            Link("d1", "planner", (("tools", "calls", 10),), NOW + 300),
            Link("d2", "worker", (), NOW + 60),
        ),
        tools=frozenset({"orders.read", "orders.update"}),
        arguments={"orders.update": {"amount": [{"max": 500}, {"one_of": [True, 1, 1.5, "x"]}]}},
        root_token_id="root",
        ledger="here",
    ),
)


class Clock:
    def __init__(self) -> None:
        self.now: float = NOW

    def __call__(self) -> float:
        return self.now


def issuer(key: SigningKey = KEY, **fields: Any) -> DelegationIssuer:
    usual = issuer_of("agent-pdp", key.public_set, keys_version=lambda: key)
    return replace(usual, **fields)


def identity(*issuers: DelegationIssuer, clock: Clock | None = None) -> DelegatedIdentity:
    otherwise = SingleTenant(actor="local", roles=(), scopes=())
    return DelegatedIdentity(otherwise, issuers or (issuer(),), clock=clock or Clock())


def claims(**changes: Any) -> JsonObject:
    return {**claims_of(SUBJECT, issuer="agent-pdp", issued_at=NOW), **changes}


def token(payload: JsonObject | None = None, *, key: SigningKey = KEY, kind: str = TYPE) -> str:
    return key.sign(claims() if payload is None else payload, kind=kind)


def resolve(resolver: DelegatedIdentity, bearer: str | None) -> Subject:
    return asyncio.run(resolver.resolve(Credentials(bearer=bearer)))


def refused(
    bearer: str, code: str = "token_invalid", *, by: DelegatedIdentity | None = None
) -> None:
    with pytest.raises(IdentityError) as caught:
        resolve(by or identity(), bearer)
    assert caught.value.reason_code == code


def test_what_was_delegated_comes_back_to_the_letter() -> None:
    found = resolve(identity(), token())
    assert found == SUBJECT
    assert found.token_ids == ("root", "d1", "d2")
    assert found.scopes == ("orders:read", "a b")


def test_every_other_credential_is_left_to_the_usual_resolver() -> None:
    for bearer in (None, "", "local", "a.b.c", TokenIssuer().token("acme", "user-7")):
        assert resolve(identity(), bearer).tenant == "default"


def test_the_chain_reads_as_rfc_8693_says() -> None:
    assert claims()["act"] == {"sub": "worker", "act": {"sub": "planner"}}


# Forgeries


def changed(change: Callable[[dict[str, Any]], object]) -> JsonObject:
    payload = copy.deepcopy(claims())
    change(payload)
    return payload


def resigned_by_nobody(payload: JsonObject) -> str:
    """The payload under the signature of the genuine token."""
    header, _, signature = token().split(".")
    body = base64.urlsafe_b64encode(json.dumps(payload).encode()).rstrip(b"=").decode()
    return f"{header}.{body}.{signature}"


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another agent": lambda c: c["act"].update(sub="admin"),
    "no parent agent": lambda c: c["act"].pop("act"),
    "a removed link": lambda c: c["tctx"]["links"].pop(0),
    "a longer time": lambda c: c.update(exp=NOW + 9_000),
    "another tenant": lambda c: c["tctx"].update(tenant="globex"),
    "another actor": lambda c: c.update(sub="root"),
    "more tools": lambda c: c["authorization_details"][0]["actions"].append("refunds.create"),
    "fewer rules": lambda c: c["authorization_details"][0].update(arguments={}),
    "more budget": lambda c: c["tctx"]["links"][0].update(budget=[["tools", "calls", 11]]),
    "more roles": lambda c: c["roles"].append("admin"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_what_was_changed_after_it_was_signed_is_refused(forgery: str) -> None:
    refused(resigned_by_nobody(changed(FORGERIES[forgery])))
    other = SigningKey.generate()
    refused(token(changed(FORGERIES[forgery]), key=other))


MALFORMED: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown claim": lambda c: c.update(cnf={}),
    "an unknown detail": lambda c: c["authorization_details"][0].update(locations=["x"]),
    "two details": lambda c: c["authorization_details"].append(c["authorization_details"][0]),
    "another kind of detail": lambda c: c["authorization_details"][0].update(type="tool_call"),
    "an unknown context": lambda c: c["tctx"].update(scope="all"),
    "an unknown member of act": lambda c: c["act"].update(iss="x"),
    "more agents than links": lambda c: c.update(act={"sub": "a", "act": c["act"]}),
    "fewer agents than links": lambda c: c["act"].pop("act"),
    "no agent": lambda c: c.update(act=None),
    "no links": lambda c: (c["tctx"].update(links=[]), c.update(act={})),
    "an end that is not the last link's": lambda c: c.update(exp=NOW + 61),
    "an id that is not the last link's": lambda c: c.update(jti="d1"),
    "a child that outlasts its parent": lambda c: (
        c.update(exp=NOW + 301),
        c["tctx"]["links"][1].update(exp=NOW + 301),
    ),
    "an end as a text": lambda c: c.update(exp=str(NOW + 60)),
    "an end as a fraction": lambda c: c.update(exp=NOW + 60.5),
    "a beginning as true": lambda c: c.update(iat=True, nbf=True),
    "a beginning apart": lambda c: c.update(nbf=NOW - 1),
    "another audience": lambda c: c.update(aud="tools"),
    "several audiences": lambda c: c.update(aud=["agent-pdp", "tools"]),
    "no tenant": lambda c: c["tctx"].update(tenant=""),
    "a tenant with a slash": lambda c: c["tctx"].update(tenant="acme/x"),
    "no actor": lambda c: c.update(sub=""),
    "roles as a text": lambda c: c.update(roles="admin"),
    "unsorted tools": lambda c: c["authorization_details"][0]["actions"].reverse(),
    "a tool twice": lambda c: c["authorization_details"][0]["actions"].append("orders.update"),
    "rules that are none": lambda c: c["authorization_details"][0].update(arguments=[]),
    "an amount as true": lambda c: c["tctx"]["links"][0].update(budget=[["tools", "calls", True]]),
    "an amount of zero": lambda c: c["tctx"]["links"][0].update(budget=[["tools", "calls", 0]]),
    "an amount below zero": lambda c: c["tctx"]["links"][0].update(budget=[["tools", "calls", -1]]),
    "an amount as a fraction": lambda c: c["tctx"]["links"][0].update(budget=[["t", "c", 1.5]]),
    "a slice of two": lambda c: c["tctx"]["links"][0].update(budget=[["tools", "calls"]]),
    "a control character": lambda c: c["act"].update(sub="a\nb"),
    "a long id": lambda c: (c.update(jti="d" * 41), c["tctx"]["links"][1].update(id="d" * 41)),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_what_is_not_wholly_a_delegation_is_none_even_signed(fault: str) -> None:
    refused(token(changed(MALFORMED[fault])))


@pytest.mark.parametrize("claim", sorted(claims()))
def test_no_claim_may_be_missing(claim: str) -> None:
    refused(token(changed(lambda c: c.pop(claim))))


def test_a_chain_that_is_too_long_is_refused() -> None:
    delegation = SUBJECT.delegation
    assert delegation is not None
    links = tuple(Link(f"d{n}", "worker", (), NOW + 60) for n in range(17))
    long = replace(SUBJECT, token_id="d16", delegation=replace(delegation, links=links))
    refused(token(claims_of(long, issuer="agent-pdp", issued_at=NOW)))
    most = replace(long, token_id="d15", delegation=replace(delegation, links=links[:16]))
    assert subject_of(claims_of(most, issuer="agent-pdp", issued_at=NOW)) == most


@pytest.mark.parametrize("name", ("", "evil", "AGENT-PDP", 5, None))
def test_only_issuers_that_are_trusted_count(name: Any) -> None:
    refused(token(changed(lambda c: c.update(iss=name, aud=name))))


@pytest.mark.parametrize(
    "kind", ("tool-permit+jwt", "JWT", "at+jwt", "TOOL-DELEGATION+JWT", "application/" + TYPE)
)
def test_another_type_is_no_delegation_even_by_the_right_key(kind: str) -> None:
    if kind.lower().endswith(TYPE):
        refused(token(kind=kind))
    else:  # nobody has looked at it
        assert resolve(identity(), token(kind=kind)).delegation is None


def test_a_permit_is_no_delegation_and_a_delegation_is_no_permit() -> None:
    permit = PermitIssuer(KEY, issuer="agent-pdp").sign(
        Permit(
            id="p1",
            issuer="agent-pdp",
            audience="tools",
            tenant="acme",
            actor="user-7",
            tool="orders.read",
            arguments_sha256="0" * 64,
            scopes=(),
            transaction="t",
            decision_id="d",
            policy_revision="r",
            ledger="here",
            issued_at=NOW,
            expires_at=NOW + 60,
        )
    )
    assert resolve(identity(), permit.token).delegation is None
    refused(token(permit.to_claims()))
    verifier = PermitVerifier(KEY.public_set, issuer="agent-pdp", audience="tools")
    assert verifier.authenticate(permit.token) == permit
    for forged in (token(), token(permit.to_claims())):
        with pytest.raises(PermitError) as caught:
            verifier.authenticate(forged)
        assert caught.value.reason_code == "permit_invalid"


def test_an_identity_providers_token_is_no_delegation_whatever_it_says() -> None:
    idp = TokenIssuer(issuer="agent-pdp")
    body = json.dumps(claims()).encode()
    refused(idp.sign(body, header={"typ": TYPE}))
    refused(idp.sign(body, header={"typ": TYPE, "kid": KEY.kid}))


@pytest.mark.parametrize(
    "header",
    (
        {"alg": "none"},
        {"alg": "HS256"},
        {"crit": ["exp"]},
        {"jwk": {"kty": "OKP"}},
        {"kid": "unknown"},
        {"kid": 5},
    ),
)
def test_a_header_is_what_it_must_be_and_no_more(header: JsonObject) -> None:
    _, body, signature = token().split(".")
    members = {"alg": "EdDSA", "kid": KEY.kid, "typ": TYPE, **header}
    encoded = base64.urlsafe_b64encode(json.dumps(members).encode()).rstrip(b"=").decode()
    refused(f"{encoded}.{body}.{signature}")


@pytest.mark.parametrize(
    "broken", ("{}.{}", "{}.{}.", "{}.{}.{}.x", "{}..{}", "{}.!.{}", "{}.{}=.{}")
)
def test_what_is_no_token_of_three_parts_is_refused(broken: str) -> None:
    refused(broken.format(*token().split(".")))


def test_what_is_too_long_is_refused() -> None:
    refused(token() + "A" * 9_000)


# Time


def test_a_delegation_ends_to_the_second_however_often_it_was_seen() -> None:
    clock = Clock()
    resolver = identity(clock=clock)
    bearer = token()
    clock.now = NOW + 59.999
    assert resolve(resolver, bearer) == SUBJECT
    clock.now = NOW + 60
    refused(bearer, "token_expired", by=resolver)
    refused(bearer, "token_expired", by=identity(clock=clock))


def test_a_delegation_from_the_future_waits_but_for_clocks_that_differ() -> None:
    clock = Clock()
    clock.now = NOW - 31
    refused(token(), by=identity(clock=clock))
    clock.now = NOW - 29
    assert resolve(identity(clock=clock), token()) == SUBJECT


# Keys


def test_a_key_that_was_taken_away_takes_what_was_remembered_with_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    keys = LiveKeys(path, make=True)
    resolver = identity(issuer_of("agent-pdp", keys, keys_version=lambda: keys.ring))
    bearer = keys.sign(claims(), kind=TYPE)
    assert resolve(resolver, bearer) == SUBJECT
    KeyRing.generate().write(path)
    asyncio.run(keys.look())
    refused(bearer, by=resolver)


def test_another_domains_sidecars_name_the_tenants_that_they_may(tmp_path: Path) -> None:
    theirs = SigningKey.generate()
    path = tmp_path / "theirs.json"
    path.write_text(theirs.public_set.to_jwks())
    file = PublicKeyFile(path)

    def trusting(*tenants: str) -> DelegatedIdentity:
        partner = issuer_of(
            "partner", file, keys_version=lambda: file.keys, tenants=frozenset(tenants)
        )
        return identity(issuer(), partner)

    payload = changed(lambda c: c.update(iss="partner", aud="partner"))
    assert resolve(trusting("acme"), token(payload, key=theirs)) == SUBJECT
    refused(token(payload, key=theirs), "tenant_unknown", by=trusting("globex"))
    # Neither signs in the other's name.
    refused(token(payload), by=trusting("acme"))
    refused(token(key=theirs), by=trusting("acme"))


def test_another_domains_keys_are_read_again_when_they_change(tmp_path: Path) -> None:
    before, after = SigningKey.generate(), SigningKey.generate()
    path = tmp_path / "theirs.json"
    path.write_text(before.public_set.to_jwks())
    file = PublicKeyFile(path)
    resolver = identity(issuer_of("agent-pdp", file, keys_version=lambda: file.keys))
    assert resolve(resolver, token(key=before)) == SUBJECT
    path.write_text("{}")
    asyncio.run(file.look())
    assert resolve(resolver, token(key=before)) == SUBJECT
    path.write_text(after.public_set.to_jwks())
    asyncio.run(file.look())
    refused(token(key=before), by=resolver)
    assert resolve(resolver, token(key=after)) == SUBJECT


@pytest.mark.parametrize("content", (None, "{}", "no JSON"))
def test_keys_that_can_not_be_read_at_the_start_say_so(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "theirs.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PermitError, match=r"theirs\.json"):
        PublicKeyFile(path)


def test_nothing_of_a_token_shows_in_an_error() -> None:
    forged = resigned_by_nobody(changed(FORGERIES["another agent"]))
    with pytest.raises(IdentityError) as caught:
        resolve(identity(), forged)
    assert not any(part in str(caught.value) for part in (*forged.split("."), "admin", "acme"))
