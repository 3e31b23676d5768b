"""The threat model names tests that are there."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
THREATS = PAGE[PAGE.index("\n## Threats\n") : PAGE.index("\n## Not defended")]
ROWS = [
    [cell.strip() for cell in row.strip("|").split("|")]
    for row in re.findall(r"^\|.*\|$", THREATS, re.MULTILINE)
    if not row.startswith(("| attacker |", "|---"))
]


@functools.cache
def functions_of(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return frozenset(
        node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def named(cell: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", cell)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row[:2])[:60])
def test_every_threat_has_a_defence_and_tests_that_show_it(row: list[str]) -> None:
    attacker, path, defence, shown_by = row
    assert attacker
    assert path
    assert defence
    tests = named(shown_by)
    assert re.sub(r"`[^`]*`", "", shown_by).strip(" ,") == ""
    assert tests
    for file, name in tests:
        assert name in functions_of(file), f"{file} has no {name}"


def test_the_table_is_read_at_all() -> None:
    assert len(ROWS) > 50


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!https:)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
