"""``pdp audit``, as an auditor and a shell see it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdp.audit.record import AuditReceipt, AuditRecord, Outcome
from pdp.cli.audit import app

MakeRecord = Callable[..., AuditRecord]
WriteLog = Callable[..., list[AuditReceipt]]

PROGRAM = (sys.executable, "-c", "from pdp.cli.audit import app; app()")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture
def receipts(directory: Path, record: MakeRecord, write_log: WriteLog) -> list[AuditReceipt]:
    return write_log(
        directory,
        [
            record(request_id="r2"),
            record(tenant_id="globex", outcome=Outcome.DENIED, reason_code="tool_not_allowed"),
            record(outcome=Outcome.DENIED, reason_code="policy_denied"),
        ],
    )


def break_record_3(directory: Path) -> None:
    (segment,) = directory.iterdir()
    segment.write_bytes(segment.read_bytes().replace(b"globex", b"acme42"))


def test_verify_of_an_intact_log_exits_0(directory: Path, receipts: list[AuditReceipt]) -> None:
    result = run("verify", directory)
    assert result.exit_code == 0
    assert "intact: 5 records (seq 1 to 5) in 1 segment, 1 epoch" in result.stdout
    assert "closed: the last epoch ended cleanly" in result.stdout
    assert result.stderr == ""


def test_verify_of_a_broken_log_exits_1_and_names_the_first_bad_record(
    directory: Path, receipts: list[AuditReceipt]
) -> None:
    break_record_3(directory)
    result = run("verify", directory)
    assert result.exit_code == 1
    assert "audit-0000000000000001.jsonl, line 3, seq 3: hash_mismatch" in result.stdout
    result = run("verify", directory, "--output", "json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["intact"] is False
    assert report["records"] == 2
    assert report["fault"] == {
        "file": "audit-0000000000000001.jsonl",
        "line": 3,
        "seq": 3,
        "problem": "hash_mismatch",
        "message": "the content does not match its hash",
    }


def test_verify_says_of_a_torn_tail_that_it_was_never_acknowledged(
    directory: Path, receipts: list[AuditReceipt]
) -> None:
    (segment,) = directory.iterdir()
    segment.write_bytes(segment.read_bytes()[:-1])
    result = run("verify", directory)
    assert result.exit_code == 0
    assert "torn tail" in result.stdout
    assert "never acknowledged" in result.stdout
    assert "not closed" in result.stdout


def test_verify_with_a_receipt_exits_0_only_if_its_record_is_there(
    directory: Path, receipts: list[AuditReceipt]
) -> None:
    good = f"{receipts[1].sequence}:{receipts[1].hash}"
    result = run("verify", directory, "--receipt", good)
    assert result.exit_code == 0
    assert "receipt: its record is there" in result.stdout
    assert run("verify", directory, "--receipt", f"3:{'0' * 64}").exit_code == 1
    result = run("verify", directory, "--receipt", f"9:{receipts[1].hash}", "--output", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["fault"]["problem"] == "receipt_missing"


@pytest.mark.parametrize("receipt", ("", "3", "0:" + "0" * 64, "3:" + "A" * 64, "x:" + "0" * 64))
def test_a_malformed_receipt_exits_2(
    directory: Path, receipts: list[AuditReceipt], receipt: str
) -> None:
    result = run("verify", directory, "--receipt", receipt)
    assert result.exit_code == 2
    assert result.stdout == ""


@pytest.mark.parametrize("command", ("verify", "tail"))
def test_what_can_not_be_read_exits_2_and_says_so_on_stderr(tmp_path: Path, command: str) -> None:
    for path, message in (
        (tmp_path / "absent", "absent can not be read: No such file or directory."),
        (tmp_path, "holds no audit log"),
    ):
        result = run(command, path)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stdout == ""


def test_tail_shows_the_newest_records_as_rows(
    directory: Path, receipts: list[AuditReceipt]
) -> None:
    result = run("tail", directory, "-n", "3")
    assert result.exit_code == 0
    heading, *rows = result.stdout.splitlines()
    assert heading.split()[:4] == ["seq", "time", "type", "outcome"]
    assert [row.split()[0] for row in rows] == ["3", "4", "5"]
    assert "denied" in rows[0]
    assert "tool_not_allowed" in rows[0]
    assert "globex" in rows[0]


def test_tail_with_json_output_shows_the_lines_as_they_are_in_the_file(
    directory: Path, receipts: list[AuditReceipt]
) -> None:
    result = run("tail", directory, "--output", "json")
    (segment,) = directory.iterdir()
    assert result.stdout == segment.read_text()


def test_tail_shows_only_what_is_asked_for(directory: Path, receipts: list[AuditReceipt]) -> None:
    def sequences(*options: str) -> list[int]:
        result = run("tail", directory, "--output", "json", *options)
        assert result.exit_code == 0
        return [json.loads(line)["seq"] for line in result.stdout.splitlines()]

    assert sequences("--tenant", "acme") == [2, 4]
    assert sequences("--outcome", "denied") == [3, 4]
    assert sequences("--tenant", "acme", "--outcome", "denied") == [4]
    assert sequences("--tenant", "acme", "-n", "1") == [4]
    assert sequences("--tenant", "initech") == []


def test_tail_lets_no_value_act_on_the_terminal(
    directory: Path, record: MakeRecord, write_log: WriteLog
) -> None:
    hostile = "a\x1b[2Jb\rc\x9bd\u202ee\u2028[red]f"
    write_log(directory, [record(action=hostile, detail={"text": hostile})])
    result = run("tail", directory)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 4
    assert all(each == "\n" or each.isprintable() for each in result.stdout)
    assert r"a\x1b[2Jb\rc\x9bd\u202ee\u2028[red]f" in result.stdout


def test_tail_goes_on_after_a_line_that_is_no_record(
    directory: Path, receipts: list[AuditReceipt]
) -> None:
    (segment,) = directory.iterdir()
    segment.write_bytes(b"\xff\x1b[2J\n" + segment.read_bytes())
    for output in ("text", "json"):
        result = run("tail", directory, "--output", output)
        assert result.exit_code == 0
        assert "a line is not a record: run `pdp audit verify`" in result.stderr
        assert "globex" in result.stdout


def follow(directory: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*PROGRAM, "tail", str(directory), "--follow", "--output", "json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_tail_follows_over_new_segments_until_ctrl_c(
    directory: Path, receipts: list[AuditReceipt], record: MakeRecord, write_log: WriteLog
) -> None:
    with follow(directory, "-n", "1", "--tenant", "acme") as process:
        assert process.stdout is not None
        shown = [json.loads(process.stdout.readline())["seq"]]
        write_log(directory, [record()] * 3, segment_max_bytes=1)
        shown += [json.loads(process.stdout.readline())["seq"] for _ in range(3)]
        assert shown == [4, 7, 8, 9]
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=30)
    assert (process.returncode, rest, errors) == (0, "", "")


def test_tail_ends_in_silence_when_nobody_reads_any_more(
    directory: Path, receipts: list[AuditReceipt], record: MakeRecord, write_log: WriteLog
) -> None:
    with follow(directory) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        write_log(directory, [record()])
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 0


def test_importing_the_command_imports_nothing_that_only_some_commands_need() -> None:
    code = "import sys, pdp.cli.audit; print([m for m in sys.modules if m.startswith('pdp.')])"
    shown = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert shown.stdout.decode().strip() == "['pdp.cli', 'pdp.cli.exit_codes', 'pdp.cli.audit']"
