"""Delegations at their edges: one link and the most, the longest name, the first second."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from pdp.canonical import JsonObject
from pdp.identity.delegation import (
    LEEWAY_SECONDS,
    MAX_LINKS,
    DelegatedIdentity,
    claims_of,
    subject_of,
)
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.subject import Link, Subject
from tests.delegation.test_tokens import (
    NOW,
    SUBJECT,
    Clock,
    claims,
    identity,
    issuer,
    refused,
    resolve,
    token,
)

BY_THE_USER = SUBJECT.delegation
assert BY_THE_USER is not None
EMPTY = replace(
    SUBJECT,
    roles=(),
    scopes=(),
    organisation="",
    team="",
    session="",
    issuer="",
    delegation=replace(BY_THE_USER, root_token_id="", arguments={}),
)


def of_links(number: int) -> Subject:
    links = tuple(Link(f"d{n}", f"agent-{n}", (), NOW + 900 - n) for n in range(number))
    assert BY_THE_USER is not None
    return replace(
        SUBJECT,
        token_id=links[-1].id,
        expires_at=float(links[-1].expires_at),
        delegation=replace(BY_THE_USER, links=links),
    )


def said(subject: Subject) -> JsonObject:
    return claims_of(subject, issuer="agent-pdp", issued_at=NOW)


def is_malformed(payload: JsonObject) -> bool:
    try:
        subject_of(payload)
    except IdentityError as error:
        return error.reason_code == "token_invalid"
    return False


def test_a_delegation_says_this_and_nothing_else() -> None:
    """Other sidecars, of other versions, read it."""
    assert claims() == {
        "iss": "agent-pdp",
        "aud": "agent-pdp",
        "iat": NOW,
        "nbf": NOW,
        "exp": NOW + 60,
        "jti": "d2",
        "sub": "user-7",
        "act": {"sub": "worker", "act": {"sub": "planner"}},
        "scopes": ["orders:read", "a b"],
        "roles": ["support_agent"],
        "authorization_details": [
            {
                "type": "tool_delegation",
                "actions": ["orders.read", "orders.update"],
                "arguments": {
                    "orders.update": {"amount": [{"max": 500}, {"one_of": [True, 1, 1.5, "x"]}]}
                },
            }
        ],
        "tctx": {
            "tenant": "acme",
            "organisation": "acme-inc",
            "team": "sales",
            "session": "s1",
            "issuer": "https://id.example",
            "root_token_id": "root",
            "ledger": "here",
            "links": [
                {"id": "d1", "exp": NOW + 300, "budget": [["tools", "calls", 10]]},
                {"id": "d2", "exp": NOW + 60, "budget": []},
            ],
        },
    }


def test_a_user_of_whom_little_is_known_can_delegate() -> None:
    assert subject_of(said(EMPTY)) == EMPTY


@pytest.mark.parametrize("number", (1, 2, 3, MAX_LINKS))
def test_a_chain_of_one_and_of_the_most_comes_back(number: int) -> None:
    subject = of_links(number)
    assert subject_of(said(subject)) == subject
    assert is_malformed(said(of_links(MAX_LINKS + 1)))


@pytest.mark.parametrize("wrong", ([], ["d1"], [{}], [{"id": "d1", "exp": 1, "budget": []}] * 3))
def test_agents_and_links_are_as_many(wrong: Any) -> None:
    context: Any = claims()["tctx"]
    assert is_malformed(claims(tctx={**context, "links": wrong}))


def test_names_are_one_character_at_least_and_no_longer_than_names() -> None:
    for name in ("x", "x" * 255):
        assert subject_of(said(replace(SUBJECT, actor=name))).actor == name
    for name in ("", "x" * 256, "a\nb"):
        assert is_malformed(said(replace(SUBJECT, actor=name)))


def test_amounts_are_whole_and_one_at_least() -> None:
    for amount in (1, 2):
        links = (Link("d1", "worker", (("tools", "calls", amount),), NOW + 60),)
        assert BY_THE_USER is not None
        subject = replace(SUBJECT, token_id="d1", delegation=replace(BY_THE_USER, links=links))
        assert subject_of(said(subject)) == subject
    context: Any = claims()["tctx"]
    wrong: tuple[Any, ...] = (0, -1, 1.5, "1", True)
    for each in wrong:
        link = {**context["links"][0], "budget": [["tools", "calls", each]]}
        assert is_malformed(claims(tctx={**context, "links": [link, context["links"][1]]}))


def test_what_is_alike_and_of_another_type_is_something_else() -> None:
    detail: Any = claims()["authorization_details"]
    wrong: tuple[Any, ...] = ({"orders.update": {"amount": {}}}, {"orders.update": []}, [], None)
    for arguments in wrong:
        changed = [{**detail[0], "arguments": arguments}]
        assert is_malformed(claims(authorization_details=changed))


def test_its_beginning_may_lie_ahead_by_as_much_as_clocks_differ() -> None:
    clock = Clock()
    clock.now = NOW - LEEWAY_SECONDS
    assert resolve(identity(clock=clock), token()) == SUBJECT
    clock.now = NOW - LEEWAY_SECONDS - 0.001
    refused(token(), by=identity(clock=clock))


def test_a_delegation_that_is_known_is_verified_once_while_its_keys_last() -> None:
    verified: list[str] = []
    version: list[int] = [1]
    usual = issuer()

    def verify(text: str) -> JsonObject:
        verified.append(text)
        return usual.verify(text)

    resolver = identity(issuer(verify=verify, keys_version=lambda: version[0]))
    other = token(said(of_links(1)))
    for _ in range(3):
        assert resolve(resolver, token()) == SUBJECT
        assert resolve(resolver, other) == of_links(1)
    assert verified == [token(), other]
    version[0] = 2
    resolve(resolver, token())
    resolve(resolver, token())
    assert verified == [token(), other, token()]


def test_of_the_delegations_that_are_known_the_one_used_last_stays() -> None:
    verified: list[str] = []
    usual = issuer()

    def verify(text: str) -> JsonObject:
        verified.append(text)
        return usual.verify(text)

    clock = Clock()
    resolver = DelegatedIdentity(identity(), (issuer(verify=verify),), clock=clock, cache_entries=2)
    first, second, third = (token(said(of_links(number))) for number in (1, 2, 3))
    for each in (first, second, first, third, first):
        resolve(resolver, each)
    assert verified == [first, second, third]
    resolve(resolver, second)
    assert verified[-1] == second


def test_who_is_asked_whether_it_still_counts_is_asked_about_this_one() -> None:
    asked: list[Subject] = []
    resolver = identity(issuer(check=asked.append))
    for _ in range(2):
        resolve(resolver, token())
    assert asked == [SUBJECT, SUBJECT]


def test_a_tenant_that_an_issuer_may_not_name_is_told_with_the_actor() -> None:
    resolver = identity(issuer(tenants=frozenset({"globex"})))
    with pytest.raises(IdentityError) as caught:
        resolve(resolver, token())
    assert (caught.value.reason_code, caught.value.actor) == ("tenant_unknown", "user-7")


def test_what_is_no_delegation_goes_on_as_it_came() -> None:
    seen: list[Credentials] = []

    class Otherwise:
        async def resolve(self, credentials: Credentials) -> Subject:
            seen.append(credentials)
            return SUBJECT

    resolver = DelegatedIdentity(Otherwise(), (issuer(),))
    shown = Credentials(bearer="a.b.c", route_tenant="acme")
    asyncio.run(resolver.resolve(shown))
    assert seen == [shown]


@pytest.mark.parametrize("name", (7, None, ["agent-pdp"], {"agent-pdp": 1}, "", "other"))
def test_a_delegation_is_of_one_known_issuer_by_its_name(name: Any) -> None:
    refused(token(claims(iss=name)))


def test_a_token_that_is_too_long_or_odd_is_not_read() -> None:
    refused(f"{token()}{'A' * 100_000}")
    refused(f"{token()}\u00e9")
