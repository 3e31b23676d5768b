"""A bundle is read within its bounds, or refused with what is wrong and what to do."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pdp.canonical import JsonObject
from pdp.policy import bundle as bundle_module
from pdp.policy.bundle import MAX_ENTRIES, Bundle, load_bundle
from pdp.policy.engine import BundleError, Entrypoint

WritePolicy = Callable[[Mapping[str, str | JsonObject]], Path]

WASM = b"\x00asm stands for a module; it is not run here"
REGO: Mapping[str, str | JsonObject] = {
    "pdp/authz/authz.rego": 'package pdp.authz\n\ndecision := {"allow": false}\n',
    "pdp/budget/budget.rego": "package pdp.budget\n\nlimits := []\n\ndecision := true\n",
    "tenants/data.json": {"tenant_acme": {"status": "active"}},
}


def tar(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for named, body in members:
            member = tarfile.TarInfo(named) if isinstance(named, str) else named
            if member.isreg():
                member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return content.getvalue()


def bundle_of(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    """A sound bundle, and what is added to it."""
    return gzip.compress(tar(("/policy.wasm", WASM), ("/data.json", b"{}"), *members))


def special(kind: bytes, name: str = "extra", target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member


def loaded(tmp_path: Path, content: bytes) -> Bundle:
    file = tmp_path / "bundle.tar.gz"
    file.write_bytes(content)
    return load_bundle(file)


def refusal_of(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(BundleError) as refusal:
        loaded(tmp_path, content)
    assert refusal.value.reason_code == "policy_unavailable"
    assert str(tmp_path / "bundle.tar.gz") in refusal.value.message
    return refusal.value.message


def test_a_bundle_as_opa_writes_it_is_read(tmp_path: Path) -> None:
    bundle = loaded(
        tmp_path,
        gzip.compress(
            tar(
                ("/data.json", b'{"tenants":{}}'),
                ("/pdp/authz/authz.rego", b"package pdp.authz"),
                ("/policy.wasm", WASM),
                ("/.manifest", b'{"revision":"r-17","roots":[""]}'),
            )
        ),
    )

    assert bundle.revision == "r-17"
    assert bundle.wasm == WASM
    assert json.loads(bundle.data) == {"tenants": {}}


def test_without_a_revision_the_content_is_the_revision(tmp_path: Path) -> None:
    one = loaded(tmp_path, bundle_of())
    same = loaded(tmp_path, bundle_of((".manifest", b'{"revision":""}')))
    other = loaded(
        tmp_path, gzip.compress(tar(("policy.wasm", WASM), ("data.json", b'{"tenants":{}}')))
    )

    assert one.revision.startswith("sha256:")
    assert one.revision == same.revision
    assert one.revision != other.revision


def test_a_bundle_shows_neither_data_nor_module_in_its_repr(tmp_path: Path) -> None:
    shown = repr(loaded(tmp_path, bundle_of(("tools/data.json", b'{"secret":1}'))))

    assert "secret" not in shown
    assert "asm" not in shown


def test_data_below_the_root_stands_where_its_folder_says(tmp_path: Path) -> None:
    bundle = loaded(
        tmp_path,
        gzip.compress(
            tar(
                ("policy.wasm", WASM),
                ("data.json", b'{"tenants":{"a":{"status":"active"}}}'),
                ("tenants/a/data.json", b'{"scopes":["x"]}'),
                ("tools/data.json", b"{}"),
            )
        ),
    )

    assert json.loads(bundle.data) == {
        "tenants": {"a": {"status": "active", "scopes": ["x"]}},
        "tools": {},
    }


@pytest.mark.parametrize(
    "member",
    (
        special(tarfile.SYMTYPE),
        special(tarfile.SYMTYPE, "data.json", "policy.wasm"),
        special(tarfile.LNKTYPE, "extra", "policy.wasm"),
        special(tarfile.CHRTYPE),
        special(tarfile.BLKTYPE),
        special(tarfile.FIFOTYPE),
        special(tarfile.CONTTYPE),
        special(b"z"),
    ),
    ids=lambda member: f"type-{member.type!r}-{member.name}",
)
def test_links_devices_and_what_else_is_no_file_are_refused(
    tmp_path: Path, member: tarfile.TarInfo
) -> None:
    assert "link or a device" in refusal_of(tmp_path, bundle_of((member, b"")))


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("extra")
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "extra",
        "GNU.sparse.realsize": "99999999999",
    }

    assert "sparse" in refusal_of(tmp_path, bundle_of((member, b"0\n".ljust(512, b"\0"))))


@pytest.mark.parametrize(
    "name",
    (
        "../data.json",
        "tenants/../../data.json",
        "/../etc/passwd",
        "//etc/passwd",
        "tenants//data.json",
        "./../data.json",
        "tenants/./data.json",
        "..",
        "a\\..\\b",
        "a\nb",
        "a\x7fb",
        "\u202eosaj.atad",
        "x" * 513,
    ),
    ids=repr,
)
def test_a_path_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal_of(tmp_path, bundle_of((name, b"{}")))

    assert "leads elsewhere" in message
    assert message.isprintable()


@pytest.mark.parametrize("name", ("data.json", "/data.json", "./data.json", "/policy.wasm"))
def test_a_file_that_stands_twice_is_refused(tmp_path: Path, name: str) -> None:
    assert "twice" in refusal_of(tmp_path, bundle_of((name, b"{}")))


def test_too_many_entries_are_refused(tmp_path: Path) -> None:
    # Names that do not compress well, so that this is not refused for its ratio.
    names = [os.urandom(16).hex() for _ in range(MAX_ENTRIES)]

    message = refusal_of(tmp_path, bundle_of(*((name, b"") for name in names)))

    assert str(MAX_ENTRIES) in message


def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = bundle_of(("extra", b"\0" * 64 * 1024 * 1024))
    monkeypatch.setattr("tarfile.open", pytest.fail)

    message = refusal_of(tmp_path, bomb)

    assert "more than a bundle may hold" in message


def test_a_bomb_within_a_header_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("extra")
    member.pax_headers = {"comment": "x" * 32 * 1024 * 1024}

    assert "more than a bundle may hold" in refusal_of(tmp_path, bundle_of((member, b"")))


def test_an_archive_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "MAX_ARCHIVE_BYTES", 1024)

    assert "1024 bytes" in refusal_of(tmp_path, bundle_of(("extra", os.urandom(2048))))


def test_what_is_no_whole_archive_is_refused(tmp_path: Path) -> None:
    whole = bundle_of()
    for content in (
        b"",
        b"no archive",
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:-8] + bytes(8),  # the checksum
        whole + b"more",
        whole + whole,
        gzip.compress(b"no tar" * 100),
        gzip.compress(tar(("policy.wasm", WASM * 100))[:2000]),
        gzip.compress(tar(("policy.wasm", WASM))[:1024] + b"no header" * 100),
        tar(("policy.wasm", WASM)),
        gzip.compress(b""),
    ):
        message = refusal_of(tmp_path, content)
        assert "whole .tar.gz" in message or "no policy.wasm" in message


def test_a_bundle_without_its_module_says_how_to_build_it(tmp_path: Path) -> None:
    message = refusal_of(tmp_path, gzip.compress(tar(("data.json", b"{}"))))

    assert "opa build -t wasm" in message
    for entrypoint in Entrypoint:
        assert entrypoint.value in message


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    (
        ("data.json", b"[]", "object"),
        ("data.json", b'{"a":1,"a":2}', "duplicate key"),
        ("data.json", b'{"a":NaN}', "NaN"),
        ("data.json", b'{"a":9007199254740993}', "integer"),
        ("data.json", b"\xff", "UTF-8"),
        ("data.json", b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "deep"),
        ("data.json", b"{", "JSON"),
        ("tenants/data.json", b"[1]", "tenants/data.json"),
        (".manifest", b"[]", ".manifest"),
        (".manifest", b'{"revision":1}', "revision"),
        (".manifest", b'{"revision":"two words"}', "revision"),
        (".manifest", b'{"revision":"' + b"r" * 129 + b'"}', "revision"),
        ("data.yaml", b"tenants: {}", "data.json"),
        ("tenants/data.yml", b"a: 1", "data.json"),
    ),
)
def test_data_and_manifest_are_strict_json(
    tmp_path: Path, name: str, content: bytes, complaint: str
) -> None:
    members = [("policy.wasm", WASM), (name, content)]

    assert complaint in refusal_of(tmp_path, gzip.compress(tar(*members)))


def test_data_that_stands_in_two_files_is_refused(tmp_path: Path) -> None:
    root = b'{"tenants":{"a":1},"flag":true}'
    for name, content in (
        ("tenants/data.json", b'{"a":2}'),
        ("tenants/a/data.json", b'{"b":1}'),
        ("flag/data.json", b"{}"),
    ):
        members = [("policy.wasm", WASM), ("data.json", root), (name, content)]
        assert "stands already" in refusal_of(tmp_path, gzip.compress(tar(*members)))


def test_what_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.tar.gz", Path("/dev/null")):
        with pytest.raises(BundleError) as refusal:
            load_bundle(path)
        assert str(path) in refusal.value.message


def test_a_directory_of_rego_is_compiled(write_policy: WritePolicy, opa: Path) -> None:
    directory = write_policy(
        {**REGO, "pdp/authz/authz_test.rego": "package pdp.authz_test\n\nnot rego"}
    )

    bundle = load_bundle(directory, opa=opa)

    assert bundle.wasm.startswith(b"\x00asm")
    assert json.loads(bundle.data) == {"tenants": {"tenant_acme": {"status": "active"}}}
    assert bundle.revision.startswith("sha256:")


def test_a_directory_of_rego_is_compiled_by_the_opa_on_path(
    write_policy: WritePolicy, opa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(opa.parent))

    assert load_bundle(write_policy(REGO)).wasm.startswith(b"\x00asm")


def test_without_opa_a_directory_of_rego_says_what_to_do(
    write_policy: WritePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(BundleError, match="Install OPA") as refusal:
        load_bundle(write_policy(REGO))

    assert "opa build -t wasm -e pdp/authz/decision" in refusal.value.message


def test_rego_that_does_not_compile_says_where(write_policy: WritePolicy, opa: Path) -> None:
    directory = write_policy({**REGO, "pdp/authz/authz.rego": "package pdp.authz\n\nallow := nope"})

    with pytest.raises(BundleError, match="does not compile") as refusal:
        load_bundle(directory, opa=opa)

    assert "authz.rego:3" in refusal.value.message


def test_rego_without_an_entrypoint_says_which(write_policy: WritePolicy, opa: Path) -> None:
    directory = write_policy(
        {**REGO, "pdp/budget/budget.rego": "package pdp.budget\n\nlimits := []"}
    )

    with pytest.raises(BundleError) as refusal:
        load_bundle(directory, opa=opa)

    assert "pdp/budget/decision" in refusal.value.message


def test_an_opa_that_does_not_run_is_a_plain_refusal(
    write_policy: WritePolicy, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="could not be compiled"):
        load_bundle(write_policy(REGO), opa=tmp_path / "opa")


def test_an_unpacked_bundle_is_read(tmp_path: Path) -> None:
    tmp_path.joinpath("policy.wasm").write_bytes(WASM)
    tmp_path.joinpath("data.json").write_bytes(b'{"tools":{}}')
    tmp_path.joinpath(".manifest").write_bytes(b'{"revision":"r-2"}')
    tmp_path.joinpath("notes.txt").write_bytes(b"not part of a bundle")

    bundle = load_bundle(tmp_path)

    assert (bundle.revision, bundle.wasm) == ("r-2", WASM)
    assert json.loads(bundle.data) == {"tools": {}}


def test_a_mounted_config_map_is_read(tmp_path: Path) -> None:
    """Kubernetes mounts files as links into a folder that it swaps."""
    version = tmp_path / "..2026_11_24"
    version.mkdir()
    tmp_path.joinpath("..data").symlink_to(version.name)
    for name, content in (("policy.wasm", WASM), ("data.json", b'{"tools":{}}')):
        version.joinpath(name).write_bytes(content)
        tmp_path.joinpath(name).symlink_to(f"..data/{name}")

    bundle = load_bundle(tmp_path)

    assert bundle.wasm == WASM
    assert json.loads(bundle.data) == {"tools": {}}


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_bytes(b'{"secret":1}')
    directory = tmp_path / "bundle"
    directory.mkdir()
    directory.joinpath("policy.wasm").write_bytes(WASM)
    directory.joinpath("data.json").symlink_to(outside)

    with pytest.raises(BundleError, match="leads elsewhere"):
        load_bundle(directory)


@pytest.mark.parametrize(
    ("bound", "most", "complaint"),
    (("MAX_ENTRIES", 2, "more than 2 files"), ("MAX_CONTENT_BYTES", 60, "more than 60 bytes")),
)
def test_a_directory_is_read_within_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int, complaint: str
) -> None:
    monkeypatch.setattr(bundle_module, bound, most)
    tmp_path.joinpath("policy.wasm").write_bytes(WASM)
    for name in ("tenants", "tools"):
        tmp_path.joinpath(name).mkdir()
        tmp_path.joinpath(name, "data.json").write_bytes(b'{"a":"some text"}')

    with pytest.raises(BundleError, match=complaint):
        load_bundle(tmp_path)
