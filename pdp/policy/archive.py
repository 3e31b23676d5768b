"""The files of a bundle: out of a .tar.gz or a directory, within bounds, and into a .tar.gz."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from pdp.policy.engine import BundleError
from pdp.reason import ReasonCode

Files = Mapping[str, bytes]
"""A bundle's files by their path, which has no leading slash."""

MAX_ARCHIVE_BYTES: Final = 32 * 1024 * 1024
MAX_CONTENT_BYTES: Final = 128 * 1024 * 1024
MAX_RATIO: Final = 200
"""Most bytes that one byte of the archive may unpack to."""
MAX_ENTRIES: Final = 10_000
MAX_PATH_LENGTH: Final = 512
MAX_FOLDERS: Final = 32
"""Most folders that one file may lie in."""


def refused(place: str, what: str) -> BundleError:
    """The error for a bundle that is not taken. ``what`` follows the place's name, and may
    quote what stands in the bundle: no terminal is steered by it.
    """
    message = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in what)
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {place} {message}.")


def read_archive(content: bytes, *, place: str) -> dict[str, bytes]:
    """The files of a .tar.gz, within every bound; nothing is written to disk. Raises
    BundleError.
    """
    unpacked = io.BytesIO(_unpacked(content, place))
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=unpacked, mode="r:") as archive:
            for count, member in enumerate(archive, start=1):
                if count > MAX_ENTRIES:
                    raise refused(place, f"holds more than {MAX_ENTRIES} entries")
                name = _member_name(member, place)
                if name is None:
                    continue
                if name in files:
                    raise refused(place, f"holds {name} twice")
                file = archive.extractfile(member)
                files[name] = file.read() if file is not None else b""
            # At a header that it can not read, tarfile stops as if that were the end.
            unpacked.seek(archive.offset)
            if unpacked.read().strip(b"\0"):
                raise refused(place, "is not a whole .tar.gz")
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        raise refused(place, "is not a whole .tar.gz") from None
    _check_folders(files, place)
    return files


def read_directory(path: Path) -> dict[str, bytes]:
    """The files below a directory, within every bound. Raises BundleError.

    Folders whose names begin with a dot are left out. Links are followed only to what
    lies below the directory itself: so Kubernetes mounts a ConfigMap.
    """
    files: dict[str, bytes] = {}
    place = str(path)
    left = MAX_CONTENT_BYTES
    try:
        root = path.resolve()
        for file in _files_below(path, root):
            name = file.relative_to(path).as_posix()
            if len(files) >= MAX_ENTRIES:
                raise refused(place, f"holds more than {MAX_ENTRIES} files")
            _check_path(name, place)
            target = file.resolve()
            if not target.is_relative_to(root):
                raise refused(place, f"holds a link that leads elsewhere, {name}")
            content = _read_file(target, left + 1)
            if content is None:
                raise refused(place, f"holds {name}, which is a pipe or a device, not a file")
            left -= len(content)
            if left < 0:
                raise refused(place, f"holds more than {MAX_CONTENT_BYTES} bytes")
            files[name] = content
    except OSError as error:
        raise refused(place, f"can not be read: {error.strerror}") from None
    return files


def pack(files: Files) -> bytes:
    """The files as a .tar.gz: the same bytes for the same files, and such that
    :func:`read_archive` takes it. Raises BundleError for files that it would refuse.
    """
    place = "that is to be packed"
    _check_bounds(files, place)
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in sorted(files.items()):
            _check_path(name, place)
            # OPA finds policy.wasm by the path in the manifest, which has a leading slash.
            member = tarfile.TarInfo(f"/{name}")
            member.size = len(content)
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(content))
    _check_folders(files, place)
    unpacked = tar.getvalue()
    packed = gzip.compress(unpacked, mtime=0)
    if len(unpacked) > MAX_RATIO * len(packed):
        packed = gzip.compress(unpacked, compresslevel=0, mtime=0)
    if len(packed) > MAX_ARCHIVE_BYTES:
        raise refused(place, f"is larger than {MAX_ARCHIVE_BYTES} bytes")
    if len(unpacked) > MAX_CONTENT_BYTES:
        raise refused(place, f"holds more than {MAX_CONTENT_BYTES} bytes with its paths")
    return packed


def _check_bounds(files: Files, place: str) -> None:
    if len(files) > MAX_ENTRIES:
        raise refused(place, f"holds more than {MAX_ENTRIES} files")
    if sum(map(len, files.values())) > MAX_CONTENT_BYTES:
        raise refused(place, f"holds more than {MAX_CONTENT_BYTES} bytes")


def _unpacked(packed: bytes, place: str) -> bytes:
    """What the archive holds, never more than the bounds allow."""
    if len(packed) > MAX_ARCHIVE_BYTES:
        raise refused(place, f"is larger than {MAX_ARCHIVE_BYTES} bytes")
    most = min(MAX_CONTENT_BYTES, MAX_RATIO * len(packed))
    gunzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        content = gunzip.decompress(packed, most)
    except zlib.error:
        raise refused(place, "is not a whole .tar.gz") from None
    if gunzip.unconsumed_tail:
        raise refused(place, "unpacks to more than a bundle may hold")
    if not gunzip.eof or gunzip.unused_data:
        raise refused(place, "is not a whole .tar.gz")
    return content


def _member_name(member: tarfile.TarInfo, place: str) -> str | None:
    """A file's path within the bundle; None for a directory.

    OPA writes its own archives with one leading slash, which stands for the
    bundle's root.
    """
    if not member.isdir() and member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE}:
        raise refused(place, "holds a link or a device; a bundle holds files only")
    if member.sparse is not None:
        raise refused(place, "holds a sparse file; a bundle holds whole files only")
    name = member.name.removeprefix("./").removeprefix("/")
    if member.isdir() and name in {"", "."}:
        return None
    _check_path(name, place)
    return None if member.isdir() else name


def _check_path(name: str, place: str) -> None:
    folders = name.split("/")
    if (
        not name.isprintable()
        or "\\" in name
        or len(name) > MAX_PATH_LENGTH
        or not {"", ".", ".."}.isdisjoint(folders)
    ):
        raise refused(place, "holds a path that leads elsewhere")
    if len(folders) - 1 > MAX_FOLDERS:
        raise refused(place, f"holds a file more than {MAX_FOLDERS} folders deep")


def _check_folders(files: Files, place: str) -> None:
    """No path is both a file and a folder: such a bundle could not be put on a disk."""
    folders = {folder for name in files for folder in _folders_of(name)}
    for name in files:
        if name in folders:
            raise refused(place, f"holds {name} as a file and as a folder")


def _folders_of(name: str) -> Iterator[str]:
    end = name.find("/")
    while end != -1:
        yield name[:end]
        end = name.find("/", end + 1)


def _files_below(path: Path, root: Path) -> Iterator[Path]:
    """Raises OSError and BundleError."""

    def stop(error: OSError) -> None:
        raise error

    place = str(path)
    for count, (folder, below, names) in enumerate(
        os.walk(path, onerror=stop, followlinks=True), start=1
    ):
        if count > MAX_ENTRIES:
            raise refused(place, f"holds more than {MAX_ENTRIES} folders")
        below[:] = sorted(name for name in below if not name.startswith("."))
        for link in (Path(folder, name) for name in below if Path(folder, name).is_symlink()):
            target, shown = link.resolve(), link.relative_to(path).as_posix()
            if not target.is_relative_to(root):
                raise refused(place, f"holds a link that leads elsewhere, {shown}")
            if Path(folder).resolve().is_relative_to(target):
                raise refused(place, f"holds a link that leads in a circle, {shown}")
        yield from (Path(folder, name) for name in sorted(names))


def _read_file(path: Path, most: int) -> bytes | None:
    """At most so many bytes of a file; None when it is something else. Never waits, as
    opening a pipe would. Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        return file.read(most)
