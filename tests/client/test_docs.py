"""What docs/runtime-developers.md shows, run against a real sidecar."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdp.reason import ReasonCode

PAGE = Path(__file__).parents[2] / "docs" / "runtime-developers.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_example_runs(
    target: str, token_of: Callable[..., str], actor: str, tmp_path: Path
) -> None:
    names: dict[str, Any] = {
        "token": token_of("tenant_acme", actor),
        "globex_token": token_of("tenant_globex", actor),
        "agent_token": token_of("tenant_acme", actor, ["agent"]),
        "once_file": tmp_path / "once.sqlite",
    }
    text = TEXT.replace("unix:///run/pdp/pdp.sock", target)
    examples = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(examples) >= 9
    for example in examples:
        # Blank lines before it, so that a failure names the page's own line.
        lines_before = text.count("\n", 0, example.start(1))
        exec(compile("\n" * lines_before + example[1], PAGE, "exec"), names)  # noqa: S102 - the page's own code
    names["guard"].close()
    names["redeemer"].close()


def test_every_code_that_it_names_exists() -> None:
    table = TEXT[TEXT.index("| code | what happened") :]
    named = {
        code
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for code in re.findall(r"`(\w+)`", row)
    }
    assert named <= set(ReasonCode)
    stub = {"identity_missing", "identity_ended", "pdp_unavailable", "guard_failed"}
    assert stub <= named
