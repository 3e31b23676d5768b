"""Bundles as .tar.gz: what a web server or a registry hands out (pdp.policy.archive)."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Final

from pdp.policy.archive import MAX_CONTENT_BYTES, MAX_ENTRIES, MAX_PATH_LENGTH, pack, read_archive
from pdp.policy.engine import BundleError
from tests.fuzz.choices import Choices, edited_bytes
from tests.fuzz.contract import SECRET, refuses

PLACE: Final = "https://bundles.example/acme"
BLOCK: Final = 512
NAMES: Final = (
    "a", "/a", "./a", "../a", "/etc/passwd", "a/b", "a/../b", "a//b", ".", "/", "a\n", "C:\\a",
    "policy.wasm", ".manifest", "data.json", "x" * 600, "d/" * 40 + "a", "a/", "\udcff", "\u202ea",
)  # fmt: skip
TYPES: Final = (
    tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
    tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME,
    tarfile.XHDTYPE, tarfile.XGLTYPE, b"S", b"V", b"\xff",
)  # fmt: skip
PAX: Final = (
    ("size", "99999999999"), ("size", "-1"), ("size", "x"), ("path", "../a"), ("path", "b"),
    ("GNU.sparse.map", "0,1"), ("GNU.sparse.size", "1000000000000"), ("GNU.sparse.major", "1"),
    ("GNU.sparse.name", "../a"), ("hdrcharset", "BINARY"), ("mtime", "nan"), ("linkpath", "/"),
)  # fmt: skip


def samples() -> Iterable[bytes]:
    yield b"\0" + pack({"a/b.rego": b"package a", ".manifest": b"{}"})
    yield b"\1"
    yield b"\2\0\2\0\0\0\0\2hi\x0c\0\0\0\2ho"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    match choices.number(4):
        case 0:
            archive = choices.rest()
        case 1:
            archive = gzip.compress(_with_checksums(edited_bytes(_sound(), choices)), mtime=0)
        case 2:
            archive = gzip.compress(_made(choices), mtime=0)
        case _:
            archive = gzip.compress(bytes(choices.number(2**21)), mtime=0)
    files = refuses(lambda: read_archive(archive, place=PLACE), BundleError)
    if files is None:
        return False
    assert len(files) <= MAX_ENTRIES
    assert sum(map(len, files.values())) <= MAX_CONTENT_BYTES
    for name in files:
        path = PurePosixPath("/bundle", name)
        assert path.is_relative_to("/bundle")
        assert path == PurePosixPath(f"/bundle/{name}")
        assert ".." not in path.parts
        assert name.isprintable()
        assert len(name) <= MAX_PATH_LENGTH
    # They could be put on a disk, and what is packed of them is the same bundle.
    assert not any(
        PurePosixPath(one) in PurePosixPath(other).parents for one in files for other in files
    )
    assert read_archive(pack(files), place=PLACE) == files
    return True


def _sound() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.rego", "long/" + "x" * 120, "data.json", "\u20ac.json"):
            member = tarfile.TarInfo(name)
            member.size = len(SECRET)
            archive.addfile(member, io.BytesIO(SECRET.encode()))
    return content.getvalue()


def _with_checksums(tar: bytes) -> bytes:
    """The same with sums that fit, so that what was changed is read."""
    changed = bytearray(tar)
    for start in range(0, len(changed) - BLOCK + 1, BLOCK):
        if changed[start + 257 : start + 262] == b"ustar":
            changed[start + 148 : start + 156] = b" " * 8
            total = sum(changed[start : start + BLOCK])
            changed[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(changed)


def _made(choices: Choices) -> bytes:
    """An archive of members of any kind."""
    content = io.BytesIO()
    with tarfile.open(
        fileobj=content, mode="w", format=choices.pick([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    ) as archive:
        for _ in range(choices.number(8)):
            member = tarfile.TarInfo(choices.pick(NAMES))
            member.type = choices.pick(TYPES)
            member.linkname = choices.pick(NAMES) if choices.yes() else ""
            if choices.number(4) == 1:
                name, value = choices.pick(PAX)
                member.pax_headers = {name: value}
            body = choices.some()
            member.size = len(body) if member.isreg() or choices.number(4) == 1 else 0
            archive.addfile(member, io.BytesIO(body) if member.size else None)
    return content.getvalue()
