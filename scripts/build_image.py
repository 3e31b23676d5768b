"""Build the sidecar's image without a container engine: `python scripts/build_image.py`.

The root file system is made by deploy/image/build-root.sh, as the Containerfile makes it;
crane then makes an OCI image of it, by way of a registry on loopback. Both end up in
dist/image: root, and oci (an OCI layout). The same inputs give the same digest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
TOOLS: Final = ROOT / ".tools"
USER_ID: Final = 65532
OWNED: Final = frozenset({"run/pdp", "var/lib/pdp"})
"""What the sidecar's user may write, where no volume is mounted in its place."""


def build(into: Path) -> None:
    """Build root and image below a folder."""
    if into.exists():
        shutil.rmtree(into)
    root, layout = into / "root", into / "oci"
    root.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        run(
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--wheel-dir", str(scratch), str(ROOT)),
        )
        (wheel,) = scratch.glob("*.whl")
        run(
            str(ROOT / "deploy" / "image" / "build-root.sh"),
            *(str(root), sys.executable, str(wheel), str(TOOLS / "opa")),
        )
        layer = scratch / "layer.tar.gz"
        pack(root, layer)
        with registry(scratch) as address:
            reference = f"{address}/agent-pdp:{version()}"
            crane("append", "--oci-empty-base", "--new_layer", str(layer), "--new_tag", reference)
            crane(
                *("mutate", reference, "--tag", reference, "--user", f"{USER_ID}:{USER_ID}"),
                *("--entrypoint", "/usr/bin/pdp", "--set-platform", platform()),
                *("--env", "PYTHONDONTWRITEBYTECODE=1"),
                *("--label", f"org.opencontainers.image.version={version()}"),
            )
            crane("pull", "--format=oci", reference, str(layout))
    unpacked = sum(file.lstat().st_size for file in root.rglob("*") if not file.is_dir())
    compressed = sum(file.stat().st_size for file in (layout / "blobs").rglob("*"))
    (manifest,) = json.loads((layout / "index.json").read_text(encoding="utf-8"))["manifests"]
    say(f"{layout}: {manifest['digest']}")
    say(f"{compressed / 1e6:.0f} MB to pull, {unpacked / 1e6:.0f} MB unpacked")


def pack(root: Path, layer: Path) -> None:
    """A layer of everything below a folder: the same for the same content."""

    def owned(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.mtime = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
        member.uname = member.gname = ""
        member.uid = member.gid = USER_ID if member.name in OWNED else 0
        member.mode &= ~(stat.S_ISUID | stat.S_ISGID | stat.S_IWGRP | stat.S_IWOTH)
        if member.name == "tmp":
            member.mode = 0o1777
        return member

    plain = layer.with_suffix("")
    with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(root.rglob("*")):
            archive.add(path, path.relative_to(root).as_posix(), recursive=False, filter=owned)
    run("gzip", "--no-name", "-6", str(plain))


@contextmanager
def registry(scratch: Path) -> Iterator[str]:
    """A registry on loopback; its address."""
    with (scratch / "registry.log").open("w+b") as log:
        command = [str(TOOLS / "crane"), "registry", "serve", "--address", "127.0.0.1:0"]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                while process.poll() is None:
                    log.seek(0)
                    found = re.search(rb"serving on port (\d+)", log.read())
                    if found is not None:
                        yield f"localhost:{found[1].decode()}"
                        return
                raise RuntimeError("the registry did not start")
            finally:
                process.terminate()


def crane(*arguments: str) -> None:
    """Run crane. Raises CalledProcessError."""
    run(str(TOOLS / "crane"), "--insecure", *arguments)


def platform() -> str:
    """This machine's, as OCI has it."""
    machine = os.uname().machine
    return f"linux/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(machine, machine) }"


def version() -> str:
    """The product's."""
    text = (ROOT / "pdp" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.+)"', text)
    assert found is not None  # noqa: S101 - our own file
    return found[1]


def run(*command: str) -> None:
    """Run a command quietly. Raises CalledProcessError, after what it said."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        done.check_returncode()


def say(line: str) -> None:
    """A line of progress, seen at once."""
    print(f"build_image: {line}", flush=True)


def main() -> int:
    """Build it."""
    parser = argparse.ArgumentParser(description="Build the sidecar's image.")
    parser.add_argument("--into", type=Path, default=ROOT / "dist" / "image")
    build(parser.parse_args().into.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
