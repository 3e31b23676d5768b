"""Policies that are built for one test, by the OPA in .tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pdp.canonical import JsonObject
from pdp.policy.bundle import Bundle, load_bundle

ROOT = Path(__file__).resolve().parent.parent.parent

Files = Mapping[str, str | JsonObject]
"""The files of a policy by their path: Rego, or data that is written as JSON."""


@pytest.fixture(scope="session")
def opa() -> Path:
    command = ROOT / ".tools" / "opa"
    if not command.exists():
        pytest.fail("there is no .tools/opa; `make test` installs it")
    return command


@pytest.fixture(scope="session")
def write_policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Files], Path]:
    """Write the files of a policy into a directory of their own."""

    def write(files: Files) -> Path:
        directory = tmp_path_factory.mktemp("policy")
        for name, content in files.items():
            file = directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        return directory

    return write


@pytest.fixture(scope="session")
def build_policy(opa: Path, write_policy: Callable[[Files], Path]) -> Callable[[Files], Bundle]:
    """Compile a policy; the same files are compiled once."""
    built: dict[str, Bundle] = {}

    def build(files: Files) -> Bundle:
        key = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
        if key not in built:
            built[key] = load_bundle(write_policy(files), opa=opa)
        return built[key]

    return build


@pytest.fixture(scope="session")
def starter(opa: Path) -> Bundle:
    """The bundle that the product ships."""
    return load_bundle(ROOT / "policies" / "bundle.tar.gz", opa=opa)
