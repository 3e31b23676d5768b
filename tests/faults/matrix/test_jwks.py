"""The server of an issuer's keys fails, and they are used until they are too old."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from tests.faults.matrix.machine import Machine
from tests.faults.matrix.network import FileServer, Way
from tests.faults.matrix.stand import DAY, Stand, old_issuer
from tests.faults.matrix.table import Dependency, Failure, Row, rows_of
from tests.faults.matrix.walk import walk

pytestmark = pytest.mark.slow
CLOCKS = {Failure.CLOCK_BACK: -DAY, Failure.CLOCK_FORWARD: DAY}
ROWS = rows_of(Dependency.JWKS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """A sidecar that fetches an issuer's keys every second, and all that can be broken."""

    stand: Stand
    server: FileServer
    way: Way
    machine: Machine


@pytest.fixture(scope="module")
def fetching(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fetching]:
    folder = tmp_path_factory.mktemp("jwks")
    issuer = old_issuer()
    published = folder / "published"
    published.mkdir()
    issuer.write_jwks(published / "jwks.json")
    with (
        FileServer(published) as server,
        Way(folder, server.address) as way,
        Machine(folder, folder / "state") as machine,
    ):
        trusted = {
            "issuer": issuer.issuer,
            "audiences": [issuer.audience],
            "jwks_url": f"http://{way.address}/jwks.json",
            "poll_seconds": 1,
            "max_age_seconds": 3,
        }
        with Stand(
            folder,
            config={"identity": {"mode": "jwt", "issuers": [trusted]}},
            environment=machine.environment,
            issuer=issuer,
            # A call waits for two seconds for keys that are asked for just then.
            timeout_seconds=4.0,
        ) as stand:
            yield Fetching(stand=stand, server=server, way=way, machine=machine)


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure not in CLOCKS], ids=str)
def test_keys_that_are_too_old_let_nobody_in(fetching: Fetching, row: Row) -> None:
    breaks: dict[Failure, Callable[[], AbstractContextManager[None]]] = {
        **fetching.way.breaks(slow_ms=8_000),
        Failure.KILLED: fetching.server.killed,
        Failure.PAUSED: fetching.server.paused,
    }
    walk(row, fetching.stand, breaks[row.failure]())


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in CLOCKS], ids=str)
def test_a_clock_that_is_set_makes_no_key_old(fetching: Fetching, row: Row) -> None:
    ahead = fetching.machine.ahead(CLOCKS[row.failure])
    walk(row, fetching.stand, ahead, call=fetching.stand.charge)
