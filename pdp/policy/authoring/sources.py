"""The files that an author works on, and a copy of them for the opa command."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pdp.policy.archive import (
    MAX_ARCHIVE_BYTES,
    Files,
    read_archive,
    read_directory,
    refused,
)
from pdp.policy.manifest import MANIFEST, REGO_VERSION


def read_files(path: Path) -> dict[str, bytes]:
    """The files of a directory or a .tar.gz. Raises BundleError."""
    if path.is_dir():
        return read_directory(path)
    return read_archive(read_content(path), place=str(path))


def read_content(path: Path) -> bytes:
    """A .tar.gz as it is. Raises BundleError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_ARCHIVE_BYTES + 1)
    except OSError as error:
        raise refused(str(path), f"can not be read: {error.strerror}") from None


@contextmanager
def folder_of(files: Files) -> Iterator[Path]:
    """A folder of its own that holds these files, until the context ends."""
    with tempfile.TemporaryDirectory(prefix="pdp-policy-") as scratch:
        folder = Path(scratch)
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        yield folder


def opa_sources(rego: Mapping[str, str], data: bytes) -> dict[str, bytes]:
    """Rego and the data document, as files that OPA takes whatever their roots were."""
    manifest = {"roots": [""], "rego_version": REGO_VERSION}
    return {
        **{name: text.encode() for name, text in rego.items()},
        "data.json": data,
        MANIFEST: json.dumps(manifest).encode(),
    }
