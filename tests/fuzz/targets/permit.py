"""Permits, as a tool server gets them from strangers (pdp.permit)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from pdp.canonical import JsonObject, canonical_bytes, sha256_hex
from pdp.permit import Permit, PermitError, PermitKeySet, PermitVerifier, jws
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.contract import SECRET, refuses

NOW: Final = 1_800_000_000
ARGUMENTS: Final[JsonObject] = {"order_id": "918", "status": "shipped"}
HEADER: Final[JsonObject] = {"alg": "EdDSA", "kid": jose.KID, "typ": jws.TYPE}
USUAL: Final = Permit(
    id="4f7c0a8e-0000-4000-8000-000000000001",
    issuer="agent-pdp",
    audience="orders",
    tenant="tenant_acme",
    actor="user-7",
    tool="orders.update",
    arguments_sha256=sha256_hex(ARGUMENTS),
    scopes=("orders:write", SECRET),
    transaction="req-1",
    decision_id="d-1",
    policy_revision="r-1",
    ledger="ledger-1",
    issued_at=NOW,
    expires_at=NOW + 60,
    hold_id="h-1",
    resource="order/918",
    agents=("planner", "researcher"),
    delegations=("token-1", "d-1", "d-2"),
    workload="spiffe://example.org/agent",
    certificate_sha256="A" * 43,
)
CLAIMS: Final = USUAL.to_claims()
VERIFIER: Final = PermitVerifier(
    PermitKeySet.from_jwks(jose.JWKS), issuer="agent-pdp", audience="orders", clock=lambda: NOW
)
GOOD: Final = jose.compact(HEADER, canonical_bytes(CLAIMS))


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
    permit = refuses(lambda: VERIFIER.authenticate(token), PermitError, secret=token)
    refuses(lambda: jws.key_id(token), jws.JwsError, secret=token)
    if permit is None:
        return False
    assert signed or token == GOOD, "another permit than was signed is taken"
    header, claims = jose.said(token)
    assert header == HEADER, "a header was chosen"
    # What was read is all that was said: no claim is passed over, none is read differently.
    assert permit.to_claims() == claims
    assert token not in repr(permit)
    return _lets_through_only_what_it_is_for(permit, token)


def _payload(choices: Choices) -> bytes:
    if choices.yes():
        return edited_bytes(canonical_bytes(CLAIMS), choices)
    return json.dumps(edited(CLAIMS, choices)).encode("utf-8", "surrogatepass")


def _lets_through_only_what_it_is_for(permit: Permit, token: str) -> bool:
    def verify(arguments: JsonObject, tool: str, tenant: str) -> Permit:
        return VERIFIER.verify(
            token, tool=tool, arguments=arguments, tenant=tenant, certificate_sha256="A" * 43
        )

    usual = replace(permit, token="")
    found = refuses(lambda: verify(ARGUMENTS, USUAL.tool, USUAL.tenant), PermitError)
    if found is None:
        return False
    assert (found.tenant, found.tool, found.audience) == (USUAL.tenant, USUAL.tool, "orders")
    assert found.issued_at - 5 <= NOW < found.expires_at + 5
    assert found.arguments_sha256 in {USUAL.arguments_sha256, ""}
    assert found.certificate_sha256 in {"A" * 43, ""}
    others = [(ARGUMENTS, "orders.delete", usual.tenant), (ARGUMENTS, USUAL.tool, "tenant_other")]
    if found.arguments_sha256:
        others.append(({**ARGUMENTS, "status": "lost"}, USUAL.tool, usual.tenant))
    for other in others:
        assert refuses(lambda call=other: verify(*call), PermitError) is None  # type: ignore[misc]
    return found == permit
