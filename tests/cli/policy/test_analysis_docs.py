"""What docs/policy-analysis.md shows is what the commands do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pdp.audit.record import AuditRecord, Outcome
from pdp.canonical import JsonObject
from pdp.identity.subject import Subject
from pdp.policy.analysis.mutations import Mutation
from pdp.policy.question import authorize_input
from tests.audit.conftest import make_record, write_in

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "policy-analysis.md").read_text(encoding="utf-8")
PROGRAM = """\
import typer
from pdp.cli.explain import explain
from pdp.cli.policy import app as policy

app = typer.Typer()
app.add_typer(policy, name="policy")
app.command()(explain)
app()
"""
CONSOLES = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)


def call(tool: str, arguments: JsonObject) -> JsonObject:
    subject = Subject(
        tenant="tenant_acme",
        actor="alice",
        roles=("viewer",),
        scopes=("orders:read", "orders:write"),
    )
    return authorize_input(
        subject,
        tool=tool,
        arguments=arguments,
        resource=None,
        time=0,
        request_id="r",
        context={},
    )


UPDATE = call("orders.update", {"order_id": "918", "status": "shipped"})


def decision(number: int, tool: str, document: JsonObject | None, code: str) -> AuditRecord:
    return make_record(
        tenant_id="tenant_acme",
        action=tool,
        decision_id=f"d{number}",
        policy_revision="old",
        input=document,
        reason_code=code,
        outcome=Outcome.ALLOWED if code == "ok" else Outcome.DENIED,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page takes for granted: policies, the cases file, an audit log, a call."""
    folder = tmp_path_factory.mktemp("analysis")
    shutil.copytree(ROOT / "policies", folder / "policies")
    (cases,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (folder / "cases.yaml").write_text(cases)
    (folder / "call.json").write_text(json.dumps(UPDATE))
    (folder / "state").mkdir()
    write_in(
        folder / "state" / "audit",
        [
            decision(1, "orders.read", call("orders.read", {"order_id": "918"}), "ok"),
            decision(2, "orders.update", UPDATE, "role_not_allowed"),
            decision(3, "orders.read", None, "ok"),
        ],
    )
    commands = folder / "bin"
    commands.mkdir()
    pdp = commands / "pdp"
    pdp.write_text(f"#!{sys.executable}\n{PROGRAM}")
    pdp.chmod(0o755)
    (commands / "opa").symlink_to(ROOT / ".tools" / "opa")
    return folder


def test_every_example_does_what_the_page_shows(folder: Path) -> None:
    for console in CONSOLES:
        commands = [line[2:] for line in console.splitlines() if line.startswith("$ ")]
        shown = [line for line in console.splitlines() if not line.startswith("$ ")]
        done = subprocess.run(
            ["/bin/sh", "-euc", "\n".join(commands)],
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (commands, done.stdout)
        at = 0
        for line in shown:
            found = done.stdout.find(line, at)
            assert found >= 0, (commands, line, done.stdout)
            at = found + len(line)
    assert (folder / "matrix.html").stat().st_size > 1000
    assert "newly granted" in (folder / "grants.txt").read_text()


def test_every_mutation_is_told() -> None:
    told = PAGE.split("## Are the tenants apart?")[1].split("## ")[0]
    assert told.count("- every other tenant") == len(Mutation)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(#([a-z-]+)\)", PAGE):
        headings = [
            re.sub(r"[^a-z -]", "", line[3:].lower()).strip().replace(" ", "-")
            for line in PAGE.splitlines()
            if line.startswith("## ")
        ]
        assert target in headings
