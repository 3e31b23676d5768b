"""Tokens of users and of workloads, whatever is written into them (pdp.identity)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final, cast

from pdp.canonical import JsonObject, JsonValue
from pdp.identity.key_source import FixedKeys
from pdp.identity.keys import parse_jwks
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.subject import Subject
from pdp.identity.tenancy import TenantRule
from pdp.identity.tokens import Issuer, TokenIdentity
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.contract import SECRET, at_once, refuses

NOW: Final = 1_800_000_000
NAME: Final = "https://id.example"
AUDIENCE: Final = "agent-service"
HEADER: Final[JsonObject] = {"alg": "EdDSA", "kid": jose.KID, "typ": "JWT"}
CLAIMS: Final[JsonObject] = {
    "iss": NAME,
    "aud": AUDIENCE,
    "sub": "user-7",
    "iat": NOW,
    "nbf": NOW,
    "exp": NOW + 600,
    "jti": "token-1",
    "tenant_id": "tenant_acme",
    "roles": ["agent", "admin"],
    "scope": "orders:read orders:write",
    "org": "org-1",
    "team": "team-1",
    "sid": "s-1",
    "note": SECRET,
}
ISSUER: Final = Issuer(
    issuer=NAME,
    audiences=frozenset({AUDIENCE}),
    types=frozenset({"jwt", "at+jwt"}),
    algorithms=frozenset({"EdDSA", "ES256", "RS256"}),
    keys=FixedKeys(parse_jwks(jose.JWKS, strict=True)),
    tenant=TenantRule(claim="tenant_id"),
    organisation_claim="org",
    team_claim="team",
    session_claim="sid",
)
IDENTITY: Final = TokenIdentity([ISSUER], clock=lambda: NOW, cache_entries=100)
GOOD: Final = jose.compact(HEADER, json.dumps(CLAIMS).encode())


def samples() -> Iterable[bytes]:
    yield b"\0" + GOOD.encode()
    yield b"\1\0"
    yield b"\1\2"
    yield b"\2"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    signed = False
    match choices.number(4):
        case 0:
            token = choices.rest().decode("utf-8", "replace")
        case 1:  # by the issuer, whatever it says
            token, signed = _signed(choices), True
        case 2:  # changed on the way
            token = edited_bytes(GOOD.encode(), choices).decode("utf-8", "replace")
        case _:  # by somebody else
            token = jose.compact(HEADER, _claims(choices), key=jose.STRANGER)
    subject = refuses(lambda: _resolve(token), IdentityError, secret=token)
    if subject is None:
        return False
    assert signed or token == GOOD, "another token than was signed is taken"
    _check_says(subject, token)
    assert _resolve(token) == subject, "it is somebody else the second time"
    return True


def _signed(choices: Choices) -> str:
    header = edited(HEADER, choices) if choices.yes() else HEADER
    return jose.compact(header, _claims(choices))


def _claims(choices: Choices) -> bytes:
    if choices.yes():
        return edited_bytes(json.dumps(CLAIMS).encode(), choices)
    return json.dumps(edited(CLAIMS, choices)).encode("utf-8", "surrogatepass")


def _resolve(token: str) -> Subject:
    return at_once(IDENTITY.resolve(Credentials(bearer=token)))


def _check_says(subject: Subject, token: str) -> None:
    """The subject is who the payload says, and nobody else."""
    header, claims = jose.said(token)
    assert header["alg"] == "EdDSA"
    assert not header.keys() & {"jwk", "jku", "x5c", "x5u", "crit", "b64"}
    assert claims["iss"] == NAME
    assert subject.tenant == claims["tenant_id"]
    assert subject.actor == claims["sub"]
    audience: JsonValue = claims["aud"]
    assert AUDIENCE in (audience if isinstance(audience, list) else [audience])
    assert cast("float", claims["exp"]) + ISSUER.leeway_seconds > NOW
    for name, names in (("roles", subject.roles), ("scope", subject.scopes)):
        value = claims.get(name) or []
        assert {*names} <= {*(value.split(" ") if isinstance(value, str) else value)}  # type: ignore[misc]
