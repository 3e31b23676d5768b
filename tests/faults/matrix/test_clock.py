"""The sidecar's clock is wrong, and tokens are of another time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pdp.testing import TokenIssuer
from tests.faults.matrix.machine import Machine
from tests.faults.matrix.stand import Stand
from tests.faults.matrix.table import Dependency, Failure, Row, rows_of
from tests.faults.matrix.walk import walk

pytestmark = pytest.mark.slow
HOUR = 3_600
AHEAD = {Failure.CLOCK_BACK: -2 * HOUR, Failure.CLOCK_FORWARD: 2 * HOUR}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A sidecar whose clock can be set, and an agent with a token for an hour."""

    stand: Stand
    machine: Machine


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Timed]:
    folder = tmp_path_factory.mktemp("clock")
    with (
        Machine(folder, folder / "state") as machine,
        Stand(
            folder, environment=machine.environment, issuer=TokenIssuer(), token_seconds=HOUR
        ) as stand,
    ):
        yield Timed(stand=stand, machine=machine)


@pytest.mark.parametrize("row", rows_of(Dependency.CLOCK), ids=str)
def test_a_token_of_another_time_lets_nobody_in(timed: Timed, row: Row) -> None:
    walk(row, timed.stand, timed.machine.ahead(AHEAD[row.failure]))
