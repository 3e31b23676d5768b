"""What a reload costs the calls that are under way: latency with and without reloads in
the same run, and what memory it leaves behind.

Run: python bench/bench_reload.py [reloads] [--same-rules] [--output json]

Each reload changes the data and, unless --same-rules is given, the rules too, so that
machine code is made anew.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from pdp.api.v1 import authorization_pb2
from pdp.policy.archive import Files, pack, read_archive
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle

ROOT = Path(__file__).parents[1]
STARTER = read_archive((ROOT / "policies/bundle.tar.gz").read_bytes(), place="starter")


def other_rules(directory: Path) -> Files:
    """The starter bundle with a rule more, so that its Wasm is another."""
    sources = directory / "sources"
    for name, content in STARTER.items():
        if name.endswith((".rego", "data.json")) or name == ".manifest":
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes(content)
    manifest = json.loads(STARTER[".manifest"])
    manifest.pop("wasm", None)
    (sources / ".manifest").write_text(json.dumps(manifest))
    rule = sources / "pdp/authz/authz.rego"
    rule.write_text(rule.read_text() + "\nunused := sum([1, 2, 3])\n")
    built = build_bundle(sources, directory / "other.tar.gz", opa=ROOT / ".tools/opa")
    return {**STARTER, **read_archive(built.read_bytes(), place="other")}


def packed(files: Files, number: int) -> bytes:
    manifest = json.loads(files[".manifest"]) | {"revision": f"r{number}"}
    return pack({**files, ".manifest": json.dumps(manifest).encode()})


def release(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".draft")
    draft.write_bytes(content)
    draft.replace(path)


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def main(reloads: int, *, same_rules: bool, as_json: bool) -> None:
    issuer = TokenIssuer()
    token = issuer.token("tenant_acme", "alice", roles=["support_agent"], scopes=["orders:read"])
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = directory / "bundle.tar.gz"
        versions = [STARTER, STARTER if same_rules else other_rules(directory)]
        # Made beforehand: the calls are made by this process too.
        releases = [packed(versions[number % 2], number) for number in range(reloads + 1)]
        release(path, releases[0])
        config = {
            "policy": {"bundles": {"main": {"path": str(path), "poll_seconds": 0.1}}},
            "limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}},
        }
        sidecar = stack.enter_context(
            SidecarProcess(directory, issuer=issuer, bundle=path, config=config)
        )
        caller = stack.enter_context(Caller(sidecar.target, token=token))
        assert sidecar.process is not None
        times: dict[bool, list[float]] = {False: [], True: []}
        revisions: set[str] = set()
        reloading = threading.Event()
        ended = threading.Event()

        def call() -> None:
            while not ended.is_set():
                under_reload = reloading.is_set()
                began = time.perf_counter()
                answer = caller.authorize("orders.read", {"order_id": "918"})
                times[under_reload].append((time.perf_counter() - began) * 1e3)
                assert answer.decision, answer.reason_code
                revisions.add(answer.policy_revision)

        thread = threading.Thread(target=call)
        thread.start()
        watch = caller.authorization.Watch(authorization_pb2.WatchRequest(), timeout=3600)
        assert next(watch).policy.revision == "r0"
        memory = []
        for number in range(1, reloads + 1):
            reloading.set()
            release(path, releases[number])
            assert next(watch).policy.revision == f"r{number}"
            reloading.clear()
            time.sleep(0.3)
            memory.append(resident_mib(sidecar.process.pid))
            if number % 20 == 0:
                print(f"  {number} reloads, {memory[-1]:.0f} MiB", file=sys.stderr)
        ended.set()
        thread.join()
        settled = memory[len(memory) // 4 :]
        slope = statistics.linear_regression(range(len(settled)), settled).slope
        found = {
            "reloads": reloads,
            "revisions": len(revisions),
            "first_mib": round(memory[0]),
            "last_mib": round(memory[-1]),
            "kib_per_reload": round(slope * 1024, 1),
            "quiet": measured(times[False]),
            "reload": measured(times[True]),
        }
        if as_json:
            print(json.dumps(found, indent=1))
        else:
            show(found)


def measured(times_ms: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times_ms, n=1000, method="inclusive")
    return {
        "calls": len(times_ms),
        "p50_ms": round(cuts[499], 3),
        "p99_ms": round(cuts[989], 3),
        "p999_ms": round(cuts[998], 3),
        "max_ms": round(max(times_ms), 3),
    }


def show(found: dict[str, Any]) -> None:
    for key, name in (("quiet", "quiet"), ("reload", "while a bundle is taken up")):
        each = found[key]
        print(
            f"{name:27} {each['calls']:7} calls   p50 {each['p50_ms']:6.2f} ms"
            f"   p99 {each['p99_ms']:6.2f}   p99.9 {each['p999_ms']:6.2f}   max {each['max_ms']:6.2f}"
        )
    print(
        f"{found['reloads']} reloads, {found['revisions']} revisions seen by calls, none failed;"
        f" resident {found['first_mib']} -> {found['last_mib']} MiB,"
        f" slope {found['kib_per_reload']} KiB per reload after the first quarter"
    )


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    main(
        numbers[0] if numbers else 200,
        same_rules="--same-rules" in sys.argv,
        as_json="json" in sys.argv,
    )
