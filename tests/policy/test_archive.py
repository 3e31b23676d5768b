"""A bundle's files are read within their bounds, or refused with what is wrong."""

from __future__ import annotations

import gzip
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdp.policy import archive as archive_module
from pdp.policy.archive import MAX_ENTRIES, MAX_FOLDERS, pack, read_archive, read_directory
from pdp.policy.engine import BundleError
from tests.policy.bundles import message_of, tar, write_files

PLACE = "https://bundles.example/acme"


def bundle_of(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    """A sound bundle, and what is added to it."""
    return gzip.compress(tar(("/policy.wasm", b"wasm"), ("/data.json", b"{}"), *members))


def special(kind: bytes, name: str = "extra", target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member


def refusal_of(content: bytes) -> str:
    with pytest.raises(BundleError) as refusal:
        read_archive(content, place=PLACE)
    message = message_of(refusal)
    assert message.startswith(f"The policy bundle {PLACE} ")
    assert message.isprintable()
    return message


def directory_refusal(path: Path) -> str:
    with pytest.raises(BundleError) as refusal:
        read_directory(path)
    assert str(path) in refusal.value.message
    return message_of(refusal)


def test_an_archive_as_opa_or_tar_writes_it_is_read() -> None:
    folder = tarfile.TarInfo("./tenants")
    folder.type = tarfile.DIRTYPE
    root = tarfile.TarInfo("./")
    root.type = tarfile.DIRTYPE
    content = tar(
        (root, b""),
        ("/data.json", b"{}"),
        (folder, b""),
        ("./tenants/data.json", b"1"),
        ("a", b"x"),
    )

    assert read_archive(gzip.compress(content), place=PLACE) == {
        "data.json": b"{}",
        "tenants/data.json": b"1",
        "a": b"x",
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
def test_links_devices_and_what_else_is_no_file_are_refused(member: tarfile.TarInfo) -> None:
    message = refusal_of(bundle_of((member, b"")))

    assert message.endswith("holds a link or a device; a bundle holds files only.")


def test_a_sparse_file_is_refused() -> None:
    member = tarfile.TarInfo("extra")
    member.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "extra",
        "GNU.sparse.realsize": "99999999999",
    }

    assert "holds a sparse file" in refusal_of(bundle_of((member, b"0\n".ljust(512, b"\0"))))


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
def test_a_path_that_leads_elsewhere_is_refused(name: str) -> None:
    assert refusal_of(bundle_of((name, b"{}"))).endswith("holds a path that leads elsewhere.")


@pytest.mark.parametrize("name", ("data.json", "/data.json", "./data.json"))
def test_a_file_that_stands_twice_is_refused(name: str) -> None:
    assert refusal_of(bundle_of((name, b"{}"))).endswith("holds data.json twice.")


@pytest.mark.parametrize("first", (True, False))
def test_a_file_that_is_a_folder_too_is_refused(first: bool) -> None:  # noqa: FBT001
    members = [("tenants", b"{}"), ("/tenants/data.json", b"{}")]

    message = refusal_of(bundle_of(*(members if first else reversed(members))))

    assert message.endswith("holds tenants as a file and as a folder.")


def test_too_many_entries_are_refused() -> None:
    # Names that do not compress well, so that this is not refused for its ratio.
    names = [os.urandom(16).hex() for _ in range(MAX_ENTRIES)]

    message = refusal_of(bundle_of(*((name, b"") for name in names)))

    assert message.endswith(f"holds more than {MAX_ENTRIES} entries.")


def test_a_file_in_too_many_folders_is_refused() -> None:
    deep = "f/" * MAX_FOLDERS
    read_archive(bundle_of((f"{deep}data.json", b"1")), place=PLACE)

    message = refusal_of(bundle_of((f"{deep}f/data.json", b"1")))

    assert message.endswith(f"holds a file more than {MAX_FOLDERS} folders deep.")


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = bundle_of(("extra", b"\0" * 64 * 1024 * 1024))
    monkeypatch.setattr("tarfile.open", pytest.fail)

    assert "unpacks to more than a bundle may hold" in refusal_of(bomb)


def test_a_bomb_within_a_header_is_refused() -> None:
    member = tarfile.TarInfo("extra")
    member.pax_headers = {"comment": "x" * 32 * 1024 * 1024}

    assert "more than a bundle may hold" in refusal_of(bundle_of((member, b"")))


def test_an_archive_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "MAX_ARCHIVE_BYTES", 1024)

    assert "is larger than 1024 bytes" in refusal_of(bundle_of(("extra", os.urandom(2048))))


def test_what_is_no_whole_archive_is_refused() -> None:
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
        gzip.compress(tar(("policy.wasm", b"wasm" * 1000))[:2000]),
        gzip.compress(tar(("policy.wasm", b"wasm"))[:1024] + b"no header" * 100),
        tar(("policy.wasm", b"wasm")),
    ):
        assert refusal_of(content).endswith("is not a whole .tar.gz.")


def test_a_changed_byte_in_an_archive_changes_no_file_unseen() -> None:
    whole = bundle_of(("tenants/data.json", b'{"acme": {}}'))
    files = read_archive(whole, place=PLACE)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 0x01
        try:
            assert read_archive(bytes(changed), place=PLACE) == files  # within gzip's own header
        except BundleError as error:
            assert error.message.startswith("The policy bundle ")  # noqa: PT017


names = st.lists(
    st.text("abcdefg.-_é ", min_size=1, max_size=40).filter(lambda part: part.strip(".")),
    min_size=1,
    max_size=6,
).map("/".join)


@given(st.dictionaries(names, st.binary(max_size=2000), max_size=12))
def test_what_is_packed_is_read_again_and_packed_alike(files: dict[str, bytes]) -> None:
    try:
        packed = pack(files)
    except BundleError as error:
        assert "as a file and as a folder" in error.message  # noqa: PT017
        return

    assert read_archive(packed, place=PLACE) == files
    assert pack(dict(reversed(files.items()))) == packed


def test_files_that_compress_like_a_bomb_are_packed_so_that_they_can_be_read() -> None:
    files = {"data.json": b'{"text": "' + b"x" * 4_000_000 + b'"}'}

    assert read_archive(pack(files), place=PLACE) == files


@pytest.mark.parametrize(
    ("files", "complaint"),
    (
        ({"../data.json": b"{}"}, "leads elsewhere"),
        ({"/data.json": b"{}"}, "leads elsewhere"),
        ({"a": b"", "a/b": b""}, "as a file and as a folder"),
        ({str(number): b"" for number in range(MAX_ENTRIES + 1)}, "more than 10000 files"),
    ),
    ids=("up", "slash", "folder", "many"),
)
def test_what_could_not_be_read_again_is_not_packed(
    files: dict[str, bytes], complaint: str
) -> None:
    with pytest.raises(BundleError, match=complaint):
        pack(files)


def test_more_than_an_archive_may_hold_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"data.json": os.urandom(2048)}
    for bound in ("MAX_ARCHIVE_BYTES", "MAX_CONTENT_BYTES"):
        with monkeypatch.context() as patched:
            patched.setattr(archive_module, bound, 1024)
            with pytest.raises(BundleError, match="1024 bytes"):
                pack(files)


def test_a_directory_is_read_with_all_its_files(tmp_path: Path) -> None:
    names = ("policy.wasm", ".manifest", ".signatures.json", "notes.txt", "tenants/data.json")
    write_files(tmp_path, {name: name.encode() for name in (*names, ".git/data.json")})

    assert read_directory(tmp_path) == {name: name.encode() for name in names}


def test_a_mounted_config_map_is_read(tmp_path: Path) -> None:
    """Kubernetes mounts files as links into a folder that it swaps."""
    version = tmp_path / "..2026_11_24"
    version.mkdir()
    tmp_path.joinpath("..data").symlink_to(version.name)
    for name in ("policy.wasm", "data.json", ".manifest"):
        version.joinpath(name).write_bytes(name.encode())
        tmp_path.joinpath(name).symlink_to(f"..data/{name}")

    assert read_directory(tmp_path) == {
        name: name.encode() for name in ("policy.wasm", "data.json", ".manifest")
    }


def test_a_mounted_config_map_with_folders_is_read(tmp_path: Path) -> None:
    """Where its items have paths, Kubernetes links the first folder of each."""
    (tmp_path / "..1/tenants/acme").mkdir(parents=True)
    (tmp_path / "..1/tenants/acme/data.json").write_text("{}")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "tenants").symlink_to("..data/tenants")

    assert read_directory(tmp_path) == {"tenants/acme/data.json": b"{}"}


@pytest.mark.parametrize(
    ("target", "complaint"),
    (("..", "leads in a circle, a/b"), (".", "leads in a circle, a/b"), ("/", "leads elsewhere")),
)
def test_a_linked_folder_that_leads_back_or_out_is_refused(
    tmp_path: Path, target: str, complaint: str
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to(target)
    with pytest.raises(BundleError, match=complaint):
        read_directory(tmp_path)


def test_folders_that_multiply_by_links_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    for number in range(1, 20):
        (tmp_path / str(number)).mkdir()
        for name in ("a", "b", "c"):
            (tmp_path / str(number) / name).symlink_to(tmp_path / str(number - 1))
    with pytest.raises(BundleError, match="holds more than 10000 folders"):
        read_directory(tmp_path)


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_bytes(b'{"secret":1}')
    directory = tmp_path / "bundle"
    directory.mkdir()
    directory.joinpath("data.json").symlink_to(outside)

    assert directory_refusal(directory).endswith("holds a link that leads elsewhere, data.json.")


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("data.json").symlink_to("nowhere.json")

    assert "can not be read: No such file" in directory_refusal(tmp_path)


def test_a_pipe_in_the_directory_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.json")

    assert "holds data.json, which is a pipe or a device" in directory_refusal(tmp_path)


def test_a_file_whose_name_could_steer_a_terminal_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("a\x1b[31m.rego").write_bytes(b"")

    assert directory_refusal(tmp_path).endswith("holds a path that leads elsewhere.")


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "can not be read: No such file" in directory_refusal(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("bound", "most", "complaint"),
    (("MAX_ENTRIES", 2, "more than 2 files"), ("MAX_CONTENT_BYTES", 60, "more than 60 bytes")),
)
def test_a_directory_is_read_within_its_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int, complaint: str
) -> None:
    monkeypatch.setattr(archive_module, bound, most)
    for name in ("a", "b", "c"):
        tmp_path.joinpath(name).write_bytes(b'{"a":"some more text"}')

    assert complaint in directory_refusal(tmp_path)
