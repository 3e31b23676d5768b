"""Put redis-server into .tools: `python scripts/install_redis.py`.

The one on PATH is taken where it is new enough. Otherwise, as root on Debian or
Ubuntu, the system's package is installed; elsewhere the message says what to install.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
OLDEST: Final = (7, 0)


class InstallError(Exception):
    """The server could not be had; the message says what to do."""


def install(folder: Path) -> None:
    """Make folder/redis-server a server that will do. Raises InstallError."""
    target = folder / "redis-server"
    if is_right(target):
        say(f"{target} is there already")
        return
    found = on_path()
    if found is None:
        install_package()
        found = on_path()
    if found is None:
        raise InstallError(
            "the package brought no redis-server of version 7.0 or later: put one, or Valkey's"
            " valkey-server under that name, on PATH and try again."
        )
    folder.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(found)
    say(f"{target} is {found}")


def on_path() -> Path | None:
    """The command on PATH, if it will do."""
    found = shutil.which("redis-server")
    return Path(found) if found is not None and is_right(Path(found)) else None


def is_right(command: Path) -> bool:
    """Whether a command is there, runs, and is new enough."""
    try:
        printed = subprocess.run(
            [command, "--version"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    version = re.search(r"v=(\d+)\.(\d+)", printed)
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST


def install_package() -> None:
    """Install the system's package. Raises InstallError."""
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        raise InstallError(
            "no redis-server 7.0 or later on PATH. Install it (Debian and Ubuntu:"
            " sudo apt-get install redis-server; macOS: brew install redis) and try again."
        )
    say("installing the package redis-server")
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    try:
        subprocess.run([apt, "install", "-y", "redis-server"], env=environment, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise InstallError(
            "the package redis-server could not be installed: run apt-get update, or put"
            " redis-server 7.0 or later on PATH, and try again."
        ) from None


def say(line: str) -> None:
    """A line of progress, seen at once."""
    print(f"install_redis: {line}", flush=True)


def main() -> int:
    """Install the server."""
    parser = argparse.ArgumentParser(description="Put redis-server into .tools.")
    parser.add_argument("--into", type=Path, default=ROOT / ".tools", help="another folder")
    arguments = parser.parse_args()
    try:
        install(arguments.into.resolve())
    except InstallError as error:
        print(f"install_redis: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
