"""Loss of power at random moments: with durability power nothing that was said is lost."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from pdp.storage import Durability
from pdp.tool.once import SqliteOnce
from tests.faults.disk import Disk, compiler
from tests.faults.kills import DISTURBANCES, ROOT, play

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


@pytest.mark.slow
def test_durability_process_leaves_a_whole_sidecar_that_lost_no_more_than_the_last_moments(
    tmp_path: Path,
) -> None:
    outcome = play(
        tmp_path,
        "sqlite",
        seed=SEED,
        kills=4,
        power=True,
        durability=Durability.PROCESS,
        disturbances=("nothing", "wait_for_a_sync", "reload", "begin_segment"),
    )
    sys.stdout.write(f"seed {SEED}: {outcome}\n")
    assert outcome.changes_lost > 100


MUTATIONS: Final = """
import os, signal, sys
from pathlib import Path
from pdp.storage import Durability
from pdp.tool.once import SqliteOnce

store = SqliteOnce(Path(sys.argv[1]))
for number in range(int(sys.argv[2])):
    assert store.begin(f"call-{number}", "content") is None
    if number < int(sys.argv[2]) - 1 or sys.argv[3] == "done":
        store.finish(f"call-{number}", '"done"')
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("last", ("begun", "done"))
def test_a_mutation_that_was_done_once_is_not_done_again_after_loss_of_power(
    last: str, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    (root / "state").mkdir(parents=True)
    disk = Disk(root, tmp_path)
    for seed in range(6):
        file = root / "state" / f"{seed}.db"
        ended = subprocess.run(
            [sys.executable, "-c", MUTATIONS, str(file), "4", last],
            env={**os.environ, **disk.environment},
            cwd=ROOT,
            check=False,
        )
        assert ended.returncode == -9
        disk.lose_power(random.Random(seed))  # noqa: S311 - what is lost is no secret
        store = SqliteOnce(file)
        expected = ['"done"', '"done"', '"done"', None if last == "begun" else '"done"']
        found = [store.begin(f"call-{number}", "content") for number in range(4)]
        store.close()
        assert found == [("content", result) for result in expected], f"seed {seed}"
        disk.settle()
