"""The table of others' faults in docs/security.md names each of these tests, and no others."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("\n## What went wrong elsewhere\n") :]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", SECTION)
STORIES = sorted(set(Path(__file__).parent.glob("test_*.py")) - {Path(__file__)})


@pytest.mark.parametrize("file", STORIES, ids=lambda file: file.stem)
def test_the_page_names_every_story_and_nothing_else(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    tests = [
        node
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert sorted(named for at, named in NAMED if at == name) == sorted(test.name for test in tests)
    assert all(ast.get_docstring(test) for test in tests)


def test_every_row_of_the_research_is_there() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (`.+`) \|$", SECTION, re.MULTILINE)
    assert len(rows) == SECTION.count("\n| ") - 1  # all but the heading
    told = " ".join(source for source, _, _ in rows)
    for issue in (
        *("26672", "34732", "23714", "35524", "27735", "27509", "38647", "buttercup#550"),
        *("python#3353", "deepagents#6209", "python#4620", "#956", "crewAI#5888", "crewAI#6859"),
        *("python-sdk#1223", "fastmcp#1895", "fastmcp#3678", "mcp-context-forge#2055"),
        *("pydantic-ai#6425", "mcp#3617", "agent-identity-management#200", "agenta#4854"),
        *("extra#139", "langgraph#7780", "#6208", "idun-agent-platform#670"),
        *("agent-service-toolkit#305", "AISVS#1104", "opencode#26700", "toolkit#597", "#609"),
        *("#272", "Asana", "ResponseCachingMiddleware", "AgentCore"),
    ):
        assert issue in told, issue
