"""Generate the reference pages of docs/ from the code."""

from __future__ import annotations

from pathlib import Path

from pdp import config_reference
from pdp.reason import ReasonCode

DOCS = Path(__file__).resolve().parent.parent / "docs"


def reason_codes() -> str:
    """docs/reason-codes.md."""
    lines = [
        "# Reason codes",
        "",
        "<!-- Generated from pdp/reason.py by `make docs`. -->",
        "",
        "Every answer, error, audit record and exception carries one of these, or a code of the",
        "policy's own (lower snake case, at most 64 characters).",
        "",
        "| code | meaning |",
        "|---|---|",
        *(f"| `{code.value}` | {code.meaning} |" for code in ReasonCode),
        "",
    ]
    return "\n".join(lines)


PAGES = {"configuration.md": config_reference.markdown, "reason-codes.md": reason_codes}


def main() -> None:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
