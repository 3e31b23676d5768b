"""What the pages for operators and for security say is so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from pdp.api.v1 import execution_pb2
from pdp.permit import PermitKeySet
from pdp.permit.ring import KeyRing
from pdp.reason import ReasonCode
from pdp.server.metrics import Metrics
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of

ROOT = Path(__file__).parents[2]
OPERATORS = (ROOT / "docs/operators.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs/security.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", OPERATORS, re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("pdp serve")  # every test with a sidecar runs that one
]
ISSUER = TokenIssuer()


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("operators")
    bundle = build_bundle(
        ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    config = {"listen": {"metrics": "127.0.0.1:0"}}
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config) as process:
        yield process


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_works_as_it_stands_there(sidecar: SidecarProcess, command: str) -> None:
    arguments = shlex.split(command)
    if shutil.which(arguments[0]) is None and arguments[0] != "pdp":
        pytest.skip(f"{arguments[0]} is not installed")
    said = sidecar.log.read_text(encoding="utf-8")
    places = {
        "/etc/pdp/pdp.yaml": str(sidecar.config_file),
        "/etc/pdp": str(sidecar.directory),
        "/var/lib/pdp": str(sidecar.state),
        "http://127.0.0.1:9464": re.findall(r"http://[\d.:]+", said)[-1],
    }
    for written, real in places.items():
        command = command.replace(written, real)
    if arguments[0] == "chmod":
        (sidecar.directory / "permit-key.pem").touch()
    shown = shlex.split(command)
    run = [sys.executable, "-m", "pdp", *shown[1:]] if shown[0] == "pdp" else shown
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    if arguments[0] == "openssl":
        (sidecar.directory / "permit-key.pem").chmod(0o600)
        assert KeyRing.from_file(sidecar.directory / "permit-key.pem").signing.kid


EXAMPLES = [
    yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", OPERATORS, re.DOTALL)
]


@pytest.mark.parametrize("sections", EXAMPLES, ids="-".join)
def test_every_configuration_is_one_that_is_accepted(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    """The first is whole; the others are sections that take the place of its own."""
    example = json.dumps({**EXAMPLES[0], **sections})
    for name in re.findall(r"/etc/pdp/([\w.-]+)", example):
        (tmp_path / name).touch()
    (tmp_path / "pdp.yaml").write_text(example.replace("/etc/pdp", str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "pdp", "config", "check", str(tmp_path / "pdp.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_metric_is_in_the_table_as_it_is() -> None:
    rows = []
    for metric in Metrics().registry._collector_to_names:
        assert isinstance(metric, MetricWrapperBase)
        kind = str(metric._type)
        suffix = {"counter": "_total", "info": "_info"}.get(kind, "")
        labels = metric._labelnames or (("revision",) if kind == "info" else ())
        shown = ", ".join(f"`{label}`" for label in labels)
        cells = [f"`{metric._name}{suffix}`", kind, shown, metric._documentation]
        rows.append("| " + " | ".join(cells).replace("|  |", "| |") + " |")
    table = [row for row in OPERATORS.splitlines() if row.startswith("| `pdp_")]
    assert sorted(table) == sorted(rows)


def test_every_reason_code_has_a_place_to_look() -> None:
    section = OPERATORS.split("## Troubleshooting")[1]
    assert [code for code in ReasonCode if f"`{code}`" not in section] == [ReasonCode.OK]


def test_every_file_of_the_state_directory_is_explained(sidecar: SidecarProcess) -> None:
    section = OPERATORS.split("## The state directory")[1].split("\n## ")[0]
    for path in sidecar.state.iterdir():
        assert f"`{path.name}`" in section or f"`{path.name}/`" in section, path.name


@pytest.mark.parametrize("page", (OPERATORS, SECURITY), ids=("operators", "security"))
def test_every_link_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)", page)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


def test_every_test_that_security_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECURITY)
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_after_the_permit_key_has_changed_old_permits_are_refused(
    tmp_path: Path, sidecar: SidecarProcess
) -> None:
    bundle = sidecar.directory / "bundle.tar.gz"
    token = ISSUER.token("tenant_acme", "user-7", roles=["agent"])
    keys = execution_pb2.GetPermitKeysRequest()
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle) as changing,
        Caller(changing.target, token=token) as caller,
    ):
        old = caller.authorize("orders.read", request_id="before").permit
        assert changing.terminate() == 0
        (changing.state / "permit-key.pem").unlink()
        changing.start()

        report = execution_pb2.ReportOutcomeRequest(
            permit=old, outcome=execution_pb2.OUTCOME_EXECUTED
        )
        refusal = refusal_of(caller.execution.ReportOutcome, report, wait_for_ready=True)

        assert refusal.status is grpc.StatusCode.UNAUTHENTICATED
        assert refusal.reason_code == "permit_invalid"
        new = caller.authorize("orders.read", request_id="before")
        assert new.replayed
        assert new.permit != old
        PermitKeySet.from_jwks(caller.execution.GetPermitKeys(keys).jwks_json)
        report.permit = new.permit
        caller.execution.ReportOutcome(report)
