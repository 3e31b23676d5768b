"""A fleet that is small, whole, and checked as a large one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench.scale.bundles import tenant_id
from bench.scale.measure import faults
from bench.scale.stubs import Tally

ROOT = Path(__file__).parents[2]
ACME, GLOBEX = tenant_id(0), tenant_id(1)


def spent(acme: int, globex: int = 5) -> Tally:
    return Tally(spent=Counter({ACME: acme, GLOBEX: globex}))


def test_a_run_in_which_all_is_well_has_no_fault() -> None:
    assert faults(spent(10), {ACME: (10, 0), GLOBEX: (5, 0)}, {0: 10}) == []


def test_an_overspent_budget_is_a_fault() -> None:
    (said,) = faults(spent(11), {ACME: (11, 0), GLOBEX: (5, 0)}, {0: 10})
    assert said == f"{ACME} spent 11 of 10"


def test_what_the_store_does_not_know_of_is_a_fault() -> None:
    found = {ACME: (9, 0), GLOBEX: (5, 1)}
    assert len(faults(spent(10), found, {})) == 2
    assert len(faults(spent(10), {}, {})) == 2
    assert len(faults(Tally(), {ACME: (1, 0)}, {})) == 1


def test_a_call_that_ran_for_another_tenant_is_a_fault() -> None:
    assert faults(Tally(strays=1), {}, {}) == ["1 calls ran for another tenant"]


def test_only_budgets_may_refuse() -> None:
    refused = Counter({"tenant_budget_exceeded": 3, "pdp_unavailable": 1})
    assert faults(Tally(refused=refused), {}, {}) == ["1 calls were refused with pdp_unavailable"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_small_fleet_overspends_nothing_and_serves_nobody_as_somebody_else(
    tmp_path: Path,
) -> None:
    results = tmp_path / "scale.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.scale", "--smoke", "--out", str(results)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for run in json.loads(results.read_text(encoding="utf-8"))["runs"]:
        plan, store = run["plan"], run["traffic"]["store"]
        assert sum(run["executed"].values()) > 200
        assert run["refused"].keys() == {"tenant_budget_exceeded"}
        assert run["idle"]["store"]["scripts"] == 0
        assert run["bundle"]["whole"] == run["jwks"]["whole"] == 0  # they had it
        assert run["bundle"]["shortest_seconds"] < run["bundle"]["longest_seconds"]
        assert run["release_seconds"] < 1.1 * plan["bundle_poll_seconds"] + 5
        if plan["lease_seconds"]:
            assert store["scripts"] < sum(run["executed"].values())
