"""Measure this product beside its peers, and keep what it took.

Run: python -m bench.peers [--quick] [--only NAME ...] [--out FILE]
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.peers import servers
from bench.peers.measure import FULL, QUICK, measure
from bench.peers.physical import physical
from bench.peers.servers import Server
from bench.peers.systems import SYSTEMS
from bench.peers.tenants import tokens
from pdp.testing import TokenIssuer


def every_server(folder: Path, issuer: TokenIssuer) -> dict[str, Server]:
    """Not started."""
    return {
        "stages": servers.stages(folder / "stages", issuer),
        "ours": servers.ours(folder / "ours", issuer, durability="process"),
        "ours-power": servers.ours(folder / "ours-power", issuer, durability="power"),
        "cerbos": servers.cerbos(folder / "cerbos", audit=False),
        "cerbos-audit": servers.cerbos(folder / "cerbos-audit", audit=True),
        "opa": servers.opa(folder / "opa", decision_logs=False),
        "opa-log": servers.opa(folder / "opa-log", decision_logs=True),
        "agt": servers.agt(folder / "agt"),
    }


def machine() -> dict[str, Any]:
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "measured_on": dt.datetime.now(dt.UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "processor": processor,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> int:
    options = argparse.ArgumentParser(description="Measure this product beside its peers.")
    options.add_argument("--quick", action="store_true", help="few calls, for a look")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these systems and no others")
    options.add_argument("--out", type=Path, help="where to write the results as JSON")
    chosen = options.parse_args()
    systems = [each for each in SYSTEMS if not chosen.only or each.name in chosen.only]
    began = time.monotonic()

    def show(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)

    results = machine() | {"quick": chosen.quick}
    with tempfile.TemporaryDirectory(prefix="pdp-peers-") as name:
        folder, issuer = Path(name), TokenIssuer()
        results["physical_us"] = physical(folder)
        show("what a decision can not do without")
        results |= measure(
            systems,
            every_server(folder, issuer),
            QUICK if chosen.quick else FULL,
            folder,
            tokens=tokens(issuer),
            show=show,
        )
    for each in results["systems"].values():
        alone = each["levels"]["1"]
        print(
            f"{each['title']:60} p50 {alone['p50_us']:8.1f} us  p99 {alone['p99_us']:8.1f} us"
            f"  CPU {alone['client_cpu_us']:6.0f} + {alone['server_cpu_us'] or 0:6.0f} us"
        )
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
