"""Measure one sidecar by itself, for the model, and a fleet, to hold the model against."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from bench.scale.bundles import ROLE, SCOPES, bundle_of, tenant_id
from bench.scale.counters import Store, read_audit, read_store
from bench.scale.crowd import Crowd
from bench.scale.fleet import Fleet, Setting
from bench.scale.model import Inputs, slope
from bench.scale.origin import BUNDLE, JWKS, Origin
from bench.scale.stubs import Job, Seat, Tally
from pdp.budget.ledger import Account, Charge, IdempotencyKey, Limit, Scope, Window
from pdp.budget.redis_ledger import RedisLedger
from pdp.config import RedisSettings
from pdp.redis_store import open_redis
from pdp.revocation.redis import RedisRevocations
from pdp.testing import TokenIssuer
from tests.budget.redis_server import RedisServer

LEASE_SECONDS: Final = 30
MEMORY_AT: Final = (20, 1_000, 10_000)
"""Tenants in the bundle."""
_FOLLOW_SECONDS: Final = 60.0
"""Between polls where nothing is to be seen of them."""

Show = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What was used while calls were made."""

    seconds: float
    calls: int
    store: Store
    cpu_seconds: float
    """Of all sidecars."""
    audit_bytes: int
    """That they put on record."""


class _Meter:
    """Reads every counter now, and says later what came between."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._store = read_store(fleet.store)
        self._processes = fleet.processes()
        self._audit_bytes = fleet.audit_bytes()
        self._begun_at = time.monotonic()

    def read(self, calls: int = 0) -> Traffic:
        seconds = time.monotonic() - self._begun_at
        both = zip(self._processes, self._fleet.processes(), strict=True)
        return Traffic(
            seconds=seconds,
            calls=calls,
            store=read_store(self._fleet.store).since(self._store),
            cpu_seconds=sum(now.cpu_seconds - then.cpu_seconds for then, now in both),
            audit_bytes=self._fleet.audit_bytes() - self._audit_bytes,
        )


def traffic(fleet: Fleet, crowd: Crowd) -> tuple[Traffic, Tally]:
    meter = _Meter(fleet)
    tally = crowd.work()
    return meter.read(sum(tally.executed.values()) + sum(tally.refused.values())), tally


def idle(fleet: Fleet, seconds: float) -> Traffic:
    meter = _Meter(fleet)
    time.sleep(seconds)
    return meter.read()


def seats(fleet: Fleet, issuer: TokenIssuer, *, stubs: int, tenants: int) -> list[Seat]:
    """Each sidecar has as many stubs as any other, and each tenant stubs at several."""
    sidecars = len(fleet.sidecars)
    return [
        Seat(
            target=fleet.sidecars[number % sidecars].target,
            # Two stubs of a tenant at a sidecar, and each tenant at several sidecars.
            tenant=tenant_id(_tenant_of(number, sidecars, tenants)),
            token=issuer.token(
                tenant_id(_tenant_of(number, sidecars, tenants)),
                f"user-{number}",
                roles=[ROLE],
                scopes=SCOPES,
                lifetime_seconds=3_600,
            ),
        )
        for number in range(stubs)
    ]


def _tenant_of(number: int, sidecars: int, tenants: int) -> int:
    sidecar, turn = number % sidecars, number // sidecars
    return (sidecar + turn // 2 * 7) % tenants


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Calls to measure by themselves."""

    rate: float
    """Per second."""
    charged_share: float
    tenant: int = 0
    longer: int = 1
    """How many times as long it takes to see enough of them."""


BROKE: Final = 1
"""The number of a tenant that can spend nothing."""
FREE, CHARGED = Kind(rate=20, charged_share=0), Kind(rate=20, charged_share=1)
NEARLY_BROKE: Final = 2
"""One that can spend so little that nothing is leased."""
EXACT: Final = Kind(rate=5, charged_share=1, tenant=NEARLY_BROKE)
REFUSED: Final = Kind(rate=20, charged_share=1, tenant=BROKE)
SPARSE: Final = Kind(rate=2.4, charged_share=0.5, longer=3)
"""As in a fleet."""
BUSY: Final = Kind(rate=100, charged_share=0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """What one sidecar uses by itself."""

    idle: Traffic
    traffic: Mapping[Kind, Traffic]
    audit_bytes: Mapping[str, float]
    """Of a record, by action and outcome."""
    audit_packed: float
    start_seconds: float


def alone(folder: Path, kinds: Sequence[Kind], *, lease_seconds: int, seconds: float) -> Alone:
    """Measure it, each kind of call for so long."""
    issuer = TokenIssuer()
    with Origin() as origin:
        origin.put(BUNDLE, bundle_of(MEMORY_AT[0], limits={BROKE: 0, NEARLY_BROKE: 60}))
        with Fleet(folder, _one_sidecar(lease_seconds), origin, issuer) as fleet:
            quiet = idle(fleet, seconds)
            found = {kind: _measure(fleet, kind, issuer, seconds) for kind in kinds}
            fleet.stop()
            (state,) = (sidecar.state for sidecar in fleet.sidecars)
            content = b"".join(file.read_bytes() for file in (state / "audit").glob("*.jsonl"))
            return Alone(
                idle=quiet,
                traffic=found,
                audit_bytes={
                    kind: each.size_bytes / each.number for kind, each in read_audit(state).items()
                },
                audit_packed=len(gzip.compress(content)) / len(content),
                start_seconds=fleet.start_seconds[0],
            )


def _one_sidecar(lease_seconds: int = 0) -> Setting:
    return Setting(
        sidecars=1,
        lease_seconds=lease_seconds,
        bundle_poll_seconds=_FOLLOW_SECONDS,
        jwks_poll_seconds=_FOLLOW_SECONDS,
    )


def _measure(fleet: Fleet, kind: Kind, issuer: TokenIssuer, seconds: float) -> Traffic:
    tenant = tenant_id(kind.tenant)
    token = issuer.token(tenant, "user", roles=[ROLE], scopes=SCOPES)
    seat = Seat(target=fleet.sidecars[0].target, tenant=tenant, token=token)
    stubs = max(4, int(kind.rate / 5))  # that none is still busy when its next call is due
    job = Job(
        seats=[seat] * stubs,
        calls_per_second=kind.rate / stubs,
        charged_share=kind.charged_share,
        seconds=seconds * kind.longer,
        seed=1,
    )
    with Crowd(job, processes=1) as crowd:
        found, _ = traffic(fleet, crowd)
        crowd.leave()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCost:
    """Seconds of the store's processor, under load: an operation is dearer at a store that
    has little to do."""

    per_look: float
    per_script: float
    idle: float
    """Share of a core, with nobody connected."""


def store_cost(folder: Path, operations: int) -> StoreCost:
    """Measure it by as many looks, and holds that are settled, one after the other."""
    limits = tuple(
        Limit(id=name, budget="tools", unit="calls", window=window, limit=10**9, scope=Scope.TENANT)
        for name, window in (("calls-ever", Window.LIFETIME), ("calls-per-day", Window.DAY))
    )
    account = Account(tenant="tenant", actor="actor", tool="tool")

    async def charge(ledger: RedisLedger, number: int) -> None:
        key = IdempotencyKey(operation="reserve", key=str(number), content_sha256="0" * 64)
        charges = (Charge("tools", "calls", 1),)
        hold = await ledger.reserve(account, key, charges=charges, limits=limits, ttl_seconds=60)
        settled = replace(key, operation="settle")
        await ledger.settle(account, settled, hold_id=hold.id, charges=None)

    async def measure() -> StoreCost:
        await asyncio.sleep(_REST_SECONDS)
        times = [read_store(server).cpu_seconds]
        store = await open_redis(RedisSettings(unix=server.socket))
        ledger, revocations = RedisLedger(store), RedisRevocations(store)
        try:
            times.append(read_store(server).cpu_seconds)
            for _ in range(operations):
                await revocations.version()
            times.append(read_store(server).cpu_seconds)
            for number in range(operations):
                await charge(ledger, number)
            times.append(read_store(server).cpu_seconds)
        finally:
            await ledger.close()
        looks, scripts = times[2] - times[1], times[3] - times[2]
        return StoreCost(
            per_look=looks / operations,
            per_script=scripts / operations / 2,
            idle=(times[0] - begun_with) / _REST_SECONDS,
        )

    server = RedisServer(folder).start()
    try:
        begun_with = read_store(server).cpu_seconds
        return asyncio.run(measure())
    finally:
        server.stop()


_REST_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of one sidecar, by the number of tenants in its bundle."""

    tenants: int
    bundle_bytes: int
    rss_bytes: int
    start_seconds: float


def size(folder: Path, tenants: int) -> Size:
    """After it has answered calls."""
    issuer = TokenIssuer()
    bundle = bundle_of(tenants)
    with Origin() as origin:
        origin.put(BUNDLE, bundle)
        with Fleet(folder, _one_sidecar(), origin, issuer) as fleet:
            _measure(fleet, FREE, issuer, seconds=3.0)
            (process,) = fleet.processes()
            return Size(
                tenants=tenants,
                bundle_bytes=len(bundle),
                rss_bytes=process.rss_bytes,
                start_seconds=fleet.start_seconds[0],
            )


def inputs_of(plain: Alone, leased: Alone, sizes: Sequence[Size], store: StoreCost) -> Inputs:
    """What the model goes by."""

    def per_call(found: Traffic) -> float:
        return found.store.scripts / found.calls

    def cpu(found: Traffic, quiet: Traffic) -> float:
        return (found.cpu_seconds / found.seconds - _share(quiet)) * found.seconds / found.calls

    looks = plain.idle.store
    look_bytes = looks.moved_bytes / looks.looks

    def script_bytes(found: Traffic) -> float:
        return (found.store.moved_bytes - found.store.looks * look_bytes) / found.store.scripts

    bundle, bundle_per_tenant = slope([(each.tenants, each.bundle_bytes) for each in sizes])
    memory, memory_per_tenant = slope([(each.tenants, each.rss_bytes) for each in sizes])
    sizes_of = plain.audit_bytes
    return Inputs(
        scripts_per_free_call=per_call(plain.traffic[FREE]),
        scripts_per_charged_call=per_call(plain.traffic[CHARGED]),
        scripts_per_exact_call=per_call(leased.traffic[EXACT]),
        scripts_per_refusal=per_call(plain.traffic[REFUSED]),
        store_cpu_per_script=store.per_script,
        store_cpu_per_look=store.per_look,
        store_idle_cpu=store.idle,
        bytes_per_script=script_bytes(plain.traffic[BUSY]),
        bytes_per_leased_script=script_bytes(leased.traffic[SPARSE]),
        bytes_per_look=look_bytes,
        cpu_per_call=cpu(plain.traffic[SPARSE], plain.idle),
        cpu_per_leased_call=cpu(leased.traffic[SPARSE], leased.idle),
        cpu_per_busy_call=cpu(plain.traffic[BUSY], plain.idle),
        idle_cpu=_share(plain.idle),
        audit_bytes_per_free_call=sizes_of["orders.read allowed"]
        + sizes_of["orders.read executed"],
        audit_bytes_per_charged_call=sizes_of["orders.update allowed"]
        + sizes_of["orders.update executed"],
        audit_packed=plain.audit_packed,
        bundle_bytes=bundle,
        bundle_bytes_per_tenant=bundle_per_tenant,
        memory_bytes=memory,
        memory_bytes_per_tenant=memory_per_tenant,
        start_seconds=plain.start_seconds,
        connections_at_rest=plain.idle.store.connections,
    )


def _share(quiet: Traffic) -> float:
    return quiet.cpu_seconds / quiet.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run of a fleet."""

    sidecars: int
    stubs: int
    tenants: int
    tight_tenants: int
    """Of these, some that run out of budget on the way."""
    tight_limit: int
    lease_seconds: int
    calls_per_second: float
    """Of the whole fleet."""
    charged_share: float = 0.5
    seconds: float
    idle_seconds: float
    bundle_poll_seconds: float
    jwks_poll_seconds: float
    processes: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Polled:
    """Requests of a fleet for one document while nothing changed."""

    requests_per_second: float
    not_modified: int
    whole: int
    shortest_seconds: float
    """Between two of one sidecar."""
    longest_seconds: float
    most_in_a_second: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a fleet used, and what went wrong."""

    plan: Plan
    start_seconds: float
    """Median of the sidecars, several of which start at the same time."""
    idle: Traffic
    traffic: Traffic
    executed: Mapping[str, int]
    refused: Mapping[str, int]
    late: int
    rss_bytes: float
    """Of a sidecar, on average, after the calls."""
    pss_bytes: float
    bundle: Polled
    jwks: Polled
    release_seconds: float
    """From a new bundle's release until every sidecar had fetched it."""
    release_bytes: int
    faults: Sequence[str]
    """Empty where nothing was overspent, and nobody was served as somebody else."""


def run(folder: Path, plan: Plan, show: Show) -> Ran:
    """Have a fleet start, rest, work, follow a release, and stop; and check its budgets."""
    issuer = TokenIssuer()
    setting = Setting(
        sidecars=plan.sidecars,
        lease_seconds=plan.lease_seconds,
        bundle_poll_seconds=plan.bundle_poll_seconds,
        jwks_poll_seconds=plan.jwks_poll_seconds,
    )
    limits = dict.fromkeys(range(plan.tight_tenants), plan.tight_limit)
    with Origin() as origin:
        origin.put(BUNDLE, bundle_of(plan.tenants, limits=limits))
        show(f"starting {plan.sidecars} sidecars, leases of {plan.lease_seconds} s")
        with Fleet(folder, setting, origin, issuer) as fleet:
            job = Job(
                seats=seats(fleet, issuer, stubs=plan.stubs, tenants=plan.tenants),
                calls_per_second=plan.calls_per_second / plan.stubs,
                charged_share=plan.charged_share,
                seconds=plan.seconds,
                seed=1,
            )
            show(f"connecting {plan.stubs} stubs")
            with Crowd(job, processes=plan.processes) as crowd:
                begun_at = time.monotonic()
                show("resting")
                quiet = idle(fleet, plan.idle_seconds)
                show(f"{plan.calls_per_second:.0f} calls a second for {plan.seconds:.0f} s")
                found, tally = traffic(fleet, crowd)
                processes = fleet.processes()
                polled = {
                    path: _polled(origin, path, begun_at, time.monotonic())
                    for path in (BUNDLE, JWKS)
                }
                show("releasing a bundle")
                release_seconds, release_bytes = _release(fleet, plan, limits)
                crowd.leave()
            show("stopping")
            fleet.stop()
            return Ran(
                plan=plan,
                start_seconds=statistics.median(fleet.start_seconds),
                idle=quiet,
                traffic=found,
                executed=dict(tally.executed),
                refused=dict(tally.refused),
                late=tally.late,
                rss_bytes=statistics.mean(each.rss_bytes for each in processes),
                pss_bytes=statistics.mean(each.pss_bytes for each in processes),
                bundle=polled[BUNDLE],
                jwks=polled[JWKS],
                release_seconds=release_seconds,
                release_bytes=release_bytes,
                faults=faults(tally, spent_at(fleet.store, plan.tenants), limits),
            )


def _polled(origin: Origin, path: str, begin: float, end: float) -> Polled:
    found = [each for each in origin.requests if each.path == path and begin <= each.at < end]
    times: dict[str, list[float]] = {}
    for each in found:
        times.setdefault(each.sidecar, []).append(each.at)
    between = [b - a for own in times.values() for a, b in itertools.pairwise(own)]
    by_second = statistics.multimode(int(each.at) for each in found)
    return Polled(
        requests_per_second=len(found) / (end - begin),
        not_modified=sum(each.sent_bytes == 0 for each in found),
        whole=sum(each.sent_bytes > 0 for each in found),
        shortest_seconds=min(between, default=0.0),
        longest_seconds=max(between, default=0.0),
        most_in_a_second=sum(int(each.at) == by_second[0] for each in found) if found else 0,
    )


def _release(fleet: Fleet, plan: Plan, limits: Mapping[int, int]) -> tuple[float, int]:
    """Until every sidecar has fetched a new bundle, and what that took of the origin."""
    origin = fleet.origin
    bundle = bundle_of(plan.tenants, limits=limits, release=2)
    released_at = time.monotonic()
    origin.put(BUNDLE, bundle)
    deadline = released_at + 3 * plan.bundle_poll_seconds + 30
    while True:
        found = [
            each
            for each in origin.requests
            if each.path == BUNDLE and each.at >= released_at and each.sent_bytes
        ]
        if len({each.sidecar for each in found}) == plan.sidecars:
            return max(each.at for each in found) - released_at, sum(e.sent_bytes for e in found)
        assert time.monotonic() < deadline, "not every sidecar has fetched the release"
        time.sleep(0.1)


def spent_at(server: RedisServer, tenants: int) -> dict[str, tuple[int, int]]:
    """(spent, held) under the limit that never ends, as the store has it, by tenant."""

    async def read() -> dict[str, tuple[int, int]]:
        ledger = RedisLedger(await open_redis(RedisSettings(unix=server.socket)))
        try:
            return {
                tenant: (state.spent, state.held)
                for tenant in map(tenant_id, range(tenants))
                for state in await ledger.accounts(tenant, most=10)
                if state.limit.id == "calls-ever"
            }
        finally:
            await ledger.close()

    return asyncio.run(read())


def faults(
    tally: Tally, store: Mapping[str, tuple[int, int]], limits: Mapping[int, int]
) -> list[str]:
    """What may not be: in words, empty where all is well."""
    found = [f"{tally.strays} calls ran for another tenant"] if tally.strays else []
    found += [
        f"{number} calls were refused with {code}"
        for code, number in tally.refused.items()
        if code != "tenant_budget_exceeded"
    ]
    for tenant in tally.spent.keys() | store.keys():
        spent, held = store.get(tenant, (0, 0))
        if (spent, held) != (tally.spent[tenant], 0):
            found.append(
                f"{tenant} spent {tally.spent[tenant]}, and the store has {spent} and holds {held}"
            )
    for number, limit in limits.items():
        spent = tally.spent[tenant_id(number)]
        if spent > limit:
            found.append(f"{tenant_id(number)} spent {spent} of {limit}")
    return sorted(found)
