"""Whose call it is comes from a verified token, or the call is refused."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwk, jws

from pdp import base64url
from pdp.budget.bounds import check_account
from pdp.canonical import JsonObject
from pdp.identity.jwks_file import JwksFile
from pdp.identity.key_source import FixedKeys, KeySourceError
from pdp.identity.keys import IssuerKey
from pdp.identity.resolver import Credentials, IdentityError, SingleTenant
from pdp.identity.subject import Subject
from pdp.identity.tenancy import TenantRule
from pdp.identity.tokens import Issuer, TokenIdentity
from pdp.rooms import isolate
from pdp.testing import TokenIssuer

NOW = 1_800_000_000.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def idp(clock: Clock) -> TokenIssuer:
    return TokenIssuer(clock=clock)


@pytest.fixture
def keys(idp: TokenIssuer, tmp_path: Path) -> Mapping[str, IssuerKey]:
    return JwksFile(idp.write_jwks(tmp_path / "jwks.json")).read_first()


def trusted(keys: Mapping[str, IssuerKey], **changes: Any) -> Issuer:
    usual: dict[str, Any] = {
        "issuer": "https://id.example",
        "audiences": frozenset({"agent-service"}),
        "types": frozenset({"jwt", "at+jwt"}),
        "algorithms": frozenset({"EdDSA", "ES256", "RS256"}),
        "keys": FixedKeys(keys),
        "tenant": TenantRule(claim="tenant_id"),
    }
    return Issuer(**{**usual, **changes})


@pytest.fixture
def identity(keys: Mapping[str, IssuerKey], clock: Clock) -> TokenIdentity:
    return TokenIdentity([trusted(keys)], clock=clock)


def resolve(identity: TokenIdentity, token: str | None) -> Subject:
    return asyncio.run(identity.resolve(Credentials(bearer=token)))


def refused(identity: TokenIdentity, token: str | None, reason_code: str) -> IdentityError:
    with pytest.raises(IdentityError) as caught:
        resolve(identity, token)
    assert caught.value.reason_code == reason_code
    assert not token or token not in caught.value.message
    return caught.value


def test_a_valid_token_names_tenant_actor_roles_and_scopes(
    identity: TokenIdentity, idp: TokenIssuer
) -> None:
    token = idp.token(
        "tenant_acme", "user-7", roles=["support_agent"], scopes=["orders:write", "mail:send"]
    )
    subject = resolve(identity, token)
    assert subject == Subject(
        expires_at=NOW + 3_600,
        tenant="tenant_acme",
        actor="user-7",
        roles=("support_agent",),
        scopes=("mail:send", "orders:write"),
        issuer="https://id.example",
    )
    assert subject.namespace == "tenant/tenant_acme/"


def test_without_a_token_there_is_no_identity(identity: TokenIdentity) -> None:
    refused(identity, None, "token_missing")
    refused(identity, "", "token_missing")


@pytest.mark.parametrize(
    "garbage",
    ("malformed", "a.b.c", "..", "ey.ey", "é.é.é", "a" * 9000, "\x00", "a b.c.d", "e30.e30.e30"),
)
def test_garbage_is_refused(identity: TokenIdentity, garbage: str) -> None:
    refused(identity, garbage, "token_invalid")


def test_a_wrong_signature_is_refused(identity: TokenIdentity, idp: TokenIssuer) -> None:
    header, payload, signature = idp.token("tenant_acme", "user-7").split(".")
    other = idp.token("tenant_globex", "user-7").split(".")[1]
    refused(identity, f"{header}.{other}.{signature}", "token_invalid")
    refused(identity, f"{header}.{payload}.{'A' * 86}", "token_invalid")
    refused(identity, f"{header}.{payload}.", "token_invalid")


def test_another_key_under_the_same_name_is_refused(identity: TokenIdentity, clock: Clock) -> None:
    imposter = TokenIssuer(clock=clock)
    refused(identity, imposter.token("tenant_acme", "user-7"), "token_invalid")


@pytest.mark.parametrize("spelling", ("none", "None", "nOnE", "NONE", ""))
def test_an_unsigned_token_is_refused(
    identity: TokenIdentity, idp: TokenIssuer, spelling: str
) -> None:
    header = {"alg": spelling, "kid": idp.kid, "typ": "JWT"}
    payload = idp.token("tenant_acme", "user-7").split(".")[1]
    text = base64url.encode(json.dumps(header).encode())
    refused(identity, f"{text}.{payload}.", "token_invalid")


@pytest.mark.parametrize("form", ("raw", "jwk", "x"))
def test_the_public_key_is_not_a_secret_for_hs256(
    identity: TokenIdentity, idp: TokenIssuer, form: str
) -> None:
    public = idp._key.as_dict(private=False)
    secret = {
        "raw": idp._key.public_key.public_bytes_raw(),
        "jwk": json.dumps(public).encode(),
        "x": str(public["x"]).encode(),
    }[form]
    header = {"alg": "HS256", "kid": idp.kid, "typ": "JWT"}
    payload = idp.token("tenant_acme", "user-7").split(".")[1]
    signed = f"{base64url.encode(json.dumps(header).encode())}.{payload}"
    mac = base64url.encode(hmac.new(secret, signed.encode(), hashlib.sha256).digest())
    refused(identity, f"{signed}.{mac}", "token_invalid")


@pytest.mark.parametrize(
    "header",
    (
        {"typ": "tool-permit+jwt"},
        {"typ": "dpop+jwt"},
        {"typ": ""},
        {"kid": "unknown"},
        {"kid": "../../../dev/null"},
        {"kid": "' OR 1=1 --"},
        {"jku": "https://attacker.example/jwks.json"},
        {"x5u": "https://attacker.example/cert.pem"},
    ),
)
def test_a_header_that_is_not_accepted_is_refused_even_when_signed(
    identity: TokenIdentity, idp: TokenIssuer, header: dict[str, Any]
) -> None:
    payload = base64url.decode(idp.token("tenant_acme", "user-7").split(".")[1])
    refused(identity, idp.sign(payload, header=header), "token_invalid")


def test_a_token_can_not_bring_its_own_key(identity: TokenIdentity, clock: Clock) -> None:
    imposter = TokenIssuer(clock=clock)
    public: JsonObject = dict(imposter._key.as_dict(private=False))  # type: ignore[arg-type]
    payload = base64url.decode(imposter.token("tenant_acme", "user-7").split(".")[1])
    refused(identity, imposter.sign(payload, header={"jwk": public}), "token_invalid")


@pytest.mark.parametrize(
    ("claims", "reason_code"),
    (
        ({"iss": "https://attacker.example"}, "token_invalid"),
        ({"iss": None}, "token_invalid"),
        ({"aud": "another-service"}, "token_invalid"),
        ({"aud": ["another-service"]}, "token_invalid"),
        ({"aud": None}, "token_invalid"),
        ({"aud": {"agent-service": 1}}, "token_invalid"),
        ({"exp": None}, "token_invalid"),
        ({"exp": "9999999999"}, "token_invalid"),
        ({"exp": True}, "token_invalid"),
        ({"exp": [9999999999]}, "token_invalid"),
        ({"exp": NOW - 31}, "token_expired"),
        ({"exp": 0}, "token_expired"),
        ({"exp": -1e300}, "token_invalid"),
        ({"nbf": NOW + 31}, "token_invalid"),
        ({"nbf": "now"}, "token_invalid"),
        ({"iat": NOW + 31}, "token_invalid"),
        ({"sub": None}, "token_invalid"),
        ({"sub": ""}, "token_invalid"),
        ({"sub": 7}, "token_invalid"),
        ({"sub": "user\n7"}, "token_invalid"),
        ({"sub": "user\u202e7"}, "token_invalid"),
        ({"sub": "u" * 256}, "token_invalid"),
        ({"jti": {"a": 1}}, "token_invalid"),
        ({"tenant_id": None}, "tenant_missing"),
        ({"tenant_id": ""}, "tenant_missing"),
        ({"tenant_id": ["tenant_acme"]}, "token_invalid"),
        ({"tenant_id": "tenant_acme/../tenant_globex"}, "token_invalid"),
        ({"tenant_id": "tenant acme"}, "token_invalid"),
        ({"tenant_id": "t" * 129}, "token_invalid"),
        ({"roles": {"admin": True}}, "token_invalid"),
        ({"roles": [1]}, "token_invalid"),
        ({"roles": ["r"] * 257}, "token_invalid"),
        ({"scope": 7}, "token_invalid"),
    ),
)
def test_a_claim_that_is_wrong_refuses_the_token(
    identity: TokenIdentity, idp: TokenIssuer, claims: dict[str, Any], reason_code: str
) -> None:
    usual = json.loads(base64url.decode(idp.token("tenant_acme", "user-7").split(".")[1]))
    changed = {name: value for name, value in {**usual, **claims}.items() if value is not None}
    refused(identity, idp.sign(json.dumps(changed).encode()), reason_code)


@pytest.mark.parametrize(
    "payload",
    (
        b'{"iss":"https://id.example","iss":"https://id.example"}',
        b'{"exp":NaN}',
        b'{"exp":1e999}',
        b"[]",
        b"",
        b'{"a":' * 200 + b"1" + b"}" * 200,
    ),
)
def test_claims_that_parsers_read_differently_are_refused(
    identity: TokenIdentity, idp: TokenIssuer, payload: bytes
) -> None:
    refused(identity, idp.sign(payload), "token_invalid")


def test_a_remembered_token_expires_all_the_same(
    identity: TokenIdentity, idp: TokenIssuer, clock: Clock
) -> None:
    token = idp.token("tenant_acme", "user-7", lifetime_seconds=60)
    resolve(identity, token)
    clock.now = NOW + 89
    resolve(identity, token)
    clock.now = NOW + 90
    refused(identity, token, "token_expired")


def test_the_memory_for_tokens_is_bounded(
    keys: Mapping[str, IssuerKey], idp: TokenIssuer, clock: Clock
) -> None:
    identity = TokenIdentity([trusted(keys)], clock=clock, cache_entries=3)
    for number in range(10):
        resolve(identity, idp.token("tenant_acme", f"user-{number}"))
    assert len(identity._tokens._cache) == 3


def test_what_is_remembered_is_not_the_token(identity: TokenIdentity, idp: TokenIssuer) -> None:
    token = idp.token("tenant_acme", "user-7")
    resolve(identity, token)
    assert token not in repr(identity._tokens._cache)
    assert token not in repr(Credentials(bearer=token))


def test_organisations_are_mapped_to_tenants(
    keys: Mapping[str, IssuerKey], idp: TokenIssuer, clock: Clock
) -> None:
    rule = TenantRule(claim="org_id", organisations={"org-1": "tenant_acme"})
    identity = TokenIdentity([trusted(keys, tenant=rule)], clock=clock)
    assert resolve(identity, idp.token(None, "u", org_id="org-1")).tenant == "tenant_acme"
    # A tenant claim beside it is not identity.
    token = idp.token("tenant_globex", "u", org_id="org-1")
    assert resolve(identity, token).tenant == "tenant_acme"
    error = refused(identity, idp.token(None, "u", org_id="org-2"), "tenant_unknown")
    assert error.actor == "u"
    refused(identity, idp.token("tenant_acme", "u"), "tenant_missing")


BELONGING: dict[str, Any] = {
    "organisation_claim": "org",
    "team_claim": "team",
    "session_claim": "sid",
}
"""Which claims say to whom an actor belongs, where an issuer is trusted to say so."""


def test_a_token_may_name_organisation_team_and_session(
    keys: Mapping[str, IssuerKey], idp: TokenIssuer, clock: Clock
) -> None:
    identity = TokenIdentity([trusted(keys, **BELONGING)], clock=clock)
    token = idp.token("tenant_acme", "u", org="ACME Group", team="Rücksendungen", sid="s" * 255)
    subject = resolve(identity, token)
    assert subject.organisation == "ACME Group"
    assert subject.team == "Rücksendungen"
    assert subject.session == "s" * 255


@pytest.mark.parametrize("nothing", ({}, {"org": "", "team": "", "sid": ""}))
def test_a_token_need_not_name_them(
    nothing: dict[str, Any], keys: Mapping[str, IssuerKey], idp: TokenIssuer, clock: Clock
) -> None:
    identity = TokenIdentity([trusted(keys, **BELONGING)], clock=clock)
    subject = resolve(identity, idp.token("tenant_acme", "u", **nothing))
    assert (subject.organisation, subject.team, subject.session) == ("", "", "")


def test_claims_that_are_not_configured_name_nothing(
    identity: TokenIdentity, idp: TokenIssuer
) -> None:
    told: dict[str, Any] = {
        "org": "acme",
        "organisation": "acme",
        "team": "a",
        "sid": "s",
        "session": "s",
    }
    subject = resolve(identity, idp.token("tenant_acme", "u", **told))
    assert (subject.organisation, subject.team, subject.session) == ("", "", "")


@pytest.mark.parametrize(
    "odd", (7, 0, True, False, 1.5, ["a"], [], {"id": "a"}, "a\nb", "a\u202eb")
)
@pytest.mark.parametrize("claim", ("org", "team", "sid"))
def test_a_team_that_is_no_short_text_refuses_the_token(
    claim: str, odd: Any, keys: Mapping[str, IssuerKey], idp: TokenIssuer, clock: Clock
) -> None:
    identity = TokenIdentity([trusted(keys, **BELONGING)], clock=clock)
    refused(identity, idp.token("tenant_acme", "u", **{claim: odd}), "token_invalid")


@pytest.mark.parametrize(("claim", "longest"), (("org", 128), ("team", 128), ("sid", 255)))
def test_what_is_named_is_no_longer_than_ledgers_take(
    claim: str, longest: int, keys: Mapping[str, IssuerKey], idp: TokenIssuer, clock: Clock
) -> None:
    identity = TokenIdentity([trusted(keys, **BELONGING)], clock=clock)
    named: Any = "x" * longest
    subject = resolve(identity, idp.token("tenant_acme", "u", **{claim: named}))
    check_account(isolate(subject, tool=""))
    error = refused(
        identity, idp.token("tenant_acme", "u", **{claim: named + "x"}), "token_invalid"
    )
    assert "xxx" not in error.message


def test_a_mapped_organisation_is_the_organisation(
    keys: Mapping[str, IssuerKey], idp: TokenIssuer, clock: Clock
) -> None:
    rule = TenantRule(claim="org_id", organisations={"org-1": "tenant_acme"})
    identity = TokenIdentity([trusted(keys, tenant=rule, **BELONGING)], clock=clock)
    # What the token says of an organisation elsewhere does not count beside it.
    subject = resolve(identity, idp.token(None, "u", org_id="org-1", org="org-2", team="returns"))
    assert (subject.tenant, subject.organisation) == ("tenant_acme", "org-1")
    assert subject.team == "returns"


def test_a_key_of_one_issuer_does_not_sign_for_another(
    keys: Mapping[str, IssuerKey], idp: TokenIssuer, clock: Clock, tmp_path: Path
) -> None:
    other = TokenIssuer("https://other.example", kid="other-key", clock=clock)
    other_keys = JwksFile(other.write_jwks(tmp_path / "other.json")).read_first()
    identity = TokenIdentity([trusted(keys), trusted(other_keys, issuer=other.issuer)], clock=clock)
    assert resolve(identity, other.token("tenant_acme", "u")).issuer == other.issuer
    refused(identity, other.token("tenant_acme", "u", iss=idp.issuer), "token_invalid")


@pytest.mark.parametrize(
    ("key", "algorithm"),
    (
        (jwk.ECKey.generate_key("P-256"), "ES256"),
        (jwk.RSAKey.generate_key(2048), "RS256"),
    ),
    ids=["ES256", "RS256"],
)
def test_es256_and_rs256_are_accepted_from_their_own_kind_of_key(
    key: jwk.ECKey | jwk.RSAKey, algorithm: str, tmp_path: Path, clock: Clock
) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [{**key.as_dict(private=False), "kid": "k"}]}))
    keys = JwksFile(file).read_first()
    payload = json.dumps(
        {
            "iss": "https://id.example",
            "aud": "agent-service",
            "sub": "u",
            "tenant_id": "tenant_acme",
            "exp": NOW + 60,
        }
    )
    token = jws.serialize_compact({"alg": algorithm, "kid": "k", "typ": "JWT"}, payload, key)
    assert resolve(TokenIdentity([trusted(keys)], clock=clock), token).actor == "u"
    narrowed = trusted(keys, algorithms=frozenset({"EdDSA"}))
    refused(TokenIdentity([narrowed], clock=clock), token, "token_invalid")


@pytest.mark.parametrize(
    ("text", "problem"),
    (
        ("", "is not JSON"),
        ("{}", 'needs "keys"'),
        ('{"keys": []}', "holds no signing key"),
        ('{"keys": [7]}', "not an object"),
        ('{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}]}', "private or symmetric"),
        ('{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "AA", "d": "AA"}]}', "private"),
        ('{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "AA", "kid": "a"}]}', "can not be read"),
        ('{"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "a"}]}', "can not"),
        ('{"keys": [{"kty": "EC", "crv": "P-521", "kid": "a"}]}', "holds no signing key"),
        ('{"keys": [{"kty": "OKP", "kty": "oct"}]}', "duplicate key"),
    ),
)
def test_a_key_file_that_can_not_be_trusted_is_refused(
    tmp_path: Path, text: str, problem: str
) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(text)
    with pytest.raises(KeySourceError, match=problem) as caught:
        JwksFile(file).read_first()
    assert str(file) in caught.value.message


def test_a_short_rsa_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    with pytest.warns(UserWarning, match="Key size"):
        key = jwk.RSAKey.generate_key(1024)
    file.write_text(json.dumps({"keys": [{**key.as_dict(private=False), "kid": "k"}]}))
    with pytest.raises(KeySourceError, match="fewer than 2048 bits"):
        JwksFile(file).read_first()


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeySourceError, match=r"absent\.json can not be read: No such file"):
        JwksFile(tmp_path / "absent.json").read_first()


def test_single_tenant_mode_has_one_subject() -> None:
    identity = SingleTenant(actor="local", roles=("agent",), scopes=("orders:read",))
    subject = asyncio.run(identity.resolve(Credentials(bearer="ignored")))
    assert subject == Subject(
        tenant="default", actor="local", roles=("agent",), scopes=("orders:read",)
    )
