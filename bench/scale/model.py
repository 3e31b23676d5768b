"""What a fleet of sidecars asks of everything around it: formulas over what was measured.

Nothing is measured here. ``Inputs`` come from docs/scale.json, which ``make bench-scale``
writes; the tables of docs/scale.md are these functions' results.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pdp.budget.lease_journal import LeaseRecord
from pdp.budget.lease_pool import FIRST_CALLS, Lease, Pool
from pdp.budget.ledger import Account, Charge, Limit, Scope, Window
from pdp.revocation.revocations import LOOK_SECONDS

DAY: Final = 86_400
MONTH: Final = 30 * DAY
GIB: Final = 2**30
_LONG: Final = 40
"""Lengths of a lease in which one that is spent evenly is looked at: the start no longer
shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What was measured on one sidecar by itself."""

    scripts_per_free_call: float
    """Operations on the store for one call that costs nothing, its report included, without
    leases; with leases there are none."""
    scripts_per_charged_call: float
    """The same for a call that costs something."""
    scripts_per_exact_call: float
    """For a charged call that no lease pays for, at a sidecar that leases: it keeps the uses
    of its permits itself."""
    scripts_per_refusal: float
    """For a call that is refused for want of budget."""
    store_cpu_per_script: float
    """Seconds."""
    store_cpu_per_look: float
    """Seconds, for one look at whether something was revoked."""
    store_idle_cpu: float
    """Share of a core of a store that nobody uses."""
    bytes_per_script: float
    """There and back, as are the next two."""
    bytes_per_leased_script: float
    """Where leases are drawn and reported: these are the longer ones."""
    bytes_per_look: float
    cpu_per_call: float
    """Seconds of the sidecar for a call and its report, at two or three calls a second, without
    leases: nothing is warm then."""
    cpu_per_leased_call: float
    cpu_per_busy_call: float
    """At a hundred calls a second."""
    idle_cpu: float
    """Share of a core without any call."""
    audit_bytes_per_free_call: float
    """Of both its records: the decision and the outcome."""
    audit_bytes_per_charged_call: float
    audit_packed: float
    """What gzip leaves of a byte."""
    bundle_bytes: float
    """Of a packed bundle: the rules alone, and more for each tenant."""
    bundle_bytes_per_tenant: float
    memory_bytes: float
    """Resident, of a sidecar that has answered calls: with no tenant, and for each."""
    memory_bytes_per_tenant: float
    start_seconds: float
    connections_at_rest: float
    """Of a sidecar with the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Sidecars and what they are asked."""

    sidecars: int
    tenants_in_bundle: int
    active_tenants: int
    """Tenants that one sidecar works for at the same time."""
    calls_per_second: float
    """Of one sidecar."""
    charged_share: float
    """Of the calls, those that cost something."""
    lease_seconds: int
    """0: nothing is leased."""
    bundle_poll_seconds: float = 60.0
    jwks_poll_seconds: float = 300.0
    issuers: int = 1

    @property
    def pool_rate(self) -> float:
        """Charged calls per second that one sidecar makes for one tenant."""
        return self.calls_per_second * self.charged_share / self.active_tenants


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLoad:
    """Of the shared store, per second."""

    looks: float
    scripts: float
    bytes_moved: float
    cores: float
    """Of one that runs commands one after the other: 1 is all that a server has."""

    @property
    def round_trips(self) -> float:
        return self.looks + self.scripts


def store_load(inputs: Inputs, fleet: Fleet) -> StoreLoad:
    """In the long run, every budget being ample."""
    return _load(inputs, fleet, _scripts_per_second(inputs, fleet) * fleet.sidecars)


def store_load_from_start(inputs: Inputs, fleet: Fleet, seconds: float) -> StoreLoad:
    """On average over the first seconds, before which nobody had a lease."""
    scripts = _scripts_per_second(inputs, fleet, seconds)
    return _load(inputs, fleet, scripts * fleet.sidecars)


def _load(inputs: Inputs, fleet: Fleet, scripts: float) -> StoreLoad:
    looks = fleet.sidecars / LOOK_SECONDS
    each = inputs.bytes_per_leased_script if fleet.lease_seconds else inputs.bytes_per_script
    return StoreLoad(
        looks=looks,
        scripts=scripts,
        bytes_moved=scripts * each + looks * inputs.bytes_per_look,
        cores=inputs.store_idle_cpu
        + scripts * inputs.store_cpu_per_script
        + looks * inputs.store_cpu_per_look,
    )


def _scripts_per_second(inputs: Inputs, fleet: Fleet, seconds: float | None = None) -> float:
    """Of one sidecar."""
    charged = fleet.calls_per_second * fleet.charged_share
    free = fleet.calls_per_second - charged
    if not fleet.lease_seconds:
        return charged * inputs.scripts_per_charged_call + free * inputs.scripts_per_free_call
    each = leased_scripts_per_second(
        fleet.pool_rate,
        fleet.lease_seconds,
        scripts_per_call=inputs.scripts_per_exact_call,
        seconds=seconds,
    )
    return each * fleet.active_tenants


def leased_scripts_per_second(
    rate: float, lease_seconds: int, *, scripts_per_call: float, seconds: float | None = None
) -> float:
    """Operations on the store for one tenant at one sidecar, of ``rate`` charged calls per
    second at random times: to draw leases, to report them, and for calls that no lease
    paid for. The sidecar's own rules say when it leases.

    Over the first ``seconds``, or in the long run.
    """
    begin, end = 0.0, seconds or 0.0
    if seconds is None:
        begin = 2.0 * lease_seconds
        end = begin + max(_LONG * lease_seconds, _LONG * 10 / rate)
    draw = random.Random(1)  # noqa: S311 - the same each time
    # Over a short time, chance counts: many of them are looked at.
    times = 200 if seconds else 3
    total = sum(
        _scripts(rate, lease_seconds, scripts_per_call, begin, end, draw) for _ in range(times)
    )
    return total / times / (end - begin)


def _scripts(
    rate: float,
    lease_seconds: int,
    scripts_per_call: float,
    begin: float,
    end: float,
    draw: random.Random,
) -> float:
    pool = Pool(limits=(_AMPLE,), used_at=0)
    scripts = 0.0
    at = draw.expovariate(rate)

    def count(number: float, when: float) -> None:
        nonlocal scripts
        if begin <= when < end:
            scripts += number

    while at < end:
        lease = pool.lease_for(1, at)
        if lease is not None:
            lease.left -= 1
            want = pool.renewal(at, lease_seconds)
        else:
            count(scripts_per_call, at)
            want = pool.granted if pool.is_missed(at, lease_seconds) else None
        if want is not None:
            size = max(want, FIRST_CALLS)
            pool.leases.append(_lease(size, at + lease_seconds))
            pool.granted = size
            count(1, at)
            count(1, at + lease_seconds)  # its report
        at += draw.expovariate(rate)
    return scripts


def _lease(size: int, until: float) -> Lease:
    record = LeaseRecord(
        name="lease",
        account=_ACCOUNT,
        charge=Charge("tools", "calls", size),
        limits=(_AMPLE,),
        ttl_seconds=1,
        asked_at=0,
    )
    lease = Lease(record=record)
    lease.until, lease.left, lease.retired = until, size, False
    return lease


_ACCOUNT: Final = Account(tenant="tenant", actor="actor", tool="tool")
_AMPLE: Final = Limit(
    id="ample",
    budget="tools",
    unit="calls",
    window=Window.LIFETIME,
    limit=10**12,
    scope=Scope.TENANT,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FanOut:
    """What the fleet asks of the servers that hand out bundles and keys."""

    bundle_requests_per_second: float
    """Answered with 304 while there is nothing new."""
    bundle_bytes: float
    release_bytes: float
    """What a release costs: every sidecar fetches it once."""
    release_seconds: float
    """Within which all have it."""
    jwks_requests_per_second: float

    @property
    def release_bytes_per_second(self) -> float:
        return self.release_bytes / self.release_seconds


def fan_out(inputs: Inputs, fleet: Fleet) -> FanOut:
    bundle_bytes = inputs.bundle_bytes + fleet.tenants_in_bundle * inputs.bundle_bytes_per_tenant
    return FanOut(
        bundle_requests_per_second=fleet.sidecars / fleet.bundle_poll_seconds,
        bundle_bytes=bundle_bytes,
        release_bytes=fleet.sidecars * bundle_bytes,
        release_seconds=LONGEST_POLL * fleet.bundle_poll_seconds,
        jwks_requests_per_second=fleet.sidecars * fleet.issuers / fleet.jwks_poll_seconds,
    )


LONGEST_POLL: Final = 1.1
"""Polls are moved by up to a tenth."""


def audit_bytes_per_day(inputs: Inputs, fleet: Fleet) -> float:
    """Of the whole fleet, unpacked."""
    charged = fleet.charged_share * inputs.audit_bytes_per_charged_call
    free = (1 - fleet.charged_share) * inputs.audit_bytes_per_free_call
    return fleet.sidecars * fleet.calls_per_second * (charged + free) * DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What one sidecar uses."""

    memory_bytes: float
    cores: float


def pod(inputs: Inputs, fleet: Fleet) -> Pod:
    per_call = inputs.cpu_per_leased_call if fleet.lease_seconds else inputs.cpu_per_call
    return Pod(
        memory_bytes=memory_bytes(inputs, fleet.tenants_in_bundle),
        cores=inputs.idle_cpu + fleet.calls_per_second * per_call,
    )


def memory_bytes(inputs: Inputs, tenants: int) -> float:
    return inputs.memory_bytes + tenants * inputs.memory_bytes_per_tenant


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Assumptions, in US dollars: put your own in."""

    core_month: float = 25.0
    gib_month: float = 3.5
    gigabyte_between_zones: float = 0.02
    """Both directions together."""
    gigabyte_stored_month: float = 0.023
    wire_bytes_per_call: float = 5_000
    """Question, answer and report, with token and permit, as they cross a network."""
    between_zones_share: float = 2 / 3
    """Of the calls, those that find a central service in another of three zones."""
    busy_share: float = 0.5
    """How much of its cores a central service uses on average."""
    central_replicas: int = 6
    """At least: two in each of three zones."""
    store_cores_used: float = 0.5
    """How full the core of a store's server may be."""
    store_server_month: float = 250.0
    """One server of the store with a replica."""
    audit_days: int = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Dollars per month."""

    cores: float
    memory: float
    network: float
    store: float
    audit: float

    @property
    def total(self) -> float:
        return self.cores + self.memory + self.network + self.store + self.audit


def sidecar_cost(inputs: Inputs, fleet: Fleet, prices: Prices) -> Cost:
    """A sidecar in every pod: its calls cross no network, the store's and the bundles do."""
    each, load = pod(inputs, fleet), store_load(inputs, fleet)
    crossing = load.bytes_moved * MONTH * prices.between_zones_share
    return Cost(
        cores=fleet.sidecars * each.cores * prices.core_month,
        memory=fleet.sidecars * each.memory_bytes / GIB * prices.gib_month,
        network=crossing / 1e9 * prices.gigabyte_between_zones,
        store=_store_cost(load.cores, prices),
        audit=_audit_cost(inputs, fleet, prices),
    )


def central_cost(inputs: Inputs, fleet: Fleet, prices: Prices) -> Cost:
    """The same server as a service that every runtime asks over the network."""
    calls = fleet.sidecars * fleet.calls_per_second
    cores = calls * inputs.cpu_per_busy_call / prices.busy_share
    replicas = max(prices.central_replicas, cores)  # one core each, as Python uses it
    central = _as_central(fleet, replicas)
    load = store_load(inputs, central)
    crossing = (calls * prices.wire_bytes_per_call + load.bytes_moved) * prices.between_zones_share
    return Cost(
        cores=replicas * prices.core_month,
        memory=replicas * memory_bytes(inputs, fleet.tenants_in_bundle) / GIB * prices.gib_month,
        network=crossing * MONTH / 1e9 * prices.gigabyte_between_zones,
        store=_store_cost(load.cores, prices),
        audit=_audit_cost(inputs, fleet, prices),
    )


def _as_central(fleet: Fleet, replicas: float) -> Fleet:
    """The same calls, come together at few servers, which each see far more tenants."""
    number = round(replicas)
    together = fleet.sidecars / number
    return Fleet(
        sidecars=number,
        tenants_in_bundle=fleet.tenants_in_bundle,
        active_tenants=round(fleet.active_tenants * together),
        calls_per_second=fleet.calls_per_second * together,
        charged_share=fleet.charged_share,
        lease_seconds=fleet.lease_seconds,
    )


def _store_cost(cores: float, prices: Prices) -> float:
    servers = max(1.0, cores / prices.store_cores_used)
    return -(-servers // 1) * prices.store_server_month


def _audit_cost(inputs: Inputs, fleet: Fleet, prices: Prices) -> float:
    kept = audit_bytes_per_day(inputs, fleet) * inputs.audit_packed * prices.audit_days
    return kept / 1e9 * prices.gigabyte_stored_month


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(at zero, per unit) of the line through points, least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    rise = sum((x - mean_x) * (y - mean_y) for x, y in points)
    per_unit = rise / sum((x - mean_x) ** 2 for x, _ in points)
    return mean_y - per_unit * mean_x, per_unit
