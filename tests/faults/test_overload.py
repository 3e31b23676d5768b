"""Ten times too many: who is let in is served, the rest is told when to come back."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from pdp.testing import SidecarProcess, TokenIssuer, build_bundle
from tests.faults.crowd import Heard, Plan, crowd

ROOT: Final = Path(__file__).resolve().parents[2]
ISSUER: Final = TokenIssuer()
PHASE_SECONDS: Final = 4.0
PLACES: Final = 8
WAITING: Final = 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("overload") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/faults/policy", target, opa=ROOT / ".tools/opa")


def tokens(count: int) -> tuple[str, ...]:
    return tuple(
        ISSUER.token(f"tenant-{number}", "user-7", roles=["agent"]) for number in range(count)
    )


def hear(plan: Plan) -> Heard:
    with crowd(plan) as heard:
        time.sleep(PHASE_SECONDS)
    return heard


def middle(seconds: Sequence[float]) -> float:
    return statistics.median(seconds) * 1_000


def check_refusals(heard: Heard) -> None:
    """All that were refused were told when to come back, and none had to wait for long to
    hear it.
    """
    # gRPC itself sheds calls in a backlog that nobody has taken from it.
    assert heard.others.keys() <= {"CANCELLED "}, heard.others
    assert heard.others.get("CANCELLED ", 0) < 0.2 * len(heard.refused_seconds)
    assert statistics.quantiles(heard.refused_seconds, n=20)[-1] < 2.5


def check_recovered(usual: Heard, after: Heard) -> None:
    """As it was before, but for calls of the first moments."""
    assert len(after.refused_seconds) < 0.1 * len(after.allowed_seconds)
    assert middle(after.allowed_seconds) < max(3 * middle(usual.allowed_seconds), 50.0)


@pytest.mark.slow
@pytest.mark.alone
def test_ten_times_the_rate_of_all_tenants_is_served_at_that_rate(
    tmp_path: Path, bundle: Path
) -> None:
    rate = 5.0
    limits: dict[str, Any] = {"tenants": {"calls_per_second": rate, "burst": 2}}
    everybody = tokens(4)
    with SidecarProcess(
        tmp_path, issuer=ISSUER, bundle=bundle, config={"limits": limits}
    ) as sidecar:
        ordinary = Plan(target=sidecar.target, tokens=everybody, per_second=4 * rate / 2)
        usual = hear(ordinary)
        flooded = hear(Plan(target=sidecar.target, tokens=everybody, per_second=4 * rate * 10))
        after = hear(ordinary)
    sys.stdout.write(
        f"allowed in {middle(usual.allowed_seconds):.1f} ms, and {flooded.allowed_per_second:.0f}"
        f" a second in {middle(flooded.allowed_seconds):.1f} ms, while"
        f" {len(flooded.refused_seconds)} were refused in {middle(flooded.refused_seconds):.0f} ms\n"
    )
    assert not usual.refused_seconds
    check_recovered(usual, after)
    assert len(flooded.refused_seconds) > 5 * len(flooded.allowed_seconds)
    assert flooded.allowed_per_second > 0.6 * 4 * rate
    assert middle(flooded.allowed_seconds) < max(5 * middle(usual.allowed_seconds), 50.0)
    check_refusals(flooded)


@pytest.mark.slow
@pytest.mark.alone
def test_ten_times_the_callers_that_there_are_places_for_do_not_bring_it_down(
    tmp_path: Path, bundle: Path
) -> None:
    limits: dict[str, Any] = {
        "max_concurrent_calls": PLACES,
        "max_waiting_calls": WAITING,
        "tenants": {"calls_per_second": 100_000, "burst": 100_000},
    }
    everybody = tokens(20)
    full = PLACES + WAITING
    with SidecarProcess(
        tmp_path, issuer=ISSUER, bundle=bundle, config={"limits": limits}
    ) as sidecar:
        ordinary = Plan(target=sidecar.target, tokens=everybody, callers=full)
        usual = hear(ordinary)
        flooded = hear(Plan(target=sidecar.target, tokens=everybody, callers=10 * full))
        after = hear(ordinary)
    sys.stdout.write(
        f"{usual.allowed_per_second:.0f} a second in {middle(usual.allowed_seconds):.1f} ms, and"
        f" {flooded.allowed_per_second:.0f} in {middle(flooded.allowed_seconds):.1f} ms, while"
        f" {len(flooded.refused_seconds)} were refused in {middle(flooded.refused_seconds):.0f} ms\n"
    )
    assert not usual.refused_seconds
    check_recovered(usual, after)
    assert flooded.refused_seconds
    # The crowd and the sidecar share the machine, and so does the work of refusing.
    assert flooded.allowed_per_second > 0.3 * usual.allowed_per_second
    assert middle(flooded.allowed_seconds) < 15 * middle(usual.allowed_seconds)
    check_refusals(flooded)
