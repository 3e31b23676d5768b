"""A policy that changes while the sidecar serves."""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from pdp.api.v1 import authorization_pb2
from pdp.cli.app import app
from pdp.policy.archive import pack, read_archive
from pdp.testing import Caller, SidecarProcess, TokenIssuer

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
STARTER = read_archive((ROOT / "policies/bundle.tar.gz").read_bytes(), place="starter")


def release(path: Path, number: int, *, tools: tuple[str, ...] = ("orders.read",)) -> str:
    """Put a bundle there under which reading an order costs NUMBER calls; its revision."""
    manifest = json.loads(STARTER[".manifest"]) | {
        "revision": f"r{number}",
        "metadata": {"pdp": {"sequence": number}},
    }
    data = json.loads(STARTER["data.json"])
    charge = {"budget": "tools", "unit": "calls", "amount": number}
    data["tools"]["orders.read"]["charge"] = [charge]
    acme = data["tenants"]["tenant_acme"]
    acme["roles"] = {"viewer": {"tools": list(tools)}}
    acme["limits"] = [
        {
            "id": "calls", "budget": "tools", "unit": "calls", "window": "lifetime",
            "limit": 10**12, "scope": "tenant",
        }
    ]  # fmt: skip
    content = pack(
        {
            **STARTER,
            ".manifest": json.dumps(manifest).encode(),
            "data.json": json.dumps(data).encode(),
        }
    )
    draft = path.with_suffix(".draft")
    draft.write_bytes(content)
    draft.replace(path)
    return f"r{number}"


def config(path: Path, **policy: Any) -> dict[str, Any]:
    return {
        "listen": {"metrics": "127.0.0.1:0"},
        "limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}},
        "policy": {"bundles": {"main": {"path": str(path), "poll_seconds": 0.1}}, **policy},
    }


def serving(directory: Path, path: Path, **policy: Any) -> SidecarProcess:
    return SidecarProcess(directory, issuer=ISSUER, bundle=path, config=config(path, **policy))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "bundle.tar.gz"
    release(path, 1)
    return path


def acting(sidecar: SidecarProcess) -> Caller:
    token = ISSUER.token("tenant_acme", "ann", roles=["viewer"], scopes=["orders:read"])
    return Caller(sidecar.target, token=token)


def ask(caller: Caller) -> authorization_pb2.AuthorizeResponse:
    return caller.authorize("orders.read", {"order_id": "918"})


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def http_address(sidecar: SidecarProcess) -> str:
    # Calls are answered a moment before it is said where the rest is.
    until(lambda: "http://" in sidecar.log.read_text(encoding="utf-8"))
    line = sidecar.log.read_text(encoding="utf-8")
    return line[line.rindex("http://") :].split()[0].rstrip(",")


def http(sidecar: SidecarProcess, path: str) -> str:
    with urllib.request.urlopen(http_address(sidecar) + path, timeout=5) as response:  # noqa: S310 - loopback
        return str(response.read().decode())


def records(sidecar: SidecarProcess) -> list[dict[str, Any]]:
    files = sorted((sidecar.state / "audit").iterdir())
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def resident_mib(sidecar: SidecarProcess) -> float:
    assert sidecar.process is not None
    status = Path(f"/proc/{sidecar.process.pid}/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def reload_under_load(directory: Path, path: Path, reloads: int) -> tuple[int, list[float]]:
    """Reload while two callers ask; how many calls they made, and the sidecar's resident
    memory after each reload.
    """
    calls = [0, 0]
    memory: list[float] = []
    with serving(directory, path) as sidecar:
        last = f"r{reloads + 1}"
        failures: list[object] = []
        ended = threading.Event()

        def call(index: int) -> None:
            with acting(sidecar) as caller:
                newest = 0
                while not ended.is_set():
                    answer = ask(caller)
                    calls[index] += 1
                    number = int(answer.policy_revision.removeprefix("r"))
                    held = [charge.amount for charge in answer.hold.charges]
                    if not answer.decision or held != [number] or number < newest:
                        failures.append(answer)
                    newest = number

        def watched() -> Iterator[str]:
            with acting(sidecar) as caller:
                watch = caller.authorization.Watch(authorization_pb2.WatchRequest(), timeout=600)
                yield from (event.policy.revision for event in watch)

        revisions = watched()
        assert next(revisions) == "r1"
        threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        try:
            for number in range(2, reloads + 2):
                revision = release(path, number)
                assert next(revisions) == revision
                memory.append(resident_mib(sidecar))
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert failures == []
        with acting(sidecar) as caller:
            assert ask(caller).policy_revision == last
    revisions_on_record = [
        record["policy_revision"] for record in records(sidecar) if record["type"] == "policy"
    ]
    assert revisions_on_record == [f"r{number}" for number in range(1, reloads + 2)]
    return sum(calls), memory


def test_no_call_fails_or_sees_two_revisions_while_the_policy_changes(
    tmp_path: Path, path: Path
) -> None:
    calls, _ = reload_under_load(tmp_path, path, reloads=5)
    assert calls > 20


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hundred_reloads_under_load_leave_nothing_behind(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, memory = reload_under_load(tmp_path, path, reloads=200)
    settled = memory[50:]
    slope = statistics.linear_regression(range(len(settled)), settled).slope
    with capsys.disabled():
        sys.stdout.write(
            f"\n{calls} calls during 200 reloads, none failed; resident {memory[0]:.0f} MiB,"
            f" then {settled[-1]:.0f} MiB, slope {slope * 1024:.0f} KiB per reload\n"
        )
    # 200 engines of this bundle would be some 200 MiB.
    assert max(settled) - min(settled) < 30


def test_watch_tells_of_the_end_too(tmp_path: Path, path: Path) -> None:
    with serving(tmp_path, path) as sidecar, acting(sidecar) as caller:
        watch = caller.authorization.Watch(authorization_pb2.WatchRequest(), timeout=30)
        assert next(watch).policy.revision == "r1"
        assert sidecar.process is not None
        sidecar.process.terminate()
        assert next(watch).HasField("draining")
        with pytest.raises(StopIteration):
            next(watch)
        assert sidecar.process.wait(20) == 0


def test_watch_needs_a_token(tmp_path: Path, path: Path) -> None:
    with serving(tmp_path, path) as sidecar, Caller(sidecar.target) as stranger:
        with pytest.raises(grpc.RpcError) as refused:
            next(stranger.authorization.Watch(authorization_pb2.WatchRequest(), timeout=10))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "watch" in [record["action"] for record in records(sidecar)]


def test_a_refused_bundle_is_seen_and_the_one_in_force_stays(tmp_path: Path, path: Path) -> None:
    with serving(tmp_path, path) as sidecar, acting(sidecar) as caller:
        address = http_address(sidecar)
        well = CliRunner().invoke(app, ["status", "--url", address])
        assert well.exit_code == 0, well.output
        assert "all is well" in well.output
        path.write_bytes(b"not a bundle")
        until(lambda: "pdp_policy_refusals_total{" in http(sidecar, "/metrics"))
        assert ask(caller).policy_revision == "r1"
        broken = CliRunner().invoke(app, ["status", "--url", address, "--output", "json"])
        assert broken.exit_code == 1
        (fault,) = json.loads(broken.stdout)["faults"]
        assert fault == (f"bundle main: The policy bundle {path} is not a whole .tar.gz.")
        (told,) = [record for record in records(sidecar) if record["outcome"] == "refused"]
        assert told["detail"]["bundle"] == "main"
        release(path, 2)
        until(lambda: ask(caller).policy_revision == "r2")
        assert json.loads(http(sidecar, "/status"))["policy"]["bundles"][0]["error"] is None


def test_status_of_nothing_says_what_to_name() -> None:
    found = CliRunner().invoke(app, ["status", "--url", "http://127.0.0.1:9"])
    assert found.exit_code == 2
    assert "--url" in found.stderr


def test_a_policy_past_its_age_is_denied_and_probes_say_so(tmp_path: Path, path: Path) -> None:
    with serving(tmp_path, path, max_age_seconds=1) as sidecar, acting(sidecar) as caller:
        assert ask(caller).decision
        path.unlink()
        until(lambda: ask(caller).reason_code == "policy_stale")
        stub: Any = health_pb2_grpc.HealthStub(caller.channel)
        until(
            lambda: (
                stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
                == health_pb2.HealthCheckResponse.NOT_SERVING
            )
        )
        with pytest.raises(urllib.error.HTTPError) as unready:
            http(sidecar, "/readyz")
        assert unready.value.code == 503
        unready.value.close()
        assert "pdp_policy_stale 1.0" in http(sidecar, "/metrics")
        release(path, 2)
        until(lambda: ask(caller).policy_revision == "r2")
        until(
            lambda: (
                stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status
                == health_pb2.HealthCheckResponse.SERVING
            )
        )


def test_a_sidecar_starts_again_without_its_source(tmp_path: Path, path: Path) -> None:
    sidecar = serving(tmp_path, path)
    with sidecar, acting(sidecar) as caller:
        release(path, 2)
        until(lambda: ask(caller).policy_revision == "r2")
        sidecar.kill()
        path.unlink()
        sidecar.start()
        until(sidecar.socket.exists)
        with acting(sidecar) as again:
            assert ask(again).policy_revision == "r2"
        release(path, 1)
        until(lambda: "older than one that was taken before" in http(sidecar, "/status"))
        with acting(sidecar) as again:
            assert ask(again).policy_revision == "r2"


def test_what_a_candidate_would_answer_otherwise_is_counted_and_on_record(
    tmp_path: Path, path: Path
) -> None:
    candidate = tmp_path / "candidate.tar.gz"
    release(candidate, 1, tools=())
    shadow = {"bundles": {"next": {"path": str(candidate), "poll_seconds": 0.1}}}
    with serving(tmp_path, path, shadow=shadow) as sidecar, acting(sidecar) as caller:
        answer = ask(caller)
        assert answer.decision
        until(lambda: 'pdp_shadow_answers_total{result="differs"} 1.0' in http(sidecar, "/metrics"))
        release(candidate, 2)
        until(lambda: '"r2"' in http(sidecar, "/status"))
        assert ask(caller).policy_revision == "r1"
    told = next(
        record
        for record in records(sidecar)
        if record["action"] == "orders.read" and record["type"] == "shadow"
    )
    assert (told["tenant_id"], told["actor_id"]) == ("tenant_acme", "ann")
    assert (told["outcome"], told["reason_code"]) == ("denied", "role_not_allowed")
    assert told["detail"]["active"] == {"allow": True, "policy_revision": "r1", "reason_code": "ok"}


def test_a_managed_opa_decides_and_changes_like_the_embedded_engine(
    tmp_path: Path, path: Path
) -> None:
    engine = {"opa": {"managed": True}}
    opa = str(ROOT / ".tools/opa")
    managed = serving(tmp_path, path, engine=engine, opa_command=opa)
    with managed as sidecar, acting(sidecar) as caller:
        answer = ask(caller)
        assert (answer.decision, answer.policy_revision) == (True, "r1")
        release(path, 2)
        until(lambda: ask(caller).policy_revision == "r2")
        assert [charge.amount for charge in ask(caller).hold.charges] == [2]
