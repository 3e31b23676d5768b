"""``pdp policy matrix``, ``diff``, ``prove-isolation`` and ``replay``, as a shell sees them."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pdp.audit.record import AuditRecord, Outcome
from pdp.canonical import JsonObject
from pdp.cli.policy.analysis import app
from pdp.identity.subject import Subject
from pdp.policy.question import authorize_input
from tests.audit.conftest import make_record, write_in

ROOT = Path(__file__).parents[3]
Small = Callable[..., Path]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def grant(data: Any) -> None:
    data["tenants"]["acme"]["roles"]["reader"]["tools"].append("notes.write")


def revoke(data: Any) -> None:
    data["tenants"]["globex"]["allowlist"] = []


def needs_case(data: Any) -> None:
    data["tools"]["notes.read"]["arguments"]["id"]["pattern"] = "q{9}"


@pytest.fixture(scope="session")
def plain(small: Small) -> Path:
    return small()


def test_a_matrix_is_a_table_for_people(plain: Path) -> None:
    result = run("matrix", plain)
    assert result.exit_code == 0
    assert "acme" in result.stdout
    assert "allow: tools 1 calls" in result.stdout
    assert "tool_not_allowed" in result.stdout
    assert result.stderr == ""


def test_a_matrix_is_written_to_a_file(plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "matrix.csv"
    result = run("matrix", plain, "--output", "csv", "--out", out, "--tenant", "globex")
    assert (result.exit_code, result.stdout) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert {row["tenant"] for row in rows} == {"globex"}
    result = run("matrix", plain, "--output", "html", "--out", tmp_path / "no" / "matrix.html")
    assert result.exit_code == 2
    assert "can not be used: No such file or directory" in result.stderr


def test_a_tool_that_needs_a_case_is_named_on_stderr(small: Small, tmp_path: Path) -> None:
    bundle = small(needs_case)
    result = run("matrix", bundle, "--output", "json")
    assert result.exit_code == 0
    assert result.stderr.startswith("notes.read: the argument id has a pattern that no sample")
    cases = tmp_path / "cases.yaml"
    cases.write_text("tools:\n  notes.read:\n    - arguments: {id: qqqqqqqqq}\n")
    result = run("matrix", bundle, "--output", "json", "--cases", cases)
    assert result.stderr == ""
    assert json.loads(result.stdout.splitlines()[0])["allow"] is True


def test_a_mistake_in_the_cases_file_is_named_with_its_line(plain: Path, tmp_path: Path) -> None:
    cases = tmp_path / "cases.yaml"
    cases.write_text("roles: [a]\ntool: {}\n")
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("matrix", plain),
        ("diff", plain, plain),
        ("prove-isolation", plain),
    )
    for command in commands:
        result = run(*command, "--cases", cases)
        assert result.exit_code == 2
        assert f"{cases}:2: 'tool' is not known" in result.stderr


def test_a_name_that_nobody_knows_is_refused(plain: Path) -> None:
    result = run("matrix", plain, "--tenant", "acmee", "--role", "x", "--tool", "notes.read")
    assert result.exit_code == 2
    assert result.stderr == (
        "Neither the bundle nor the cases know tenant acmee (did you mean acme?), role x.\n"
    )


def test_a_case_for_a_tool_that_is_not_there_is_named_on_stderr(
    plain: Path, tmp_path: Path
) -> None:
    cases = tmp_path / "cases.yaml"
    cases.write_text("tools: {notes.reed: [{arguments: {}}]}\n")
    result = run("matrix", plain, "--cases", cases)
    assert result.exit_code == 0
    assert "the tool notes.reed, which data.tools has not (did you mean notes.read?)" in (
        result.stderr
    )


def test_a_bundle_that_can_not_be_read_is_refused(tmp_path: Path) -> None:
    for command in ("matrix", "prove-isolation"):
        result = run(command, tmp_path / "none.tar.gz")
        assert result.exit_code == 2
        assert "none.tar.gz" in result.stderr


def test_what_a_terminal_would_act_on_is_shown_and_not_sent(small: Small) -> None:
    def rename(data: Any) -> None:
        data["tenants"]["\x1b[2Jevil"] = data["tenants"].pop("acme")

    result = run("matrix", small(rename))
    assert "\x1b" not in result.stdout
    assert "\\x1b[2Jevil" in result.stdout


def test_many_tenants_show_progress_on_stderr(small: Small) -> None:
    def many(data: Any) -> None:
        data["tenants"] |= {f"t{number}": data["tenants"]["globex"] for number in range(100)}

    result = run("matrix", small(many), "--output", "csv")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[-1] == "102 of 102 tenants"
    assert len(result.stderr.splitlines()) <= 10


def test_a_terminal_gets_a_bar_on_stderr(plain: Path) -> None:
    terminal, command_side = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "pdp", "policy", "matrix", str(plain), "--output", "csv"],
        stdout=subprocess.PIPE,
        stderr=command_side,
        env={**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    os.close(command_side)
    shown = os.read(terminal, 65536)
    os.close(terminal)
    assert done.returncode == 0
    assert b"tenants" in shown
    assert done.stdout.startswith(b"tenant,role,tool")
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("change", "fail_on", "exit_code"),
    (
        (grant, "grant", 1),
        (grant, "revoke", 0),
        (grant, "any", 1),
        (revoke, "grant", 0),
        (revoke, "revoke", 1),
        (lambda data: data["tenants"].update(new={}), "any", 1),
        (lambda data: None, "any", 0),
    ),
)
def test_diff_fails_on_what_it_is_told_to(
    plain: Path, small: Small, change: Any, fail_on: str, exit_code: int
) -> None:
    assert run("diff", plain, small(change), "--fail-on", fail_on).exit_code == exit_code


def test_diff_without_a_gate_exits_0(plain: Path, small: Small) -> None:
    result = run("diff", plain, small(grant))
    assert result.exit_code == 0
    assert "newly granted: 1 call\n" in result.stdout
    assert "  reader, notes.write: role_not_allowed -> allow: tools 1 calls" in result.stdout


def test_diff_as_json_and_csv_has_every_change(plain: Path, small: Small) -> None:
    new = small(grant)
    found = json.loads(run("diff", plain, new, "--output", "json").stdout)
    (change,) = found["changes"]
    assert (change["change"], change["tenant"], change["role"]) == ("grant", "acme", "reader")
    assert change["example"]["action"]["name"] == "notes.write"
    (row,) = csv.DictReader(io.StringIO(run("diff", plain, new, "--output", "csv").stdout))
    assert json.loads(row["example"]) == change["example"]


def test_diff_tells_other_terms_and_names(plain: Path, small: Small) -> None:
    def change(data: Any) -> None:
        data["tools"]["notes.write"]["charge"][0]["amount"] = 7
        data["tenants"]["initech"] = data["tenants"].pop("globex")

    result = run("diff", plain, small(change))
    assert "tenants added: initech\n" in result.stdout
    assert "tenants removed: globex\n" in result.stdout
    assert "charges tools 1 calls -> tools 7 calls" in result.stdout


def test_isolation_that_holds_exits_0_and_says_what_it_is(plain: Path) -> None:
    result = run("prove-isolation", plain)
    assert result.exit_code == 0
    assert "not a proof over all inputs" in result.stdout
    assert "evaluations." in result.stdout
    found = json.loads(run("prove-isolation", plain, "--output", "json").stdout)
    assert found["isolated"] is True
    assert found["evaluations"] > 100


def test_isolation_that_fails_exits_1_and_shows_whose_data_it_was(tmp_path: Path) -> None:
    from tests.policy.analysis.small import LEAKY  # noqa: PLC0415 - beside its policy

    for name, content in LEAKY.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    opa = ROOT / ".tools" / "opa"
    result = run("prove-isolation", tmp_path, "--opa", opa)
    assert result.exit_code == 1
    assert "acme, reader, notes.read: pdp/authz/decision" in result.stdout
    assert "changed: the data of every other tenant is deleted (globex)" in result.stdout
    assert 'after:   {"allow": false' in result.stdout
    assert "NOT isolated" in result.stdout


def call() -> JsonObject:
    return authorize_input(
        Subject(tenant="acme", actor="alice", roles=("reader",), scopes=("notes:write",)),
        tool="notes.write",
        arguments={"kind": "memo"},
        resource=None,
        time=0,
        request_id="r",
        context={},
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    known: dict[str, Any] = {"action": "notes.write", "policy_revision": "old"}
    records: list[AuditRecord] = [
        make_record(
            **known,
            decision_id="d1",
            input=call(),
            outcome=Outcome.DENIED,
            reason_code="role_not_allowed",
        ),
        make_record(**known, decision_id="d2"),
    ]
    write_in(tmp_path / "audit", records)
    return tmp_path / "audit"


def test_replay_lists_flips_and_what_could_not_be_replayed(
    plain: Path, small: Small, log: Path
) -> None:
    result = run("replay", log, "--bundle", small(grant))
    assert result.exit_code == 0
    assert "acme: 1 decision replayed, 1 grant\n" in result.stdout
    assert "role_not_allowed -> ok (decision d1, seq 2, " in result.stdout
    assert "  1: no input is recorded (audit.record_policy_input is off)\n" in result.stdout
    found = json.loads(run("replay", log, "--bundle", plain, "--output", "json").stdout)
    assert found["flips"] == []
    assert found["replayed"] == 1


def test_replay_refuses_a_broken_log_unless_told(plain: Path, log: Path) -> None:
    (segment,) = log.iterdir()
    segment.write_bytes(segment.read_bytes().replace(b"role_not", b"rule_not"))
    result = run("replay", log, "--bundle", plain)
    assert result.exit_code == 2
    assert "The log is broken at" in result.stderr
    assert "line 2" in result.stderr
    result = run("replay", log, "--bundle", plain, "--allow-broken")
    assert result.exit_code == 0
    assert "replayed: 1 decision\n" in result.stdout


def test_replay_refuses_a_time_without_an_offset(plain: Path, log: Path) -> None:
    for text in ("2026-01-01", "yesterday"):
        result = run("replay", log, "--bundle", plain, "--since", text)
        assert result.exit_code == 2
        assert "must be RFC 3339 with an offset" in result.stderr


def test_replay_of_nothing_is_refused(plain: Path, tmp_path: Path) -> None:
    result = run("replay", tmp_path, "--bundle", plain)
    assert result.exit_code == 2
    assert "holds no audit log" in result.stderr
