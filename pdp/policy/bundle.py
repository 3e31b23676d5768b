"""Read a policy bundle: an OPA bundle with its Wasm, or Rego that is compiled now."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from pdp.canonical import JsonError, JsonObject, JsonValue, canonical_bytes, parse_object
from pdp.policy.engine import BundleError, Entrypoint
from pdp.reason import ReasonCode

MAX_ARCHIVE_BYTES: Final = 32 * 1024 * 1024
MAX_CONTENT_BYTES: Final = 128 * 1024 * 1024
MAX_RATIO: Final = 200
"""Most bytes that one byte of the archive may unpack to."""
MAX_ENTRIES: Final = 10_000
MAX_PATH_LENGTH: Final = 512
COMPILE_TIMEOUT_SECONDS: Final = 120
_REVISION: Final = re.compile(r"[\x21-\x7e]{1,128}")
_BUILD: Final = "opa build -t wasm " + " ".join(f"-e {name}" for name in Entrypoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What an engine loads."""

    revision: str
    """The manifest's revision, or else a digest of the content."""
    wasm: bytes = field(repr=False)
    data: bytes = field(repr=False)
    """The data document: one JSON object."""
    rego: Mapping[str, str] = field(repr=False, default_factory=dict)
    """The sources that the bundle carries, by their path. Only for messages."""


def content_revision(wasm: bytes, data: bytes) -> str:
    """The revision of a bundle whose manifest names none.

    128 bits, so that no second bundle can be made to which the same records fit.
    """
    module = hashlib.sha256(wasm).digest()
    return f"sha256:{hashlib.sha256(module + data).hexdigest()[:32]}"


def load_bundle(path: Path, *, opa: Path | None = None) -> Bundle:
    """Read a bundle from a .tar.gz or a directory.

    A directory without policy.wasm is compiled with ``opa``, or with the one on
    PATH. Raises BundleError: the message says what is wrong, where, and what to do.
    """
    if not path.is_dir():
        return _bundle(_read_archive(path), path)
    if (path / "policy.wasm").is_file():
        return _bundle(_read_directory(path), path)
    return _compile(path, opa)


def _compile(path: Path, opa: Path | None) -> Bundle:
    command = opa or shutil.which("opa")
    if command is None:
        raise _refused(
            path,
            "holds no policy.wasm, and there is no opa command on PATH to compile it. Install"
            f" OPA, or build the bundle where it is: {_BUILD} -b DIRECTORY",
        )
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "bundle.tar.gz"
        arguments = ["build", "--target", "wasm", "--bundle", ".", "--output", str(target)]
        arguments += ["--ignore", "*_test.rego"]
        for entrypoint in Entrypoint:
            arguments += ["--entrypoint", entrypoint]
        try:
            done = subprocess.run(  # noqa: S603 - the operator's own opa
                [Path(command).absolute(), *arguments],
                cwd=path,  # so that the Wasm is the same wherever the sources lie
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMPILE_TIMEOUT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _refused(path, f"could not be compiled: {type(error).__name__}") from None
        if done.returncode != 0:
            raise _refused(path, f"does not compile:\n{(done.stdout + done.stderr).strip()}")
        # What opa puts into a bundle lacks the rules that became Wasm.
        return replace(_bundle(_read_archive(target), path), rego=_rego(_read_directory(path)))


def _bundle(files: Mapping[str, bytes], path: Path) -> Bundle:
    wasm = files.get("policy.wasm")
    if wasm is None:
        raise _refused(path, f"holds no policy.wasm; build it with {_BUILD} -b DIRECTORY")
    data = _data(files, path)
    manifest = _json(files.get(".manifest", b"{}"), path, ".manifest")
    revision = manifest.get("revision", "")
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision or "-"):
        raise _refused(path, "has a revision in .manifest that is not 1 to 128 ASCII characters")
    return Bundle(
        revision=revision or content_revision(wasm, data),
        wasm=wasm,
        data=data,
        rego=_rego(files),
    )


def _rego(files: Mapping[str, bytes]) -> dict[str, str]:
    return {
        name: content.decode("utf-8", errors="replace")
        for name, content in files.items()
        if name.endswith(".rego")
    }


def _data(files: Mapping[str, bytes], path: Path) -> bytes:
    """The data document. Each data.json stands for the place that its folder names."""
    names = sorted(name for name in files if name.rsplit("/", 1)[-1] in _DATA_NAMES)
    for name in names:
        if not name.endswith(".json"):
            raise _refused(path, f"has data in YAML, {name}; {_BUILD} turns it into data.json")
    if names == ["data.json"]:
        _json(files["data.json"], path, "data.json")
        return files["data.json"]
    document: JsonObject = {}
    for name in names:
        place = document
        for key in name.split("/")[:-1]:
            below = place.setdefault(key, {})
            if not isinstance(below, dict):
                raise _refused(path, f"has a {name} where other data stands already")
            place = below
        _merge(place, _json(files[name], path, name), path, name)
    return canonical_bytes(document)


_DATA_NAMES: Final = frozenset({"data.json", "data.yaml", "data.yml"})


def _merge(place: JsonObject, more: JsonObject, path: Path, name: str) -> None:
    for key, value in more.items():
        below: JsonValue = place.setdefault(key, value)
        if below is value:
            continue
        if not isinstance(below, dict) or not isinstance(value, dict):
            raise _refused(path, f"has a {name} where other data stands already")
        _merge(below, value, path, name)


def _json(data: bytes, path: Path, name: str) -> JsonObject:
    try:
        return parse_object(data, max_bytes=MAX_CONTENT_BYTES)
    except JsonError as error:
        raise _refused(path, f"has a {name} that {error}") from None


def _read_directory(path: Path) -> dict[str, bytes]:
    """The files of a directory that belong to a bundle, within every bound.

    Links are followed only to what lies below the directory itself, which is how
    Kubernetes mounts a ConfigMap.
    """
    files: dict[str, bytes] = {}
    root = path.resolve()
    left = MAX_CONTENT_BYTES
    try:
        for file in _files_below(path):
            if len(files) >= MAX_ENTRIES:
                raise _refused(path, f"holds more than {MAX_ENTRIES} files")
            if not file.resolve().is_relative_to(root):
                raise _refused(path, "holds a link that leads elsewhere")
            with file.open("rb") as opened:
                content = opened.read(left + 1)
            left -= len(content)
            if left < 0:
                raise _refused(path, f"holds more than {MAX_CONTENT_BYTES} bytes")
            files[file.relative_to(path).as_posix()] = content
    except OSError as error:
        raise _refused(path, f"can not be read: {error.strerror}") from None
    return files


def _files_below(path: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(path):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder) / name
            wanted = name in _DATA_NAMES or name.endswith(".rego")
            if (wanted or name in {"policy.wasm", ".manifest"}) and file.is_file():
                yield file


def _read_archive(path: Path) -> dict[str, bytes]:
    """The files of a .tar.gz by their path, within every bound. Nothing is written
    to disk.
    """
    content = io.BytesIO(_unpacked(path))
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=content, mode="r:") as archive:
            for count, member in enumerate(archive, start=1):
                if count > MAX_ENTRIES:
                    raise _refused(path, f"holds more than {MAX_ENTRIES} entries")
                name = _safe_name(member, path)
                if name is None:
                    continue
                if name in files:
                    raise _refused(path, f"holds {name} twice")
                file = archive.extractfile(member)
                files[name] = file.read() if file is not None else b""
            # At a header that it can not read, tarfile stops as if that were the end.
            content.seek(archive.offset)
            if content.read().strip(b"\0"):
                raise _refused(path, "is not a whole .tar.gz")
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        raise _refused(path, "is not a whole .tar.gz") from None
    return files


def _unpacked(path: Path) -> bytes:
    """What the archive holds, never more than the bounds allow."""
    try:
        with path.open("rb") as file:
            packed = file.read(MAX_ARCHIVE_BYTES + 1)
    except OSError as error:
        raise _refused(path, f"can not be read: {error.strerror}") from None
    if len(packed) > MAX_ARCHIVE_BYTES:
        raise _refused(path, f"is larger than {MAX_ARCHIVE_BYTES} bytes")
    most = min(MAX_CONTENT_BYTES, MAX_RATIO * len(packed))
    gunzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        content = gunzip.decompress(packed, most)
    except zlib.error:
        raise _refused(path, "is not a whole .tar.gz") from None
    if gunzip.unconsumed_tail:
        raise _refused(path, "unpacks to more than a bundle may hold")
    if not gunzip.eof or gunzip.unused_data:
        raise _refused(path, "is not a whole .tar.gz")
    return content


def _safe_name(member: tarfile.TarInfo, path: Path) -> str | None:
    """A file's path within the bundle; None for a directory.

    OPA writes its own archives with one leading slash, which stands for the
    bundle's root.
    """
    if not member.isdir() and member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE}:
        raise _refused(path, "holds a link or a device; a bundle holds files only")
    if member.sparse is not None:
        raise _refused(path, "holds a sparse file; a bundle holds whole files only")
    name = member.name.removeprefix("./").removeprefix("/")
    if member.isdir() and name in {"", "."}:
        return None
    if (
        not name.isprintable()
        or "\\" in name
        or len(name) > MAX_PATH_LENGTH
        or {"", ".", ".."} & set(name.split("/"))
    ):
        raise _refused(path, "holds a path that leads elsewhere")
    return None if member.isdir() else name


def _refused(path: Path, what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {path} {what}.")
