"""The bill of materials names all that is in the image."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.kubernetes.conftest import IMAGE, ROOT

pytestmark = pytest.mark.kubernetes

SITE: Final = IMAGE / "usr" / "local" / "lib" / "python3.11" / "dist-packages"


def build(into: Path, *, hash_seed: str = "0") -> str:
    script = ROOT / "scripts" / "build_sbom.py"
    subprocess.run(
        [sys.executable, script, "--root", IMAGE, "--into", into],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=60,
    )
    return into.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sbom(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(tmp_path_factory.mktemp("sbom") / "sbom.cdx.json")


@pytest.fixture(scope="module")
def components(sbom: str) -> dict[str, Any]:
    return {each["bom-ref"]: each for each in json.loads(sbom)["components"]}


def named(components: dict[str, Any], kind: str) -> set[str]:
    """The names of one kind, as in pkg:KIND/..."""
    return {
        each["name"]
        for reference, each in components.items()
        if reference.startswith(f"pkg:{kind}/")
    }


def test_it_is_cyclonedx(sbom: str) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom) is None


def test_it_has_every_package_of_debian(components: dict[str, Any]) -> None:
    wanted = (ROOT / "deploy" / "image" / "packages.txt").read_text(encoding="utf-8").split()
    assert named(components, "deb") == set(wanted)
    (tls,) = (each for each in components.values() if each["name"] == "libssl3")
    assert "upstream=openssl" in tls["purl"], "advisories name the source package"


def test_it_has_every_package_of_python(components: dict[str, Any]) -> None:
    folders = {folder.name.partition("-")[0] for folder in SITE.glob("*.dist-info")}
    found = {re.sub(r"[-.]", "_", name) for name in named(components, "pypi")}
    assert {name.lower() for name in folders} == found
    assert "openssl" in named(components, "generic"), "what is compiled into a wheel counts, too"


def test_it_has_every_module_of_opa(components: dict[str, Any]) -> None:
    command = (IMAGE / "usr" / "bin" / "opa").read_bytes()
    modules = {name.decode() for name in re.findall(rb"\n(?:mod|dep)\t(\S+)\t", command)}
    assert len(modules) > 50
    assert named(components, "golang") == {"stdlib", *modules}


def test_each_is_a_part_of_something(sbom: str, components: dict[str, Any]) -> None:
    parts = {
        part for each in json.loads(sbom)["dependencies"] for part in each.get("dependsOn", ())
    }
    assert parts == components.keys()


def test_nothing_is_under_the_agpl(components: dict[str, Any]) -> None:
    licensed = [each for each in components.values() if "licenses" in each]
    assert len(licensed) > 100
    assert not re.search("AGPL|Affero", json.dumps(licensed), re.IGNORECASE)


def test_the_same_image_has_the_same(sbom: str, tmp_path: Path) -> None:
    assert build(tmp_path / "again.json", hash_seed="7") == sbom
