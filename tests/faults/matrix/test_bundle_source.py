"""The server of a bundle fails, and the last good one is used until it is too old."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from pdp.policy.archive import pack, read_directory
from pdp.policy.compile import build_files
from tests.faults.matrix.machine import Machine
from tests.faults.matrix.network import FileServer, Way
from tests.faults.matrix.small_disk import SmallDisk
from tests.faults.matrix.stand import DAY, OPA, Stand, policy_bundle, wait_for
from tests.faults.matrix.table import Dependency, Failure, Row, rows_of
from tests.faults.matrix.walk import walk

pytestmark = pytest.mark.slow
CLOCKS = {Failure.CLOCK_BACK: -DAY, Failure.CLOCK_FORWARD: DAY}
ROWS = rows_of(Dependency.BUNDLE)
CHECKED = "pdp_policy_checked_timestamp_seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """A sidecar that looks at a bundle every second, and all that can be broken."""

    stand: Stand
    server: FileServer
    way: Way
    machine: Machine
    disk: SmallDisk
    published: Path


@pytest.fixture(scope="module")
def following(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Following]:
    folder = tmp_path_factory.mktemp("bundle")
    published = folder / "published" / "bundle.tar.gz"
    published.parent.mkdir()
    shutil.copy(policy_bundle(folder), published)
    kept = folder / "state" / "policy"
    kept.mkdir(mode=0o700, parents=True)
    kept.parent.chmod(0o700)
    with (
        SmallDisk(kept) as disk,
        FileServer(published.parent) as server,
        Way(folder, server.address) as way,
        Machine(folder, folder / "nothing") as machine,
    ):
        source = {
            "url": f"http://{way.address}/{published.name}",
            "poll_seconds": 1,
            "timeout_seconds": 1,
        }
        policy = {"bundles": {"all": {"http": source}}, "max_age_seconds": 3}
        with Stand(folder, config={"policy": policy}, environment=machine.environment) as stand:
            yield Following(
                stand=stand,
                server=server,
                way=way,
                machine=machine,
                disk=disk,
                published=published,
            )


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row.failure not in (*CLOCKS, Failure.FULL_DISK)],
    ids=str,
)
def test_a_policy_that_is_too_old_allows_nothing(following: Following, row: Row) -> None:
    breaks: dict[Failure, Callable[[], AbstractContextManager[None]]] = {
        **following.way.breaks(slow_ms=4_000),
        Failure.KILLED: following.server.killed,
        Failure.PAUSED: following.server.paused,
    }
    walk(row, following.stand, breaks[row.failure]())


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in CLOCKS], ids=str)
def test_a_clock_that_is_set_makes_the_policy_old_until_the_next_look(
    following: Following, row: Row
) -> None:
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def jumped() -> Iterator[None]:
            seen = following.stand.metric(CHECKED)
            wait_for(lambda: following.stand.metric(CHECKED) != seen, "looked at")
            stack.enter_context(following.machine.ahead(CLOCKS[row.failure]))
            yield

        walk(row, following.stand, jumped(), call=following.stand.charge)


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure is Failure.FULL_DISK], ids=str)
def test_a_full_disk_keeps_no_policy_out(following: Following, row: Row) -> None:
    @contextlib.contextmanager
    def full() -> Iterator[None]:
        with following.disk.full():
            revision = "released-on-a-full-disk"
            sources = read_directory(Path(__file__).with_name("policy"))
            files = build_files(sources, opa=OPA, revision=revision, sequence=None)
            following.published.write_bytes(pack(files))
            log = following.stand.sidecar.log
            wait_for(lambda: f"policy {revision} is in force" in log.read_text(), "it is in force")
            yield

    walk(row, following.stand, full())
