"""Say what is in the sidecar's image, as CycloneDX: `python scripts/build_sbom.py`.

Everything is read out of the image's root file system: Debian's packages from what dpkg
would know of them, Python's from their metadata with what is bundled in them as far as
they say so, opa's Go modules from the command itself. The same root gives the same bytes.
"""

from __future__ import annotations

import argparse
import email.parser
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Final

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense, License
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

ROOT: Final = Path(__file__).resolve().parent.parent
BUILD_INFO: Final = b"\xff Go buildinf:"
SENTINEL_BYTES: Final = 16
"""Go puts as many before and behind the list of modules (debug/buildinfo)."""
LICENSE_CLASSIFIER: Final = re.compile(r"License :: OSI Approved :: (.+)")
OPA: Final = "pkg:golang/github.com/open-policy-agent/opa"


@dataclass(frozen=True, slots=True)
class Package:
    """Something in the image that has a version."""

    url: PackageURL
    licenses: tuple[str, ...] = ()
    """As the package says it: SPDX expressions, or names."""
    parts: tuple[Package, ...] = ()
    """What is built into it."""
    kind: ComponentType = ComponentType.LIBRARY

    @property
    def component(self) -> Component:
        """As CycloneDX has it."""
        url = self.url
        licenses: list[License] = [DisjunctiveLicense(name=each) for each in self.licenses]
        if len(licenses) == 1:  # else none may be an expression
            licenses = [LicenseFactory().make_from_string(self.licenses[0])]
        return Component(
            type=self.kind,
            name="/".join(filter(None, (url.namespace if url.type == "golang" else "", url.name))),
            version=url.version,
            purl=url,
            bom_ref=url.to_string(),
            licenses=licenses,
        )


def packages(root: Path) -> list[Package]:
    """All that are in a root file system. Raises ValueError where one can not be read."""
    return [*debian_packages(root), *python_packages(root), opa(root / "usr" / "bin" / "opa")]


def debian_packages(root: Path) -> Iterator[Package]:
    """What dpkg would list."""
    release = dict(
        line.split("=", 1) for line in (root / "etc/os-release").read_text("utf-8").splitlines()
    )
    distribution = "debian-" + release["VERSION_ID"].strip('"')
    for file in sorted((root / "var/lib/dpkg/status.d").iterdir()):
        fields = email.parser.Parser().parsestr(file.read_text("utf-8"))
        qualifiers = {"arch": fields["Architecture"], "distro": distribution}
        if fields["Source"]:  # where it is not named as its source
            qualifiers["upstream"] = fields["Source"].partition(" ")[0]
        yield Package(
            PackageURL("deb", "debian", fields["Package"], fields["Version"], qualifiers),
            debian_licenses(root / "usr/share/doc" / fields["Package"] / "copyright"),
        )


def debian_licenses(copyright_file: Path) -> tuple[str, ...]:
    """The names of licences that Debian has found in a package; empty where the file is in
    the format of before those names.
    """
    text = copyright_file.read_text("utf-8")
    if not text.startswith("Format:"):
        return ()
    return tuple(sorted(set(re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE))))


def python_packages(root: Path) -> Iterator[Package]:
    """The sidecar, and what it is made with."""
    (site,) = root.glob("usr/local/lib/python3*/dist-packages")
    found = distributions(path=[str(site)])
    for distribution in sorted(found, key=lambda each: each.name.lower()):
        yield Package(
            PackageURL("pypi", None, distribution.name.lower(), distribution.version),
            python_licenses(distribution),
            tuple(bundled(distribution)),
        )


def python_licenses(distribution: Distribution) -> tuple[str, ...]:
    """As the metadata has it: in its newest way, or one of those of before."""
    metadata = distribution.metadata
    stated = metadata["License-Expression"] or metadata["License"] or ""
    if stated and "\n" not in stated:
        return (stated,)
    classifiers = metadata.get_all("Classifier") or []
    return tuple(found[1] for each in classifiers if (found := LICENSE_CLASSIFIER.match(each)))


def bundled(distribution: Distribution) -> Iterator[Package]:
    """What a wheel says is compiled into it (PEP 770)."""
    for file in distribution.files or ():
        if file.parent.name != "sboms" or file.suffix != ".json":
            continue
        for component in json.loads(file.read_text("utf-8"))["components"]:
            licenses = (each.get("expression") for each in component.get("licenses", ()))
            url = PackageURL.from_string(component["purl"])
            yield Package(url, tuple(filter(None, licenses)))


def opa(command: Path) -> Package:
    """The opa command, and the Go modules in it. Raises ValueError where it is not OPA."""
    go_version, listed = build_info(command.read_bytes())
    parts = [go_module("stdlib", go_version.removeprefix("go"))]
    main = None
    for line in listed.splitlines():
        mark, *words = line.split("\t")
        if mark == "mod":
            main = go_module(words[0], words[1])
        elif mark == "dep":
            parts.append(go_module(words[0], words[1]))
        elif mark == "=>":  # in the place of the one before
            parts[-1] = go_module(words[0], words[1])
    if main is None or main.url.to_string() != f"{OPA}@{main.url.version}":
        raise ValueError(f"{command}: is not built from OPA's module")
    return Package(main.url, ("Apache-2.0",), tuple(parts), ComponentType.APPLICATION)


def go_module(path: str, version: str) -> Package:
    """A Go module by its path."""
    namespace, _, name = path.rpartition("/")
    return Package(PackageURL("golang", namespace or None, name, version))


def build_info(command: bytes) -> tuple[str, str]:
    """Go's version, and the list of modules that `go version -m` prints. Raises ValueError."""
    at = command.find(BUILD_INFO)
    if at < 0:
        raise ValueError("not a command that Go 1.18 or newer has built")
    version, at = go_string(command, at + 32)
    modules, _ = go_string(command, at)
    return version.decode("utf-8"), modules[SENTINEL_BYTES:-SENTINEL_BYTES].decode("utf-8")


def go_string(command: bytes, at: int) -> tuple[bytes, int]:
    """A string behind its length as a varint, and where it ends."""
    length = shift = 0
    more = True
    while more:
        length |= (command[at] & 0x7F) << shift
        more = bool(command[at] & 0x80)
        at, shift = at + 1, shift + 7
    return command[at : at + length], at + length


def sbom(root: Path) -> str:
    """The bill of materials of a root file system, as JSON. Raises ValueError."""
    every = packages(root)
    (ours,) = (each for each in every if each.url.name == "agent-pdp")
    image = Package(PackageURL("oci", None, "agent-pdp", ours.url.version), ours.licenses).component
    image.type = ComponentType.CONTAINER
    metadata = BomMetaData(
        component=image,
        timestamp=datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC),
    )
    bom = Bom(metadata=metadata)
    known: dict[str, Component] = {}
    for package in every:
        component, *parts = (
            known.setdefault(each.url.to_string(), each.component)
            for each in (package, *package.parts)
        )
        bom.register_dependency(component, parts)
    bom.components.update(known.values())
    bom.register_dependency(image, [known[each.url.to_string()] for each in every])
    # Else it is a random one.
    bom.serial_number = uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(sorted(known)))
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def main() -> int:
    """Write it."""
    parser = argparse.ArgumentParser(description="Say what is in the sidecar's image.")
    parser.add_argument("--root", type=Path, default=ROOT / "dist" / "image" / "root")
    parser.add_argument("--into", type=Path, default=ROOT / "dist" / "sbom.cdx.json")
    arguments = parser.parse_args()
    written = sbom(arguments.root)
    arguments.into.write_text(written, encoding="utf-8")
    print(f"build_sbom: {arguments.into}: {len(json.loads(written)['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
