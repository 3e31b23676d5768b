"""bench/workload.py measures what it says."""

from __future__ import annotations

import pytest

from bench import workload


@pytest.mark.slow
def test_a_permit_for_many_reads_leaves_little_to_ask_for() -> None:
    found = workload.measure(1, lambda _line: None, calls=200, sizes=(1, 3), warm_up=50)
    assert found["calls"] == 200
    messages = {(each["tenants"], each["way"]): each["rpcs_per_1000"] for each in found["ways"]}
    # Each call is asked for and reported; and with permits for many reads, each write alone.
    assert messages[1, workload.EACH] == messages[3, workload.EACH] == 2_000
    assert 400 <= messages[1, workload.REUSED] <= messages[3, workload.REUSED] < 600
    for each in found["ways"]:
        assert each["writes_us"]["p50"] > each["bare_us"]["orders.update"]
        assert each["sidecar_cpu_us"] > 0
    (table,) = found["tables"]
    assert {len(row) for row in table["rows"]} == {len(table["heads"])}
