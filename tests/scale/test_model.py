"""The model of a large fleet, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.scale import model
from bench.scale.model import DAY, GIB, MONTH, Fleet, Inputs, Prices

INPUTS = Inputs(
    scripts_per_free_call=2,
    scripts_per_charged_call=3,
    scripts_per_exact_call=2,
    scripts_per_refusal=1,
    store_cpu_per_script=0.0001,
    store_cpu_per_look=0.00001,
    store_idle_cpu=0.002,
    bytes_per_script=1_000,
    bytes_per_leased_script=1_500,
    bytes_per_look=60,
    cpu_per_call=0.002,
    cpu_per_leased_call=0.001,
    cpu_per_busy_call=0.0005,
    idle_cpu=0.004,
    audit_bytes_per_free_call=1_000,
    audit_bytes_per_charged_call=1_400,
    audit_packed=0.2,
    bundle_bytes=100_000,
    bundle_bytes_per_tenant=100,
    memory_bytes=GIB / 8,
    memory_bytes_per_tenant=20_000,
    start_seconds=1,
    connections_at_rest=1,
)
FLEET = Fleet(
    sidecars=1_000,
    tenants_in_bundle=1_000,
    active_tenants=10,
    calls_per_second=2.0,
    charged_share=0.25,
    lease_seconds=0,
)


def test_without_leases_every_call_asks_the_store() -> None:
    load = model.store_load(INPUTS, FLEET)
    scripts = 1_000 * (0.5 * 3 + 1.5 * 2)
    assert load.looks == 2_000
    assert load.scripts == scripts
    assert load.bytes_moved == scripts * 1_000 + 2_000 * 60
    assert load.cores == pytest.approx(0.002 + scripts * 0.0001 + 2_000 * 0.00001)


def leased(rate: float) -> float:
    return model.leased_scripts_per_second(rate, 30, scripts_per_call=2)


def test_a_tenant_that_is_charged_often_costs_the_store_two_operations_each_half_lease() -> None:
    assert leased(0.5) == pytest.approx(2 / 15, rel=0.2)
    assert leased(5) == pytest.approx(2 / 15, rel=0.2)


def test_a_tenant_that_is_charged_hardly_ever_is_not_leased_for() -> None:
    assert leased(0.002) == pytest.approx(2 * 0.002, rel=0.2)


def test_leases_never_cost_more_than_a_little_beyond_what_they_save() -> None:
    for rate in (0.01, 0.03, 0.06, 0.1, 0.2, 1.0):
        assert leased(rate) < 1.1 * 2 * rate


def test_the_beginning_costs_more_than_the_long_run() -> None:
    fleet = replace(FLEET, lease_seconds=30, calls_per_second=20.0)
    begin = model.store_load_from_start(INPUTS, fleet, 45).scripts
    assert begin > model.store_load(INPUTS, fleet).scripts


def test_free_calls_under_leases_ask_nobody() -> None:
    half = replace(FLEET, lease_seconds=30, charged_share=0.5)
    same_charged = replace(half, calls_per_second=1.0, charged_share=1.0)
    assert model.store_load(INPUTS, half) == model.store_load(INPUTS, same_charged)


def test_a_release_is_fetched_once_by_each() -> None:
    found = model.fan_out(INPUTS, FLEET)
    assert found.bundle_bytes == 200_000
    assert found.release_bytes == 1_000 * 200_000
    assert found.release_seconds == pytest.approx(66)
    assert found.bundle_requests_per_second == pytest.approx(1_000 / 60)
    assert found.jwks_requests_per_second == pytest.approx(1_000 / 300)


def test_audit_by_the_day() -> None:
    per_second = 1_000 * (1.5 * 1_000 + 0.5 * 1_400)
    assert model.audit_bytes_per_day(INPUTS, FLEET) == pytest.approx(per_second * DAY)


def test_cost_of_a_sidecar_beside_every_agent() -> None:
    prices = Prices(
        core_month=20,
        gib_month=4,
        gigabyte_between_zones=0.02,
        between_zones_share=0.5,
        store_cores_used=0.5,
        store_server_month=100,
        gigabyte_stored_month=0.02,
        audit_days=30,
    )
    cost = model.sidecar_cost(INPUTS, FLEET, prices)
    load = model.store_load(INPUTS, FLEET)
    assert cost.cores == pytest.approx(1_000 * (0.004 + 2 * 0.002) * 20)
    assert cost.memory == pytest.approx(1_000 * (1 / 8 + 20_000_000 / GIB) * 4)
    assert cost.network == pytest.approx(load.bytes_moved * MONTH * 0.5 / 1e9 * 0.02)
    assert cost.store == 100  # 0.472 cores, and half a core of each is used
    audit = model.audit_bytes_per_day(INPUTS, FLEET) * 0.2 * 30
    assert cost.audit == pytest.approx(audit / 1e9 * 0.02)
    assert cost.total == pytest.approx(
        cost.cores + cost.memory + cost.network + cost.store + cost.audit
    )


def test_a_central_service_has_few_servers_and_every_call_on_the_network() -> None:
    prices = Prices(central_replicas=3, busy_share=0.1)
    cost = model.central_cost(INPUTS, FLEET, prices)
    replicas = 1_000 * 2 * 0.0005 / 0.1
    assert cost.cores == pytest.approx(replicas * prices.core_month)
    assert cost.network > 2_000 * prices.wire_bytes_per_call * MONTH / 1e9 * 0.02 / 2


def test_a_line_through_points() -> None:
    assert model.slope([(0, 5), (10, 25), (20, 45)]) == (5, 2)
