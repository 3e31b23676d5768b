"""What OPA signs is verified here, what is signed here OPA verifies, and all else is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jws
from joserfc.jwk import RSAKey

from pdp import base64url
from pdp.policy.archive import Files, pack, read_archive, read_directory
from pdp.policy.bundle import load_bundle, read_part
from pdp.policy.compile import build_files
from pdp.policy.data import parse_data
from pdp.policy.engine import BundleError
from pdp.policy.signature import SIGNATURES, VerificationKey, Verifier, sign
from tests.policy.bundles import FILES, OPA, message_of, write_files

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
PLACE = "oci://bundles/acme"
ALGORITHMS = (
    "EdDSA", "ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512",
)  # fmt: skip


CURVES: dict[str, ec.EllipticCurve] = {
    "ES256": ec.SECP256R1(),
    "ES384": ec.SECP384R1(),
    "ES512": ec.SECP521R1(),
}


def key_for(algorithm: str) -> PrivateKey:
    if algorithm == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    if algorithm in CURVES:
        return ec.generate_private_key(CURVES[algorithm])
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


KEY = key_for("EdDSA")
RSA = key_for("RS256")


def verifier(
    key: PrivateKey = KEY,
    algorithm: str = "EdDSA",
    scope: str | None = None,
    key_id: str = "release",
) -> Verifier:
    return Verifier(
        keys={key_id: VerificationKey(pem=public_pem(key), algorithm=algorithm)}, scope=scope
    )


def signed(
    files: Files = FILES,
    *,
    key: PrivateKey = KEY,
    algorithm: str = "EdDSA",
    scope: str | None = None,
    key_id: str = "release",
) -> dict[str, bytes]:
    pem = private_pem(key)
    text = sign(files, private_key_pem=pem, key_id=key_id, algorithm=algorithm, scope=scope)
    return {**files, SIGNATURES: text}


def token_of(files: Files) -> str:
    (token,) = json.loads(files[SIGNATURES])["signatures"]
    assert isinstance(token, str)
    return token


def claims_of(files: Files) -> dict[str, object]:
    payload = token_of(files).split(".")[1]
    claims = json.loads(base64url.decode(payload))
    assert isinstance(claims, dict)
    return claims


def resigned(claims: object) -> bytes:
    """Any claims, signed with the key that is trusted (RS256)."""
    token = jws.serialize_compact(
        {"alg": "RS256", "kid": "release"}, json.dumps(claims), RSAKey.import_key(private_pem(RSA))
    )
    return json.dumps({"signatures": [token]}).encode()


def refusal_of(files: Files, by: Verifier | None = None) -> str:
    with pytest.raises(BundleError) as refusal:
        (by or verifier()).verify(files, place=PLACE)
    message = message_of(refusal)
    assert message.startswith(f"The policy bundle {PLACE} ")
    assert message.isprintable()
    return message.removeprefix(f"The policy bundle {PLACE} ")


# With the real opa


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(
        tmp_path_factory.mktemp("sources"),
        {
            **FILES,
            "tenants/more/data.json": (
                '{"n": [1, -0, 1.0, 1e3, 1E+3, 0.10, 123456789], "t": "\\u2028<&>é\\u00e9\\u007f'
                '\\b\\f\\n\\u0001", "\\u00ff": {}, "z": [], "a": [true, false, null, {"b": ""}]}'
            ).encode(),
        },
    )  # fmt: skip


def run(*command: str | Path, folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_opa_build_signs_is_verified(
    opa: Path, sources: Path, tmp_path: Path, algorithm: str
) -> None:
    key = key_for(algorithm)
    tmp_path.joinpath("key.pem").write_bytes(private_pem(key))
    run(
        opa, "build", "--bundle", ".", "--output", tmp_path / "bundle.tar.gz",
        "--signing-key", tmp_path / "key.pem", "--signing-alg", algorithm,
        "--verification-key-id", "release", folder=sources,
    )  # fmt: skip
    files = read_archive(tmp_path.joinpath("bundle.tar.gz").read_bytes(), place=PLACE)

    verifier(key, algorithm).verify(files, place=PLACE)

    assert "is signed for another scope" in refusal_of(files, verifier(key, algorithm, "prod"))
    files["tenants/data.json"] = b"{}"
    assert "holds tenants/data.json, which" in refusal_of(files, verifier(key, algorithm))


def test_what_opa_sign_signs_is_verified_with_its_scope_and_key(
    opa: Path, sources: Path, tmp_path: Path
) -> None:
    """As OPA documents it: the key id and the scope in a file of claims."""
    tmp_path.joinpath("key.pem").write_bytes(private_pem(RSA))
    tmp_path.joinpath("claims.json").write_text('{"keyid": "release", "scope": "prod"}')
    folder = write_files(tmp_path / "bundle", dict(read_directory(sources)))
    run(
        opa, "sign", "--bundle", ".", "--signing-key", tmp_path / "key.pem",
        "--claims-file", tmp_path / "claims.json", folder=folder,
    )  # fmt: skip
    files = read_directory(folder)

    verifier(RSA, "RS256", "prod").verify(files, place=PLACE)

    assert "is signed for another scope" in refusal_of(files, verifier(RSA, "RS256"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_opa_takes_what_is_signed_here(
    opa: Path, sources: Path, tmp_path: Path, algorithm: str
) -> None:
    key = key_for(algorithm)
    built = build_files(read_directory(sources), opa=opa, revision="r-9", sequence=1)
    files = signed(built, key=key, algorithm=algorithm, scope="prod")
    tmp_path.joinpath("key.pub").write_bytes(public_pem(key))
    tmp_path.joinpath("bundle.tar.gz").write_bytes(pack(files))

    def evaluated(scope: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                opa, "build", "--bundle", "bundle.tar.gz", "--output", "again.tar.gz",
                "--verification-key", "key.pub", "--verification-key-id", "release",
                "--signing-alg", algorithm, "--scope", scope,
            ],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip

    verifier(key, algorithm, "prod").verify(files, place=PLACE)
    done = evaluated("prod")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scope mismatch" in evaluated("other").stdout


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(("yes", "NO", "~", "null", "1.0", "0x1", "2026-11-25", "1_0", ".5", "<<")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


plain_words = st.one_of(
    st.text("0123456789abefxoXO+-._:~TZ =<", min_size=1, max_size=6),
    st.text("nultrefasyoNTFY.", min_size=1, max_size=5),
    st.sampled_from(("24h", "10.0.0.0/8", "0b1", "0o17", "017", "1:30", "1e3", "1E+3", "-0", "1.")),
    st.sampled_from((".Inf", "-.inf", ".NaN", "True", "NULL", "Yes", "off", "y", "=", "1__0")),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(values, min_size=20, max_size=40), st.lists(plain_words, min_size=50, max_size=90))
def test_json_and_yaml_mean_to_opa_what_they_mean_here(
    values: list[object], words: list[str]
) -> None:
    """OPA digests what it has read; so a digest that is the same was read alike."""
    files = {}
    texts = [f"a: {word}\nb: [{word}]\n" for word in words]
    for number, value in enumerate(values):
        files[f"json/{number}/data.json"] = json.dumps(value, ensure_ascii=number < 20).encode()
        texts.append(yaml.safe_dump(value, allow_unicode=True, default_flow_style=number < 20))
    for number, text in enumerate(texts):
        with contextlib.suppress(BundleError):  # what is not read here can not be read otherwise
            parse_data("data.yaml", text.encode(), place=PLACE)
            files[f"yaml/{number}/data.yaml"] = text.encode()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_files(Path(scratch, "bundle"), files)
        Path(scratch, "key.pem").write_bytes(private_pem(RSA))
        Path(scratch, "claims.json").write_text('{"keyid": "release"}')
        run(
            OPA, "sign", "--bundle", ".", "--signing-key", "../key.pem",
            "--claims-file", "../claims.json", folder=folder,
        )  # fmt: skip
        signed = read_directory(folder)

    verifier(RSA, "RS256").verify(signed, place=PLACE)


# Refusals


def test_a_signed_bundle_is_read(tmp_path: Path) -> None:
    archive = tmp_path / "bundle.tar.gz"
    archive.write_bytes(pack(signed({**FILES, "policy.wasm": b"\0asm"}, scope="prod")))

    assert load_bundle(archive, verifier=verifier(scope="prod")).revision == "r-1"
    with pytest.raises(BundleError, match="another scope"):
        load_bundle(archive, verifier=verifier())


def test_an_unsigned_bundle_is_refused() -> None:
    assert refusal_of(FILES) == (
        "is not signed: it has no .signatures.json, and policy.verification asks for one."
    )


@pytest.mark.parametrize("text", (b"{}", b'{"signatures":[]}', b'{"signatures":null}'))
def test_a_stripped_signature_is_refused(text: bytes) -> None:
    assert refusal_of({**FILES, SIGNATURES: text}) == (
        "is not signed: its .signatures.json holds no signature."
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    (
        (b"[]", "has a .signatures.json that must be a JSON object."),
        (b'{"signatures":["a.b.c","a.b.c"]}', "with several signatures; OPA takes one."),
        (b'{"signatures":[1]}', "holds no JSON Web Signature."),
        (b'{"signatures":["abc"]}', "holds no JSON Web Signature."),
        (b'{"signatures":["a.b.c.d"]}', "holds no JSON Web Signature."),
        (b'{"signatures":["e30.e30.\xc3\xa9"]}', "holds no JSON Web Signature."),
        (b'{"signatures":["e30.W10.x"]}', "holds no JSON Web Signature."),
        (
            b'{"signatures":["e30.e30."],"plugin":"other"}',
            "of a plugin of OPA, which is not accepted.",
        ),
        (b'{"signatures":["e30.e30."],"plugin":{}}', "of a plugin of OPA, which is not accepted."),
    ),
)
def test_what_is_no_signature_is_refused(text: bytes, complaint: str) -> None:
    assert refusal_of({**FILES, SIGNATURES: text}).endswith(complaint)


def test_a_second_signatures_file_is_refused() -> None:
    files = signed()

    assert refusal_of({**files, f"tenants/{SIGNATURES}": files[SIGNATURES]}) == (
        "holds tenants/.signatures.json; its signature stands in .signatures.json alone."
    )


def test_a_key_that_is_not_named_is_refused() -> None:
    assert refusal_of(signed(key_id="other\x1b[31m")) == (
        r'is signed with the key "other\u001b[31m", which policy.verification does not name.'
    )


def test_another_scope_is_refused() -> None:
    wanted = 'is signed for another scope than "prod", which policy.verification names.'
    assert refusal_of(signed(scope="test"), verifier(scope="prod")) == wanted
    assert refusal_of(signed(), verifier(scope="prod")) == wanted
    assert refusal_of(signed(scope="prod")) == (
        "is signed for another scope than none, which policy.verification names."
    )


@pytest.mark.parametrize("algorithm", ("RS384", "PS256"))
def test_another_algorithm_is_refused_also_by_the_same_key(algorithm: str) -> None:
    files = signed(key=RSA, algorithm=algorithm)

    assert refusal_of(files, verifier(RSA, "RS256")) == (
        "is signed with another algorithm than RS256, the one of its key."
    )


@pytest.mark.parametrize("algorithm", ("none", "None", "HS256", "", None, 1))
def test_no_signature_and_a_shared_secret_are_refused(algorithm: object) -> None:
    header, payload, _ = token_of(signed()).split(".")
    header = base64url.encode(json.dumps({"alg": algorithm, "kid": "release"}).encode())
    text = json.dumps({"signatures": [f"{header}.{payload}."]}).encode()

    assert "with another algorithm than EdDSA" in refusal_of({**FILES, SIGNATURES: text})


def test_a_signature_by_another_key_is_refused() -> None:
    assert refusal_of(signed(key=key_for("EdDSA"))) == "has a signature that is not by its key."


def test_a_signature_over_other_claims_is_refused() -> None:
    header, _, signature = token_of(signed()).split(".")
    _, payload, _ = token_of(signed({**FILES, "x.rego": b"package x"})).split(".")
    text = json.dumps({"signatures": [f"{header}.{payload}.{signature}"]}).encode()

    assert refusal_of({**FILES, "x.rego": b"package x", SIGNATURES: text}) == (
        "has a signature that is not by its key."
    )


def test_a_file_that_was_not_signed_is_refused() -> None:
    assert refusal_of({**signed(), "notes.txt": b""}) == (
        "holds notes.txt, which its signature does not cover."
    )


def test_a_file_that_was_signed_and_is_missing_is_refused() -> None:
    for name in FILES:
        files = signed()
        del files[name]
        assert refusal_of(files) == f"lacks {name}, which its signature covers."


def test_a_file_that_was_changed_is_refused() -> None:
    for name in FILES:
        changed = b"{}" if name.endswith("json") else b"package pdp.authz\n"
        if name == ".manifest":
            changed = FILES[name].replace(b"r-1", b"r-2")
        assert refusal_of({**signed(), name: changed}) == f"holds another {name} than was signed."


def test_a_number_that_is_written_otherwise_is_another() -> None:
    """As with OPA: digests are over the text of numbers, so 1.50 is not 1.5."""
    changed = FILES["tenants/data.json"].replace(b"1.50", b"1.5")

    assert "holds another tenants/data.json" in refusal_of(
        {**signed(), "tenants/data.json": changed}
    )


def test_blanks_and_the_order_of_keys_do_not_matter_in_data() -> None:
    same = b'{"acme":{"limit":1.50,\n"status":"\\u0061ctive"}}'

    verifier().verify({**signed(), "tenants/data.json": same}, place=PLACE)


def test_data_that_is_not_well_formed_is_refused_by_name() -> None:
    for content, complaint in (
        (b"{", "JSON"),
        (b"\xff", "UTF-8"),
        (b'{"a":"\\ud800"}', "surrogate"),
        (b"[" * 100_000, "deep"),
    ):
        message = refusal_of({**signed(), "tenants/data.json": content})
        assert message.startswith("has a tenants/data.json that ")
        assert complaint in message


SHA = "0" * 64


@pytest.mark.parametrize(
    ("claims", "complaint"),
    (
        ({}, "has a signature that lists no files."),
        ({"files": {}}, "has a signature that lists no files."),
        ({"files": [1]}, "lists a file without name or hash."),
        ({"files": [{"name": "a", "algorithm": "SHA-256"}]}, "lists a file without name or hash."),
        (
            {"files": [{"name": "a", "hash": SHA}]},
            "has a signature with an unknown hash algorithm;",
        ),
        (
            {"files": [{"name": "a", "hash": SHA, "algorithm": "SHA-3"}]},
            "it takes SHA-224, SHA-256, SHA-384, SHA-512, SHA-512-224, SHA-512-256.",
        ),
        ({"files": [{"name": "a", "hash": SHA, "algorithm": "MD5"}]}, "unknown hash algorithm"),
        ({"files": [{"name": "a", "hash": SHA, "algorithm": "SHA-1"}]}, "unknown hash algorithm"),
        ({"files": [{"name": "a", "hash": SHA, "algorithm": []}]}, "unknown hash algorithm"),
        (
            {"files": 2 * [{"name": "a", "hash": SHA, "algorithm": "SHA-256"}]},
            "has a signature that lists a twice.",
        ),
        (
            {"files": [{"name": "a", "hash": "0x", "algorithm": "SHA-256"}]},
            "has a signature without a digest of a.",
        ),
        (
            {"files": [{"name": "a", "hash": "é0", "algorithm": "SHA-256"}]},
            "has a signature without a digest of a.",
        ),
        ({"files": [], "keyid": "other"}, 'has a signature whose "kid" and "keyid" differ.'),
        ({"files": [], "scope": ["x"]}, "is signed for another scope than none"),
    ),
)
def test_claims_that_do_not_list_the_files_are_refused(claims: object, complaint: str) -> None:
    files = {"a": b"", SIGNATURES: resigned(claims)}

    assert complaint in refusal_of(files, verifier(RSA, "RS256"))


@pytest.mark.parametrize(
    "algorithm", ("SHA-224", "SHA-384", "SHA-512", "SHA-512-224", "SHA-512-256")
)
def test_every_sound_hash_of_opa_is_taken(algorithm: str) -> None:
    name = algorithm.lower().replace("sha-", "sha").replace("-", "_")
    digest = hashlib.new(name, b"words").hexdigest()
    claims = {"files": [{"name": "a", "hash": digest.upper(), "algorithm": algorithm}]}

    verifier(RSA, "RS256").verify({"a": b"words", SIGNATURES: resigned(claims)}, place=PLACE)


@pytest.mark.parametrize(
    ("header", "complaint"),
    (
        ({"alg": "RS256"}, "has a signature that names no key; opa build takes"),
        ({"alg": "RS256", "kid": ""}, "names no key"),
        ({"alg": "RS256", "kid": 1}, "names no key"),
        ({"alg": "RS256", "kid": ["release"]}, "names no key"),
        ({"alg": "RS256", "kid": "release", "crit": ["b64"]}, "header that is not accepted"),
        ({"alg": "RS256", "kid": "release", "b64": True}, "header that is not accepted"),
    ),
)
def test_a_header_that_says_too_little_or_too_much_is_refused(
    header: dict[str, object], complaint: str
) -> None:
    token = ".".join((base64url.encode(json.dumps(header).encode()), "e30", "AAAA"))
    files = {SIGNATURES: json.dumps({"signatures": [token]}).encode()}

    assert complaint in refusal_of(files, verifier(RSA, "RS256"))


def test_a_token_whose_bits_are_written_otherwise_is_refused() -> None:
    token = token_of(signed())
    for other in (token + "=", token + " ", token.replace(".", "..", 1)):
        text = json.dumps({"signatures": [other]}).encode()
        assert "holds no JSON Web Signature" in refusal_of({**FILES, SIGNATURES: text})


SIGNED = signed()
VERIFIED = read_part(SIGNED, name="acme", place=PLACE, verifier=verifier())


@given(st.sampled_from(sorted(SIGNED)), st.integers(0, 10_000), st.integers(1, 255))
def test_no_changed_byte_is_taken_unless_it_means_the_same(
    name: str, place: int, flipped: int
) -> None:
    content = bytearray(SIGNED[name])
    content[place % len(content)] ^= flipped
    files = {**SIGNED, name: bytes(content)}

    try:
        read = read_part(files, name="acme", place=PLACE, verifier=verifier())
    except BundleError:
        return
    # A blank in JSON became another.
    assert name in {".manifest", "tenants/data.json", SIGNATURES}
    assert (read.manifest, read.data, read.rego) == (
        VERIFIED.manifest,
        VERIFIED.data,
        VERIFIED.rego,
    )


# Keys


def test_a_signature_can_be_made_again() -> None:
    assert signed(signed())[SIGNATURES] == signed()[SIGNATURES]
    assert [entry["name"] for entry in claims_of(signed())["files"]] == sorted(FILES)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "algorithm", "complaint"),
    (
        (lambda: private_pem(KEY), "HS256", "is for an algorithm that is not one of EdDSA,"),
        (lambda: private_pem(KEY), "none", "is for an algorithm that is not one of EdDSA,"),
        (lambda: private_pem(RSA), "EdDSA", "is no key for EdDSA in PEM form."),
        (lambda: private_pem(KEY), "RS256", "is no key for RS256 in PEM form."),
        (lambda: private_pem(key_for("ES384")), "ES256", "is for P-384, and ES256 takes P-256."),
        (lambda: b"hush", "RS256", "is no key for RS256 in PEM form."),
        (lambda: b"hush", "EdDSA", "is no key for EdDSA in PEM form."),
        (lambda: b"", "ES256", "is no key for ES256 in PEM form."),
        (lambda: b'{"kty":"oct","k":"aHVzaA"}', "RS256", "is no key for RS256 in PEM form."),
        (lambda: public_pem(KEY), "EdDSA", "must be the private half."),
    ),
)
def test_a_signing_key_that_does_not_fit_is_refused(
    make: Callable[[], bytes], algorithm: str, complaint: str
) -> None:
    pem = make()
    with pytest.raises(BundleError) as refusal:
        sign(FILES, private_key_pem=pem, key_id="release", algorithm=algorithm, scope=None)

    message = message_of(refusal)
    assert message.startswith("The signing key ")
    assert complaint in message
    assert "hush" not in message
    assert "BEGIN" not in message


def test_a_short_rsa_key_is_refused() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - which is to be refused
    with pytest.raises(BundleError, match="fewer than 2048 bits"):
        signed(key=key, algorithm="RS256")


def test_a_private_key_is_not_taken_to_verify_with() -> None:
    keys = {"release": VerificationKey(pem=private_pem(KEY), algorithm="EdDSA")}

    with pytest.raises(BundleError, match='verification key "release" must be the public half'):
        Verifier(keys=keys, scope=None).verify(signed(), place=PLACE)


def test_a_key_does_not_show_in_a_repr() -> None:
    assert "BEGIN" not in repr(verifier())
