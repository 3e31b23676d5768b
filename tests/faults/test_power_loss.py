"""Loss of power at random moments: with durability power nothing that was said is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.disk import compiler
from tests.faults.kills import DISTURBANCES, play

SEED = 20_261_125

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C compiler")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("store", "losses"), (("sqlite", 5), ("leased", 4)))
def test_no_loss_of_power_breaks_a_promise(store: str, losses: int, tmp_path: Path) -> None:
    outcome = play(tmp_path, store, seed=SEED, kills=losses, power=True)
    sys.stdout.write(f"{store}, seed {SEED}: {outcome}\n")
    assert outcome.disturbed.keys() == set(DISTURBANCES[store])
    assert outcome.epochs == losses + 1
    assert outcome.changes_lost > 0
