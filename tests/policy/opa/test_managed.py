"""The sidecar's own OPA: ready when it is started, gone when it is not needed."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from pdp.canonical import JsonObject
from pdp.policy.bundle import Bundle
from pdp.policy.engine import BundleError, Entrypoint, PolicyError
from pdp.policy.opa import managed
from pdp.policy.opa.managed import ManagedOpa
from tests.policy.opa.servers import until

AUTHZ: Final = """package pdp.authz
default decision := {"allow": false, "reason_code": "policy_denied"}
decision := {"allow": true, "reason_code": "ok"} if input.go
decision := {"allow": true, "reason_code": "ok", "n": count(big)} if input.runaway
big := {n |
    some x in numbers.range(1, 5000)
    some y in numbers.range(1, 5000)
    n := x * y
} if input.runaway
decision := {"a": 1} if input.conflict
decision := {"a": 2} if input.conflict
"""
BUDGET: Final = """package pdp.budget
default limits := []
decision := {"allow": true, "reason_code": "ok"} if input.go
"""


def bundle(rego: dict[str, str] | None = None) -> Bundle:
    return Bundle(
        revision="r-1",
        wasm=None,
        data=b'{"tenants": {}}',
        rego=rego or {"pdp/authz.rego": AUTHZ, "pdp/budget.rego": BUDGET},
    )


@asynccontextmanager
async def started(
    opa: Path, served: Bundle | None = None, **options: Any
) -> AsyncIterator[ManagedOpa]:
    engine = await ManagedOpa.start(
        served or bundle(), opa=opa, **{"deadline_ms": 5_000, "workers": 1, **options}
    )
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(autouse=True)
def temporary(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Where the folders of these tests are made; nothing is left there."""
    tmp_path_factory.getbasetemp()  # pytest's own lies elsewhere, and its path is long
    with tempfile.TemporaryDirectory() as place:
        monkeypatch.setattr(tempfile, "tempdir", place)
        yield Path(place)
        assert not list(Path(place).glob("pdp-opa-*"))


async def refusal(engine: ManagedOpa, document: JsonObject) -> str:
    with pytest.raises(PolicyError) as refused:
        await engine.evaluate(Entrypoint.AUTHZ_DECISION, document)
    return refused.value.reason_code


def pid_of(engine: ManagedOpa) -> int:
    return engine._server.process.pid


def folder_of(engine: ManagedOpa) -> Path:
    return engine._server.folder.path


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_it_answers_as_soon_as_it_is_started(opa: Path) -> None:
    async def run() -> None:
        async with started(opa) as engine:
            assert engine.revision == "r-1"
            assert await engine.healthy()
            answer = await engine.evaluate(Entrypoint.AUTHZ_DECISION, {"go": True})
            assert answer == {"allow": True, "reason_code": "ok"}
            assert await engine.evaluate(Entrypoint.BUDGET_LIMITS, {}) == []

    asyncio.run(run())


def test_no_answer_a_conflict_and_a_runaway_each_have_their_code(opa: Path) -> None:
    async def run() -> None:
        async with started(opa, deadline_ms=300) as engine:
            with pytest.raises(PolicyError) as undefined:
                await engine.evaluate(Entrypoint.BUDGET_DECISION, {})
            assert undefined.value.reason_code == "policy_undefined"
            assert await refusal(engine, {"conflict": True}) == "policy_error"
            assert await refusal(engine, {"runaway": True}) == "policy_timeout"

    asyncio.run(run())


def test_opa_ends_an_evaluation_that_nobody_waits_for(opa: Path) -> None:
    """It would otherwise take the processor from every later call."""

    def cpu_ticks(pid: int) -> int:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    async def run() -> None:
        async with started(opa, deadline_ms=100) as engine:
            assert await refusal(engine, {"runaway": True}) == "policy_timeout"
            spent = -1

            async def idle() -> bool:
                nonlocal spent
                before, spent = spent, cpu_ticks(pid_of(engine))
                await asyncio.sleep(0.1)
                return before == spent

            await until(idle)

    asyncio.run(run())


def test_tests_are_not_served_and_what_opa_refuses_is_refused_in_its_words(opa: Path) -> None:
    async def run() -> None:
        ill: dict[str, str] = {**bundle().rego, "x_test.rego": "this is no Rego"}
        async with started(opa, bundle(ill)):
            pass
        with pytest.raises(BundleError, match=r"bundle/bad\.rego:2: rego_unsafe_var_error"):
            await ManagedOpa.start(
                bundle({**bundle().rego, "bad.rego": "package bad\np := x\n"}),
                opa=opa,
                deadline_ms=1_000,
                workers=1,
            )

    asyncio.run(run())


@pytest.mark.parametrize(
    ("budget", "missing"),
    (
        ("package pdp.budget\ndecision := 1", "pdp/budget/limits"),
        ("package pdp.budget\nlimits := []", "pdp/budget/decision"),
        ("package pdp.budget.decision\nlimits := []", "pdp/budget/limits"),
    ),
)
def test_a_bundle_that_lacks_an_entrypoint_is_refused(opa: Path, budget: str, missing: str) -> None:
    with pytest.raises(BundleError, match=f"has no rule {missing} in its Rego"):
        asyncio.run(
            ManagedOpa.start(
                bundle({"a.rego": AUTHZ, "b.rego": budget}), opa=opa, deadline_ms=1_000, workers=1
            )
        )


@pytest.mark.parametrize(
    "budget",
    (
        "package pdp\nbudget.limits := []\nbudget.decision := {}",
        "package pdp.budget\nlimits contains 1\ndecision.allow := true\ndecision[x] := 1 if x := input.x",
    ),
)
def test_an_entrypoint_may_be_written_as_any_rule(opa: Path, budget: str) -> None:
    async def run() -> None:
        async with started(opa, bundle({"a.rego": AUTHZ, "b.rego": budget})):
            pass

    asyncio.run(run())


def test_a_bundle_that_fails_without_input_is_refused(opa: Path) -> None:
    conflict = "package pdp.budget\nlimits := []\ndecision := 1\ndecision := count(data.tenants)"
    with pytest.raises(BundleError, match=r"can not be evaluated \(policy_error\)"):
        asyncio.run(
            ManagedOpa.start(
                bundle({"a.rego": AUTHZ, "b.rego": conflict}),
                opa=opa,
                deadline_ms=1_000,
                workers=1,
            )
        )


def test_an_opa_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="/opa can not be run: No such file or directory"):
        asyncio.run(ManagedOpa.start(bundle(), opa=tmp_path / "opa", deadline_ms=1_000, workers=1))


def test_where_no_folder_can_be_made_it_says_what_to_do(
    opa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / ("x" * 100)
    far.mkdir()
    for place in (far, tmp_path / "missing"):
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        with pytest.raises(BundleError, match="set TMPDIR"):
            asyncio.run(ManagedOpa.start(bundle(), opa=opa, deadline_ms=1_000, workers=1))
    assert list(far.iterdir()) == []


def test_a_file_that_can_not_lie_beside_the_others_is_named(opa: Path) -> None:
    files = {**bundle().rego, "data.json/more.rego": "package more"}
    with pytest.raises(BundleError, match=r"data\.json/more\.rego can not be written"):
        asyncio.run(ManagedOpa.start(bundle(files), opa=opa, deadline_ms=1_000, workers=1))


def test_only_the_sidecars_own_user_reaches_it(opa: Path) -> None:
    async def run() -> None:
        async with started(opa) as engine:
            folder = folder_of(engine)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            (socket,) = folder.iterdir()  # and no tenant's data
            assert stat.S_IMODE(socket.stat().st_mode) == 0o600
            listening = await asyncio.to_thread(
                (Path("/proc") / str(pid_of(engine)) / "net" / "tcp").read_text
            )
            inodes = {line.split()[9] for line in listening.splitlines()[1:]}
            mine = {
                str(link.readlink())
                for link in (Path("/proc") / str(pid_of(engine)) / "fd").iterdir()
            }
            assert not {f"socket:[{inode}]" for inode in inodes} & mine

    asyncio.run(run())


def test_a_policy_sees_nothing_of_the_sidecars_environment(
    opa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDP_SECRET", "hush")
    monkeypatch.setenv("OPA_RUN_ADDR", "127.0.0.1:1")
    spy = "package pdp.authz\ndecision := opa.runtime().env"

    async def run() -> Any:
        async with started(opa, bundle({"a.rego": spy, "b.rego": BUDGET})) as engine:
            return await engine.evaluate(Entrypoint.AUTHZ_DECISION, {})

    assert set(asyncio.run(run())) <= {"GOMAXPROCS", "LD_LIBRARY_PATH", "LC_CTYPE"}


def test_a_dead_opa_is_noticed_at_once_and_started_again(opa: Path) -> None:
    async def run() -> None:
        async with started(opa) as engine:
            first = pid_of(engine)
            asking = asyncio.create_task(refusal(engine, {"runaway": True}))

            async def asked() -> bool:
                return engine._server.client._turns._value < managed.QUESTIONS_PER_WORKER

            await until(asked)
            os.kill(first, signal.SIGKILL)
            assert await asking == "policy_unavailable"
            assert await refusal(engine, {"go": True}) == "policy_unavailable"
            await until(engine.healthy)
            assert pid_of(engine) != first
            assert await engine.evaluate(Entrypoint.BUDGET_LIMITS, {}) == []

    asyncio.run(run())


def test_an_opa_that_will_not_stay_is_started_less_and_less_often(
    opa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "opa"
    command.symlink_to(opa)
    monkeypatch.setattr(managed, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(managed, "FIRST_DELAY_SECONDS", 0.011)
    monkeypatch.setattr(managed, "MAX_DELAY_SECONDS", 0.044)
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        if seconds in {0.011, 0.022, 0.044}:
            waits.append(seconds)
        await sleep(0.001)

    async def run() -> None:
        async with started(command) as engine:
            command.unlink()
            command.write_text("#!/bin/sh\nexit 1\n")
            command.chmod(0o700)
            with monkeypatch.context() as patched:
                patched.setattr(asyncio, "sleep", noted)
                os.kill(pid_of(engine), signal.SIGKILL)

                async def tried() -> bool:
                    return len(waits) >= 5

                await until(tried)
            assert await refusal(engine, {"go": True}) == "policy_unavailable"
            command.unlink()
            command.symlink_to(opa)
            await until(engine.healthy)

    asyncio.run(run())
    assert waits[:5] == [0.011, 0.022, 0.044, 0.044, 0.044]


def test_a_failure_of_the_sidecar_itself_does_not_end_the_supervision(opa: Path) -> None:
    async def run() -> None:
        async with started(opa) as engine:
            start, failures = engine._start, [RuntimeError("no thread to be had")]

            async def failing_once() -> Any:
                if failures:
                    raise failures.pop()
                return await start()

            engine._start = failing_once
            os.kill(pid_of(engine), signal.SIGKILL)

            async def started_again() -> bool:
                return not failures and await engine.healthy()

            await until(started_again)

    asyncio.run(run())


def test_after_close_nothing_is_left_and_nothing_is_answered(opa: Path) -> None:
    async def run() -> None:
        async with started(opa) as engine:
            pid, folder = pid_of(engine), folder_of(engine)
        assert is_gone(pid)
        assert not folder.exists()
        assert await refusal(engine, {"go": True}) == "policy_unavailable"
        assert not await engine.healthy()

    asyncio.run(run())


@pytest.mark.parametrize("after_seconds", (0, 0.03))
def test_a_start_that_is_given_up_leaves_nothing(opa: Path, after_seconds: float) -> None:
    async def run() -> None:
        starting = asyncio.create_task(
            ManagedOpa.start(bundle(), opa=opa, deadline_ms=1_000, workers=1)
        )
        await asyncio.sleep(after_seconds)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)

    asyncio.run(run())


def test_opa_dies_with_a_sidecar_that_is_killed(opa: Path, temporary: Path) -> None:
    program = f"""
import asyncio
from pathlib import Path
from pdp.policy.bundle import Bundle
from pdp.policy.opa.managed import ManagedOpa
bundle = Bundle(revision="r-1", wasm=None, data=b"{{}}", rego={dict(bundle().rego)!r})
async def main():
    engine = await ManagedOpa.start(
        bundle, opa=Path({str(opa)!r}), deadline_ms=1000, workers=1
    )
    print(engine._server.process.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as sidecar:
        assert sidecar.stdout is not None
        pid = int(sidecar.stdout.readline())
        assert not is_gone(pid)
        sidecar.kill()
    asyncio.run(_until_gone(pid))
    for leftover in temporary.glob("pdp-opa-*"):
        subprocess.run(["rm", "-r", leftover], check=True)  # noqa: S607 - the system's


async def _until_gone(pid: int) -> None:
    async def gone() -> bool:
        return is_gone(pid)

    await until(gone)
