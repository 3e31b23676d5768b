"""The process that prepares bundles leaves nothing behind, however it ends."""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pdp.policy import preparation
from pdp.policy.archive import read_archive
from pdp.policy.engine import BundleError
from pdp.policy.preparation import Received, Rules, prepare_apart

STARTER = read_archive(Path("policies/bundle.tar.gz").read_bytes(), place="starter")
REGO = {name: text for name, text in STARTER.items() if name != "policy.wasm"}


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def holds_something(folder: Path) -> bool:
    return any(folder.iterdir())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - of what has no event
            await asyncio.sleep(0.01)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def endless_opa(tmp_path: Path) -> Path:
    """A command that says its process id, and never ends."""
    command = tmp_path / "opa"
    command.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/draft; mv {tmp_path}/draft {tmp_path}/pid\nexec sleep 600\n"
    )
    command.chmod(0o755)
    return command


def received() -> list[Received]:
    return [Received(name="main", place="the shelf", chain=(REGO,), verifier=None)]


def rules(opa: Path) -> Rules:
    return Rules(embedded=True, opa=opa, run_tests=False)


def test_who_gives_up_leaves_neither_process_nor_file(
    tmp_path: Path, scratch: Path, endless_opa: Path
) -> None:
    async def run() -> None:
        task = asyncio.create_task(prepare_apart(received(), rules(endless_opa)))
        await until((tmp_path / "pid").exists)
        pid = int((tmp_path / "pid").read_text())
        assert is_running(pid)
        assert holds_something(scratch)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not is_running(pid))
        await until(lambda: not holds_something(scratch))

    asyncio.run(run())


def test_what_takes_too_long_is_ended_and_refused(
    tmp_path: Path, scratch: Path, endless_opa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "TIMEOUT_SECONDS", 2)

    async def run() -> None:
        with pytest.raises(BundleError, match="was not prepared within 2 seconds"):
            await prepare_apart(received(), rules(endless_opa))
        pid = int((tmp_path / "pid").read_text())
        await until(lambda: not is_running(pid))

    asyncio.run(run())
    assert not holds_something(scratch)


def test_no_descriptor_process_or_thread_is_left_of_many(scratch: Path) -> None:
    bad = [Received(name="main", place="the shelf", chain=({"x.rego": b"?"},), verifier=None)]

    def children() -> list[str]:
        tasks = Path("/proc/self/task").glob("*/children")
        return [pid for task in tasks for pid in task.read_text().split()]

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    earlier = children()  # of other tests' fixtures

    async def run() -> None:
        before = 0
        for number in range(6):
            with pytest.raises(BundleError, match="does not begin with its package"):
                await prepare_apart(bad, rules(Path("/nowhere")))
            if number == 0:
                before = descriptors()
        assert descriptors() == before
        assert set(children()) <= set(earlier)

    asyncio.run(run())
    assert not holds_something(scratch)


def test_a_later_bundle_is_compiled_on_one_core(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, python = tmp_path / "environment", tmp_path / "python"
    python.write_text(f'#!/bin/sh\nenv > {environment}\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    whole = Received(name="main", place="the shelf", chain=(STARTER,), verifier=None)
    prepared = asyncio.run(prepare_apart([whole], Rules(embedded=True, opa=None, run_tests=False)))
    assert prepared.compiled is not None
    assert "RAYON_NUM_THREADS=1" in environment.read_text().splitlines()
