"""Signs whatever it is given, always with the same keys, so that an input means the same in
every run.
"""

from __future__ import annotations

import base64
import json
from typing import Final, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from pdp import base64url
from pdp.canonical import JsonObject, JsonValue
from pdp.permit.keys import public_jwk, thumbprint

KEY: Final = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
KID: Final = thumbprint(KEY.public_key())
STRANGER: Final = Ed25519PrivateKey.from_private_bytes(b"s" * 32)
"""Signs under the name of KEY."""
JWKS: Final = json.dumps({"keys": [public_jwk(KEY.public_key(), KID)]}).encode()


def compact(header: JsonValue, payload: bytes, *, key: Ed25519PrivateKey = KEY) -> str:
    """A compact JWS (RFC 7515 3.1) with that header, which may be no header at all."""
    head = base64url.encode(json.dumps(header).encode("utf-8", "surrogatepass"))
    signed = f"{head}.{base64url.encode(payload)}"
    return f"{signed}.{base64url.encode(key.sign(signed.encode()))}"


def said(token: str) -> tuple[JsonObject, JsonObject]:
    """Header and payload of a token that was taken, as a lenient parser reads them."""
    header, payload, _ = token.split(".")
    return _object(header), _object(payload)


def _object(part: str) -> JsonObject:
    return cast("JsonObject", json.loads(base64.urlsafe_b64decode(part + "==")))
