"""Out of descriptors, of disk, of memory: refused for that reason, nothing lost, and back again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from pdp.api.v1 import authorization_pb2, authorization_pb2_grpc
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from tests.e2e.operating import records, soon
from tests.faults.agents import GONE, Agent, at_work, check_records, check_sums

ROOT: Final = Path(__file__).resolve().parents[2]
ISSUER: Final = TokenIssuer()
NO_ROOM: Final = ("audit_unavailable", "budget_unavailable", "permit_unavailable")
CONFIG: Final[dict[str, Any]] = {
    "limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}},
    "permit": {"ttl_seconds": 3_600},
    "budget": {"hold_ttl_seconds": 3_600},
    # Records as large as they get, so that segments and disks are full soon.
    "audit": {"segment_max_bytes": 1_048_576, "record_policy_input": True},
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("resources") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/faults/policy", target, opa=ROOT / ".tools/opa")


def new_agents(
    count: int,
    bears: Collection[str] = NO_ROOM,
    gone: Collection[grpc.StatusCode] = GONE,
) -> list[Agent]:
    dice = random.Random(918)  # noqa: S311 - what they do is no secret
    return [
        Agent(f"agent-{number}", "tenant_acme", ISSUER, dice, bears=bears, gone=gone)
        for number in range(count)
    ]


def answers(agents: list[Agent]) -> int:
    return sum(len(agent.knows.answered) for agent in agents)


def process_of(sidecar: SidecarProcess) -> int:
    assert sidecar.process is not None
    return sidecar.process.pid


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def no_descriptor_left(sidecar: SidecarProcess) -> Iterator[None]:
    """The process keeps what it has open, and can open nothing more."""
    process = process_of(sidecar)
    usual = resource.prlimit(process, resource.RLIMIT_NOFILE)
    taken = {int(path.name) for path in Path(f"/proc/{process}/fd").iterdir()}
    lowest_free = next(number for number in itertools.count() if number not in taken)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (lowest_free, usual[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, usual)


def answer_of(caller: Caller) -> str:
    return caller.authorize("orders.update", {"note": "x" * 20_000}).reason_code


@pytest.mark.slow
def test_out_of_descriptors_open_calls_go_on_new_ones_wait_and_all_is_well_when_there_are_some(
    tmp_path: Path, bundle: Path
) -> None:
    token = ISSUER.token("tenant_acme", "user-7", roles=["agent"])
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=CONFIG) as sidecar,
        Caller(sidecar.target, token=token) as known,
        Caller(sidecar.target, token=token, timeout_seconds=1) as late,
    ):
        assert answer_of(known) == "ok"
        with no_descriptor_left(sidecar):
            refused = refusal_of(answer_of, late)
            assert refused.status in {
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.UNAVAILABLE,
            }
            assert [answer_of(known) for _ in range(10)] == ["ok"] * 10
            # A caller who waits to be let in costs no more than a look now and then.
            before, began = cpu_seconds(process_of(sidecar)), time.monotonic()
            with contextlib.suppress(grpc.RpcError):
                answer_of(late)
            refusal_of(answer_of, late)
            share = (cpu_seconds(process_of(sidecar)) - before) / (time.monotonic() - began)
            assert share < 0.5, "it is busy with nothing"
            # Until a file has to be opened: for the next segment of the audit log.
            assert _ask_until_refused(lambda: answer_of(known)) == "audit_unavailable"
        assert soon(lambda: _asked(lambda: answer_of(known)) == "ok")
        assert soon(lambda: _asked(lambda: answer_of(late)) == "ok")
        check_records([], sidecar)
    [gap] = [record for record in records(sidecar) if record["action"] == "audit.gap"]
    assert gap["detail"]["refused"] >= 1


def _ask_until_refused(ask: Callable[[], str]) -> str:
    for _ in range(200):
        answer = _asked(ask)
        if answer != "ok":
            return answer
    raise AssertionError("nothing was refused")


def _asked(ask: Callable[[], str]) -> str:
    """The answer, or why there is none."""
    try:
        return ask()
    except grpc.RpcError as error:
        return refusal_of(_raise, error).reason_code


def _raise(error: grpc.RpcError) -> None:
    raise error


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes, in the place of a sidecar's state."""
    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    if not mounted("-t", "tmpfs", "-o", "size=6m,mode=0700", "tmpfs", str(place)):
        pytest.skip("may not mount")
    yield place
    subprocess.run((shutil.which("umount") or "umount", "--lazy", str(place)), check=True)


def mounted(*words: str) -> bool:
    command = (shutil.which("mount") or "mount", *words)
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_under_load_loses_nothing_and_calls_go_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, bundle: Path
) -> None:
    agents = new_agents(4)
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=CONFIG) as sidecar:
        for agent in agents:
            agent.meet(sidecar.target, "session")

        def refusals() -> Counter[str]:
            return sum((agent.refused for agent in agents), Counter[str]())

        with at_work(agents, goes_on=lambda: refusals().total() < 200):
            assert soon(lambda: refusals().total() > 0)
        assert refusals().keys() <= set(NO_ROOM)
        assert answers(agents) > 100, "it was full before it began"

        assert mounted("-o", "remount,size=200m", str(small_disk))

        with Caller(sidecar.target, token=ISSUER.token("tenant_globex", "user-7")) as caller:
            assert soon(lambda: _asked(lambda: answer_of(caller)) == "ok")
        for agent in agents:
            agent.settle_doubts()
            agent.check_answers(50)
            agent.check_permits()
        check_sums(agents)
        check_records(agents, sidecar)
        for agent in agents:
            agent.leave()
        assert sidecar.terminate() == 0
        check_records(agents, sidecar)
        gaps = [record for record in records(sidecar) if record["action"] == "audit.gap"]
        assert (len(gaps) > 0) == (refusals()["audit_unavailable"] > 0)


LARGEST_BYTES: Final = 4_000_000
AT_ONCE: Final = 24


@pytest.mark.slow
def test_the_largest_messages_take_no_more_memory_than_a_few_times_what_is_sent_at_once(
    tmp_path: Path, bundle: Path
) -> None:
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=CONFIG) as sidecar:
        before = memory_bytes(sidecar, "VmHWM")
        refused = asyncio.run(_send_large_messages(sidecar.target, rounds=12))
        grown = memory_bytes(sidecar, "VmHWM") - before
        assert refused <= {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}
        # Each is there as gRPC has read it and as it was parsed, and heaps have holes.
        assert grown < 4.5 * AT_ONCE * LARGEST_BYTES
        with Caller(sidecar.target, token=ISSUER.token("tenant_acme", "user-7")) as caller:
            assert answer_of(caller) == "ok"
        assert soon(lambda: memory_bytes(sidecar, "VmRSS") < before + 48 * 1024 * 1024)


@pytest.mark.slow
def test_without_memory_it_is_gone_and_nothing_that_was_said_is_lost(
    tmp_path: Path, bundle: Path
) -> None:
    bears = (*NO_ROOM, "internal", "policy_error", "policy_unavailable")
    # gRPC says UNKNOWN of a message that it has no memory for.
    agents = new_agents(4, bears, (*GONE, grpc.StatusCode.UNKNOWN))
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=CONFIG) as sidecar:
        for room_mib in (0, 8, 64):
            for agent in agents:
                agent.meet(sidecar.target, "session")
            assert _end_for_want_of_memory(sidecar, agents, room_mib) == -signal.SIGABRT
            sidecar.start()
            for agent in agents:
                agent.settle_doubts()
                agent.check_answers(20)
                agent.check_permits()
            check_sums(agents)
            check_records(agents, sidecar)
        for agent in agents:
            agent.leave()


def _end_for_want_of_memory(sidecar: SidecarProcess, agents: list[Agent], room_mib: int) -> int:
    """How it ends, in the midst of agents' work, when it gets no more than so much more."""
    enough = answers(agents) + 100
    with at_work(agents):
        assert soon(lambda: answers(agents) > enough)
        limit = memory_bytes(sidecar, "VmData") + room_mib * 1024 * 1024
        resource.prlimit(process_of(sidecar), resource.RLIMIT_DATA, (limit, limit))
        asyncio.run(_send_large_messages(sidecar.target, rounds=3))
        assert sidecar.process is not None
        return sidecar.process.wait(20)


def memory_bytes(sidecar: SidecarProcess, which: str) -> int:
    """VmHWM: at most until now; VmRSS: now; VmData: what it may write to, used or not."""
    status = Path(f"/proc/{process_of(sidecar)}/status").read_text(encoding="utf-8")
    [kib] = [line.split()[1] for line in status.splitlines() if line.startswith(f"{which}:")]
    return int(kib) * 1024


async def _send_large_messages(target: str, *, rounds: int) -> set[str]:
    """From so many at once; how their calls ended."""
    message = authorization_pb2.AuthorizeRequest(
        request_id="large", arguments_json=b"x" * LARGEST_BYTES
    )
    ended: set[str] = set()
    async with grpc.aio.insecure_channel(target) as channel:
        ask: authorization_pb2_grpc.AuthorizationServiceAsyncStub
        ask = authorization_pb2_grpc.AuthorizationServiceStub(channel)

        async def send() -> None:
            for _ in range(rounds):
                try:
                    await ask.Authorize(message, timeout=60)
                except grpc.aio.AioRpcError as error:
                    ended.add(error.code().name)

        await asyncio.gather(*(send() for _ in range(AT_ONCE)))
    return ended
