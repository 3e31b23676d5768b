"""Put a server that comes as a package into .tools: `python scripts/install_package.py NAME`.

redis-server, for tests of shared budgets, and etcd, which the API server of the chart's
tests keeps its objects in. The one on PATH is taken where it is new enough. Otherwise
Debian's or Ubuntu's package is used; elsewhere the message says what to install.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A command that is had as a package."""

    name: str
    package: str
    version: re.Pattern[str]
    """Finds major and minor version in what ``--version`` prints."""
    oldest: tuple[int, int]
    elsewhere: str
    """What to install where there is no such package."""
    stands_alone: bool
    """Whether the command runs out of the unpacked package, with nothing installed."""


SERVERS: Final = {
    server.name: server
    for server in (
        Server(
            name="redis-server",
            package="redis-server",
            version=re.compile(r"v=(\d+)\.(\d+)"),
            oldest=(7, 0),
            elsewhere="redis-server 7.0 or later, or Valkey's valkey-server under that name"
            " (macOS: brew install redis)",
            stands_alone=False,
        ),
        Server(
            name="etcd",
            package="etcd-server",
            version=re.compile(r"etcd Version: (\d+)\.(\d+)"),
            oldest=(3, 4),
            elsewhere="etcd 3.4 or later (macOS: brew install etcd)",
            stands_alone=True,
        ),
    )
}


class InstallError(Exception):
    """The server could not be had; the message says what to do."""


def install(server: Server, folder: Path) -> None:
    """Make folder/NAME a server that will do. Raises InstallError."""
    target = folder / server.name
    if is_right(server, target):
        say(f"{target} is there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = on_path(server)
    if found is None and server.stands_alone:
        unpack_package(server, target)
        say(f"{target} is out of the package {server.package}")
        return
    if found is None:
        install_package(server)
        found = on_path(server)
    if found is None:
        raise InstallError(f"the package brought none that will do: put {server.elsewhere} on PATH")
    target.unlink(missing_ok=True)
    target.symlink_to(found)
    say(f"{target} is {found}")


def on_path(server: Server) -> Path | None:
    """The command on PATH, if it will do."""
    found = shutil.which(server.name)
    return Path(found) if found is not None and is_right(server, Path(found)) else None


def is_right(server: Server, command: Path) -> bool:
    """Whether a command is there, runs, and is new enough."""
    try:
        printed = subprocess.run(
            [command, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    version = server.version.search(printed)
    return version is not None and (int(version[1]), int(version[2])) >= server.oldest


def install_package(server: Server) -> None:
    """Install the system's package. Raises InstallError."""
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise InstallError(
            f"there is none that will do on PATH. Install {server.elsewhere} (Debian and Ubuntu:"
            f" sudo apt-get install {server.package}), and try again."
        )
    say(f"installing the package {server.package}")
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    try:
        subprocess.run([apt, "install", "-y", server.package], env=environment, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise InstallError(
            f"the package {server.package} could not be installed: run apt-get update, or put"
            f" {server.elsewhere} on PATH, and try again."
        ) from None


def unpack_package(server: Server, target: Path) -> None:
    """Take the command out of the system's package. Raises InstallError."""
    failure = InstallError(
        f"the package {server.package} could not be fetched: run apt-get update, or put"
        f" {server.elsewhere} on PATH, and try again."
    )
    apt, dpkg = shutil.which("apt-get"), shutil.which("dpkg-deb")
    if apt is None or dpkg is None:
        raise failure
    say(f"fetching the package {server.package}")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpacking-") as place:
        try:
            subprocess.run([apt, "download", server.package], cwd=place, check=True)
            (archive,) = Path(place).glob("*.deb")
            subprocess.run([dpkg, "--extract", archive, place], check=True)
        except (OSError, ValueError, subprocess.CalledProcessError):
            raise failure from None
        command = Path(place, "usr", "bin", server.name)
        if not is_right(server, command):
            raise failure
        command.replace(target)


def say(line: str) -> None:
    """A line of progress, seen at once."""
    print(f"install_package: {line}", flush=True)


def main() -> int:
    """Install one of them."""
    parser = argparse.ArgumentParser(description="Put a server into .tools.")
    parser.add_argument("server", choices=sorted(SERVERS))
    parser.add_argument("--into", type=Path, default=ROOT / ".tools", help="another folder")
    arguments = parser.parse_args()
    try:
        install(SERVERS[arguments.server], arguments.into.resolve())
    except InstallError as error:
        print(f"install_package: {arguments.server}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
