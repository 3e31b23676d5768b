"""The matrix as a page: docs/reliability.md, with times from docs/reliability.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.faults.matrix.table import (
    OK,
    OMISSIONS,
    ROWS,
    Dependency,
    Recovery,
    Row,
    rows_of,
)

DOCS: Final = Path(__file__).resolve().parents[3] / "docs"
PAGE: Final = DOCS / "reliability.md"
TIMES: Final = DOCS / "reliability.json"
_INTRODUCTION: Final = Path(__file__).with_name("introduction.md")

_CONDITIONS: Final[Mapping[Dependency, str]] = {
    Dependency.ENGINE: (
        "An OPA server with `evaluation_timeout_ms: 500`; killed and paused: one that the sidecar"
        " runs itself (`managed: true`). The embedded engine is a part of the sidecar: see the"
        " ledger's last rows, and a policy that does not end is refused with `policy_timeout`."
    ),
    Dependency.LEDGER: "SQLite in `state_dir`, with a disk of its own here.",
    Dependency.REDIS: "`budget.store`, with `timeout_ms: 500`.",
    Dependency.KEYS: "`permit.key_file`. Mended with a new key, which signs within a second.",
    Dependency.JWKS: "`jwks_url`, with `poll_seconds: 1` and `max_age_seconds: 3`.",
    Dependency.AUDIT: "`audit/` in `state_dir`, with a disk of its own here.",
    Dependency.CLOCK: "The sidecar's clock alone; those of the issuer and of the stub are right.",
    Dependency.BUNDLE: "An http source, with `poll_seconds: 1` and `policy.max_age_seconds: 3`.",
}


def read_times() -> dict[str, float]:
    """How many seconds the recovery of each row took."""
    times: dict[str, float] = json.loads(TIMES.read_text(encoding="utf-8"))
    return times


def page(times: Mapping[str, float]) -> str:
    """The whole page."""
    parts = [_INTRODUCTION.read_text(encoding="utf-8").rstrip()]
    for dependency in Dependency:
        parts.append(f"## {dependency.value[0].upper()}{dependency.value[1:]}")
        parts.append(_CONDITIONS[dependency])
        parts.append("\n".join((*_HEAD, *(_line(row, times) for row in rows_of(dependency)))))
        left_out = [
            f"{omission.failure.value}: {omission.why}"
            for omission in OMISSIONS
            if omission.dependency is dependency
        ]
        if left_out:
            parts.append("Not in the table:\n\n" + "\n".join(f"- {each}" for each in left_out))
    return "\n\n".join(parts) + "\n"


def recovering() -> set[str]:
    """The rows whose recovery is timed."""
    return {str(row) for row in ROWS if not row.goes_on}


_HEAD: Final = (
    "| failure | brought about by | calls end with | `/readyz` | recovers | within | remarks |",
    "|---|---|---|---|---|---|---|",
)
_RECOVERIES: Final = {
    Recovery.BY_ITSELF: "by itself",
    Recovery.UNAIDED: "by itself, and nothing is to be mended",
    Recovery.NOT_NEEDED: "",
    Recovery.RESTART: "mend it and start the sidecar again",
    Recovery.STARTED_AGAIN: "start the sidecar again",
}


def _line(row: Row, times: Mapping[str, float]) -> str:
    codes = " or ".join(f"`{code}`" for code in row.codes)
    if row.grace:
        codes = f"`{OK}` until what is known is too old, then {codes}"
    cells = (
        row.failure.value,
        row.how,
        codes,
        {True: "200", False: "503", None: "503 or 200"}[row.ready],
        _RECOVERIES[row.recovery],
        _within(times[str(row)]) if str(row) in times else "",
        row.note,
    )
    return f"| {' | '.join(cells)} |"


def _within(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.05 else "at once"
