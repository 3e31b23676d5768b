"""docs/benchmarks.md and its plots, from what was measured: docs/benchmarks/*.json.

Run: python -m bench.peers.page   (writes the page and its plots anew)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.peers.chart import Bar, bars
from bench.peers.systems import FLOOR, INSIDE, OURS, PEERS, STAGES
from bench.scale.page import short, table

DOCS: Final = Path(__file__).parents[2] / "docs"
PAGE: Final = DOCS / "benchmarks.md"
RESULTS: Final = DOCS / "benchmarks"
PARTS: Final = ("peers", "footprint", "workload", "growth", "reload")
NOT_MEASURED: Final = "Not measured yet.\n"

_BLOCK: Final = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Results:
    """What the files hold; a part that was never measured is empty."""

    peers: Mapping[str, Any]
    footprint: Mapping[str, Any]
    workload: Mapping[str, Any]
    growth: Mapping[str, Any]
    reload: Mapping[str, Any]

    def p50(self, system: str, callers: int = 1) -> float:
        return float(self.peers["systems"][system]["levels"][str(callers)]["p50_us"])

    def ratio(self, system: str, other: str, callers: int = 1) -> float:
        """Of what both take: the median of the turns, in each of which both were asked."""
        first, second = (
            self.peers["systems"][name]["levels"][str(callers)]["slice_p50_us"]
            for name in (system, other)
        )
        return median(one / two for one, two in zip(first, second, strict=True))


def read(folder: Path = RESULTS) -> Results:
    def part(name: str) -> Mapping[str, Any]:
        file = folder / f"{name}.json"
        found: Mapping[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        return found

    return Results(*(part(name) for name in PARTS))


def rendered(text: str, results: Results) -> str:
    """The page with its tables as the results give them now."""
    return _BLOCK.sub(lambda block: block[1] + TABLES[block[2]](results) + block[3], text)


def shown(text: str) -> list[str]:
    """Names of the tables on a page."""
    return [block[2] for block in _BLOCK.finditer(text)]


def megabytes(value: float) -> str:
    return f"{value / 1e6:,.0f} MB"


def when(results: Results) -> str:
    found = results.peers
    return (
        f"Measured on {found['measured_on']}, on one machine: {found['cores']} cores"
        f" ({found['processor']}), {found['system']}, Python {found['python']}, grpcio"
        f" {found['grpcio']}; the load average was {found['load_average']} when it began."
        + (" **A quick run, with few calls: good for a look only.**" if found["quick"] else "")
        + "\n"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What was set out to be reached, and what was."""

    what: str
    most: float
    reached: float | None
    """None where it was not measured."""
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.reached is not None and self.reached <= self.most

    def row(self) -> list[str]:
        if self.reached is None:
            return [self.what, f"{short(self.most)}{self.unit}", "", "not measured"]
        off = abs(self.reached / self.most - 1)
        verdict = "met" if self.met else "**missed**"
        return [
            self.what,
            f"{short(self.most)}{self.unit}",
            f"{short(self.reached)}{self.unit}",
            f"{verdict}, by {off:.0%}" if off >= 0.01 else f"{verdict}, by less than 1%",
        ]


def targets(results: Results) -> list[Target]:
    """Those of the design, section 10."""
    servers, start = results.peers["servers"], results.footprint.get("start", {})
    rest = results.footprint.get("rest", {})
    ready = start["pdp serve"]["median_ms"] if start else None
    idle = rest["pdp serve"]["idle_percent"] if rest else None
    small = rest["pdp serve"]["ready"]["rss"] if "cerbos" in rest else None
    return [
        Target(
            what="a decision with everything on, over the stub's stream: times Cerbos's plain check",
            most=0.8,
            reached=results.ratio("ours-stream", "cerbos"),
        ),
        Target(
            what="the same as a call of its own: times Cerbos's plain check",
            most=1.3,
            reached=results.ratio("ours-unary", "cerbos"),
        ),
        Target(
            what="over the stub's stream: times an empty exchange on an open stream",
            most=1.5,
            reached=results.ratio("ours-stream", "stage-empty"),
        ),
        Target(
            what="a guarded call under a reusable permit",
            most=10,
            reached=results.p50("ours-reusable"),
            unit=" us",
        ),
        Target(
            what="10,000 tenants: times what a decision takes with 10",
            most=1.1,
            reached=results.growth["flat"]["ratio"] if results.growth else None,
        ),
        Target(
            what="a reload: its slowest call, beyond the slowest without one",
            most=5,
            reached=(
                results.reload["reload"]["max_ms"] - results.reload["quiet"]["max_ms"]
                if results.reload
                else None
            ),
            unit=" ms",
        ),
        Target(
            what="resident memory, 1,000 tenants, after the run: times Cerbos's",
            most=1.0,
            reached=servers["ours"]["resident_bytes"] / servers["cerbos"]["resident_bytes"],
        ),
        Target(
            what="resident memory with the starter bundle: times Cerbos's with one small policy",
            most=1.0,
            reached=None if small is None else small / rest["cerbos"]["ready"]["rss"],
        ),
        Target(what="from start to ready", most=500, reached=ready, unit=" ms"),
        Target(what="idle, of a core", most=0.5, reached=idle, unit=" %"),
    ]


def targets_table(results: Results) -> str:
    rows = [target.row() for target in targets(results)]
    return table(["what", "at most", "reached", ""], rows)


_PLAIN: Final = "cerbos"
"""What the others are held against."""
_LATENCY_HEADS: Final = [
    "system",
    "x Cerbos",
    "p50 us",
    "p95",
    "p99",
    "p999",
    "calls/s",
    "CPU us: client",
    "server",
]


def _latency(results: Results, callers: int, *groups: str) -> str:
    rows = []
    for name, system in results.peers["systems"].items():
        found = system["levels"].get(str(callers))
        if system["group"] in groups and found:
            served = found["server_cpu_us"]
            rows.append(
                [
                    system["title"],
                    short(results.ratio(name, _PLAIN, callers)),
                    *(short(found[f"{share}_us"]) for share in ("p50", "p95", "p99", "p999")),
                    short(found["calls_per_second"]),
                    short(found["client_cpu_us"]),
                    "" if served is None else short(served),
                ]
            )
    return table(_LATENCY_HEADS, rows) if rows else NOT_MEASURED


def stages_table(results: Results) -> str:
    """Each stage beside the one before."""
    rows, before = [], 0.0
    names = [name for name, each in results.peers["systems"].items() if each["group"] == STAGES]
    for name in [*names, "ours-stream"]:
        found = results.peers["systems"][name]
        alone = found["levels"]["1"]
        p50 = alone["p50_us"]
        title = "+ the sidecar's wire, and the stub" if name == "ours-stream" else found["title"]
        rows.append(
            [
                title,
                short(p50),
                f"{p50 - before:+,.0f}" if before else "",
                short(alone["client_cpu_us"]),
                short(alone["server_cpu_us"]),
            ]
        )
        before = p50
    return table(["stage", "p50 us", "more", "CPU us: client", "server"], rows)


def physical_table(results: Results) -> str:
    """What can not be left out, and how much more is spent on it."""
    parts = results.peers["physical_us"]
    least = sum(parts.values())
    rows = [[name, short(us)] for name, us in parts.items()]
    rows.append(["**all of it**", f"**{short(least)}**"])
    whole, exchange = results.p50("ours-stream"), results.p50("stage-empty")
    rows += [
        ["an empty exchange in Python's gRPC, in place of the bare socket", short(exchange)],
        [
            "the steps of a decision on a bare stream, beyond it",
            short(results.p50("stage-hold") - exchange),
        ],
        ["the whole, through the stub", short(whole)],
        ["the whole, times all that it can not do without", f"{short(whole / least)} x"],
    ]
    return table(["what", "p50 us"], rows)


def reload_table(results: Results) -> str:
    found = results.reload
    if not found:
        return NOT_MEASURED
    rows = [
        [title, f"{found[name]['calls']:,}", *(f"{found[name][key]:.2f}" for key in _RELOAD_KEYS)]
        for name, title in (
            ("quiet", "no reload under way"),
            ("reload", "while a bundle is taken up"),
        )
    ]
    heads = ["calls", "number", "p50 ms", "p99", "p99.9", "slowest"]
    return table(heads, rows)


_RELOAD_KEYS: Final = ("p50_ms", "p99_ms", "p999_ms", "max_ms")


def throughput_table(results: Results) -> str:
    levels = ["1", "8", "32", "128"]
    rows = []
    for system in results.peers["systems"].values():
        if system["group"] in {OURS, PEERS, FLOOR}:
            row = [system["title"]]
            for level in levels:
                found = system["levels"].get(level)
                row.append(
                    f"{short(found['calls_per_second'])} ({short(found['p50_us'] / 1e3)} ms)"
                    if found
                    else ""
                )
            rows.append(row)
    return table(["calls/s (p50)", *(f"{level} callers" for level in levels)], rows)


def servers_table(results: Results) -> str:
    names = {
        "ours": "ours, durability `process`",
        "ours-power": "ours, durability `power`",
        "cerbos": "Cerbos",
        "cerbos-audit": "Cerbos, decision log to a file",
        "opa": "OPA",
        "opa-log": "OPA, decision log on",
        "agt": "Agent Governance Toolkit, its server",
        "stages": "ours, stage by stage (for this page)",
    }
    found = results.peers["servers"]
    rows = [
        [
            title,
            f"{found[name]['start_seconds'] * 1e3:,.0f} ms",
            megabytes(found[name]["resident_bytes"]),
            f"{found[name]['idle_cores']:.2%}",
        ]
        for name, title in names.items()
        if name in found
    ]
    return table(
        ["server, 1,000 tenants", "start to ready", "resident after the run", "idle, of a core"],
        rows,
    )


def footprint_table(results: Results) -> str:
    found = results.footprint
    if not found:
        return NOT_MEASURED
    rows = []
    for name, start in found["start"].items():
        rest = found["rest"].get(name)
        rows.append(
            [
                f"`{name}`" if "pdp" in name else name,
                f"{start['first_ms']:,.0f} ms",
                f"{start['median_ms']:,.0f} ms",
                f"{rest['ready']['rss']:,.0f} MiB" if rest else "",
                f"{rest['idle_percent']:.2f} %" if rest else "",
            ]
        )
    heads = ["", "first start to ready", "later ones", "resident when ready", "idle, of a core"]
    calls = [
        [name, f"{seen['ready']['rss']:,.0f} MiB", f"{seen['after_calls']['rss']:,.0f} MiB"]
        for name, seen in found["calls"].items()
    ]
    return table(heads, rows) + "\n" + table(["ours", "when ready", "after 1,000 calls"], calls)


def _tables_of(part: Mapping[str, Any]) -> str:
    """Of a part that brings its own."""
    if not part:
        return NOT_MEASURED
    return "\n".join(
        f"**{each['title']}**\n\n{table(each['heads'], each['rows'])}" for each in part["tables"]
    )


TABLES: Final[Mapping[str, Callable[[Results], str]]] = {
    "when": when,
    "targets": targets_table,
    "one": lambda results: _latency(results, 1, FLOOR, OURS, PEERS),
    "inside": lambda results: _latency(results, 1, INSIDE),
    "stages": stages_table,
    "physical": physical_table,
    "throughput": throughput_table,
    "many": lambda results: _latency(results, 128, FLOOR, OURS, PEERS),
    "servers": servers_table,
    "footprint": footprint_table,
    "reload": reload_table,
    "workload": lambda results: _tables_of(results.workload),
    "growth": lambda results: _tables_of(results.growth),
}


def plots(results: Results) -> dict[str, str]:
    """Each plot as SVG, by the name of its file."""
    kinds = {OURS: "ours", PEERS: "peer", FLOOR: "floor"}
    known = results.peers["systems"].values()

    def rows(callers: str, key: str, text: Callable[[Mapping[str, Any]], str]) -> list[Bar]:
        return [
            Bar(
                label=each["title"].replace("`", ""),
                value=each["levels"][callers][key],
                kind=kinds[each["group"]],
                text=text(each["levels"][callers]),
            )
            for each in known
            if each["group"] in kinds and callers in each["levels"]
        ]

    stages = [
        Bar(
            label=each["title"],
            value=each["levels"]["1"]["p50_us"],
            kind="floor" if each["title"].startswith("an empty") else "ours",
            text=short(each["levels"]["1"]["p50_us"]),
        )
        for each in known
        if each["group"] == STAGES
    ]
    return {
        "latency.svg": bars(
            "One caller: p50",
            "us, with p99 behind",
            rows("1", "p50_us", lambda at: f"{short(at['p50_us'])} (p99 {short(at['p99_us'])})"),
        ),
        "throughput.svg": bars(
            "32 callers: throughput",
            "calls/s",
            rows("32", "calls_per_second", lambda at: short(at["calls_per_second"])),
        ),
        "stages.svg": bars("What a decision adds to an empty exchange: p50", "us", stages),
    }


def main() -> None:
    results = read()
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    for name, plot in plots(results).items():
        (RESULTS / name).write_text(plot, encoding="utf-8")


if __name__ == "__main__":
    main()
