"""The ledger fails: its disk, its file, its clock, and the process that it is a part of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from tests.faults.matrix.machine import Machine, Trouble
from tests.faults.matrix.network import paused
from tests.faults.matrix.small_disk import SmallDisk
from tests.faults.matrix.stand import DAY, Stand
from tests.faults.matrix.table import Dependency, Failure, Row, rows_of
from tests.faults.matrix.walk import overwritten, unable_to_start, walk

pytestmark = pytest.mark.slow
TROUBLES = {
    Failure.DOWN: Trouble.GONE,
    Failure.SLOW: Trouble.SLOW,
    Failure.HANGING: Trouble.HANGING,
    Failure.PARTIAL: Trouble.TORN,
    Failure.PERMISSION_LOST: Trouble.READ_ONLY,
}
CLOCKS = {Failure.CLOCK_BACK: -DAY, Failure.CLOCK_FORWARD: DAY}
ROWS = rows_of(Dependency.LEDGER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """A sidecar whose ledger lies on a disk that the audit log is not on."""

    stand: Stand
    machine: Machine
    disk: SmallDisk


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeping]:
    folder = tmp_path_factory.mktemp("ledger")
    state = folder / "state"
    state.mkdir(mode=0o700)
    with SmallDisk(state) as disk:
        log = state / "audit"
        log.mkdir(mode=0o700)
        with (
            SmallDisk(log),
            Machine(folder, state / "ledger.db") as machine,
            Stand(folder, environment=machine.environment) as stand,
        ):
            yield Keeping(stand=stand, machine=machine, disk=disk)


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in TROUBLES], ids=str)
def test_what_can_not_be_held_does_not_run(keeping: Keeping, row: Row) -> None:
    walk(row, keeping.stand, keeping.machine.disk(TROUBLES[row.failure]))


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.failure not in (*TROUBLES, *CLOCKS)], ids=str
)
def test_without_a_ledger_nothing_runs(keeping: Keeping, row: Row) -> None:
    process = keeping.stand.sidecar.process
    assert process is not None
    breaks: dict[Failure, Callable[[], AbstractContextManager[None]]] = {
        Failure.FULL_DISK: keeping.disk.full,
        Failure.PAUSED: lambda: paused(process.pid),
        Failure.KILLED: lambda: killed(keeping.stand),
        Failure.WRONG_BYTES: lambda: unable_to_start(
            keeping.stand,
            overwritten(keeping.stand.sidecar.state / "ledger.db", b"no ledger" * 1_000),
            complaint="ledger.db can not be used as a store",
        ),
    }
    walk(row, keeping.stand, breaks[row.failure]())


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in CLOCKS], ids=str)
def test_the_clock_ends_holds_and_loses_no_charge(keeping: Keeping, row: Row) -> None:
    hold = keeping.stand.hold()
    with keeping.machine.ahead(CLOCKS[row.failure]):
        walk(row, keeping.stand, contextlib.nullcontext(), call=keeping.stand.charge)
        keeping.stand.settle(hold)
    keeping.stand.check_books()


@contextlib.contextmanager
def killed(stand: Stand) -> Iterator[None]:
    stand.sidecar.kill()
    yield
    stand.sidecar.start()
