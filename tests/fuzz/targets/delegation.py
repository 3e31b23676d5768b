"""Delegations: the tokens that a sidecar makes for agents (pdp.identity.delegation)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Final

from pdp.canonical import JsonObject
from pdp.identity.delegation import (
    MAX_LINKS,
    TYPE,
    DelegatedIdentity,
    DelegationIssuer,
    claims_of,
    is_delegation,
)
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.subject import Delegation, Link, Subject
from pdp.permit import PermitKeySet, jws
from pdp.reason import ReasonCode
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.contract import SECRET, at_once, refuses

NOW: Final = 1_800_000_000
NAME: Final = "agent-pdp"
HEADER: Final[JsonObject] = {"alg": "EdDSA", "kid": jose.KID, "typ": TYPE}
USUAL: Final = Subject(
    tenant="tenant_acme",
    actor="user-7",
    roles=("agent", SECRET),
    scopes=("orders:read",),
    organisation="org-1",
    team="team-1",
    session="s-1",
    issuer="https://id.example",
    token_id="d-2",
    expires_at=float(NOW + 60),
    delegation=Delegation(
        links=(
            Link("d-1", "planner", (("llm", "micro_usd", 100),), NOW + 600),
            Link("d-2", "researcher", (), NOW + 60),
        ),
        tools=frozenset({"orders.read", "orders.update"}),
        arguments={"orders.update": {"status": [{"equals": "shipped"}]}},
        root_token_id="token-1",
        ledger="ledger-1",
    ),
)
CLAIMS: Final = claims_of(USUAL, issuer=NAME, issued_at=NOW)
GOOD: Final = jose.compact(HEADER, json.dumps(CLAIMS).encode())
KEYS: Final = PermitKeySet.from_jwks(jose.JWKS)


class Nobody:
    """Knows no other credentials."""

    async def resolve(self, credentials: Credentials) -> Subject:
        raise IdentityError(ReasonCode.TOKEN_INVALID, "It is no delegation.")


IDENTITY: Final = DelegatedIdentity(
    Nobody(),
    [
        DelegationIssuer(
            name=NAME,
            verify=lambda token: jws.verify(token, find_key=KEYS.find, kind=TYPE),
            keys_version=lambda: 1,
            tenants=frozenset({"tenant_acme"}),
        )
    ],
    clock=lambda: NOW,
    cache_entries=100,
)


def samples() -> Iterable[bytes]:
    yield b"\0" + GOOD.encode()
    yield b"\1\0\0"
    yield b"\2"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    signed = False
    match choices.number(4):
        case 0:
            token = choices.rest().decode("utf-8", "replace")
        case 1:
            header = edited(HEADER, choices) if choices.yes() else HEADER
            token, signed = jose.compact(header, _payload(choices)), True
        case 2:
            token = edited_bytes(GOOD.encode(), choices).decode("utf-8", "replace")
        case _:
            token = jose.compact(HEADER, _payload(choices), key=jose.STRANGER)
    subject = refuses(
        lambda: at_once(IDENTITY.resolve(Credentials(bearer=token))),
        IdentityError,
        secret=token,
    )
    if subject is None:
        return False
    assert is_delegation(token)
    assert signed or token == GOOD, "another delegation than was signed is taken"
    header, claims = jose.said(token)
    assert header == HEADER, "a header was chosen"
    assert claims["iss"] == claims["aud"] == NAME
    assert claims == claims_of(subject, issuer=NAME, issued_at=claims["iat"])  # type: ignore[arg-type]
    assert subject.tenant == "tenant_acme"
    assert subject.expires_at > NOW
    assert subject.delegation is not None
    links = subject.delegation.links
    assert 1 <= len(links) <= MAX_LINKS
    assert all(child.expires_at <= parent.expires_at for parent, child in pairwise(links))
    return True


def _payload(choices: Choices) -> bytes:
    if choices.yes():
        return edited_bytes(json.dumps(CLAIMS).encode(), choices)
    return json.dumps(edited(CLAIMS, choices)).encode("utf-8", "surrogatepass")
