"""Ledgers under faults: what callers were told, in every round, could be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.rounds import play

SEED = 20_261_125


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("store", "seconds"), (("sqlite", 20), ("redis", 30), ("leased", 30)))
def test_no_fault_breaks_a_promise(store: str, seconds: int, tmp_path: Path) -> None:
    outcome = play(store, tmp_path, seed=SEED, seconds=seconds)
    sys.stdout.write(f"{store}: {outcome}\n")
    assert outcome.events["ok"] > 1_000
    assert outcome.faults.total() >= 4
