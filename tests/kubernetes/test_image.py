"""What is in the image, and how it starts out of it."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from pdp import __version__
from tests.kubernetes.conftest import IMAGE, ROOT, Make

pytestmark = pytest.mark.kubernetes

LAYOUT = IMAGE.with_name("oci")


def blob(digest: str) -> Any:
    return json.loads((LAYOUT / "blobs" / digest.replace(":", "/")).read_text(encoding="utf-8"))


def test_it_says_who_it_runs_as_and_what_it_runs() -> None:
    index = json.loads((LAYOUT / "index.json").read_text(encoding="utf-8"))
    (listed,) = index["manifests"]
    manifest = blob(listed["digest"])
    assert len(manifest["layers"]) == 1
    settings = blob(manifest["config"]["digest"])
    assert settings["os"] == "linux"
    assert settings["config"]["User"] == "65532:65532"
    assert settings["config"]["Entrypoint"] == ["/usr/bin/pdp"]
    assert settings["config"]["Labels"]["org.opencontainers.image.version"] == __version__


def test_it_has_a_python_and_opa_and_nothing_else_to_run() -> None:
    commands = {
        path.name
        for folder in ("bin", "sbin", "usr/bin", "usr/sbin", "usr/local/bin")
        if (IMAGE / folder).is_dir()
        for path in (IMAGE / folder).iterdir()
    }
    assert not commands & {"sh", "bash", "dash", "busybox", "apt", "dpkg", "pip", "pip3", "curl"}
    assert {"pdp", "opa", "python3", "python3.11"} <= commands
    modules = {path.name for path in IMAGE.glob("usr/local/lib/python3.11/dist-packages/*")}
    assert not modules & {"pip", "setuptools", "pytest", "aiosmtpd"}


def test_nothing_in_it_gains_rights_or_can_be_changed_by_others() -> None:
    blobs = LAYOUT / "blobs"
    index = json.loads((LAYOUT / "index.json").read_text(encoding="utf-8"))
    (layer,) = blob(index["manifests"][0]["digest"])["layers"]
    wanted = stat.S_ISUID | stat.S_ISGID | stat.S_IWGRP | stat.S_IWOTH
    with tarfile.open(blobs / layer["digest"].replace(":", "/")) as archive:
        open_to_others = {
            member.name for member in archive if not member.issym() and member.mode & wanted
        }
    assert open_to_others == {"tmp"}


def test_every_module_is_compiled_as_it_can_not_be_later() -> None:
    for package in ("pdp", "grpc", "msgspec"):
        folder = IMAGE / "usr/local/lib/python3.11/dist-packages" / package
        compiled = {path.name.partition(".")[0] for path in folder.glob("__pycache__/*.pyc")}
        assert {path.stem for path in folder.glob("*.py")} == compiled


def test_it_tells_nothing_of_the_machine_that_built_it() -> None:
    found = subprocess.run(
        ["/usr/bin/grep", "--recursive", "--files-with-matches", "--fixed-strings", ROOT, IMAGE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
    assert not list(IMAGE.rglob("direct_url.json"))


@pytest.mark.timeout(300)
def test_the_same_inputs_give_the_same_image(tmp_path: Path) -> None:
    """Held against the one that make has just built."""
    script = ROOT / "scripts" / "build_image.py"
    subprocess.run([sys.executable, script, "--into", tmp_path / "image"], check=True)
    index = json.loads((LAYOUT / "index.json").read_text(encoding="utf-8"))
    again = json.loads((tmp_path / "image" / "oci" / "index.json").read_text(encoding="utf-8"))
    assert again["manifests"][0]["digest"] == index["manifests"][0]["digest"]


def test_the_licences_of_what_is_in_it_are_in_it() -> None:
    packages = (ROOT / "deploy" / "image" / "packages.txt").read_text(encoding="utf-8").split()
    assert all((IMAGE / "usr/share/doc" / name / "copyright").is_file() for name in packages)


def test_it_is_ready_soon_and_says_so(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Size and time are for who reads the log; what must hold is the startup probe."""
    pod = make()
    began = time.monotonic()
    pod.start()
    seconds = time.monotonic() - began
    size = sum(file.stat().st_size for file in (LAYOUT / "blobs").rglob("*"))
    with capsys.disabled():
        sys.stdout.write(f"\nimage: {size / 1e6:.0f} MB to pull; ready in {seconds:.2f} s\n")
    assert re.search(r"serving on unix:/run/pdp/pdp.sock", pod.log("pdp"))
    assert pod.delete()["pdp"] == 0
    assert not list(Path(pod.volume("pdp-tmp")).iterdir()), "it leaves nothing behind in /tmp"
