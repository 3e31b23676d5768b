"""Signatures of bundles, as OPA makes and reads them: .signatures.json holds one JWS over
the digests of all other files (OPA 1.22.2, v1/bundle/{hash,sign,verify}.go).
"""

from __future__ import annotations

import binascii
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import TYPE_CHECKING, Final

from pdp import base64url
from pdp.canonical import JsonObject, JsonValue, canonical_bytes, parse_object
from pdp.policy.archive import Files, refused
from pdp.policy.data import is_data, parse_data, parse_json_object
from pdp.policy.engine import BundleError
from pdp.policy.manifest import MANIFEST
from pdp.reason import ReasonCode

if TYPE_CHECKING:  # A start waits for what its policy needs; joserfc can come meanwhile.
    from joserfc.jwk import ECKey, OKPKey, RSAKey

SIGNATURES: Final = ".signatures.json"
MAX_TOKEN_BYTES: Final = 8 * 1024 * 1024
ALGORITHMS: Final = (
    "EdDSA", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
)  # fmt: skip
"""What a bundle may be signed with. No shared secrets: a sidecar could sign with its own."""
_HASHES: Final[Mapping[str, Callable[[bytes], hashlib._Hash]]] = {
    "SHA-224": hashlib.sha224,
    "SHA-256": hashlib.sha256,
    "SHA-384": hashlib.sha384,
    "SHA-512": hashlib.sha512,
    "SHA-512-224": lambda content: hashlib.new("sha512_224", content),
    "SHA-512-256": lambda content: hashlib.new("sha512_256", content),
}
"""OPA takes MD5 and SHA-1 too; with those, two files can be made to share a digest."""
_MIN_RSA_BITS: Final = 2048
_CURVES: Final[Mapping[str, str]] = {
    "EdDSA": "Ed25519", "ES256": "P-256", "ES384": "P-384", "ES512": "P-521",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationKey:
    """A public key, and the one algorithm that it is used with."""

    pem: bytes = field(repr=False)
    algorithm: str
    """One of ALGORITHMS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """Who must have signed a bundle, and for what."""

    keys: Mapping[str, VerificationKey]
    """By key id."""
    scope: str | None
    """The scope that the signature must name; None: it must name none."""

    def verify(self, files: Files, *, place: str) -> None:
        """Raises BundleError unless one of the keys has signed exactly these files."""
        token = _only_token(files, place)
        claims = self._verified_claims(token, place)
        if claims.get("scope", "") != (self.scope or ""):
            wanted = json.dumps(self.scope) if self.scope else "none"
            raise refused(
                place,
                f"is signed for another scope than {wanted}, which policy.verification names",
            )
        signed = _signed_files(claims, place)
        present = files.keys() - {SIGNATURES}
        for name in sorted(present - signed.keys()):
            raise refused(place, f"holds {name}, which its signature does not cover")
        for name in sorted(signed.keys() - present):
            raise refused(place, f"lacks {name}, which its signature covers")
        for name, (algorithm, digest) in signed.items():
            hashed = _HASHES[algorithm](_hashed_form(name, files[name], place)).digest()
            if hashed != digest:
                raise refused(place, f"holds another {name} than was signed")

    def _verified_claims(self, token: str, place: str) -> JsonObject:
        from joserfc import jws  # noqa: PLC0415
        from joserfc.errors import JoseError  # noqa: PLC0415

        header, claims = _parts(token, place)
        key_id = _key_id(header, claims, place)
        key = self.keys.get(key_id)
        if key is None:
            raise refused(
                place,
                f"is signed with the key {json.dumps(key_id)}, which policy.verification"
                " does not name",
            )
        if header.get("alg") != key.algorithm:
            raise refused(
                place, f"is signed with another algorithm than {key.algorithm}, the one of its key"
            )
        if not {"crit", "b64"}.isdisjoint(header):
            raise refused(place, "has a signature with a header that is not accepted")
        public = _imported(key.pem, key.algorithm, f"The verification key {json.dumps(key_id)}")
        try:
            with warnings.catch_warnings():
                # joserfc warns that the name EdDSA is being replaced by Ed25519.
                warnings.simplefilter("ignore")
                jws.deserialize_compact(token, public, algorithms=[key.algorithm])
        except (JoseError, ValueError):
            raise refused(place, "has a signature that is not by its key") from None
        return claims


def sign(
    files: Files, *, private_key_pem: bytes, key_id: str, algorithm: str, scope: str | None
) -> bytes:
    """The text of .signatures.json for these files; an older one among them is left out.

    Raises BundleError for a key that does not fit, and for files that are not well formed.
    """
    from joserfc import jws  # noqa: PLC0415

    place = "that is to be signed"
    key = _imported(private_key_pem, algorithm, "The signing key", private=True)
    listed = [
        {
            "name": name,
            "hash": hashlib.sha256(_hashed_form(name, files[name], place)).hexdigest(),
            "algorithm": "SHA-256",
        }
        for name in sorted(files.keys() - {SIGNATURES})
    ]
    claims = {"files": listed} | ({"scope": scope} if scope else {})
    header = {"alg": algorithm, "kid": key_id, "typ": "JWT"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        token = jws.serialize_compact(header, json.dumps(claims), key, algorithms=[algorithm])
    return json.dumps({"signatures": [token]}, indent=1).encode() + b"\n"


def _only_token(files: Files, place: str) -> str:
    for name in files:
        if name.endswith(f"/{SIGNATURES}"):
            raise refused(place, f"holds {name}; its signature stands in {SIGNATURES} alone")
    if SIGNATURES not in files:
        raise refused(
            place, f"is not signed: it has no {SIGNATURES}, and policy.verification asks for one"
        )
    document = parse_json_object(SIGNATURES, files[SIGNATURES], place=place)
    if document.get("plugin", "") not in ("", "_default"):
        raise refused(place, f"has a {SIGNATURES} of a plugin of OPA, which is not accepted")
    tokens = document.get("signatures")
    if not isinstance(tokens, list) or not tokens:
        raise refused(place, f"is not signed: its {SIGNATURES} holds no signature")
    token = tokens[0]
    if len(tokens) > 1:
        raise refused(place, f"has a {SIGNATURES} with several signatures; OPA takes one")
    if not isinstance(token, str) or len(token) > MAX_TOKEN_BYTES:
        raise refused(place, f"has a {SIGNATURES} that holds no JSON Web Signature")
    return token


def _parts(token: str, place: str) -> tuple[JsonObject, JsonObject]:
    """Header and claims, not verified."""
    try:
        header, claims, _ = (base64url.decode(part) for part in token.split("."))
        return (
            parse_object(header, max_bytes=MAX_TOKEN_BYTES),
            parse_object(claims, max_bytes=MAX_TOKEN_BYTES),
        )
    except ValueError:
        raise refused(place, f"has a {SIGNATURES} that holds no JSON Web Signature") from None


def _key_id(header: JsonObject, claims: JsonObject, place: str) -> str:
    in_header, in_claims = header.get("kid") or "", claims.get("keyid") or ""
    key_id = in_header or in_claims
    if not isinstance(key_id, str) or not key_id:
        raise refused(
            place, "has a signature that names no key; opa build takes --verification-key-id"
        )
    if in_claims not in ("", key_id):
        raise refused(place, 'has a signature whose "kid" and "keyid" differ')
    return key_id


def _signed_files(claims: JsonObject, place: str) -> dict[str, tuple[str, bytes]]:
    """Hash algorithm and digest by the file's path."""
    listed = claims.get("files")
    if not isinstance(listed, list):
        raise refused(place, "has a signature that lists no files")
    signed: dict[str, tuple[str, bytes]] = {}
    for entry in listed:
        name, digest, algorithm = (
            entry.get(key) if isinstance(entry, dict) else None
            for key in ("name", "hash", "algorithm")
        )
        if not isinstance(name, str) or not isinstance(digest, str):
            raise refused(place, "has a signature that lists a file without name or hash")
        if not isinstance(algorithm, str) or algorithm not in _HASHES:
            raise refused(
                place, f"has a signature with an unknown hash algorithm; it takes {_SHOWN_HASHES}"
            )
        if name in signed:
            raise refused(place, f"has a signature that lists {name} twice")
        try:
            signed[name] = algorithm, binascii.unhexlify(digest)
        except ValueError:
            raise refused(place, f"has a signature without a digest of {name}") from None
    return signed


_SHOWN_HASHES: Final = ", ".join(_HASHES)


def _imported(
    pem: bytes, algorithm: str, what: str, *, private: bool = False
) -> OKPKey | ECKey | RSAKey:
    """A key that fits the algorithm. Raises BundleError, which never shows the key."""
    from joserfc.jwk import ECKey, OKPKey, RSAKey  # noqa: PLC0415

    if algorithm not in ALGORITHMS:
        raise _unfit(f"{what} is for an algorithm that is not one of {', '.join(ALGORITHMS)}.")
    kind: type[OKPKey | ECKey | RSAKey] = RSAKey
    if algorithm in _CURVES:
        kind = OKPKey if algorithm == "EdDSA" else ECKey
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of short keys, which are refused below
            key = kind.import_key(pem)
    except Exception:  # noqa: BLE001 - joserfc and cryptography have no common root of errors
        raise _unfit(f"{what} is no key for {algorithm} in PEM form.") from None
    if key.is_private is not private:
        raise _unfit(f"{what} must be the {'private' if private else 'public'} half.")
    if isinstance(key, RSAKey):
        if key.raw_value.key_size < _MIN_RSA_BITS:
            raise _unfit(f"{what} has fewer than {_MIN_RSA_BITS} bits.")
    elif key.curve_name != _CURVES[algorithm]:
        raise _unfit(f"{what} is for {key.curve_name}, and {algorithm} takes {_CURVES[algorithm]}.")
    return key


def _unfit(message: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, message)


def _hashed_form(name: str, content: bytes, place: str) -> bytes:
    """What OPA digests of a file: data and manifest without what does not matter to JSON,
    all others as they are.
    """
    if not is_data(name) and name != MANIFEST and not name.endswith(f"/{MANIFEST}"):
        return content
    try:
        return _json_as_written(content.decode("utf-8"))
    except (ValueError, RecursionError):
        pass
    # YAML, whose numbers OPA writes as RFC 8785 does; or it is refused.
    parse_file = parse_data if is_data(name) else parse_json_object
    return _json_as_written(canonical_bytes(parse_file(name, content, place=place)).decode())


def _json_as_written(text: str) -> bytes:
    """JSON without spaces and with its keys in order. Numbers stay as they are written:
    1.0 is not 1. Raises ValueError and RecursionError.
    """
    fractions: list[str] = []
    value = json.loads(text, parse_float=fractions.append)
    if not fractions and "-0" not in text:
        # Only whole numbers, which the fast encoder writes as they were.
        written = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    else:
        pieces: list[str] = []
        _write(_AS_WRITTEN.decode(text), pieces)
        written = "".join(pieces)
    # Go writes these two, which Python does not, as escapes.
    return written.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()


class _Number(str):
    """A number as it is written."""

    __slots__ = ()


_AS_WRITTEN: Final = json.JSONDecoder(parse_int=_Number, parse_float=_Number)
_ATOMS: Final = {None: "null", True: "true", False: "false"}


def _write(value: JsonValue, pieces: list[str]) -> None:
    """JSON without spaces, keys in the order of their bytes."""
    if type(value) is dict:
        separator = "{"
        for key in sorted(value):
            pieces += (separator, encode_basestring(key), ":")
            _write(value[key], pieces)
            separator = ","
        pieces.append("}" if value else "{}")
    elif type(value) is list:
        separator = "["
        for item in value:
            pieces.append(separator)
            _write(item, pieces)
            separator = ","
        pieces.append("]" if value else "[]")
    elif type(value) is _Number:
        pieces.append(value)
    elif type(value) is str:
        pieces.append(encode_basestring(value))
    else:
        pieces.append(_ATOMS[value])  # type: ignore[index]
