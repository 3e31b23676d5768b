"""Public keys of token issuers, from a JWK set in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, OKPKey, RSAKey

from pdp import base64url
from pdp.canonical import JsonError, JsonObject, parse_object
from pdp.errors import PdpError
from pdp.reason import ReasonCode

MAX_JWKS_BYTES: Final = 1024 * 1024
MAX_KEYS: Final = 100
_MIN_RSA_BITS: Final = 2048
_LEAST_RSA_MODULUS: Final = 1 << (_MIN_RSA_BITS - 1)

ALGORITHM_OF_KEY: Final[Mapping[tuple[str, str | None], str]] = {
    ("OKP", "Ed25519"): "EdDSA",
    ("EC", "P-256"): "ES256",
    ("RSA", None): "RS256",
}
"""The one algorithm that a key of this type and curve may verify. As the key
decides, a token can not choose (RFC 8725 3.1)."""


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """A public key, pinned to one algorithm."""

    algorithm: str
    key: OKPKey | ECKey | RSAKey


class KeyFileError(PdpError):
    """The JWK set can not be used; the message names the file and what is wrong."""


def load_jwks_file(path: Path) -> dict[str, IssuerKey]:
    """The keys of a JWK set (RFC 7517) by key id. Raises KeyFileError.

    Keys for encryption, and of types that are not in ALGORITHM_OF_KEY, are passed
    over. A private or symmetric key in the file refuses it whole: it has no
    business there.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JWKS_BYTES + 1)
        members = parse_object(data, max_bytes=MAX_JWKS_BYTES).get("keys")
    except OSError as error:
        raise _refused(path, f"can not be read: {error.strerror}") from None
    except JsonError as error:
        raise _refused(path, str(error)) from None
    if not isinstance(members, list) or len(members) > MAX_KEYS:
        raise _refused(path, f'needs "keys", a list of at most {MAX_KEYS} keys')
    keys: dict[str, IssuerKey] = {}
    for jwk in members:
        if not isinstance(jwk, dict):
            raise _refused(path, "holds a key that is not an object")
        if "d" in jwk or "k" in jwk:
            raise _refused(path, "holds a private or symmetric key; keep only public keys in it")
        key = _usable(jwk, path)
        if key is None:
            continue
        kid = jwk.get("kid")
        if not isinstance(kid, str) or not kid or kid in keys:
            raise _refused(path, "holds a key without a kid of its own")
        keys[kid] = key
    if not keys:
        raise _refused(path, "holds no signing key of type Ed25519, P-256 or RSA")
    return keys


def _usable(jwk: JsonObject, path: Path) -> IssuerKey | None:
    kind = jwk.get("kty")
    curve = jwk.get("crv")
    algorithm = (
        ALGORITHM_OF_KEY.get((kind, curve if isinstance(curve, str) else None))
        if isinstance(kind, str)
        else None
    )
    if (
        algorithm is None
        or jwk.get("use", "sig") != "sig"
        or jwk.get("alg", algorithm) != algorithm
    ):
        return None
    members = {name: value for name, value in jwk.items() if isinstance(value, str)}
    key_class = {"OKP": OKPKey, "EC": ECKey, "RSA": RSAKey}[str(kind)]
    try:
        if kind == "RSA" and int.from_bytes(base64url.decode(members["n"])) < _LEAST_RSA_MODULUS:
            raise _refused(path, f"holds an RSA key of fewer than {_MIN_RSA_BITS} bits")
        key = key_class.import_key(members)  # type: ignore[attr-defined]
    except (JoseError, ValueError, KeyError, TypeError):
        raise _refused(path, "holds a key that can not be read") from None
    return IssuerKey(algorithm, key)


def _refused(path: Path, what: str) -> KeyFileError:
    return KeyFileError(ReasonCode.TOKEN_INVALID, f"The JWK set {path} {what}.")
