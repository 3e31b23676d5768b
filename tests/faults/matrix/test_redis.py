"""The shared store fails: a Redis across a network, its process, its disk and its clock."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from tests.budget.redis_server import RedisServer
from tests.faults.matrix.machine import Machine
from tests.faults.matrix.network import Way, paused
from tests.faults.matrix.small_disk import SmallDisk
from tests.faults.matrix.stand import DAY, Stand
from tests.faults.matrix.table import Dependency, Failure, Row, rows_of
from tests.faults.matrix.walk import walk
from tests.faults.toxiproxy import free_port

pytestmark = pytest.mark.slow
CLOCKS = {Failure.CLOCK_BACK: -DAY, Failure.CLOCK_FORWARD: DAY}
ROWS = rows_of(Dependency.REDIS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A sidecar on a Redis, and all that can be broken between and below them."""

    stand: Stand
    server: RedisServer
    way: Way
    disk: SmallDisk
    machine: Machine


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    folder = tmp_path_factory.mktemp("redis")
    data = folder / "data"
    data.mkdir()
    port = free_port()
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(SmallDisk(data))
        machine = stack.enter_context(Machine(folder, data))
        server = RedisServer(data, f"port {port}", "bind 127.0.0.1", "loglevel warning")
        with preloaded(machine):
            server.start()
        stack.callback(server.stop)
        way = stack.enter_context(Way(folder, f"127.0.0.1:{port}"))
        store = {"addresses": [way.address], "tls": False, "timeout_ms": 500}
        config = {"budget": {"hold_ttl_seconds": 3_600, "store": store}}
        stand = stack.enter_context(Stand(folder, config=config))
        yield Shared(stand=stand, server=server, way=way, disk=disk, machine=machine)


@contextlib.contextmanager
def preloaded(machine: Machine) -> Iterator[None]:
    """What is started now runs on that machine."""
    os.environ.update(machine.environment)
    try:
        yield
    finally:
        for name in machine.environment:
            del os.environ[name]


@contextlib.contextmanager
def killed(server: RedisServer) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextlib.contextmanager
def forbidden(server: RedisServer) -> Iterator[None]:
    """The sidecar's user may do nothing, on connections that are open already either."""
    server.command("ACL", "SETUSER", "operator", "on", "nopass", "allcommands", "allkeys")
    server.command("ACL", "SETUSER", "default", "-@all", "+ping", "+auth", "+acl")
    try:
        yield
    finally:
        server.command("ACL", "SETUSER", "default", "+@all")


def process_of(server: RedisServer) -> int:
    assert server.process is not None
    return server.process.pid


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure not in CLOCKS], ids=str)
def test_without_the_shared_store_nothing_runs(shared: Shared, row: Row) -> None:
    breaks: dict[Failure, Callable[[], AbstractContextManager[None]]] = {
        **shared.way.breaks(slow_ms=3_000, partial_bytes=3),
        Failure.KILLED: lambda: killed(shared.server),
        Failure.PAUSED: lambda: paused(process_of(shared.server)),
        Failure.FULL_DISK: shared.disk.full,
        Failure.PERMISSION_LOST: lambda: forbidden(shared.server),
    }
    walk(row, shared.stand, breaks[row.failure]())


@pytest.mark.parametrize("row", [row for row in ROWS if row.failure in CLOCKS], ids=str)
def test_the_shared_stores_clock_ends_no_call(shared: Shared, row: Row) -> None:
    hold = shared.stand.hold()
    with shared.machine.ahead(CLOCKS[row.failure]):
        walk(row, shared.stand, contextlib.nullcontext(), call=shared.stand.charge)
        shared.stand.settle(hold)
    shared.stand.check_books()
