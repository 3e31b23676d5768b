"""What docs/delegation.md shows, run against a real sidecar."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pdp.reason import ReasonCode
from pdp.testing import SidecarProcess
from tests.delegation.parties import IDP

PAGE = Path(__file__).parents[2] / "docs" / "delegation.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_example_runs(sidecar: SidecarProcess) -> None:
    roles, scopes = ["support_agent"], ["orders:read", "orders:write", "mail:send"]
    token = IDP.token("tenant_acme", "user-7", roles=roles, scopes=scopes)
    names: dict[str, Any] = {"token": token}
    text = TEXT.replace("unix:///run/pdp/pdp.sock", sidecar.target)
    examples = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(examples) >= 4
    for example in examples:
        # Blank lines before it, so that a failure names the page's own line.
        lines_before = text.count("\n", 0, example.start(1))
        exec(compile("\n" * lines_before + example[1], PAGE, "exec"), names)  # noqa: S102 - the page's own code
    names["guard"].close()


def test_every_code_that_it_names_exists() -> None:
    endings = "delegated|too_wide|too_deep|revoked|expired|exceeded|invalid"
    codes = set(re.findall(rf"\b[a-z]+(?:_[a-z]+)*_(?:{endings})\b", TEXT))
    assert len(codes) >= 9
    assert codes <= set(ReasonCode)
