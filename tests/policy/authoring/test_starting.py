"""The bundle that `pdp policy init` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdp.policy.analysis.cases import read_cases
from pdp.policy.analysis.questions import Estate
from pdp.policy.archive import read_directory
from pdp.policy.authoring.check import Commands, check
from pdp.policy.authoring.starting import start
from pdp.policy.authoring.testing import run_tests
from pdp.policy.bundle import load_bundle
from pdp.policy.engine import BundleError


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("authors") / "new" / "policy"
    start(directory)
    return directory


def test_it_holds_what_an_author_needs(begun: Path) -> None:
    for name in (
        ".manifest",
        ".regal.yaml",
        "README.md",
        "cases.yaml",
        "pdp/authz/authz.rego",
        "pdp/authz/authz_test.rego",
        "schemas/authz_input.json",
        "tenants/data.json",
        "tools/data.json",
    ):
        assert (begun / name).is_file(), name
    assert not (begun / "bundle.tar.gz").exists()
    assert not (begun / "Makefile").exists()


def test_nothing_is_wrong_with_it(begun: Path, opa: Path) -> None:
    regal = opa.with_name("regal")

    assert check(read_directory(begun), Commands(opa=opa, regal=regal), place="x").findings == ()
    assert run_tests(load_bundle(begun, opa=opa), opa=opa) == []


def test_its_cases_name_every_tool_of_it_and_no_other(begun: Path, opa: Path) -> None:
    estate = Estate(load_bundle(begun, opa=opa).data)

    assert read_cases(begun / "cases.yaml").tools.keys() == estate.tools.keys()


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    assert "README.md" in start(tmp_path)


def test_nothing_that_is_there_is_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.rego").write_text("package mine\n")

    for place in (tmp_path, tmp_path / "mine.rego"):
        with pytest.raises(BundleError, match="is there already, and not an empty directory"):
            start(place)

    assert [file.name for file in tmp_path.iterdir()] == ["mine.rego"]
