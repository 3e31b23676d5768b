"""The tables of docs/scale.md, from docs/scale.json and the model.

Run: python -m bench.scale.page   (writes the page anew)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from bench.scale import model
from bench.scale.model import DAY, Fleet, Inputs, Prices

DOCS: Final = Path(__file__).parents[2] / "docs"
PAGE: Final = DOCS / "scale.md"
RESULTS: Final = DOCS / "scale.json"

LARGE: Final = Fleet(
    sidecars=10_000,
    tenants_in_bundle=1_000,
    active_tenants=10,
    calls_per_second=2.0,
    charged_share=0.5,
    lease_seconds=30,
)
"""100,000 tenants in shares of 1,000, each share on 100 sidecars."""
PRICES: Final = Prices()

_BLOCK: Final = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Results:
    """What docs/scale.json holds."""

    inputs: Inputs
    whole: Mapping[str, Any]


def read(path: Path = RESULTS) -> Results:
    whole = json.loads(path.read_text(encoding="utf-8"))
    return Results(Inputs(**whole["inputs"]), whole)


def rendered(text: str, results: Results) -> str:
    """The page with its tables as the model gives them now."""
    return _BLOCK.sub(lambda block: block[1] + TABLES[block[2]](results) + block[3], text)


def shown(text: str) -> list[str]:
    """Names of the tables on a page."""
    return [block[2] for block in _BLOCK.finditer(text)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def short(value: float) -> str:
    """Three digits that count."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def size(value: float) -> str:
    """Bytes, in powers of 1,000."""
    for factor, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{short(value / factor)} {unit}"
    return f"{short(value)} B"


def dollars(value: float) -> str:
    return f"{value:,.0f}"


_OF_INPUTS: Final[Mapping[str, tuple[str, Callable[[float], str]]]] = {
    "scripts_per_free_call": ("operations on the store for a call that costs nothing", short),
    "scripts_per_charged_call": ("the same for one that costs something", short),
    "scripts_per_exact_call": ("the same at a sidecar that leases, for want of a lease", short),
    "scripts_per_refusal": ("the same for one that is refused for want of budget", short),
    "bytes_per_script": ("bytes of an operation, there and back", size),
    "bytes_per_leased_script": ("the same where leases are drawn and reported", size),
    "bytes_per_look": ("bytes of a look at whether something was revoked", size),
    "store_cpu_per_script": ("the store's time for an operation", lambda s: f"{short(s * 1e6)} us"),
    "store_cpu_per_look": ("the store's time for a look", lambda s: f"{short(s * 1e6)} us"),
    "store_idle_cpu": ("share of a core of a store that nobody uses", short),
    "connections_at_rest": ("connections of a sidecar that rests", short),
    "cpu_per_call": (
        "the sidecar's time for a call and its report, at 2.4 calls/s",
        lambda s: f"{short(s * 1e3)} ms",
    ),
    "cpu_per_leased_call": ("the same with leases", lambda s: f"{short(s * 1e3)} ms"),
    "cpu_per_busy_call": ("the same at 100 calls/s", lambda s: f"{short(s * 1e3)} ms"),
    "idle_cpu": ("share of a core of a sidecar that rests", short),
    "audit_bytes_per_free_call": ("audit of a call that costs nothing", size),
    "audit_bytes_per_charged_call": ("audit of one that costs something", size),
    "audit_packed": ("what gzip leaves of it", short),
    "bundle_bytes": ("a packed bundle without tenants", size),
    "bundle_bytes_per_tenant": ("and for each tenant", size),
    "memory_bytes": ("resident memory of a sidecar without tenants", size),
    "memory_bytes_per_tenant": ("and for each tenant in its bundle", size),
    "start_seconds": ("from start until ready", lambda s: f"{short(s)} s"),
}


def when(results: Results) -> str:
    """No table, but what every table depends on."""
    whole = results.whole
    return f"Measured on {whole['measured_on']}, on one machine: {whole['machine']}.\n"


def how(results: Results) -> str:
    """What the fleet was told to do."""
    plan = results.whole["runs"][0]["plan"]
    return (
        f"{plan['sidecars']} sidecars (`pdp serve`); {plan['stubs']} stubs (`AsyncGuard`), each with"
        f" a connection of its own, in {plan['processes']} processes; one Redis. In all"
        f" {plan['calls_per_second']} calls a second for {plan['seconds']} s,"
        f" {plan['charged_share']:.0%} of them charged. {plan['tenants']} tenants, each at several"
        f" sidecars; {plan['tight_tenants']} of them run out of budget on the way, at"
        f" {plan['tight_limit']} units. Bundles are looked at every {plan['bundle_poll_seconds']} s,"
        f" keys every {plan['jwks_poll_seconds']} s, so that there is something to count.\n"
    )


def inputs_table(results: Results) -> str:
    rows = []
    for field in fields(Inputs):
        meaning, show = _OF_INPUTS[field.name]
        rows.append([f"`{field.name}`", meaning, show(getattr(results.inputs, field.name))])
    return table(["input", "what it is", "measured"], rows)


def store_table(results: Results) -> str:
    rows = []
    for name, fleet in (
        ("no leases", replace(LARGE, lease_seconds=0)),
        *(
            (f"leases, {tenants} active tenants each", replace(LARGE, active_tenants=tenants))
            for tenants in (1, 3, 10, 30)
        ),
    ):
        load = model.store_load(results.inputs, fleet)
        rows.append(
            [
                name,
                short(fleet.pool_rate * fleet.lease_seconds) if fleet.lease_seconds else "",
                short(load.looks),
                short(load.scripts),
                size(load.bytes_moved) + "/s",
                short(load.cores),
                str(math.ceil(load.cores / PRICES.store_cores_used)),
            ]
        )
    heads = [
        "",
        "charged calls of a tenant at a sidecar in 30 s",
        "looks/s",
        "operations/s",
        "traffic",
        "cores of the store",
        "servers, half full",
    ]
    return table(heads, rows)


def fan_out_table(results: Results) -> str:
    rows = []
    for tenants in (100, 1_000, 10_000):
        found = model.fan_out(results.inputs, replace(LARGE, tenants_in_bundle=tenants))
        rows.append(
            [
                f"{tenants:,}",
                size(found.bundle_bytes),
                short(found.bundle_requests_per_second),
                size(found.release_bytes),
                f"{short(found.release_seconds)} s",
                size(found.release_bytes_per_second) + "/s",
                short(found.jwks_requests_per_second),
            ]
        )
    heads = [
        "tenants in the bundle",
        "packed",
        "bundle requests/s (304)",
        "a release moves",
        "all have it within",
        "meanwhile",
        "JWKS requests/s",
    ]
    return table(heads, rows)


def audit_table(results: Results) -> str:
    kinds = {
        "orders.read allowed": "decision, costs nothing",
        "orders.read executed": "its outcome",
        "orders.update allowed": "decision, costs something",
        "orders.update executed": "its outcome",
        "orders.update denied": "refusal for want of budget",
    }
    sizes = results.whole["audit_bytes"]
    rows = [[meaning, f"{sizes[kind]} B"] for kind, meaning in kinds.items()]
    day = model.audit_bytes_per_day(results.inputs, LARGE)
    rows += [
        ["the fleet of 10,000, a day", size(day)],
        ["the same, packed", size(day * results.inputs.audit_packed)],
        ["one sidecar, a day", size(day / LARGE.sidecars)],
    ]
    return table(["record", "bytes"], rows)


def pod_table(results: Results) -> str:
    rows = []
    for each in results.whole["sizes"]:
        expected = model.memory_bytes(results.inputs, each["tenants"])
        rows.append(
            [
                f"{each['tenants']:,}",
                size(each["bundle_bytes"]),
                size(each["rss_bytes"]),
                size(expected),
                f"{short(each['start_seconds'])} s",
            ]
        )
    heads = ["tenants in the bundle", "packed", "resident", "by the line", "ready after"]
    return table(heads, rows)


def cpu_table(results: Results) -> str:
    rows = []
    for rate in (0.0, 0.1, 2.0, 10.0):
        fleet = replace(LARGE, calls_per_second=rate, lease_seconds=0)
        cores = model.pod(results.inputs, fleet).cores
        rows.append([short(rate), f"{short(cores * 1000)}m", short(cores * fleet.sidecars)])
    return table(["calls/s of a sidecar", "CPU of a sidecar", "cores of 10,000"], rows)


def cost_table(results: Results) -> str:
    rows = []
    for rate in (0.1, 2.0):
        fleet = replace(LARGE, calls_per_second=rate)
        for name, cost in (
            ("beside every agent", model.sidecar_cost(results.inputs, fleet, PRICES)),
            ("central service", model.central_cost(results.inputs, fleet, PRICES)),
        ):
            parts = [cost.cores, cost.memory, cost.network, cost.store, cost.audit, cost.total]
            rows.append([f"{name}, {short(rate)} calls/s each", *map(dollars, parts)])
    heads = ["10,000 agents", "CPU", "memory", "network", "store", "audit", "USD a month"]
    return table(heads, rows)


def prices_table(_results: Results) -> str:
    rows = [[f"`{each.name}`", f"{getattr(PRICES, each.name):.4g}"] for each in fields(Prices)]
    return table(["assumption", "value"], rows)


def measured_table(results: Results) -> str:
    rows: list[list[str]] = []
    for run in results.whole["runs"]:
        leases = f"{run['plan']['lease_seconds']} s" if run["plan"]["lease_seconds"] else "none"
        for name, measured, expected, show in compared(results.inputs, run):
            error = f"{(expected - measured) / measured:+.0%}" if measured else ""
            rows.append([leases, name, show(measured), show(expected), error])
        calls, connections = run["traffic"], run["traffic"]["store"]["connections"]
        rows += [
            [leases, "connections after the calls", str(connections), "", ""],
            [leases, "calls", str(calls["calls"]), "", ""],
            [
                leases,
                "of these refused for want of budget",
                str(sum(run["refused"].values())),
                "",
                "",
            ],
            [leases, "overspent, lost, or another tenant's", str(len(run["faults"])), "", ""],
        ]
    heads = ["leases", "50 sidecars, 500 stubs", "measured", "model", "model's error"]
    return table(heads, rows)


Row = tuple[str, float, float, Callable[[float], str]]


def compared(inputs: Inputs, run: Mapping[str, Any]) -> list[Row]:
    """What a run measured beside what the model says of one like it."""
    plan, calls, quiet = run["plan"], run["traffic"], run["idle"]
    made = sum(run["executed"].values())
    refused = sum(run["refused"].values())
    charged = run["executed"]["orders.update"]
    fleet = Fleet(
        sidecars=plan["sidecars"],
        tenants_in_bundle=plan["tenants"],
        active_tenants=plan["stubs"] // plan["sidecars"] // 2,
        calls_per_second=made / calls["seconds"] / plan["sidecars"],
        charged_share=charged / made,
        lease_seconds=plan["lease_seconds"],
        bundle_poll_seconds=plan["bundle_poll_seconds"],
        jwks_poll_seconds=plan["jwks_poll_seconds"],
    )
    load = model.store_load_from_start(inputs, fleet, calls["seconds"])
    refusals = refused * inputs.scripts_per_refusal / calls["seconds"]
    fan_out, pod = model.fan_out(inputs, fleet), model.pod(inputs, fleet)
    seconds, store = calls["seconds"], calls["store"]
    moved = store["received_bytes"] + store["sent_bytes"]
    each = inputs.bytes_per_leased_script if plan["lease_seconds"] else inputs.bytes_per_script
    audit = model.audit_bytes_per_day(inputs, fleet) / DAY * seconds
    return [
        ("looks at the store, per s", store["looks"] / seconds, load.looks, short),
        (
            "operations on the store, per s",
            store["scripts"] / seconds,
            load.scripts + refusals,
            short,
        ),
        (
            "traffic of the store, per s",
            moved / seconds,
            load.bytes_moved + refusals * each,
            size,
        ),
        ("the store's cores", store["cpu_seconds"] / seconds, load.cores, short),
        (
            "connections at rest",
            quiet["store"]["connections"],
            plan["sidecars"] * inputs.connections_at_rest,
            short,
        ),
        (
            "looks at rest, per s",
            quiet["store"]["looks"] / quiet["seconds"],
            load.looks,
            short,
        ),
        (
            "a sidecar's CPU at rest",
            quiet["cpu_seconds"] / quiet["seconds"] / plan["sidecars"],
            inputs.idle_cpu,
            short,
        ),
        (
            "a sidecar's CPU with calls",
            calls["cpu_seconds"] / seconds / plan["sidecars"],
            pod.cores,
            short,
        ),
        ("a sidecar's resident memory", run["rss_bytes"], pod.memory_bytes, size),
        ("audit of the calls", calls["audit_bytes"], audit, size),
        (
            "bundle requests, per s",
            run["bundle"]["requests_per_second"],
            fan_out.bundle_requests_per_second,
            short,
        ),
        (
            "JWKS requests, per s",
            run["jwks"]["requests_per_second"],
            fan_out.jwks_requests_per_second,
            short,
        ),
        ("bytes of a release", run["release_bytes"], fan_out.release_bytes, size),
        ("seconds until all have it", run["release_seconds"], fan_out.release_seconds, short),
    ]


TABLES: Final[Mapping[str, Callable[[Results], str]]] = {
    "when": when,
    "how": how,
    "inputs": inputs_table,
    "store": store_table,
    "fan-out": fan_out_table,
    "audit": audit_table,
    "pod": pod_table,
    "cpu": cpu_table,
    "cost": cost_table,
    "prices": prices_table,
    "measured": measured_table,
}


def main() -> None:
    PAGE.write_text(rendered(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


if __name__ == "__main__":
    main()
