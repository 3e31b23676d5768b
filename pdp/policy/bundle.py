"""Read a policy bundle: an OPA bundle with its Wasm, or Rego that is compiled now."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pdp.canonical import JsonError, JsonObject, parse_object
from pdp.policy.engine import BundleError, Entrypoint
from pdp.reason import ReasonCode

MAX_ARCHIVE_BYTES: Final = 32 * 1024 * 1024
MAX_CONTENT_BYTES: Final = 128 * 1024 * 1024
MAX_RATIO: Final = 200
"""Most bytes that one byte of the archive may unpack to."""
MAX_ENTRIES: Final = 10_000
MAX_PATH_LENGTH: Final = 512
COMPILE_TIMEOUT_SECONDS: Final = 120
_CHUNK: Final = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """What an engine loads."""

    revision: str
    """The manifest's revision, or else a digest of the content."""
    wasm: bytes = field(repr=False)
    data: bytes = field(repr=False)
    """The data document: one JSON object."""


def load_bundle(path: Path, *, opa: Path | None = None) -> Bundle:
    """Read a bundle from a .tar.gz or a directory.

    A directory without policy.wasm is compiled with ``opa``, or with the one on
    PATH. Raises BundleError: the message says what is wrong, where, and what to do.
    """
    if path.is_dir():
        if (path / "policy.wasm").is_file():
            return _bundle(_read_directory(path), path)
        return _compile(path, opa)
    return _bundle(_read_archive(path), path)


def _compile(path: Path, opa: Path | None) -> Bundle:
    command = opa or shutil.which("opa")
    if command is None:
        raise _refused(
            path,
            "holds no policy.wasm, and there is no opa command on PATH to compile it. Install OPA,"
            " or build the bundle where it is: opa build -t wasm "
            + " ".join(f"-e {entrypoint}" for entrypoint in Entrypoint),
        )
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "bundle.tar.gz"
        arguments = ["build", "--target", "wasm", "--bundle", str(path), "--output", str(target)]
        arguments += ["--ignore", "*_test.rego"]
        for entrypoint in Entrypoint:
            arguments += ["--entrypoint", entrypoint]
        try:
            done = subprocess.run(  # noqa: S603 - the operator's own opa
                [str(command), *arguments],
                capture_output=True,
                text=True,
                timeout=COMPILE_TIMEOUT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise _refused(path, f"could not be compiled: {type(error).__name__}") from None
        if done.returncode != 0:
            raise _refused(path, f"does not compile:\n{done.stderr.strip()}")
        return _bundle(_read_archive(target), path)


def _bundle(files: Mapping[str, bytes], path: Path) -> Bundle:
    wasm = files.get("policy.wasm")
    if wasm is None:
        raise _refused(path, "holds no policy.wasm; build it with opa build -t wasm")
    data = files.get("data.json", b"{}")
    _json(data, path, "data.json")
    manifest = _json(files.get(".manifest", b"{}"), path, ".manifest")
    revision = manifest.get("revision", "")
    if not isinstance(revision, str) or len(revision) > MAX_PATH_LENGTH:
        raise _refused(path, "has a revision in .manifest that is not a short text")
    digest = hashlib.sha256(wasm + data).hexdigest()
    return Bundle(revision=revision or f"sha256:{digest[:16]}", wasm=wasm, data=data)


def _json(data: bytes, path: Path, name: str) -> JsonObject:
    try:
        return parse_object(data, max_bytes=MAX_CONTENT_BYTES)
    except JsonError as error:
        raise _refused(path, f"has a {name} that {error}") from None


def _read_directory(path: Path) -> dict[str, bytes]:
    files = {}
    for name in ("policy.wasm", "data.json", ".manifest"):
        file = path / name
        if file.is_file():
            if file.stat().st_size > MAX_CONTENT_BYTES:
                raise _refused(file, f"is larger than {MAX_CONTENT_BYTES} bytes")
            files[name] = file.read_bytes()
    return files


def _read_archive(path: Path) -> dict[str, bytes]:
    """The files of a .tar.gz by their path, within every bound."""
    try:
        size = path.stat().st_size
        if size > MAX_ARCHIVE_BYTES:
            raise _refused(path, f"is larger than {MAX_ARCHIVE_BYTES} bytes")
        files: dict[str, bytes] = {}
        total = 0
        with tarfile.open(path, mode="r|gz") as archive:
            for count, member in enumerate(archive, start=1):
                total += member.size
                if count > MAX_ENTRIES or total > min(MAX_CONTENT_BYTES, MAX_RATIO * size):
                    raise _refused(path, "unpacks to more than a bundle may hold")
                if member.isdir():
                    continue
                name = _safe_name(member, path)
                if name in files:
                    raise _refused(path, f"holds {name} twice")
                file = archive.extractfile(member)
                if file is not None:
                    files[name] = file.read()
    except OSError as error:
        reason = error.strerror or "it is not a .tar.gz"
        raise _refused(path, f"can not be read: {reason}") from None
    except (tarfile.TarError, zlib.error, EOFError):
        raise _refused(path, "is not a whole .tar.gz") from None
    else:
        return files


def _safe_name(member: tarfile.TarInfo, path: Path) -> str:
    name = member.name.removeprefix("./").removeprefix("/")
    parts = name.split("/")
    if not member.isreg():
        raise _refused(path, "holds a link or a device; a bundle holds files only")
    if not name.isprintable() or len(name) > MAX_PATH_LENGTH or {"", ".", ".."} & set(parts):
        raise _refused(path, "holds a path that leads elsewhere")
    return name


def _refused(path: Path, what: str) -> BundleError:
    return BundleError(ReasonCode.POLICY_UNAVAILABLE, f"The policy bundle {path} {what}.")
