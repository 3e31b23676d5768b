"""Build Rego into a bundle that the sidecar runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from pdp.policy.archive import pack, read_directory
from pdp.policy.compile import build_files
from pdp.policy.engine import BundleError


def build_bundle(sources: Path, target: Path, *, opa: str | Path = "opa") -> Path:
    """Build the Rego below ``sources`` into ``target`` (.tar.gz), and return it.

    Raises RuntimeError with what is wrong, in the opa command's words where it is the Rego.
    """
    try:
        command = Path(shutil.which(opa) or opa)
        files = build_files(read_directory(sources), opa=command, revision=None, sequence=None)
        target.write_bytes(pack(files))
    except BundleError as error:
        raise RuntimeError(f"the policy does not build: {error.message}") from None
    return target
