"""What docs/audit.md says, run."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from pdp.audit.record import AuditReceipt, AuditRecord, Outcome

DOCS = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")


def test_the_snippet_verifies_a_log_and_finds_a_change(
    directory: Path,
    record: Callable[..., AuditRecord],
    write_log: Callable[..., list[AuditReceipt]],
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", snippet, str(directory)],
            capture_output=True,
            text=True,
            check=False,
        )

    for _ in range(2):
        write_log(directory, [record(detail={"é": "\n"})] * 5, segment_max_bytes=1_000)
    intact = run()
    assert intact.returncode == 0, intact.stderr
    assert intact.stdout.split()[0] == "14"
    first = min(directory.iterdir())
    first.write_bytes(first.read_bytes().replace(b'"start"', b'"starT"'))
    broken = run()
    assert broken.returncode == 1
    assert "('audit-0000000000000001.jsonl', 1, 'hash')" in broken.stderr


def test_every_field_and_outcome_is_described() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", DOCS, re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(AuditRecord)}
    chain = {"v", "seq", "time", "instance", "epoch", "prev_hash", "hash"}
    assert described == fields | chain | {"start", "stop", "gap"}
    assert all(f"`{outcome}`" in DOCS for outcome in Outcome)
