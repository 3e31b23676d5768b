"""Become a container: `unshare --mount python launch.py SPEC`, as root.

SPEC is JSON: image and scratch (folders), mounts ([source, path, read-only]), user, group,
groups, environment and command. The root is read-only, the user keeps no capability and can get
none, and nothing of the outside is seen but what is mounted.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PR_SET_NO_NEW_PRIVS = 38


def mount(*arguments: str | Path) -> None:
    subprocess.run(["/usr/bin/mount", *arguments], check=True)


def become(spec: dict[str, Any]) -> None:
    mount("--make-rprivate", "/")
    # Over the image, so that there are places to mount at; it is read-only in the end.
    scratch = Path(spec["scratch"])
    mount("-t", "tmpfs", "tmpfs", scratch)
    upper, work, root = (scratch / name for name in ("upper", "work", "root"))
    for folder in (upper, work, root):
        folder.mkdir()
    layers = f"lowerdir={spec['image']},upperdir={upper},workdir={work}"
    mount("-t", "overlay", "-o", layers, "overlay", root)
    mount("-t", "proc", "proc", root / "proc")
    for device in ("null", "zero", "random", "urandom"):
        (root / "dev" / device).touch()
        mount("--bind", f"/dev/{device}", root / "dev" / device)
    for source, path, read_only in spec["mounts"]:
        place = root / path.lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        mount("--bind", source, place)
        if read_only:
            mount("-o", "remount,bind,ro", place)
    mount("-o", "remount,ro,nosuid", root)
    os.chroot(root)
    os.chdir("/")
    os.setgroups(spec["groups"])
    os.setgid(spec["group"])
    os.setuid(spec["user"])
    if ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise SystemExit("no_new_privs is refused")
    command = spec["command"]
    os.execve(command[0], command, spec["environment"])  # noqa: S606 - that is what it is for


if __name__ == "__main__":
    become(json.loads(sys.argv[1]))
