"""``pdp explain``, as a shell sees it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from pdp.audit.record import Outcome
from pdp.cli.explain import explain
from tests.audit.conftest import make_record, write_in

Small = Callable[..., Path]
OPA = Path(__file__).parents[2] / ".tools" / "opa"
READER = ("--tenant", "acme", "--role", "reader", "--scope", "notes:write")
WRITE = ("--tool", "notes.write", "--arguments", '{"kind": "memo"}')


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(explain)
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="session")
def bundle(small: Small) -> Path:
    return small()


def test_a_denied_call_is_told_in_words(bundle: Path) -> None:
    result = run("--bundle", bundle, "--opa", OPA, *READER, *WRITE, "--actor", "bo")
    assert result.exit_code == 0
    told = result.stdout
    assert told.startswith(
        "denied: role_not_allowed\n"
        "  None of the actor's roles may use the tool.\n"
        "  by policy revision small\n"
    )
    assert '"id": "bo"' in told
    assert "in role_allowed: input.action.name in role.tools\n" in told
    assert "it would have been allowed if\n  the actor has the role writer\n  or the " in told


def test_an_allowed_call_tells_its_terms(bundle: Path) -> None:
    writer = ("--tenant", "acme", "--role", "writer", "--scope", "notes:write")
    result = run(
        "--bundle", bundle, "--opa", OPA, *writer, *WRITE, "--resource", "note/a/1",
    )  # fmt: skip
    assert result.stdout.startswith("allowed: ok\n")
    assert "  scopes: notes:write\n  charges: tools 1 calls\n" in result.stdout
    assert '"id": "a/1"' in result.stdout
    assert "would have been allowed" not in result.stdout


def test_json_has_all_of_it(bundle: Path) -> None:
    result = run("--bundle", bundle, "--opa", OPA, *READER, *WRITE, "--output", "json")
    found = json.loads(result.stdout)
    assert found["decision"] == {"allow": False, "reason_code": "role_not_allowed"}
    assert found["input"]["tool"] == "notes.write"
    assert found["would_allow"][0] == ["the actor has the role writer"]
    assert {"file": "pdp/authz/authz.rego", "rule": "role_allowed"}.items() <= found["failed"][
        0
    ].items()


def test_the_input_of_a_file_is_taken_as_it_is(bundle: Path, tmp_path: Path) -> None:
    document: Any = {"subject": {"properties": {"tenant": "acme"}}, "anything": [1]}
    (tmp_path / "input.json").write_text(json.dumps(document))
    result = run(
        "--bundle", bundle, "--opa", OPA, "--input", tmp_path / "input.json", "--output", "json"
    )
    assert json.loads(result.stdout)["input"] == document


def test_a_recorded_decision_is_explained_as_the_engine_saw_it(
    bundle: Path, tmp_path: Path
) -> None:
    whole = json.loads(
        run("--bundle", bundle, "--opa", OPA, *READER, *WRITE, "--output", "json").stdout
    )["input"]
    records = [
        make_record(decision_id="d1", policy_revision="old", input=whole, reason_code="ok"),
        make_record(decision_id="d2", outcome=Outcome.DENIED, reason_code="policy_denied"),
    ]
    write_in(tmp_path / "audit", records)
    from_log = ("--bundle", bundle, "--opa", OPA, "--audit", tmp_path / "audit", "--decision")
    result = run(*from_log, "d1", "--output", "json")
    assert result.exit_code == 0
    assert result.stderr == "on record: ok by policy revision old\n"
    assert json.loads(result.stdout)["input"] == whole
    result = run(*from_log, "d2")
    assert result.exit_code == 2
    assert "audit.record_policy_input" in result.stderr
    result = run(*from_log, "d3")
    assert result.exit_code == 2
    assert "holds no decision d3. The ids are the decision_id of" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((), "name one call"),
        ((*READER, *WRITE, "--input", "x.json"), "name one call"),
        (READER, "--tenant and --tool belong together"),
        ((*READER, "--tool", "t", "--arguments", "[1]"), "--arguments must be a JSON object."),
        ((*READER, "--tool", "t", "--arguments", '{"a": 1'), "--arguments is not JSON"),
        ((*READER, *WRITE, "--resource", "x"), "must be TYPE/ID"),
        (("--input", "none.json"), "none.json can not be read: No such file"),
        (("--decision", "d1"), "needs the log that holds it"),
        (("--decision", "d1", "--audit", "none"), "none can not be read"),
    ),
)
def test_a_call_that_is_not_one_is_refused(
    bundle: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = run("--bundle", bundle, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_without_opa_it_says_so_and_tells_the_rest(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    result = run("--bundle", bundle, *READER, *WRITE)
    assert result.exit_code == 0
    assert "The rules can not be named: there is no opa command on PATH." in result.stdout
    assert "the actor has the role writer" in result.stdout


def test_a_slip_in_a_name_is_told_on_stderr(bundle: Path) -> None:
    result = run("--bundle", bundle, "--tenant", "acme", "--role", "wirter", "--tool", "note.write")
    assert result.stderr.splitlines() == [
        "The bundle's data have no tool note.write (did you mean notes.write?).",
        "The bundle's data have no role wirter (did you mean writer?).",
    ]


def test_why_a_policy_failed_is_told_as_opa_says_it(bundle: Path, tmp_path: Path) -> None:
    conflicting = shutil.copytree(bundle, tmp_path / "conflicting")
    (conflicting / "policy.wasm").unlink()
    (conflicting / "more.rego").write_text(
        'package pdp.authz\n\ndecision := {"allow": true, "reason_code": "ok"}\n'
    )
    result = run("--bundle", conflicting, "--opa", OPA, *READER, *WRITE)
    assert result.stdout.startswith("denied: policy_error\n")
    assert "why it failed\n  rule data.pdp.authz.decision produced conflict" in result.stdout
    assert "at more.rego:3" in result.stdout


def test_nothing_that_would_have_allowed_it_is_told(bundle: Path) -> None:
    result = run("--bundle", bundle, "--opa", OPA, "--tenant", "nobody", *WRITE)
    assert "Nothing that was tried would have allowed it" in result.stdout


def test_where_no_workload_may_ask_the_option_that_names_one_is_told(
    bundle: Path, tmp_path: Path
) -> None:
    guarded = shutil.copytree(bundle, tmp_path / "guarded")
    (guarded / "policy.wasm").unlink()
    authz = next(guarded.rglob("authz.rego"))
    authz.write_text(
        'package pdp.authz\n\ndecision := {"allow": false, "reason_code": "workload_not_allowed"}\n'
    )
    result = run("--bundle", guarded, "--opa", OPA, *READER, *WRITE)
    assert "name the one that asks with --workload" in result.stdout
