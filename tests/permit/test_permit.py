"""A permit allows one call of one tool for one tenant, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from dataclasses import replace
from pathlib import Path

import pytest

from pdp import base64url
from pdp.canonical import JsonObject, canonical_bytes, sha256_hex
from pdp.permit import Permit, PermitError, PermitKeySet, PermitVerifier
from pdp.permit.issuer import PermitIssuer
from pdp.permit.signing import SigningKey

ARGUMENTS: JsonObject = {"order_id": "918", "status": "shipped"}
NOW = 1_800_000_000
KEY = SigningKey.generate()


def permit(**changes: object) -> Permit:
    usual = Permit(
        id="4f7c0a8e-0000-4000-8000-000000000001",
        issuer="agent-pdp",
        audience="orders",
        tenant="tenant_acme",
        actor="user-7",
        tool="orders.update",
        arguments_sha256=sha256_hex(ARGUMENTS),
        scopes=("orders:write",),
        transaction="req-1",
        decision_id="d-1",
        policy_revision="r-1",
        ledger="ledger-1",
        issued_at=NOW,
        expires_at=NOW + 60,
        hold_id="h-1",
        resource="order/918",
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def token(**changes: object) -> str:
    return PermitIssuer(KEY, issuer="agent-pdp").sign(permit(**changes)).token


def verifier(now: float = NOW + 1, keys: PermitKeySet = KEY.public_set) -> PermitVerifier:
    return PermitVerifier(keys, issuer="agent-pdp", audience="orders", clock=lambda: now)


def refused(attempt: str, reason_code: str, **call: object) -> None:
    usual = {"tool": "orders.update", "arguments": ARGUMENTS}
    with pytest.raises(PermitError) as caught:
        verifier().verify(attempt, **{**usual, **call})  # type: ignore[arg-type]
    assert caught.value.reason_code == reason_code
    assert attempt == "" or attempt not in caught.value.message


def forged(header: JsonObject, claims: JsonObject | None = None, *, key: SigningKey = KEY) -> str:
    """Signed by the real key under another header."""
    payload = canonical_bytes(claims or permit().to_claims())
    signed = base64url.encode(canonical_bytes(header)) + "." + base64url.encode(payload)
    return signed + "." + base64url.encode(key._private.sign(signed.encode()))


HEADER: JsonObject = {"alg": "EdDSA", "kid": KEY.kid, "typ": "tool-permit+jwt"}


def test_a_permit_verifies_for_the_call_it_was_issued_for() -> None:
    found = verifier().verify(token(), tool="orders.update", arguments=ARGUMENTS)
    assert found == permit()
    assert found.namespace == "tenant/tenant_acme/"


def test_the_same_permit_is_signed_the_same_every_time() -> None:
    assert token() == token()


def test_its_repr_does_not_show_the_token() -> None:
    signed = PermitIssuer(KEY, issuer="agent-pdp").sign(permit())
    assert signed.token not in repr(signed)


@pytest.mark.parametrize("asked", ("tool", "tenant"))
def test_what_is_no_text_in_utf_8_is_refused_like_any_other(asked: str) -> None:
    refused(token(), "permit_mismatch", **{asked: "orders.update\udcff"})


def test_another_tool_is_refused() -> None:
    refused(token(), "permit_mismatch", tool="orders.delete")


def test_other_arguments_are_refused() -> None:
    refused(token(), "permit_mismatch", arguments={**ARGUMENTS, "order_id": "919"})
    refused(token(), "permit_mismatch", arguments={**ARGUMENTS, "tenant_id": "tenant_globex"})


def test_arguments_that_are_not_json_are_refused() -> None:
    refused(token(), "permit_mismatch", arguments={"order_id": object()})


def test_another_audience_is_refused() -> None:
    refused(token(audience="mail"), "permit_mismatch")


def test_another_tenants_tool_refuses_it() -> None:
    refused(token(), "permit_mismatch", tenant="tenant_globex")
    verifier().verify(token(), tool="orders.update", arguments=ARGUMENTS, tenant="tenant_acme")


def test_another_issuers_permit_is_refused() -> None:
    refused(token(issuer="other-pdp"), "permit_invalid")


@pytest.mark.parametrize("now", (NOW + 65, NOW + 10_000, NOW - 6))
def test_outside_its_time_it_is_refused(now: float) -> None:
    with pytest.raises(PermitError) as caught:
        verifier(now).verify(token(), tool="orders.update", arguments=ARGUMENTS)
    assert caught.value.reason_code == "permit_expired"


def test_no_permit_is_permit_missing() -> None:
    refused("", "permit_missing")


@pytest.mark.parametrize(
    "garbage", ("x", "a.b", "a.b.c", "..", "a.b.c.d", "é.é.é", "\x00.\x00.\x00", "a" * 9000)
)
def test_garbage_is_refused(garbage: str) -> None:
    refused(garbage, "permit_invalid")


def test_another_key_is_refused() -> None:
    other = SigningKey.generate()
    refused(PermitIssuer(other, issuer="agent-pdp").sign(permit()).token, "permit_invalid")
    # ... also when it claims to be the known one.
    refused(forged(HEADER, key=other), "permit_invalid")


def test_every_changed_character_is_noticed() -> None:
    signed = token()
    for position in range(len(signed)):
        letter = "A" if signed[position] != "A" else "B"
        refused(signed[:position] + letter + signed[position + 1 :], "permit_invalid")


@pytest.mark.parametrize(
    "header",
    (
        {**HEADER, "alg": "none"},
        {**HEADER, "alg": "None"},
        {**HEADER, "alg": "HS256"},
        {**HEADER, "alg": "Ed25519"},
        {**HEADER, "typ": "JWT"},
        {**HEADER, "typ": "TOOL-PERMIT+JWT"},
        {**HEADER, "kid": "../../etc/passwd"},
        {**HEADER, "kid": 1},
        {**HEADER, "crit": ["exp"]},
        {**HEADER, "b64": False},
        {**HEADER, "jwk": {}},
        {"alg": "EdDSA", "typ": "tool-permit+jwt"},
    ),
)
def test_any_other_header_is_refused_even_when_signed(header: JsonObject) -> None:
    refused(forged(header), "permit_invalid")


def test_the_public_key_is_not_a_secret_for_hs256() -> None:
    public = KEY.public_set.find(KEY.kid)
    assert public is not None
    signed = ".".join(
        base64url.encode(canonical_bytes(part))
        for part in ({**HEADER, "alg": "HS256"}, permit().to_claims())
    )
    mac = hmac.new(public.public_bytes_raw(), signed.encode(), hashlib.sha256).digest()
    refused(f"{signed}.{base64url.encode(mac)}", "permit_invalid")


def test_a_permit_has_one_spelling() -> None:
    header, payload, signature = token().split(".")
    refused(f"{header}.{payload}.{signature}=", "permit_invalid")
    refused(f"{header}.{payload}.{signature}\n", "permit_invalid")
    standard = base64.b64encode(base64url.decode(signature)).decode().rstrip("=")
    if standard != signature:
        refused(f"{header}.{payload}.{standard}", "permit_invalid")


@pytest.mark.parametrize(
    "change",
    (
        {"exp": str(NOW + 60)},
        {"exp": NOW + 60.5},
        {"exp": True},
        {"exp": None},
        {"nbf": NOW + 1},
        {"aud": ["orders"]},
        {"jti": ""},
        {"scope": ["orders:write"]},
        {"cnf": {"x5t#S256": "..."}},
        {"tctx": {"tenant": "tenant_acme"}},
        {"tctx": {**permit().to_claims()["tctx"], "tenant": ""}},  # type: ignore[dict-item]
        {"tctx": {**permit().to_claims()["tctx"], "more": "x"}},  # type: ignore[dict-item]
        {"authorization_details": []},
        {"authorization_details": permit().to_claims()["authorization_details"] * 2},  # type: ignore[operator]
        {"authorization_details": [{}]},
    ),
)
def test_claims_that_are_not_those_of_a_permit_are_refused(change: JsonObject) -> None:
    claims = {**permit().to_claims(), **change}
    refused(forged(HEADER, claims), "permit_invalid")


def test_duplicate_claims_are_refused() -> None:
    text = json.dumps(permit().to_claims())[:-1] + ',"sub":"admin"}'
    signed = base64url.encode(canonical_bytes(HEADER)) + "." + base64url.encode(text.encode())
    refused(signed + "." + base64url.encode(KEY._private.sign(signed.encode())), "permit_invalid")


def test_the_key_set_travels_as_a_jwk_set(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(KEY.public_set.to_jwks())
    keys = PermitKeySet.from_file(file)
    verifier(keys=keys).verify(token(), tool="orders.update", arguments=ARGUMENTS)
    assert '"d"' not in file.read_text()


@pytest.mark.parametrize(
    "jwks",
    (
        "",
        "[]",
        '{"keys": {}}',
        '{"keys": []}',
        '{"keys": [1]}',
        '{"keys": [{"kty": "oct", "k": "AA"}]}',
        '{"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": "AA"}]}',
        '{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "AA"}]}',
        '{"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "a", "x": "AA", "d": "AA"}]}',
        "\ud800",
    ),
)
def test_a_key_set_that_is_not_one_is_refused(jwks: str) -> None:
    with pytest.raises(PermitError) as caught:
        PermitKeySet.from_jwks(jwks)
    assert caught.value.reason_code == "permit_unavailable"
