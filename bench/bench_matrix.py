"""What `pdp policy matrix` takes for 1,000 tenants x 5 roles x 50 tools, with the rules
that the product ships: 250,000 decisions, as CSV, by as many processes as there are cores.

Run: python bench/bench_matrix.py [tenants]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from pdp.policy.analysis.cases import Cases
from pdp.policy.analysis.matrix import Cell, matrix
from pdp.policy.analysis.matrix_output import write_matrix_csv, write_matrix_page
from pdp.policy.analysis.questions import Only
from pdp.policy.bundle import load_bundle

BUNDLE = Path(__file__).parents[1] / "policies" / "bundle.tar.gz"
ROLES, TOOLS = 5, 50


def data(tenants: int) -> bytes:
    tools = {
        f"tool_{number:02}": {
            "scopes": [f"scope:{number % 10}"],
            "arguments": {
                "id": {"type": "string", "pattern": "[0-9]{1,12}"},
                "pages": {"type": "integer", "minimum": 1, "maximum": 20},
            },
            "charge": [{"budget": "tools", "unit": "calls", "amount": 1}],
        }
        for number in range(TOOLS)
    }
    roles = {
        f"role_{number}": {"tools": [*tools][number * 10 : number * 10 + 20]}
        for number in range(ROLES)
    }
    tenant = {
        "status": "active",
        "scopes": [f"scope:{number}" for number in range(9)],
        "allowlist": [*tools],
        "roles": roles,
        "limits": [],
    }
    named = {f"tenant_{number:04}": tenant for number in range(tenants)}
    return json.dumps({"tenants": named, "tools": tools}).encode()


def main(tenants: int) -> None:
    bundle = replace(load_bundle(BUNDLE), data=data(tenants))
    processes = len(os.sched_getaffinity(0))
    started = time.perf_counter()
    cells = list(
        matrix(bundle, Cases(), Only(), processes=processes, progress=lambda _done, _total: None)
    )
    decided = time.perf_counter() - started
    assert len(cells) == tenants * ROLES * TOOLS
    print(
        f"{len(cells):,} decisions in {decided:.1f} s: {len(cells) / decided:,.0f} a second,"
        f" {processes} processes"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, write in (("csv", write_matrix_csv), ("html", _page)):
            file = Path(folder) / f"matrix.{name}"
            started = time.perf_counter()
            with file.open("w", encoding="utf-8") as out:
                write(out, cells)
            took = time.perf_counter() - started
            print(f"{name}: {took:.1f} s, {file.stat().st_size / 1e6:.1f} MB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"most memory: {peak // 1024} MiB here, {workers // 1024} MiB in a worker")


def _page(out: TextIO, cells: Iterable[Cell]) -> None:
    write_matrix_page(out, cells, revision="bench")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
