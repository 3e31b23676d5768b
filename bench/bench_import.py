"""What importing the stub costs over the bare interpreter: median of ten runs each,
and the modules that take longest.

Run: python bench/bench_import.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 10
TARGET_MS = 150


def median_ms(program: str) -> float:
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        times.append((time.perf_counter() - started) * 1000)
    return statistics.median(times)


def slowest(count: int) -> list[tuple[int, str]]:
    """Microseconds of a module's own, and its name."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import pdp.client"],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines()[1:]]
    return sorted(((int(own), name.strip()) for own, _, name in rows), reverse=True)[:count]


if __name__ == "__main__":
    bare = median_ms("pass")
    for package in ("pdp.client", "pdp.permit"):
        added = median_ms(f"import {package}") - bare
        print(f"import {package}: {added:.0f} ms over the bare interpreter (target {TARGET_MS})")
    for own, name in slowest(12):
        print(f"{own:8} us  {name}")
