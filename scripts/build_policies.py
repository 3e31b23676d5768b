"""Build policies/bundle.tar.gz from policies/, or check with --check that it is current.

The bundle is what `opa build -t wasm` writes, packed again so that the same
sources give the same bytes: entries sorted, no times, no owners. Its revision is
the digest of what decides.
"""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pdp.policy.bundle import content_revision
from pdp.policy.engine import Entrypoint

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "policies"
BUNDLE = SOURCES / "bundle.tar.gz"
OPA = ROOT / ".tools" / "opa"


def members(archive: Path) -> dict[str, bytes]:
    """The files of a .tar.gz by their path."""
    with tarfile.open(archive) as opened:
        return {
            member.name: file.read() for member in opened if (file := opened.extractfile(member))
        }


def build() -> dict[str, bytes]:
    """The files of the bundle that the sources build, by their path."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "bundle.tar.gz"
        command = [str(OPA), "build", "--target", "wasm", "--bundle", "."]
        command += ["--ignore", "*_test.rego", "--output", str(target)]
        for entrypoint in Entrypoint:
            command += ["--entrypoint", entrypoint]
        subprocess.run(command, cwd=SOURCES, check=True)
        files = members(target)
    manifest = json.loads(files["/.manifest"])
    manifest["revision"] = content_revision(files["/policy.wasm"], files["/data.json"])
    files["/.manifest"] = json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n"
    return files


def pack(files: dict[str, bytes]) -> bytes:
    """The same bytes for the same files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mode = 0o644
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(tar.getvalue(), mtime=0)


def main() -> int:
    """Build, or compare and say which files differ."""
    fresh = build()
    if sys.argv[1:] != ["--check"]:
        BUNDLE.write_bytes(pack(fresh))
        return 0
    kept = members(BUNDLE) if BUNDLE.exists() else {}
    differing = sorted(
        name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name)
    )
    if differing:
        print(
            "policies/bundle.tar.gz is not what policies/ builds: run `make policies`.",
            *differing,
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    print("policies/bundle.tar.gz is current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
