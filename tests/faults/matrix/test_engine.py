"""The engine fails: an OPA server across a network, and one of the sidecar's own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.matrix.network import Way, paused
from tests.faults.matrix.stand import OPA, Stand, policy_bundle
from tests.faults.matrix.table import Dependency, Failure, Row, rows_of
from tests.faults.matrix.walk import walk
from tests.policy.opa.servers import served

pytestmark = pytest.mark.slow
OF_ITS_PROCESS = (Failure.KILLED, Failure.PAUSED)
ROWS = rows_of(Dependency.ENGINE)


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stand, Way]]:
    folder = tmp_path_factory.mktemp("engine")
    with (
        served(OPA, "--bundle", policy_bundle(folder)) as url,
        Way(folder, url.removeprefix("http://")) as way,
    ):
        policy = {
            "engine": {"opa": {"url": f"http://{way.address}"}},
            "evaluation_timeout_ms": 500,
        }
        with Stand(folder, config={"policy": policy}) as stand:
            yield stand, way


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure not in OF_ITS_PROCESS], ids=str)
def test_without_an_engine_across_the_network_nothing_runs(
    across: tuple[Stand, Way], row: Row
) -> None:
    stand, way = across
    walk(row, stand, way.breaks(slow_ms=3_000)[row.failure]())


@pytest.fixture(scope="module")
def managing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("managed")
    policy = {
        "bundle": str(folder / "bundle.tar.gz"),
        "engine": {"opa": {"managed": True}},
        "opa_command": str(OPA),
        "evaluation_timeout_ms": 500,
    }
    with Stand(folder, config={"policy": policy}) as stand:
        yield stand


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in OF_ITS_PROCESS], ids=str)
def test_without_an_engine_of_its_own_nothing_runs(managing: Stand, row: Row) -> None:
    breaks = {Failure.KILLED: killed, Failure.PAUSED: paused}
    walk(row, managing, breaks[row.failure](opa_of(managing)))


def opa_of(stand: Stand) -> int:
    """The process id of the sidecar's OPA."""
    assert stand.sidecar.process is not None
    parent = stand.sidecar.process.pid
    [child] = [
        int(number)
        for task in Path(f"/proc/{parent}/task").iterdir()
        for number in (task / "children").read_text().split()
        if "opa" in Path(f"/proc/{number}/comm").read_text()
    ]
    return child


@contextlib.contextmanager
def killed(process_id: int) -> Iterator[None]:
    os.kill(process_id, signal.SIGKILL)
    yield
