"""bench/growth.py measures what it says."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import apsw
import pytest

from bench import growth


def test_a_ledger_is_filled_with_as_many_entries_as_it_is_said_to_have(tmp_path: Path) -> None:
    file = tmp_path / "ledger.sqlite"
    with (
        contextlib.closing(asyncio.new_event_loop()) as loop,
        growth.filled(file, 1_000, loop) as size,
    ):
        size.call()
    with contextlib.closing(apsw.Connection(str(file), flags=apsw.SQLITE_OPEN_READONLY)) as store:
        # Two entries each of the call that was copied, and of two more since.
        assert store.execute("SELECT count(*) FROM answer").get == 1_000 + 2 * 3
        assert store.execute("SELECT count(*) FROM hold").get == 500 + 3
        orphans = "SELECT count(*) FROM answer WHERE hold NOT IN (SELECT id FROM hold)"
        assert store.execute(orphans).get == 0


def test_a_ratio_is_that_of_the_slices_which_both_took() -> None:
    # The machine was slow in the second slice, and hit both.
    small = growth.Size(size=10, call=lambda: None, medians=[1e-3, 4e-3, 1.1e-3])
    large = growth.Size(size=20, call=lambda: None, medians=[2e-3, 8e-3, 2.2e-3])
    assert large.beside(small) == {"size": 20, "p50_us": 2_200.0, "ratio": 2.0}


@pytest.mark.slow
def test_every_axis_gives_a_table() -> None:
    axes = ["tenants", "arguments", "ledger"]  # of each kind one
    found = growth.measure(growth.QUICK, axes, lambda _line: None)
    assert list(found["axes"]) == axes
    for axis, each in zip(axes, found["tables"], strict=True):
        assert len(each["rows"]) == len(found["axes"][axis])
        assert {len(row) for row in each["rows"]} == {len(each["heads"])}
    assert found["axes"]["arguments"][-1]["refused"] == "arguments_invalid"
    assert "flat" not in found, "10,000 tenants were not measured"
