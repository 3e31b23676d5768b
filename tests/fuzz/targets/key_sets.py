"""Key sets that others publish: of token issuers, and of sidecars (RFC 7517)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from pdp.canonical import JsonValue
from pdp.identity.keys import MAX_KEYS, JwksError, parse_jwks
from pdp.permit import PermitError, PermitKeySet
from tests.fuzz import jose
from tests.fuzz.choices import Choices, edited
from tests.fuzz.contract import SECRET, refuses

P256: Final[JsonValue] = {
    "kty": "EC",
    "crv": "P-256",
    "kid": "ec",
    # RFC 7517 A.1
    "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
    "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
    "use": "sig",
    "alg": "ES256",
    "note": SECRET,
}
RSA: Final[JsonValue] = {
    "kty": "RSA",
    "kid": "rsa",
    "n": (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJEC"
        "PebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2Qvz"
        "qY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZ"
        "u0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    ),
    "e": "AQAB",
    "key_ops": ["verify"],
}
SET: Final[JsonValue] = {"keys": [*json.loads(jose.JWKS)["keys"], P256, RSA]}


def samples() -> Iterable[bytes]:
    yield b"\0" + json.dumps(SET).encode()
    yield b"\1"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    if choices.yes():
        content = json.dumps(edited(SET, choices)).encode("utf-8", "surrogatepass")
    else:
        content = choices.rest()
    strict = refuses(lambda: parse_jwks(content, strict=True), JwksError)
    lenient = refuses(lambda: parse_jwks(content, strict=False), JwksError)
    of_workloads = refuses(
        lambda: parse_jwks(content, strict=False, uses=frozenset({"jwt-svid"})), JwksError
    )
    permits = refuses(lambda: PermitKeySet.from_jwks(content), PermitError)
    if strict is not None:
        assert lenient is not None
        assert of_workloads is not None
        assert strict.keys() <= lenient.keys() <= of_workloads.keys()
    if lenient:
        said = json.loads(content)["keys"]
        assert len(said) <= MAX_KEYS
        assert not any({"d", "k"} & jwk.keys() for jwk in said)
        assert {key.algorithm for key in lenient.values()} <= {"EdDSA", "ES256", "RS256"}
    if permits is not None:
        assert PermitKeySet.from_jwks(permits.to_jwks()).to_jwks() == permits.to_jwks()
    return bool(strict)
