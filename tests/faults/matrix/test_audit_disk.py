"""The disk of the audit log fails, and the clock that its records have their times from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.matrix.machine import Machine, Trouble
from tests.faults.matrix.small_disk import SmallDisk
from tests.faults.matrix.stand import DAY, Stand
from tests.faults.matrix.table import Dependency, Failure, Row, rows_of
from tests.faults.matrix.walk import overwritten, unable_to_start, walk

pytestmark = pytest.mark.slow
TROUBLES = {
    Failure.SLOW: Trouble.SLOW,
    Failure.HANGING: Trouble.HANGING,
    Failure.PARTIAL: Trouble.TORN,
    Failure.PERMISSION_LOST: Trouble.READ_ONLY,
}
CLOCKS = {Failure.CLOCK_BACK: -DAY, Failure.CLOCK_FORWARD: DAY}
RESTARTS = (Failure.DOWN, Failure.WRONG_BYTES)
ROWS = rows_of(Dependency.AUDIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logging:
    """A sidecar whose audit log lies on a disk of its own."""

    stand: Stand
    machine: Machine
    disk: SmallDisk
    log: Path


@pytest.fixture(scope="module")
def logging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logging]:
    folder = tmp_path_factory.mktemp("audit-disk")
    log = folder / "state" / "audit"
    log.mkdir(mode=0o700, parents=True)
    log.parent.chmod(0o700)
    with (
        SmallDisk(log) as disk,
        Machine(folder, log) as machine,
        Stand(folder, environment=machine.environment) as stand,
    ):
        yield Logging(stand=stand, machine=machine, disk=disk, log=log)


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in TROUBLES], ids=str)
def test_what_can_not_be_put_on_record_does_not_run(logging: Logging, row: Row) -> None:
    walk(row, logging.stand, logging.machine.disk(TROUBLES[row.failure]))


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure is Failure.FULL_DISK], ids=str)
def test_without_room_for_a_record_nothing_runs(logging: Logging, row: Row) -> None:
    walk(row, logging.stand, logging.disk.full())


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in RESTARTS], ids=str)
def test_a_log_that_can_not_be_trusted_is_not_written_on(logging: Logging, row: Row) -> None:
    breaks: dict[Failure, Callable[[], AbstractContextManager[None]]] = {
        Failure.DOWN: lambda: gone(logging),
        Failure.WRONG_BYTES: lambda: unable_to_start(
            logging.stand, changed(logging.log), complaint="is broken: record"
        ),
    }
    walk(row, logging.stand, breaks[row.failure]())


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in CLOCKS], ids=str)
def test_records_are_written_whatever_the_clock_says(logging: Logging, row: Row) -> None:
    ahead = logging.machine.ahead(CLOCKS[row.failure])
    walk(row, logging.stand, ahead, call=logging.stand.charge)


@contextlib.contextmanager
def gone(logging: Logging) -> Iterator[None]:
    with logging.machine.disk(Trouble.GONE):
        yield
    logging.stand.sidecar.terminate()
    logging.stand.sidecar.start()


@contextlib.contextmanager
def changed(log: Path) -> Iterator[None]:
    """The outcome of the last record but one is another one."""
    [newest] = log.glob("*.jsonl")
    *before, record, last = newest.read_bytes().splitlines(keepends=True)
    assert b"executed" in record
    other = record.replace(b"executed", b"rejected")
    with overwritten(newest, b"".join((*before, other, last))):
        yield
