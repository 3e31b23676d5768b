"""Measure a fleet of sidecars, hold the model against it, and keep the results.

Run: python -m bench.scale [--smoke] [--out FILE]
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from bench.scale.measure import (
    BUSY,
    CHARGED,
    EXACT,
    FREE,
    LEASE_SECONDS,
    MEMORY_AT,
    REFUSED,
    SPARSE,
    Plan,
    alone,
    inputs_of,
    run,
    size,
    store_cost,
)

FULL = Plan(
    sidecars=50,
    stubs=500,
    tenants=50,
    tight_tenants=5,
    tight_limit=40,
    lease_seconds=0,
    calls_per_second=120,
    seconds=60,
    idle_seconds=8,
    bundle_poll_seconds=10,
    jwks_poll_seconds=15,
)
SMOKE = Plan(
    sidecars=3,
    stubs=30,
    tenants=6,
    tight_tenants=1,
    tight_limit=20,
    lease_seconds=0,
    calls_per_second=30,
    seconds=10,
    idle_seconds=2,
    bundle_poll_seconds=2,
    jwks_poll_seconds=3,
    processes=2,
)


def main() -> int:
    options = argparse.ArgumentParser(description="Measure a fleet of sidecars.")
    options.add_argument("--smoke", action="store_true", help="a small fleet, for a short time")
    options.add_argument("--out", type=Path, help="where to write the results as JSON")
    chosen = options.parse_args()
    plan = SMOKE if chosen.smoke else FULL
    begun_at = time.monotonic()

    def show(what: str) -> None:
        print(f"{time.monotonic() - begun_at:6.1f} s  {what}", flush=True)

    with tempfile.TemporaryDirectory(prefix="pdp-scale-") as directory:
        folder = Path(directory)
        seconds = 2.0 if chosen.smoke else 10.0
        show("the store by itself")
        store = store_cost(folder / "store", 500 if chosen.smoke else 5_000)
        show("one sidecar")
        kinds = (FREE, CHARGED, REFUSED, SPARSE, BUSY)
        plain = alone(folder / "plain", kinds, lease_seconds=0, seconds=seconds)
        show("one sidecar that leases")
        leased = alone(
            folder / "leased", (EXACT, SPARSE), lease_seconds=LEASE_SECONDS, seconds=seconds
        )
        sizes = []
        for tenants in MEMORY_AT[:2] if chosen.smoke else MEMORY_AT:
            show(f"one sidecar with {tenants:,} tenants")
            sizes.append(size(folder / f"size-{tenants}", tenants))
        runs = []
        for lease_seconds in (0, LEASE_SECONDS):
            chosen_plan = replace(plan, lease_seconds=lease_seconds)
            runs.append(run(folder / f"fleet-{lease_seconds}", chosen_plan, show))
    results = {
        "measured_on": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "inputs": asdict(inputs_of(plain, leased, sizes, store)),
        "sizes": [asdict(each) for each in sizes],
        "audit_bytes": {kind: round(each) for kind, each in plain.audit_bytes.items()},
        "runs": [asdict(each) for each in runs],
    }
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for each in runs:
        name = f"leases of {each.plan.lease_seconds} s" if each.plan.lease_seconds else "no leases"
        calls = sum(each.executed.values())
        show(f"{name}: {calls} calls ran, {sum(each.refused.values())} were refused")
        for fault in each.faults:
            show(f"FAULT: {fault}")
        if each.late:
            show(f"{each.late} calls began late: the machine was overloaded, and rates are too low")
    return 1 if any(each.faults for each in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
