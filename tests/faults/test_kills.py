"""Kill -9 at random moments under load: a start without help, and nothing that was said is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.kills import DISTURBANCES, play

SEED = 20_261_125


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("store", "kills"), (("sqlite", 7), ("leased", 5)))
def test_no_kill_breaks_a_promise(store: str, kills: int, tmp_path: Path) -> None:
    outcome = play(tmp_path, store, seed=SEED, kills=kills)
    sys.stdout.write(f"{store}, seed {SEED}: {outcome}\n")
    assert outcome.disturbed.keys() == set(DISTURBANCES[store])
    assert outcome.epochs == kills + 1
    assert outcome.answers > 30 * kills
