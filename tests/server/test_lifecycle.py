"""The sidecar's life: start, listen, drain, stop, and never two of them."""

from __future__ import annotations

import base64
import datetime as dt
import ipaddress
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdp.api.v1 import budget_pb2, common_pb2, execution_pb2
from pdp.permit import PermitKeySet
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
SERVICES = (
    "",
    "pdp.v1.AuthorizationService",
    "pdp.v1.BudgetService",
    "pdp.v1.ExecutionService",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("lifecycle") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/server/policy", target, opa=ROOT / ".tools/opa")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[SidecarProcess]:
    """One that no test stops or harms."""
    config = {"listen": {"metrics": "127.0.0.1:0", "tcp": {"address": "127.0.0.1:0"}}}
    directory = tmp_path_factory.mktemp("running")
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config) as sidecar:
        yield sidecar


def acting(target: str, credentials: grpc.ChannelCredentials | None = None) -> Caller:
    token = ISSUER.token("tenant_acme", "user-7", roles=["agent"])
    return Caller(target, token=token, credentials=credentials)


def charge(amount: int = 1) -> budget_pb2.ChargeBudgetRequest:
    return budget_pb2.ChargeBudgetRequest(
        idempotency_key=str(uuid.uuid4()),
        charges=[common_pb2.Charge(budget="llm", unit="tokens_out", amount=amount)],
    )


def health(channel: grpc.Channel, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    status: int = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5).status
    return status


def place(sidecar: SidecarProcess, scheme: str) -> str:
    """HOST:PORT of a listener, from the line that the sidecar prints."""
    found = re.findall(rf"{scheme}(127\.0\.0\.1:\d+)", sidecar.log.read_text(encoding="utf-8"))
    return str(found[-1])


def serve_once(config_file: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """``pdp serve`` with a configuration with which it can not start."""
    return subprocess.run(
        [sys.executable, "-m", "pdp", "serve", "--config", str(config_file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env={**os.environ, **changes},
    )


# Start


def test_grpc_has_the_settings_that_it_is_given(running: SidecarProcess) -> None:
    # What it does not know it names in the log, and goes on without: slower.
    log = running.log.read_text(encoding="utf-8")
    assert "serving on" in log
    assert "xperiment" not in log


def test_the_socket_and_the_state_are_closed_to_others(running: SidecarProcess) -> None:
    assert stat.S_IMODE(running.socket.stat().st_mode) == 0o660
    assert stat.S_IMODE(running.state.stat().st_mode) == 0o700
    for path in running.state.rglob("*"):
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_health_is_told_for_the_server_and_for_each_service(running: SidecarProcess) -> None:
    with grpc.insecure_channel(running.target) as channel:
        for service in SERVICES:
            assert health(channel, service) == health_pb2.HealthCheckResponse.SERVING
        refusal = refusal_of(health, channel, "pdp.v1.Nothing")
        assert refusal.status is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(running: SidecarProcess) -> None:
    with grpc.insecure_channel(running.target) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
        )
    listed = {service.name for service in answer.list_services_response.service}
    assert listed == {
        *SERVICES[1:],
        "grpc.health.v1.Health",
    }


def test_plain_tcp_on_loopback_answers_like_the_socket(running: SidecarProcess) -> None:
    with acting(place(running, " ")) as caller:
        assert caller.authorize("orders.read").decision


def test_a_second_sidecar_on_the_same_socket_does_not_start(
    running: SidecarProcess, tmp_path: Path
) -> None:
    second = serve_once(running.config_file, PDP_STATE_DIR=str(tmp_path / "other"))
    assert second.returncode == 3
    assert "The socket" in second.stderr
    assert "is in use by another sidecar" in second.stderr
    assert "Traceback" not in second.stderr
    with acting(running.target) as caller:
        assert caller.authorize("orders.read").decision


def test_a_second_sidecar_on_the_same_state_does_not_start(
    running: SidecarProcess, tmp_path: Path
) -> None:
    second = serve_once(running.config_file, PDP_LISTEN__UNIX=str(tmp_path / "other.sock"))
    assert second.returncode == 3
    assert "The state directory" in second.stderr
    assert "is in use by another sidecar" in second.stderr
    with acting(running.target) as caller:
        assert caller.authorize("orders.read").decision


def test_a_second_sidecar_on_the_same_port_does_not_start(
    running: SidecarProcess, tmp_path: Path
) -> None:
    own = {"PDP_STATE_DIR": str(tmp_path / "other"), "PDP_LISTEN__UNIX": str(tmp_path / "s")}
    for listener, variable in (
        (" ", "PDP_LISTEN__TCP__ADDRESS"),
        ("http://", "PDP_LISTEN__METRICS"),
    ):
        second = serve_once(running.config_file, **own, **{variable: place(running, listener)})
        assert second.returncode == 3
        assert "can not be listened on" in second.stderr
        assert "Traceback" not in second.stderr


def test_what_a_killed_sidecar_left_is_replaced(tmp_path: Path, bundle: Path) -> None:
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle) as sidecar:
        sidecar.kill()
        assert sidecar.socket.exists()
        sidecar.start()
        with acting(sidecar.target) as caller:
            assert caller.authorize("orders.read").decision


@pytest.fixture
def prepared(tmp_path: Path, bundle: Path) -> Iterator[SidecarProcess]:
    """A sidecar that could start, and has not."""
    sidecar = SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle)
    yield sidecar
    sidecar.close()


def changed(sidecar: SidecarProcess, **sections: object) -> Path:
    config = yaml.safe_load(sidecar.config_file.read_text(encoding="utf-8"))
    sidecar.config_file.write_text(yaml.safe_dump({**config, **sections}), encoding="utf-8")
    return sidecar.config_file


def no_bundle(sidecar: SidecarProcess) -> Path:
    return changed(sidecar, policy={"bundle": "missing.tar.gz"})


def broken_bundle(sidecar: SidecarProcess) -> Path:
    (sidecar.directory / "broken.tar.gz").write_bytes(b"\x1f\x8b not really")
    return changed(sidecar, policy={"bundle": "broken.tar.gz"})


def no_jwks(sidecar: SidecarProcess) -> Path:
    (sidecar.directory / "jwks.json").unlink()
    return sidecar.config_file


def open_key(sidecar: SidecarProcess) -> Path:
    key = sidecar.directory / "permit.pem"
    key.write_bytes(new_key())
    key.chmod(0o644)
    return changed(sidecar, permit={"key_file": "permit.pem"})


def wrong_key(sidecar: SidecarProcess) -> Path:
    key = sidecar.directory / "permit.pem"
    key.write_bytes(new_key())
    key.chmod(0o600)
    return changed(sidecar, permit={"key_file": "permit.pem"})


def torn_digest_key(sidecar: SidecarProcess) -> Path:
    sidecar.state.mkdir(mode=0o700)
    (sidecar.state / "audit-digest.key").write_bytes(b"short")
    return sidecar.config_file


def file_as_state(sidecar: SidecarProcess) -> Path:
    sidecar.state.write_text("", encoding="utf-8")
    return sidecar.config_file


def file_as_socket(sidecar: SidecarProcess) -> Path:
    sidecar.socket.write_text("precious", encoding="utf-8")
    return sidecar.config_file


def no_directory_for_socket(sidecar: SidecarProcess) -> Path:
    return changed(sidecar, listen={"unix": "/nowhere/pdp.sock", "metrics": None})


def long_socket(sidecar: SidecarProcess) -> Path:
    return changed(sidecar, listen={"unix": str(sidecar.directory / ("s" * 120)), "metrics": None})


def no_certificate(sidecar: SidecarProcess) -> Path:
    tls = {"certificate_file": "no.pem", "key_file": "no.pem"}
    return changed(sidecar, listen={"unix": None, "tcp": {"address": "127.0.0.1:0", "tls": tls}})


def bad_certificate(sidecar: SidecarProcess) -> Path:
    (sidecar.directory / "bad.pem").write_text("no certificate", encoding="utf-8")
    tls = {"certificate_file": "bad.pem", "key_file": "bad.pem"}
    return changed(sidecar, listen={"unix": None, "tcp": {"address": "127.0.0.1:0", "tls": tls}})


def stranger_as_certificate(sidecar: SidecarProcess) -> Path:
    tls = certify(sidecar.directory)
    (sidecar.directory / "server.key").write_bytes(new_key())
    return changed(sidecar, listen={"unix": None, "tcp": {"address": "127.0.0.1:0", "tls": tls}})


def broken_ledger(sidecar: SidecarProcess) -> Path:
    sidecar.state.mkdir(mode=0o700)
    (sidecar.state / "ledger.db").write_bytes(b"this is no database" * 100)
    return sidecar.config_file


CAN_NOT_START: dict[str, tuple[Callable[[SidecarProcess], Path], str]] = {
    "missing bundle": (no_bundle, "missing.tar.gz"),
    "broken bundle": (broken_bundle, "broken.tar.gz"),
    "key open to others": (open_key, "chmod 600"),
    "key of another kind": (wrong_key, "Ed25519"),
    "torn digest key": (torn_digest_key, "audit-digest.key"),
    "file as state directory": (file_as_state, "state"),
    "file as socket": (file_as_socket, "is no socket"),
    "no directory for the socket": (no_directory_for_socket, "/nowhere/pdp.sock"),
    "socket path too long": (long_socket, "too long"),
    "bad certificate": (bad_certificate, "bad.pem"),
    "key of another certificate": (stranger_as_certificate, "server.key"),
    "broken ledger": (broken_ledger, "ledger.db"),
}


QUICK = {"broken bundle", "key open to others", "file as socket"}
"""The others take a second each and run with the slow tests."""


@pytest.mark.parametrize(
    "case",
    tuple(
        pytest.param(case, marks=() if case in QUICK else pytest.mark.slow)
        for case in CAN_NOT_START
    ),
)
def test_a_sidecar_that_can_not_start_says_why_in_a_line_and_exits_3(
    prepared: SidecarProcess, case: str
) -> None:
    spoil, named = CAN_NOT_START[case]
    done = serve_once(spoil(prepared))
    assert done.returncode == 3, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("pdp: ")]
    assert len(said) == 1
    assert named in said[0]
    assert "Traceback" not in done.stderr
    assert "serving" not in done.stderr
    if case == "file as socket":
        assert prepared.socket.read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("spoil", "said"),
    (
        (no_jwks, "identity.issuers.0.jwks_file: there is no file "),
        (no_certificate, "listen.tcp.tls.certificate_file: there is no file "),
    ),
)
def test_a_file_that_is_not_there_is_told_by_line_and_key_and_exits_2(
    prepared: SidecarProcess, spoil: Callable[[SidecarProcess], Path], said: str
) -> None:
    file = spoil(prepared)
    done = serve_once(file)
    assert done.returncode == 2
    assert re.search(rf"^{re.escape(str(file))}:\d+: {re.escape(said)}", done.stderr, re.MULTILINE)


def test_a_wrong_configuration_is_told_by_line_and_exits_2(prepared: SidecarProcess) -> None:
    done = serve_once(changed(prepared, polices={}))
    assert done.returncode == 2
    assert "polices" in done.stderr
    assert "policy" in done.stderr
    assert serve_once(prepared.directory / "missing.yaml").returncode == 2


def test_plain_tcp_beyond_loopback_is_refused(prepared: SidecarProcess) -> None:
    done = serve_once(prepared.config_file, PDP_LISTEN__TCP__ADDRESS="0.0.0.0:0")
    assert done.returncode == 2
    assert "set tls" in done.stderr


# Stop


def test_sigterm_under_load_loses_nothing_that_was_answered(tmp_path: Path, bundle: Path) -> None:
    as_fast_as_it_can = {"limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}}}
    sidecar = SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=as_fast_as_it_can)
    acknowledged: list[tuple[int, str]] = []
    refusals: list[grpc.StatusCode] = []
    stopped = threading.Event()

    def load() -> None:
        with acting(sidecar.target) as caller:
            while not stopped.is_set():
                try:
                    receipt = caller.budget.ChargeBudget(charge()).audit
                except grpc.RpcError as error:
                    refusals.append(error.code())
                    return
                acknowledged.append((receipt.sequence, receipt.hash))

    with sidecar:
        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        _wait_for(lambda: len(acknowledged) > 100)

        assert sidecar.terminate() == 0

        stopped.set()
        for thread in threads:
            thread.join()
        assert set(refusals) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert not sidecar.socket.exists()
        segment = max((sidecar.state / "audit").glob("*.jsonl"))
        chain = [json.loads(line) for line in segment.read_text(encoding="utf-8").splitlines()]
        hashes_by_sequence = {record["seq"]: record["hash"] for record in chain}
        assert all(hashes_by_sequence[sequence] == hash_ for sequence, hash_ in acknowledged)
        assert chain[-1]["action"] == "audit.stop"
        verified = subprocess.run(
            [sys.executable, "-m", "pdp", "audit", "verify", str(sidecar.state / "audit")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert verified.returncode == 0, verified.stdout
        sidecar.start()
        with acting(sidecar.target) as caller:
            limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
            (tokens,) = (limit for limit in limits if limit.limit_id == "tokens")
            charged = [record for record in chain if record["outcome"] == "charged"]
            assert tokens.spent == len(charged) >= len(acknowledged)


def test_a_call_under_way_is_finished_before_the_sidecar_stops(
    tmp_path: Path, bundle: Path
) -> None:
    patient = {"policy": {"bundle": str(bundle), "evaluation_timeout_ms": 1_000}}
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=patient) as sidecar,
        acting(sidecar.target) as caller,
        grpc.insecure_channel(sidecar.target) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(
            health_pb2.HealthCheckRequest(service="pdp.v1.AuthorizationService"), timeout=20
        )
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        caller.authorize("orders.read")
        answers: list[Any] = []
        call = threading.Thread(target=lambda: answers.append(caller.authorize("tools.runaway")))
        call.start()
        _wait_for(lambda: sidecar.process is not None and _is_busy(sidecar.process.pid))
        assert sidecar.process is not None
        sidecar.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        call.join()
        assert answers[0].reason_code == "policy_timeout"
        # Well within drain_seconds, though the watcher is still there.
        assert sidecar.process.wait(6) == 0


# HTTP


def get(sidecar: SidecarProcess, path: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(f"http://{place(sidecar, 'http://')}{path}", timeout=5) as got:
            return got.status, got.headers["Content-Type"], got.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def test_probes_and_keys_are_served_over_http(running: SidecarProcess) -> None:
    assert get(running, "/healthz")[0] == 200
    assert get(running, "/readyz")[0] == 200
    assert get(running, "/anything")[0] == 404
    status, kind, body = get(running, "/.well-known/jwks.json")
    assert (status, kind) == (200, "application/jwk-set+json")
    with acting(running.target) as caller:
        permit = caller.authorize("orders.read").permit
        assert (
            body == caller.execution.GetPermitKeys(execution_pb2.GetPermitKeysRequest()).jwks_json
        )
    assert PermitKeySet.from_jwks(body).find(_kid(permit)) is not None
    assert '"d"' not in body


def test_metrics_count_what_happened_and_name_no_tenant(running: SidecarProcess) -> None:
    with acting(running.target) as caller:
        caller.authorize("tools.closed")
        for _ in range(2):
            caller.authorize("tools.costly")
        refusal_of(caller.budget.ChargeBudget, charge(2 * 10**9))
    with Caller(running.target) as nobody:
        refusal_of(nobody.authorize, "orders.read")

    status, kind, body = get(running, "/metrics")

    assert status == 200
    assert kind.startswith("text/plain")
    for line in (
        'pdp_decisions_total{outcome="denied",reason_code="closed_on_sundays"} 1.0',
        'pdp_errors_total{method="Authorize",reason_code="token_missing"} 1.0',
        'pdp_budget_refusals_total{method="Authorize"} 1.0',
        'pdp_budget_refusals_total{method="ChargeBudget"} 1.0',
        'pdp_step_seconds_count{step="audit"}',
        'pdp_call_seconds_count{method="Authorize",status="UNAUTHENTICATED"} 1.0',
        "pdp_calls_under_way 0.0",
        "pdp_audit_failures_total 0.0",
        "pdp_ledger_failures_total 0.0",
        'pdp_policy_info{revision="sha256:',
    ):
        assert line in body
    assert "tenant_acme" not in body
    assert "user-7" not in body


def test_anything_but_get_is_refused(running: SidecarProcess) -> None:
    with socket.create_connection(
        ("127.0.0.1", int(place(running, "http://").split(":")[1]))
    ) as raw:
        raw.settimeout(10)
        raw.sendall(b"POST /metrics HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.0 405")


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tls")
    certify(directory)
    return directory


def certify(directory: Path) -> dict[str, str]:
    """Make ca.pem, server.pem, server.key, client.pem, client.key; the tls section."""
    now = dt.datetime.now(dt.UTC)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])

    def certificate(name: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(ca_key, hashes.SHA256())
            .public_bytes(Encoding.PEM)
        )

    (directory / "ca.pem").write_bytes(certificate(ca_name, ca_key, ca=True))
    for who in ("server", "client"):
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
        (directory / f"{who}.pem").write_bytes(certificate(name, key, ca=False))
        (directory / f"{who}.key").write_bytes(_pem(key))
    return {
        "certificate_file": str(directory / "server.pem"),
        "key_file": str(directory / "server.key"),
    }


def credentials(certificates: Path, *, client: bool) -> grpc.ChannelCredentials:
    def read(name: str) -> bytes:
        return (certificates / name).read_bytes()

    if not client:
        return grpc.ssl_channel_credentials(read("ca.pem"))
    return grpc.ssl_channel_credentials(read("ca.pem"), read("client.key"), read("client.pem"))


@pytest.mark.parametrize("mutual", (False, True), ids=("tls", "mtls"))
def test_tls_lets_in_who_may_come_in_and_nobody_else(
    tmp_path: Path, bundle: Path, certificates: Path, *, mutual: bool
) -> None:
    tls = {
        "certificate_file": str(certificates / "server.pem"),
        "key_file": str(certificates / "server.key"),
        **({"client_ca_file": str(certificates / "ca.pem")} if mutual else {}),
    }
    config = {"listen": {"tcp": {"address": "127.0.0.1:0", "tls": tls}}}
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=config) as sidecar:
        target = place(sidecar, " ")
        with acting(target, credentials(certificates, client=mutual)) as caller:
            assert caller.authorize("orders.read").decision
        with acting(target) as plain:
            assert refusal_of(plain.authorize, "a").status is grpc.StatusCode.UNAVAILABLE
        with acting(target, grpc.ssl_channel_credentials()) as distrustful:
            assert refusal_of(distrustful.authorize, "a").status is grpc.StatusCode.UNAVAILABLE
        with acting(target, credentials(certificates, client=False)) as anonymous:
            if mutual:
                assert refusal_of(anonymous.authorize, "a").status is grpc.StatusCode.UNAVAILABLE
            else:
                assert anonymous.authorize("orders.read").decision


def new_key() -> bytes:
    return _pem(ec.generate_private_key(ec.SECP256R1()))


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _kid(permit: str) -> str:
    header = permit.split(".", maxsplit=1)[0]
    decoded = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    return str(decoded["kid"])


def _is_busy(pid: int) -> bool:
    """Whether one of its threads is working for more than a moment."""

    def ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(0.05)
    return ticks() - before >= 3


def _wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
