"""Identity at its edges: the last second, the longest name, the second route, the next key."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pdp.identity.claims import MAX_NAME_LENGTH, MAX_NAMES
from pdp.identity.jwks_file import JwksFile
from pdp.identity.key_source import KeySourceError
from pdp.identity.keys import MAX_KID_LENGTH, IssuerKey
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.signature import MAX_TOKEN_LENGTH
from pdp.identity.subject import Subject
from pdp.identity.tenancy import Routes, Source, TenantRule, WorkloadRoute, agreed
from pdp.identity.tokens import MAX_TIME, Issuer, TokenIdentity
from pdp.testing import TokenIssuer

NOW = 1_800_000_000.0


class Counted:
    """Keys, and how often they were asked for."""

    def __init__(self, keys: Mapping[str, IssuerKey]) -> None:
        self.keys = dict(keys)
        self.asked: list[str] = []
        self.are_away = False

    async def find(self, kid: str) -> IssuerKey | None:
        self.asked.append(kid)
        if self.are_away:
            raise KeySourceError("keys_unavailable", "They are away.")
        return self.keys.get(kid)


class World:
    def __init__(self, folder: Path) -> None:
        self.now = NOW
        self.idp = TokenIssuer(clock=lambda: NOW)
        jwks = self.idp.write_jwks(folder / "jwks.json")
        self.keys = Counted(JwksFile(jwks).read_first())

    def identity(self, *, entries: int = 10, **changes: Any) -> TokenIdentity:
        usual: dict[str, Any] = {
            "issuer": self.idp.issuer,
            "audiences": frozenset({self.idp.audience}),
            "types": frozenset({"jwt"}),
            "algorithms": frozenset({"EdDSA"}),
            "keys": self.keys,
            "tenant": TenantRule(claim="tenant_id"),
        }
        issuer = Issuer(**{**usual, **changes})
        return TokenIdentity([issuer], clock=lambda: self.now, cache_entries=entries)

    def resolve(self, identity: TokenIdentity, token: str, *, route: str = "") -> Subject:
        return asyncio.run(identity.resolve(Credentials(bearer=token, route_tenant=route)))

    def code(self, identity: TokenIdentity, token: str, **given: Any) -> str:
        try:
            self.resolve(identity, token, **given)
        except IdentityError as error:
            return error.reason_code
        return "ok"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_clocks_may_differ_by_the_leeway_and_no_more_at_either_end(world: World) -> None:
    for leeway in (0, 30):
        token = world.idp.token("acme", "alice", lifetime_seconds=60, nbf=int(NOW))
        for now, expected in (
            (NOW + 60 + leeway - 0.001, "ok"),
            (NOW + 60 + leeway, "token_expired"),
            (NOW - leeway, "ok"),
            (NOW - leeway - 0.001, "token_invalid"),
        ):
            world.now = now  # each by an identity that remembers nothing
            assert world.code(world.identity(leeway_seconds=leeway), token) == expected


@pytest.mark.parametrize("claim", ("nbf", "iat"))
def test_a_token_counts_from_both_of_its_beginnings_on(world: World, claim: str) -> None:
    begins: dict[str, Any] = {claim: int(NOW) + 31}
    later = world.idp.token("acme", "alice", **begins)
    assert world.code(world.identity(), later) == "token_invalid"


def test_a_time_is_at_most_the_last_that_there_is(world: World) -> None:
    assert world.code(world.identity(), world.idp.token("acme", "alice", exp=MAX_TIME)) == "ok"
    beyond = world.idp.token("acme", "alice", exp=MAX_TIME * 2)
    assert world.code(world.identity(), beyond) == "token_invalid"


def test_an_actors_name_and_its_prefix_are_together_as_long_as_a_name(world: World) -> None:
    identity = world.identity(actor_prefix="corp/")
    longest = "a" * (MAX_NAME_LENGTH - len("corp/"))
    assert world.resolve(identity, world.idp.token("acme", longest)).actor == f"corp/{longest}"
    assert world.code(identity, world.idp.token("acme", f"{longest}a")) == "token_invalid"


def test_a_tokens_id_is_the_subjects_and_a_short_text(world: World) -> None:
    identity = world.identity()
    assert world.resolve(identity, world.idp.token("acme", "alice", jti="id-1")).token_id == "id-1"
    assert world.resolve(identity, world.idp.token("acme", "alice")).token_id == ""
    for wrong in ("x" * (MAX_NAME_LENGTH + 1), "a\nb", 7, ["id"]):
        assert world.code(identity, world.idp.token("acme", "alice", jti=wrong)) == "token_invalid"


def test_roles_are_as_many_as_may_be_and_scopes_are_parted_by_spaces_alone(world: World) -> None:
    identity = world.identity()
    many = [f"role-{number}" for number in range(MAX_NAMES)]
    assert len(world.resolve(identity, world.idp.token("acme", "a", roles=many)).roles) == MAX_NAMES
    assert world.code(identity, world.idp.token("acme", "a", roles=[*many, "x"])) == "token_invalid"
    spaced = world.idp.token("acme", "a", scope="one  two")
    assert world.resolve(identity, spaced).scopes == ("one", "two")
    tab = world.idp.token("acme", "a", scope="one\ttwo")
    assert world.code(identity, tab) == "token_invalid"


def test_one_token_is_of_the_tenant_of_the_route_that_it_comes_by(world: World) -> None:
    identity = world.identity(tenant=TenantRule(by_route=True))
    token = world.idp.token(None, "alice")
    for route in ("acme", "globex", "globex", "acme"):
        assert world.resolve(identity, token, route=route).tenant == route
    assert world.code(identity, token) == "tenant_missing"


def test_a_token_that_is_known_is_not_verified_again_while_its_key_counts(world: World) -> None:
    identity = world.identity()
    token = world.idp.token("acme", "alice")
    found = world.resolve(identity, token)
    assert all(world.resolve(identity, token) is found for _ in range(3))
    assert set(world.keys.asked) == {world.idp.kid}
    world.keys.keys.clear()
    assert world.code(identity, token) == "token_invalid"


def test_a_token_that_is_known_falls_when_another_key_has_its_keys_name(
    world: World, tmp_path: Path
) -> None:
    identity = world.identity()
    token = world.idp.token("acme", "alice")
    world.resolve(identity, token)
    (tmp_path / "other").mkdir()
    other = World(tmp_path / "other")
    world.keys.keys = other.keys.keys
    assert world.code(identity, token) == "token_invalid"


def test_what_was_used_last_is_forgotten_last(world: World) -> None:
    identity = world.identity(entries=2)
    first, second, third = (world.idp.token("acme", name) for name in ("a", "b", "c"))
    kept = world.resolve(identity, first)
    gone = world.resolve(identity, second)
    assert world.resolve(identity, first) is kept
    world.resolve(identity, third)
    assert world.resolve(identity, first) is kept
    assert world.resolve(identity, second) is not gone


def test_as_many_tokens_are_known_as_there_is_room_for(world: World) -> None:
    identity = world.identity(entries=2)
    tokens = [world.idp.token("acme", name) for name in ("a", "b")]
    found = [world.resolve(identity, token) for token in tokens]
    assert all(
        world.resolve(identity, token) is known for token, known in zip(tokens, found, strict=True)
    )


def test_where_keys_can_not_be_had_nobody_is_let_in_and_it_is_said_so(world: World) -> None:
    world.keys.are_away = True
    assert world.code(world.identity(), world.idp.token("acme", "alice")) == "keys_unavailable"


def test_a_key_id_is_one_character_at_least_and_not_too_long(world: World) -> None:
    payload = b'{"iss":"https://id.example"}'
    (key,) = world.keys.keys.values()
    for kid, is_asked_for in (
        ("", False),
        ("k" * MAX_KID_LENGTH, True),
        ("k" * (MAX_KID_LENGTH + 1), False),
    ):
        world.keys.asked.clear()
        world.keys.keys[kid] = key
        assert world.code(world.identity(), world.idp.sign(payload, header={"kid": kid})) != "ok"
        assert (kid in world.keys.asked) is is_asked_for


def test_a_token_is_read_up_to_its_longest(world: World) -> None:
    def padded(length: int) -> str:
        return world.idp.token("acme", "alice", padding="x" * length)

    spare = (MAX_TOKEN_LENGTH - len(padded(0))) * 3 // 4
    sizes = [spare + more for more in range(-4, 5)]
    tokens = {len(token): token for token in map(padded, sizes)}
    assert any(size <= MAX_TOKEN_LENGTH for size in tokens)
    for size, token in tokens.items():
        expected = "ok" if size <= MAX_TOKEN_LENGTH else "token_invalid"
        assert world.code(world.identity(), token) == expected


@pytest.mark.parametrize("token", ("é.b.c", "a.b", "a.b.c.d", "...", "x" * (MAX_TOKEN_LENGTH + 1)))
def test_what_is_no_token_asks_for_no_key(world: World, token: str) -> None:
    assert world.code(world.identity(), token) == "token_invalid"
    assert world.keys.asked == []


# What a route and an issuer say


def test_a_workload_s_route_says_that_it_is_one(tmp_path: Path) -> None:
    routes = Routes(
        listeners={"acme": "tenant_acme"},
        workloads=[
            WorkloadRoute.of("spiffe://acme/{tenant}/agent", ""),
            WorkloadRoute.of("spiffe://acme/*/agent", "tenant_shared"),
            WorkloadRoute.of("spiffe://other/agent", "tenant_other"),
        ],
    )
    listener = Source("listener", "tenant_acme")
    both = (Source("workload", "globex"), Source("workload", "tenant_shared"))
    assert routes.sources(listener="acme", workload="") == (listener,)
    assert routes.sources(listener="", workload="spiffe://acme/globex/agent") == both
    assert routes.sources(listener="acme", workload="spiffe://acme/globex/agent") == (
        listener,
        *both,
    )
    assert routes.sources(listener="", workload="spiffe://nobody/agent") == ()
    assert routes.sources(listener="", workload="") == ()


def mismatch(rule: TenantRule, tenant: str, organisation: str) -> IdentityError | None:
    try:
        rule.check_still(tenant, organisation=organisation, actor="alice")
    except IdentityError as error:
        return error
    return None


def test_what_an_issuer_would_say_by_now_is_held_against_what_it_said() -> None:
    mapped = TenantRule(claim="org", organisations={"org-1": "acme"})
    assert mismatch(mapped, "acme", "org-1") is None
    moved = mismatch(mapped, "globex", "org-1")
    assert moved is not None
    assert (moved.reason_code, moved.actor) == ("tenant_mismatch", "alice")
    assert moved.sources == (("token", "globex"), ("issuer", "acme"))
    gone = mismatch(mapped, "acme", "org-2")
    assert gone is not None
    assert (gone.reason_code, gone.actor) == ("tenant_unknown", "alice")


def test_an_issuer_without_organisations_is_held_to_its_tenants() -> None:
    for rule in (TenantRule(claim="t"), TenantRule(by_route=True), TenantRule(fixed="acme")):
        assert mismatch(rule, "acme", "") is None
    only = TenantRule(claim="t", tenants=frozenset({"acme"}))
    assert mismatch(only, "acme", "whatever") is None
    refused = mismatch(only, "globex", "acme")
    assert refused is not None
    assert refused.reason_code == "tenant_unknown"
    fixed = mismatch(TenantRule(fixed="acme"), "globex", "")
    assert fixed is not None
    assert fixed.reason_code == "tenant_mismatch"


def test_where_nobody_says_anything_there_is_no_tenant() -> None:
    assert agreed(()) == ""
    assert agreed((Source("listener", "acme"), Source("workload", "acme"))) == "acme"


def test_only_so_many_workloads_are_remembered() -> None:
    routes = Routes(workloads=[WorkloadRoute.of("spiffe://acme/{tenant}/agent", "")])
    for number in range(1_100):
        assert routes.sources(listener="", workload=f"spiffe://acme/t{number}/agent")
    remembered: Any = routes._tenants_of
    assert remembered.cache_info().currsize == 1_024
