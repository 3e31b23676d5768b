"""A manifest is read as OPA reads it, or refused."""

from __future__ import annotations

import pytest

from pdp.policy.archive import Files
from pdp.policy.engine import BundleError
from pdp.policy.manifest import Manifest, parse_manifest
from tests.policy.bundles import manifest, message_of

PLACE = "bundles/acme"
RESOLVER = {"entrypoint": "pdp/authz/decision", "module": "/policy.wasm"}


def parsed(files: Files) -> Manifest:
    return parse_manifest(files, place=PLACE)


def refusal_of(files: Files) -> str:
    with pytest.raises(BundleError) as refusal:
        parsed(files)
    message = message_of(refusal)
    assert message.startswith(f"The policy bundle {PLACE} ")
    assert message.isprintable()
    return message.removeprefix(f"The policy bundle {PLACE} ")


@pytest.mark.parametrize(
    "files",
    (
        {},
        {".manifest": b"{}"},
        {".manifest": b'{"revision":null,"roots":null,"wasm":null,"metadata":null}'},
        {".manifest": b'{"unknown":1,"metadata":{"other":1,"pdp":{}}}'},
    ),
)
def test_without_more_said_a_bundle_is_of_everything(files: Files) -> None:
    assert parsed(files) == Manifest(revision="", roots=("",), sequence=None)


def test_what_a_manifest_says_is_read() -> None:
    said = manifest(
        revision="2026-11-25/7",
        roots=["/pdp/", "tenants/acme", "tools"],
        rego_version=1,
        file_rego_versions={"/*.rego": 1},
        wasm=[RESOLVER],
        metadata={"pdp": {"sequence": 1_764_000_000}},
    )

    assert parsed({".manifest": said, "policy.wasm": b""}) == Manifest(
        revision="2026-11-25/7",
        roots=("pdp", "tenants/acme", "tools"),
        sequence=1_764_000_000,
    )


def test_a_bundle_may_have_no_root_at_all() -> None:
    assert parsed({".manifest": manifest(roots=[])}).roots == ()


@pytest.mark.parametrize(
    ("said", "complaint"),
    (
        (b"[]", "has a .manifest that must be a JSON object."),
        (b"{", "has a .manifest that is not JSON"),
        (b'{"revision":"a","revision":"b"}', "duplicate key"),
        (b'{"Revision":"a"}', 'has the key "Revision" in .manifest; write "revision".'),
        (b'{"ROOTS":[]}', 'has the key "ROOTS" in .manifest; write "roots".'),
        (
            manifest(revision=1),
            "has a revision in .manifest that is not 1 to 128 ASCII characters.",
        ),
        (manifest(revision="two words"), "has a revision"),
        (manifest(revision="r" * 129), "has a revision"),
        (manifest(revision="é"), "has a revision"),
        (manifest(roots="pdp"), "has roots in .manifest that are not a list of paths."),
        (manifest(roots=[1]), "has roots in .manifest that are not a list of paths."),
        (manifest(roots=["a", "b", "a/"]), 'has roots in .manifest that overlap, "a" and "a".'),
        (manifest(roots=["a/b/c", "a/b"]), 'that overlap, "a/b/c" and "a/b".'),
        (manifest(roots=["a", ""]), 'that overlap, "a" and "".'),
        (manifest(roots=["\x1b", "\x1b"]), "that overlap"),
        (manifest(rego_version=0), "has another Rego version in .manifest than 1, which is run."),
        (manifest(rego_version=True), "has another Rego version"),
        (manifest(rego_version="1"), "has another Rego version"),
        (manifest(file_rego_versions={"a.rego": 0}), "has another Rego version"),
        (manifest(file_rego_versions=[]), "has another Rego version"),
        (manifest(metadata=[]), "has a metadata.pdp.sequence in .manifest that is not a whole"),
        (manifest(metadata={"pdp": 1}), "has a metadata.pdp.sequence"),
        (manifest(metadata={"pdp": {"sequence": -1}}), "has a metadata.pdp.sequence"),
        (manifest(metadata={"pdp": {"sequence": True}}), "has a metadata.pdp.sequence"),
        (manifest(metadata={"pdp": {"sequence": 1.5}}), "has a metadata.pdp.sequence"),
        (manifest(metadata={"pdp": {"sequence": "1"}}), "has a metadata.pdp.sequence"),
        (manifest(wasm={}), 'has "wasm" in .manifest that does not list its entrypoints.'),
        (manifest(wasm=[1]), 'has "wasm" in .manifest that does not list its entrypoints.'),
        (manifest(wasm=[{"entrypoint": "a"}]), 'has "wasm" in .manifest'),
        (manifest(wasm=[RESOLVER | {"module": "/other.wasm"}]), "names a module in .manifest"),
        (
            manifest(roots=["pdp/budget"], wasm=[RESOLVER]),
            'has the entrypoint "pdp/authz/decision" outside of the roots in .manifest.',
        ),
        (manifest(wasm=[RESOLVER, RESOLVER]), 'names the entrypoint "pdp/authz/decision" twice'),
    ),
)
def test_what_is_not_a_sound_manifest_is_refused(said: bytes, complaint: str) -> None:
    assert complaint in refusal_of({".manifest": said, "policy.wasm": b""})


def test_a_module_that_is_not_there_is_refused() -> None:
    assert refusal_of({".manifest": manifest(wasm=[RESOLVER])}) == (
        "names a module in .manifest that it does not hold as policy.wasm."
    )


@pytest.mark.parametrize(
    "name", ("tenants/.manifest", "x.manifest", ".manifest.pb", "a/.manifest.pb")
)
def test_a_second_manifest_is_refused(name: str) -> None:
    """OPA takes any file whose name ends so for the manifest."""
    assert refusal_of({".manifest": b"{}", name: b"{}"}) == (
        f"has a second or another manifest, {name}; it takes one, .manifest."
    )
