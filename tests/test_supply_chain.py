"""What comes from others is looked up, may be used, and no rule is put aside without a reason."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
SCRIPT: Final = ROOT / "scripts" / "audit_dependencies.py"
LOOKED_UP: Final = {"name": "grpcio", "version": "1.85.1", "vulns": []}
WEAK: Final = {
    "name": "grpcio",
    "version": "1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}],
}
SKIPPED: Final = {"name": "grpcio", "skip_reason": "Dependency not found on PyPI: grpcio (1.0)"}


def audited(folder: Path, *answers: str, code: int = 0) -> tuple[int, str]:
    """How an audit ends for which pip-audit has these answers, one for each lock file."""
    stand_in = folder / "pip-audit"
    stand_in.write_text(
        f"#!{sys.executable}\nimport sys\nprint(open(sys.argv[-1]).read())\nsys.exit({code})\n"
    )
    stand_in.chmod(0o700)
    locks = [folder / f"{number}.txt" for number in range(len(answers))]
    for lock, answer in zip(locks, answers, strict=True):
        lock.write_text(answer, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, SCRIPT, "--pip-audit", stand_in, *locks],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.stderr == ""
    return ran.returncode, ran.stdout


def found(*dependencies: dict[str, Any]) -> str:
    return json.dumps({"dependencies": dependencies, "fixes": []})


def test_what_could_not_be_looked_up_is_not_called_clean(tmp_path: Path) -> None:
    code, said = audited(tmp_path, found(LOOKED_UP), found(LOOKED_UP, SKIPPED))
    assert code == 2
    assert "0.txt: 1 looked up, 0 known weaknesses\n" in said
    assert "1 could not be looked up, the first: Dependency not found on PyPI" in said
    assert "of the rest nothing is known" in said


@pytest.mark.parametrize("answer", ("", "no JSON", "[]", "{}", '{"dependencies": [{}]}', found()))
def test_an_answer_that_is_none_is_not_called_clean(tmp_path: Path, answer: str) -> None:
    assert audited(tmp_path, answer, code=1)[0] == 2
    assert audited(tmp_path, answer, code=0)[0] == 2


def test_a_known_weakness_is_told_and_counts_more_than_what_is_not_known(tmp_path: Path) -> None:
    code, said = audited(tmp_path, found(SKIPPED), found(WEAK), code=1)
    assert code == 1
    assert "  grpcio 1.0: PYSEC-1, fixed in 1.1\n" in said


def test_all_looked_up_and_none_weak_is_clean(tmp_path: Path) -> None:
    code, said = audited(tmp_path, found(LOOKED_UP), found(LOOKED_UP))
    assert (code, said.count("1 looked up, 0 known weaknesses")) == (0, 2)


# Licences

MAY_BE_USED: Final = re.compile(
    r"\b(MIT|Apache|BSD|0BSD|ISC|PSF|Python Software Foundation|MPL|Mozilla|Unlicense|any-OSI)\b"
)
MAY_NOT: Final = re.compile(r"AGPL|Affero|SSPL|BUSL|Business Source|Commons Clause", re.IGNORECASE)
WITHOUT: Final = {"atheris"}
"""Its metadata names no licence; it is Apache-2.0, and only for tests."""


def licence_of(name: str) -> str | None:
    """What a package's metadata says; None where it is not for this machine."""
    try:
        found = metadata(name)
    except PackageNotFoundError:
        return None
    classifiers = [each for each in found.get_all("Classifier") or () if "License ::" in each]
    named = [found[field] for field in ("License-Expression", "License") if field in found]
    return " ".join([*named, *classifiers])


@pytest.mark.parametrize("lock", ("server", "demo", "dev"))
def test_every_locked_package_has_a_licence_that_allows_its_use(lock: str) -> None:
    pinned = re.findall(
        r"^([\w.-]+)(?:\[.*\])?==", (ROOT / f"requirements/{lock}.txt").read_text(), re.MULTILINE
    )
    licences = {name: licence_of(name) for name in pinned}
    told = {name: licence for name, licence in licences.items() if licence is not None}
    assert len(told) > len(pinned) * 0.9
    assert {name for name, licence in told.items() if MAY_NOT.search(licence)} == set()
    unclear = {name for name, licence in told.items() if not MAY_BE_USED.search(licence)}
    assert unclear == WITHOUT & set(pinned)


# Security rules that are put aside

SHIPPED: Final = {
    ("budget/lease_journal.py", "S608"),
    ("policy/analysis/trace.py", "S603"),
    ("policy/authoring/command.py", "S603"),
    ("policy/compile.py", "S603"),
    ("policy/opa/leash.py", "S606"),
    ("revocation/revocations.py", "S105"),
    ("testing/sidecar.py", "S603"),
}
"""Where the product itself puts one aside, but for asserts (S101)."""


def put_aside(path: Path) -> Iterator[tuple[str, str]]:
    """Security rules of ruff that a line puts aside, with the reason that it gives."""
    source = io.StringIO(path.read_text(encoding="utf-8"))
    for token in tokenize.generate_tokens(source.readline):
        if token.type == tokenize.COMMENT and token.string.startswith("# noqa: "):
            rules, _, reason = token.string.removeprefix("# noqa: ").partition(" - ")
            for rule in re.findall(r"\bS\d{3}\b", rules):
                yield rule, reason.strip()


def sources() -> list[Path]:
    return [
        path
        for folder in ("pdp", "tests", "scripts", "bench")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not path.is_relative_to(ROOT / "pdp" / "api") and "# noqa:" in path.read_text("utf-8")
    ]


def test_no_security_rule_is_put_aside_without_a_reason() -> None:
    bare = [
        f"{path.relative_to(ROOT)}: {rule}"
        for path in sources()
        for rule, reason in put_aside(path)
        if not reason
    ]
    assert bare == []


def test_the_product_puts_aside_these_and_no_others() -> None:
    product = ROOT / "pdp"
    assert {
        (str(path.relative_to(product)), rule)
        for path in sources()
        if path.is_relative_to(product)
        for rule, _ in put_aside(path)
        if rule != "S101"
    } == SHIPPED


def test_what_is_put_aside_for_whole_folders_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lint = tomllib.loads(text)["tool"]["ruff"]["lint"]
    assert lint["select"] == ["ALL"]
    rules = {
        *lint["ignore"],
        *(rule for each in lint["per-file-ignores"].values() for rule in each),
    }
    for rule in sorted(rule for rule in rules if rule.startswith("S")):
        told = re.findall(rf'^\s*"{rule}",\s+# \S', text, re.MULTILINE)
        assert told, f"{rule} is put aside without a reason"
