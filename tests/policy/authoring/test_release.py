"""From sources to a release: built, signed, verified."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pdp.policy.archive import pack, read_archive
from pdp.policy.authoring.release import Signer, WasmOrigin, build, signed, verify, write_whole
from pdp.policy.engine import BundleError
from pdp.policy.signature import SIGNATURES, VerificationKey, Verifier

SOURCES = {
    "pdp/authz/authz.rego": b'package pdp.authz\n\ndecision := {"allow": false,'
    b' "reason_code": "no"}\n',
    "pdp/authz/authz_test.rego": b"package pdp.authz_test\n\ntest_it if true\n",
    "pdp/budget/budget.rego": b"package pdp.budget\n\ndecision := {}\n\nlimits := []\n",
    "tenants/data.json": b'{"acme": {"status": "active"}}',
    "README.md": b"Not part of a bundle.",
}
PRIVATE = ed25519.Ed25519PrivateKey.generate()
SIGNER = Signer(
    private_key_pem=PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    key_id="release",
    algorithm="EdDSA",
    scope="prod",
)
PUBLIC = PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
VERIFIER = Verifier(keys={"release": VerificationKey(pem=PUBLIC, algorithm="EdDSA")}, scope="prod")


@pytest.fixture(scope="module")
def released(opa: Path) -> bytes:
    archive, _ = build(SOURCES, opa=opa, revision="r-7", sequence=7, signer=SIGNER)
    return archive


def test_a_release_is_what_it_was_told_to_be(released: bytes, opa: Path) -> None:
    found = verify(released, place="it", verifier=VERIFIER, opa=opa)

    assert (found.revision, found.sequence, found.roots) == ("r-7", 7, ("",))
    assert "policy.wasm" in found.files
    assert "pdp/authz/authz_test.rego" in found.files
    assert "README.md" not in found.files
    assert found.archive_sha256 == hashlib.sha256(released).hexdigest()
    assert found.wasm is WasmOrigin.SAME


def test_the_same_options_give_the_same_bytes(released: bytes, opa: Path) -> None:
    again, _ = build(SOURCES, opa=opa, revision="r-7", sequence=7, signer=SIGNER)

    assert again == released


def test_without_a_revision_it_is_named_by_what_decides(opa: Path) -> None:
    _, one = build(SOURCES, opa=opa, revision=None, sequence=1, signer=None)
    _, later = build(SOURCES, opa=opa, revision=None, sequence=2, signer=None)
    other = {**SOURCES, "tenants/data.json": b"{}"}
    _, another = build(other, opa=opa, revision=None, sequence=1, signer=None)

    assert one.manifest.revision == later.manifest.revision
    assert one.manifest.revision.startswith("sha256:")
    assert another.manifest.revision != one.manifest.revision


@pytest.mark.parametrize(
    ("verifier", "message"),
    (
        (Verifier(keys=VERIFIER.keys, scope="test"), "is signed for another scope"),
        (Verifier(keys={}, scope="prod"), 'is signed with the key "release"'),
    ),
)
def test_a_release_for_others_is_refused(released: bytes, verifier: Verifier, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        verify(released, place="it", verifier=verifier, opa=None)


def test_a_changed_release_is_refused(released: bytes) -> None:
    files = read_archive(released, place="it")
    tampered = pack({**files, "data.json": b'{"tenants":{"evil":{"status":"active"}}}'})

    with pytest.raises(BundleError, match=r"holds another data\.json than was signed"):
        verify(tampered, place="it", verifier=VERIFIER, opa=None)


def test_an_unsigned_release_is_refused(opa: Path) -> None:
    archive, _ = build(SOURCES, opa=opa, revision=None, sequence=1, signer=None)

    with pytest.raises(BundleError):
        verify(archive, place="it", verifier=VERIFIER, opa=None)


def test_signing_again_replaces_the_signature(released: bytes) -> None:
    files = read_archive(released, place="it")
    again = signed(
        files,
        Signer(
            private_key_pem=SIGNER.private_key_pem,
            key_id="other",
            algorithm="EdDSA",
            scope=None,
        ),
    )

    assert again.keys() == files.keys()
    assert again[SIGNATURES] != files[SIGNATURES]
    key = VERIFIER.keys["release"]
    verify(pack(again), place="it", verifier=Verifier(keys={"other": key}, scope=None), opa=None)


def test_what_is_no_bundle_is_not_signed() -> None:
    with pytest.raises(BundleError, match=r"that is to be signed has a \.manifest"):
        signed({".manifest": b"{"}, SIGNER)


def test_a_key_that_does_not_fit_is_refused_and_not_shown(opa: Path) -> None:
    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    signer = Signer(private_key_pem=pem, key_id="k", algorithm="EdDSA", scope=None)

    with pytest.raises(BundleError, match="The signing key is no key for EdDSA") as refusal:
        build(SOURCES, opa=opa, revision=None, sequence=1, signer=signer)
    assert pem.decode().splitlines()[1] not in str(refusal.value)
    assert "PRIVATE" not in repr(signer)


def test_wasm_of_other_rego_is_seen(released: bytes, opa: Path) -> None:
    files = read_archive(released, place="it")
    allowing = SOURCES["pdp/authz/authz.rego"].replace(b"false", b"true")
    swapped = signed({**files, "pdp/authz/authz.rego": allowing}, SIGNER)

    found = verify(pack(swapped), place="it", verifier=VERIFIER, opa=opa)

    assert found.wasm is WasmOrigin.DIFFERS


def test_without_opa_or_rego_the_wasm_is_not_compared_and_that_is_said(
    released: bytes, opa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = read_archive(released, place="it")
    only_wasm = signed(
        {name: text for name, text in files.items() if not name.endswith(".rego")}, SIGNER
    )
    found = verify(pack(only_wasm), place="it", verifier=VERIFIER, opa=opa)
    assert found.wasm is WasmOrigin.NOT_CHECKED
    assert found.wasm_note == "it does not hold the Rego that it was made of"

    monkeypatch.setenv("PATH", "/nowhere")
    found = verify(released, place="it", verifier=VERIFIER, opa=None)
    assert found.wasm is WasmOrigin.NOT_CHECKED
    assert "there is no opa command" in found.wasm_note


def test_a_file_is_replaced_in_one_step_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "bundle.tar.gz"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        write_whole(target, b"new")
        assert reader.read() == b"old"

    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["bundle.tar.gz"]  # noqa: PTH208 - hidden ones too


def test_what_can_not_be_replaced_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()

    with pytest.raises(OSError, match=r"."):
        write_whole(target, b"new")

    assert list(tmp_path.iterdir()) == [target]
