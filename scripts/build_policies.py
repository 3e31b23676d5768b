"""Build policies/bundle.tar.gz from policies/, or check with --check that it is current.

The same sources give the same bytes. Its revision is the digest of what decides.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pdp.policy.archive import pack, read_archive, read_directory
from pdp.policy.compile import build_files

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "policies"
BUNDLE = SOURCES / "bundle.tar.gz"
OPA = ROOT / ".tools" / "opa"


def build() -> dict[str, bytes]:
    """The files of the bundle that the sources build, by their path."""
    return build_files(read_directory(SOURCES), opa=OPA, revision=None, sequence=None)


def main() -> int:
    """Build, or compare and say which files differ."""
    fresh = build()
    if sys.argv[1:] != ["--check"]:
        BUNDLE.write_bytes(pack(fresh))
        return 0
    # Not by the bytes: another zlib packs the same content otherwise.
    kept = read_archive(BUNDLE.read_bytes(), place=str(BUNDLE)) if BUNDLE.exists() else {}
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
