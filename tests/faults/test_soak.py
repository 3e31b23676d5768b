"""Under constant load with changes all the time, what the sidecar holds does not grow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.soak import soak

SEED = 20_261_125


@pytest.mark.slow
def test_memory_descriptors_and_threads_stay_flat_under_load(tmp_path: Path) -> None:
    outcome = soak(tmp_path, seconds=45, warm_up_seconds=20, seed=SEED)
    sys.stdout.write(f"seed {SEED}: {outcome}\n")
    assert outcome.calls > 1_000
    assert outcome.operations > 20
    # Bounds for a run as short as this one, in which caches still fill; `make soak` takes
    # half an hour.
    assert outcome.resident_kib.last - outcome.resident_kib.first < 24 * 1024
    assert outcome.descriptors.last - outcome.descriptors.first <= 4
    assert outcome.threads.last - outcome.threads.first <= 2
