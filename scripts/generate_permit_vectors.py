"""Generate docs/permit-vectors.json: permits, questions, and what a verifier has to answer.

Everything in it is made from fixed keys and times, so that it comes out the same each time.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from pdp import base64url
from pdp.canonical import JsonObject, JsonValue, canonical_bytes, parse_object, sha256_hex
from pdp.permit import jws
from pdp.permit.keys import PermitKeySet, public_jwk
from pdp.permit.signing import SigningKey

FILE: Final = Path(__file__).resolve().parent.parent / "docs" / "permit-vectors.json"
ISSUER: Final = "agent-pdp"
AUDIENCE: Final = "orders"
NOW: Final = 1_800_000_000
LEEWAY_SECONDS: Final = 5
ORDER: Final = '{"order_id":"918","status":"shipped"}'
CERTIFICATE: Final = base64url.encode(hashlib.sha256(b"a client certificate").digest())

Claims = dict[str, Any]
Change = Callable[[Claims], object]


def private_key(name: str) -> Ed25519PrivateKey:
    """A key that everybody knows: for tests only."""
    seed = hashlib.sha256(f"agent-pdp permit vectors, {name}".encode()).digest()
    return Ed25519PrivateKey.from_private_bytes(seed)


PRIVATE: Final = {name: private_key(name) for name in ("first", "second", "stranger")}
KEYS: Final = {name: SigningKey(key) for name, key in PRIVATE.items()}
KNOWN: Final = ("first", "second")

DIGESTS: Final = (
    ("the empty object", "{}"),
    ("order of keys and white space do not count", '{ "b": 2,\n  "a": 1 }'),
    ("a number has one form", '{"a": 1.0, "b": 1e2, "c": -0.0, "d": 0.1, "e": 1e21, "f": 1E-7}'),
    ("an escape is the character", '{"caf\\u00e9": "\\u20ac\\n\\u0007\\/"}'),
    ("keys are sorted as UTF-16", '{"\\ufb33": 1, "\\ud83d\\ude00": 2, "a": 3}'),
    ("a text is no number", '{"amount": "12"}'),
    ("the largest integers", '{"max": 9007199254740991, "min": -9007199254740991}'),
    (
        "lists keep their order",
        '{"tags": [3, 1, [true, false, null]], "nested": {"b": {}, "a": []}}',
    ),
)


def claims(*changes: Change) -> Claims:
    """The payload of a permit for ORDER, changed."""
    payload: Claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "iat": NOW,
        "nbf": NOW,
        "exp": NOW + 60,
        "jti": "0b8f6c1e-53e3-4a7b-9f7d-2a64f5f0c001",
        "txn": "request-1",
        "sub": "user-7",
        "scope": "orders:read orders:write",
        "authorization_details": [
            {
                "type": "tool_call",
                "locations": [AUDIENCE],
                "actions": ["orders.update"],
                "args_sha256": sha256_hex(parse_object(ORDER.encode(), max_bytes=1024)),
            }
        ],
        "tctx": {
            "tenant": "tenant_acme",
            "decision_id": "5f6d9c0a-1f0e-4c89-8d2e-6a1f1b1c0001",
            "policy_revision": "2026-11-25",
            "ledger": "ledger-1",
        },
    }
    for change in changes:
        change(payload)
    return payload


def put(*path: str | int, to: object) -> Change:
    """Set what stands at the path."""

    def change(payload: Claims) -> None:
        place: Any = payload
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = copy.deepcopy(to)

    return change


def drop(*path: str | int) -> Change:
    """Take away what stands at the path."""

    def change(payload: Claims) -> None:
        place: Any = payload
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]

    return change


def detail(**members: object) -> Change:
    """Set members of the one authorization detail."""

    def change(payload: Claims) -> None:
        payload["authorization_details"][0].update(members)

    return change


any_arguments: Final = drop("authorization_details", 0, "args_sha256")


def acting(*agents: str) -> JsonObject:
    """An act claim, the agent that acts now last."""
    act: JsonObject = {}
    for agent in agents:
        act = {"sub": agent, **({"act": act} if act else {})}
    return act


def permit(*changes: Change, key: str = "first") -> str:
    """A permit as a sidecar signs it."""
    return KEYS[key].sign(claims(*changes))


def compact(header: JsonObject | bytes, payload: JsonObject | bytes, key: str = "first") -> str:
    """Anything at all, duly signed."""
    parts = (
        part if isinstance(part, bytes) else canonical_bytes(part) for part in (header, payload)
    )
    signed = ".".join(base64url.encode(part) for part in parts)
    return signed + "." + base64url.encode(PRIVATE[key].sign(signed.encode()))


def header(**members: JsonValue) -> JsonObject:
    """The header of a permit, changed; a member that is None is left out."""
    whole = {"alg": jws.ALGORITHM, "kid": KEYS["first"].kid, "typ": jws.TYPE, **members}
    return {name: value for name, value in whole.items() if value is not None}


def with_hmac() -> str:
    """HS256 with the public key as the secret: what a careless library takes."""
    public = PRIVATE["first"].public_key()
    secret = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = ".".join(
        base64url.encode(canonical_bytes(part)) for part in (header(alg="HS256"), claims())
    )
    mac = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
    return signed + "." + base64url.encode(mac)


def valid() -> Iterator[tuple[str, str, JsonObject]]:
    """Name, permit, and what of the question is not as usual."""
    yield "one set of arguments, once", permit(), {}
    yield "the other key", permit(key="second"), {}
    yield (
        "arguments in another order",
        permit(),
        {"arguments_json": '{"status": "shipped", "order_id": "918"}'},
    )
    yield "no scopes", permit(put("scope", to="")), {}
    yield (
        "with a resource and a hold",
        permit(detail(identifier="order/918"), put("tctx", "hold_id", to="hold-1")),
        {},
    )
    yield (
        "any arguments, five times",
        permit(any_arguments, detail(max_uses=5)),
        {"arguments_json": '{"order_id":"919"}'},
    )
    yield "any arguments, once", permit(any_arguments), {"arguments_json": "{}"}
    yield (
        "two agents act for the user",
        permit(
            put("act", to=acting("planner", "writer")),
            put("tctx", "delegations", to=["token-1", "delegation-1", "delegation-2"]),
        ),
        {},
    )
    yield "the workload that asked", permit(put("req_wl", to="spiffe://example/agent")), {}
    yield (
        "bound to a certificate",
        permit(put("cnf", to={"x5t#S256": CERTIFICATE})),
        {"certificate_sha256": CERTIFICATE},
    )
    yield "not bound, shown with a certificate", permit(), {"certificate_sha256": CERTIFICATE}
    yield "a server of one tenant", permit(), {"tenant": "tenant_acme"}
    yield "within the leeway before", permit(), {"time": NOW - LEEWAY_SECONDS}
    yield "within the leeway after", permit(), {"time": NOW + 60 + LEEWAY_SECONDS - 1}
    other_order = base64url.encode(
        json.dumps({"typ": jws.TYPE, "kid": KEYS["first"].kid, "alg": jws.ALGORITHM}).encode()
    )
    signed = f"{other_order}.{permit().split('.')[1]}"
    yield (
        "a header in another order, with white space",
        f"{signed}.{base64url.encode(PRIVATE['first'].sign(signed.encode()))}",
        {},
    )


def mismatched() -> Iterator[tuple[str, str, JsonObject]]:
    """Good permits for something else."""
    yield "another audience", permit(), {"audience": "mail"}
    yield "another tool", permit(), {"tool": "orders.delete"}
    yield "another tool, any arguments", permit(any_arguments), {"tool": "orders.delete"}
    yield "another argument", permit(), {"arguments_json": '{"order_id":"919","status":"shipped"}'}
    yield (
        "one argument more",
        permit(),
        {"arguments_json": '{"order_id":"918","status":"shipped","force":true}'},
    )
    yield "one argument less", permit(), {"arguments_json": '{"order_id":"918"}'}
    yield "a number for a text", permit(), {"arguments_json": '{"order_id":918,"status":"shipped"}'}
    yield "another tenant", permit(), {"tenant": "tenant_globex"}
    yield (
        "a tenant that begins alike",
        permit(),
        {"tenant": "tenant_acm"},
    )
    bound = permit(put("cnf", to={"x5t#S256": CERTIFICATE}))
    yield "bound, shown without a certificate", bound, {}
    other = base64url.encode(hashlib.sha256(b"another").digest())
    yield "bound, shown with another certificate", bound, {"certificate_sha256": other}


def expired() -> Iterator[tuple[str, str, JsonObject]]:
    """Good permits at another time."""
    yield "too early", permit(), {"time": NOW - LEEWAY_SECONDS - 1}
    yield "too late", permit(), {"time": NOW + 60 + LEEWAY_SECONDS}


def malformed() -> Iterator[tuple[str, str]]:
    """What is no permit by its form or its signature."""
    plain = permit()
    first, second, third = plain.split(".")
    yield "two segments", f"{first}.{second}"
    yield "four segments", f"{plain}."
    yield "no signature", f"{first}.{second}."
    yield "not base64url", f"{first}.{second}.{third[:-1]}*"
    yield "padded", f"{plain}=="
    yield "white space after it", f"{plain}\n"
    # Of the last character only the upper two bits count.
    yield "stray bits in the signature", f"{first}.{second}.{third[:-1]}{chr(ord(third[-1]) + 1)}"
    flipped = ("B" if third[0] == "A" else "A") + third[1:]
    yield "another signature", f"{first}.{second}.{flipped}"
    later = base64url.encode(canonical_bytes(claims(put("exp", to=NOW + 3600))))
    yield "another payload under the signature", f"{first}.{later}.{third}"
    yield "too long", permit(put("txn", to="x" * jws.MAX_LENGTH))
    yield "a key that nobody knows", permit(key="stranger")
    yield "signed by a stranger in a known key's name", compact(header(), claims(), "stranger")
    yield "signed by the other key", compact(header(), claims(), "second")
    for spelling in ("none", "None", "NONE", ""):
        unsigned = compact(header(alg=spelling), claims()).rpartition(".")[0]
        yield f"unsigned, algorithm {spelling!r}", f"{unsigned}."
    yield "HS256 with the public key", with_hmac()
    yield "another name of the algorithm", compact(header(alg="Ed25519"), claims())
    yield "no algorithm", compact(header(alg=None), claims())
    yield "no type", compact(header(typ=None), claims())
    yield "type JWT", compact(header(typ="JWT"), claims())
    yield "a media type in full", compact(header(typ="application/tool-permit+jwt"), claims())
    yield "a delegation", compact(header(typ="tool-delegation+jwt"), claims())
    yield "no key id", compact(header(kid=None), claims())
    yield "a key id that is no text", compact(header(kid=1), claims())
    yield "crit", compact(header(crit=["exp"]), claims())
    yield "b64", compact(header(b64=False, crit=["b64"]), claims())
    jwk = public_jwk(KEYS["stranger"].public, KEYS["stranger"].kid)
    yield "a key of its own", compact(header(jwk=jwk), claims(), "stranger")
    yield "the address of a key", compact(header(jku="https://evil.example/jwks.json"), claims())
    yield "a certificate of its own", compact(header(x5c=["MIIB"]), claims())
    yield "a header that is a list", compact(b"[]", claims())
    yield "a payload that is no JSON", compact(header(), b"not JSON")
    yield "a payload that is a list", compact(header(), b"[]")
    yield "a payload that is no UTF-8", compact(header(), b'{"iss":"\xff"}')


def duplicated() -> Iterator[tuple[str, str]]:
    """What two JSON parsers read differently."""
    twice = canonical_bytes(claims())[:-1] + b',"aud":"mail"}'
    yield "a claim twice", compact(header(), twice)
    in_header = canonical_bytes(header())[:-1] + b',"typ":"tool-permit+jwt"}'
    yield "a header member twice", compact(in_header, claims())


def wrong_claims() -> Iterator[tuple[str, str]]:
    """What is duly signed and no permit by its claims."""
    for name in claims():
        yield f"without {name}", permit(drop(name))
    for name in ("tenant", "decision_id", "policy_revision", "ledger"):
        yield f"without tctx.{name}", permit(drop("tctx", name))
    for name in ("type", "locations", "actions"):
        yield f"without {name} of the detail", permit(drop("authorization_details", 0, name))
    changes: tuple[tuple[str, tuple[Change, ...]], ...] = (
        ("another issuer", (put("iss", to="someone"),)),
        ("a claim that is not known", (put("only_on_mondays", to=True),)),
        ("a member of tctx that is not known", (put("tctx", "region", to="eu"),)),
        ("a member of the detail that is not known", (detail(datatypes=["x"]),)),
        ("exp as a text", (put("exp", to=str(NOW + 60)),)),
        ("exp with a fraction", (put("exp", to=NOW + 60.5),)),
        ("exp true", (put("exp", to=True),)),
        ("nbf other than iat", (put("nbf", to=NOW - 60),)),
        ("several audiences", (put("aud", to=[AUDIENCE]),)),
        ("an empty actor", (put("sub", to=""),)),
        ("an empty tenant", (put("tctx", "tenant", to=""),)),
        ("scope as a list", (put("scope", to=["orders:read"]),)),
        ("no detail", (put("authorization_details", to=[]),)),
        (
            "two details",
            (put("authorization_details", to=claims()["authorization_details"] * 2),),
        ),
        ("another type of detail", (detail(type="payment"),)),
        ("another location than the audience", (detail(locations=["mail"]),)),
        ("two tools", (detail(actions=["orders.update", "orders.delete"]),)),
        ("a digest in capitals", (detail(args_sha256="A" * 64),)),
        ("an empty digest", (detail(args_sha256=""),)),
        ("two uses for one set of arguments", (detail(max_uses=2),)),
        ("no use", (any_arguments, detail(max_uses=0))),
        ("more than 1,000 uses", (any_arguments, detail(max_uses=1001))),
        ("uses with a fraction", (any_arguments, detail(max_uses=1.5))),
        ("a resource without arguments", (any_arguments, detail(identifier="order/918"))),
        ("cnf with another key", (put("cnf", to={"jkt": CERTIFICATE}),)),
        (
            "cnf with two keys",
            (put("cnf", to={"x5t#S256": CERTIFICATE, "jkt": CERTIFICATE}),),
        ),
        ("a thumbprint that is too short", (put("cnf", to={"x5t#S256": "AAAA"}),)),
        ("act with more than sub", (put("act", to={"sub": "planner", "tenant": "tenant_x"}),)),
        ("act without sub", (put("act", to={}),)),
        ("17 agents", (put("act", to=acting(*(f"agent-{number}" for number in range(17)))),)),
        ("no delegations", (put("tctx", "delegations", to=[]),)),
        (
            "18 delegations",
            (put("tctx", "delegations", to=[f"d{number}" for number in range(18)]),),
        ),
        ("an empty workload", (put("req_wl", to=""),)),
    )
    for name, each in changes:
        yield name, permit(*each)


def vectors() -> Iterator[JsonObject]:
    """Every case."""

    def case(name: str, token: str, answer: str, asked: JsonObject | None = None) -> JsonObject:
        question: JsonObject = {
            "tool": "orders.update",
            "arguments_json": ORDER,
            "audience": AUDIENCE,
            "time": NOW + 1,
            **(asked or {}),
        }
        return {"name": name, "permit": token, "question": question, "reason_code": answer}

    for name, token, asked in valid():
        yield case(name, token, "ok", asked)
    yield case("no permit", "", "permit_missing")
    for name, token in (*malformed(), *wrong_claims()):
        yield case(name, token, "permit_invalid")
    for name, token in duplicated():
        yield {**case(name, token, "permit_invalid"), "duplicate_keys": True}
    for name, token, asked in mismatched():
        yield case(name, token, "permit_mismatch", asked)
    for name, token, asked in expired():
        yield case(name, token, "permit_expired", asked)


def digests() -> Iterator[JsonObject]:
    """What the arguments of a call are digested to."""
    for name, text in DIGESTS:
        value = parse_object(text.encode(), max_bytes=1024)
        yield {
            "name": name,
            "arguments_json": text,
            "canonical": canonical_bytes(value).decode(),
            "sha256": sha256_hex(value),
        }


def document() -> str:
    """The file."""
    known = PermitKeySet({KEYS[name].kid: KEYS[name].public for name in KNOWN})
    signing = {
        **public_jwk(KEYS["first"].public, KEYS["first"].kid),
        "d": base64url.encode(PRIVATE["first"].private_bytes_raw()),
    }
    return (
        json.dumps(
            {
                "about": "Permits and what a verifier answers: docs/permits.md. The keys are known to"
                " everybody. Generated by `make docs`.",
                "issuer": ISSUER,
                "leeway_seconds": LEEWAY_SECONDS,
                "jwks": json.loads(known.to_jwks()),
                "signing_key": signing,
                "digests": list(digests()),
                "cases": list(vectors()),
            },
            indent=1,
        )
        + "\n"
    )


def main() -> None:
    """Write the file."""
    FILE.write_text(document(), encoding="utf-8")


if __name__ == "__main__":
    main()
