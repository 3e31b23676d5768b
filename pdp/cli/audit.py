"""``pdp audit``: read and verify the audit log."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pdp.cli import exit_codes

if TYPE_CHECKING:
    from rich.console import Console

    from pdp.audit.verify import VerifyReport
    from pdp.canonical import JsonObject, JsonValue

app = typer.Typer(no_args_is_help=True)

FOLLOW_INTERVAL_SECONDS: Final = 0.2

_RECEIPT: Final = re.compile(r"([1-9][0-9]{0,15}):([0-9a-f]{64})")


class Output(StrEnum):
    """How results are printed."""

    TEXT = "text"
    JSON = "json"


LogPath = Annotated[
    Path, typer.Argument(help="The log's directory (state_dir/audit), or one of its files.")
]
OutputOption = Annotated[
    Output, typer.Option("--output", help="Lines for people, or one JSON object a line.")
]


@app.command()
def verify(
    path: LogPath,
    *,
    receipt: Annotated[
        str | None,
        typer.Option(
            metavar="SEQ:HASH",
            help="A record that must be there: sequence and hash as an answer's audit receipt"
            " gave them.",
        ),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check every record of a log, and that none is missing, changed or moved.

    Exit codes: 0 intact, 1 broken (the first bad record is named), 2 unreadable.
    """
    import json  # noqa: PLC0415 - start-up imports only what the command needs

    from pdp.audit.record import AuditError, AuditReceipt  # noqa: PLC0415
    from pdp.audit.verify import verify as verify_log  # noqa: PLC0415

    expected = None
    if receipt is not None:
        match = _RECEIPT.fullmatch(receipt)
        if match is None:
            raise typer.BadParameter(
                "must be SEQ:HASH, a number and 64 lower-case hexadecimal digits.",
                param_hint="--receipt",
            )
        expected = AuditReceipt(int(match[1]), match[2])
    try:
        report = verify_log(path, receipt=expected)
    except AuditError as error:
        raise _unusable(error.message) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if output is Output.JSON:
        typer.echo(json.dumps(_report_json(report)))
    else:
        typer.echo("\n".join(_report_lines(report)))
    if not report.is_intact:
        raise typer.Exit(exit_codes.FAILED)


@app.command()
def tail(
    path: LogPath,
    *,
    count: Annotated[int, typer.Option("-n", min=0, help="How many records.")] = 10,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new records until Ctrl-C.")
    ] = False,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's records.")] = None,
    outcome: Annotated[
        str | None, typer.Option(help="Only records with this outcome: allowed, denied, ...")
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show the newest records of a log, without verifying them.

    Exit codes: 0 shown, 2 unreadable.
    """
    from pdp.audit.tail import follow_lines, newest_lines  # noqa: PLC0415

    def is_wanted(line: bytes) -> bool:
        if tenant is None and outcome is None:
            return True
        record = _read(line)
        return (tenant is None or record.get("tenant_id") == tenant) and (
            outcome is None or record.get("outcome") == outcome
        )

    try:
        lines, position = newest_lines(path, count=count, wanted=is_wanted)
        if position.file is None and not follow:
            raise _unusable(f"{path} holds no audit log: name the directory with audit-*.jsonl.")
        show = _print_json if output is Output.JSON else _text_printer()
        _show_all(iter(lines), show)
        if follow:
            new = follow_lines(path, position, wait=lambda: time.sleep(FOLLOW_INTERVAL_SECONDS))
            _show_all(filter(is_wanted, new), show)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        _let_go_of_stdout()
    except OSError as error:
        raise _unreadable(path, error) from None


def _show_all(lines: Iterator[bytes], show: Callable[[bytes], None]) -> None:
    for line in lines:
        if _read(line):
            show(line)
        else:
            typer.echo("a line is not a record: run `pdp audit verify`", err=True)


def _read(line: bytes) -> JsonObject:
    """The record; an empty one if the line is none."""
    from pdp.audit.chain import MAX_LINE_BYTES  # noqa: PLC0415
    from pdp.canonical import JsonError, parse_object  # noqa: PLC0415

    try:
        return parse_object(line, max_bytes=MAX_LINE_BYTES)
    except JsonError:
        return {}


def _print_json(line: bytes) -> None:
    typer.echo(line.decode("utf-8"))


def _text_printer() -> Callable[[bytes], None]:
    """Prints records as rows of a table, under a heading."""
    from rich.console import Console  # noqa: PLC0415

    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    heading = {name: name.removesuffix("_id") for name in _COLUMNS}
    typer.echo(_row(console, heading, {}))

    def show(line: bytes) -> None:
        record = _read(line)
        shown = {name: _shown(record.get(name)) for name in _COLUMNS}
        typer.echo(_row(console, shown, record))

    return show


def _row(console: Console, shown: dict[str, str], record: JsonObject) -> str:
    from rich.text import Text  # noqa: PLC0415

    row = Text()
    for name, width in _COLUMNS.items():
        style = _OUTCOME_STYLES.get(shown[name], "") if name == "outcome" else ""
        row.append(shown[name].ljust(width), style if record else "bold")
        row.append("  ")
    for name in _AFTERWARDS:
        if name in record:
            row.append(f"{name}=", "dim")
            row.append(f"{_shown(record[name])} ")
    row.rstrip()
    with console.capture() as captured:
        console.print(row)
    return captured.get().removesuffix("\n")


def _shown(value: JsonValue) -> str:
    """A value in one line, without what would act on the terminal."""
    import json  # noqa: PLC0415

    if value is None:
        return "-"
    if isinstance(value, dict) and value.keys() == {"type", "id"}:
        text = f"{value['type']}/{value['id']}"
    elif isinstance(value, str):
        text = value
    else:
        text = json.dumps(value, ensure_ascii=False)
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


_COLUMNS: Final = {
    "seq": 8,
    "time": 27,
    "type": 10,
    "outcome": 8,
    "reason_code": 22,
    "tenant_id": 16,
    "actor_id": 16,
    "action": 16,
}
_AFTERWARDS: Final = ("resource", "charges", "limit_id", "request_id", "replayed", "detail")
_OUTCOME_STYLES: Final = {"denied": "red", "failed": "red", "allowed": "green", "executed": "green"}


def _let_go_of_stdout() -> None:
    """Nobody reads any more; the interpreter must not try to flush the rest."""
    import os  # noqa: PLC0415
    import sys  # noqa: PLC0415

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_json(report: VerifyReport) -> JsonObject:
    fault = report.fault
    return {
        "intact": report.is_intact,
        "records": report.records,
        "segments": report.segments,
        "epochs": report.epochs,
        "first_seq": report.first_sequence,
        "last_seq": report.last_sequence,
        "last_hash": report.last_hash,
        "closed": report.is_closed,
        "torn_bytes": report.torn_bytes,
        "receipt_found": report.has_receipt,
        "fault": None
        if fault is None
        else {
            "file": fault.file,
            "line": fault.line,
            "seq": fault.sequence,
            "problem": fault.problem.value,
            "message": fault.message,
        },
    }


def _report_lines(report: VerifyReport) -> Iterator[str]:
    fault = report.fault
    if fault is not None:
        place = [fault.file]
        if fault.line is not None:
            place.append(f"line {fault.line}")
        if fault.sequence is not None:
            place.append(f"seq {fault.sequence}")
        yield f"broken: {', '.join(place)}: {fault.problem}: {fault.message}"
        yield f"good before it: {_counted(report)}"
        return
    yield f"intact: {_counted(report)}"
    if report.last_hash is not None:
        yield f"last record: {report.last_sequence}:{report.last_hash}"
    if report.has_receipt:
        yield "receipt: its record is there"
    if report.torn_bytes:
        yield (
            f"torn tail: {report.torn_bytes} bytes of a write that did not end, never"
            " acknowledged unless power was lost under durability process; the next start of the"
            " sidecar cuts them off and keeps them."
        )
    yield (
        "closed: the last epoch ended cleanly"
        if report.is_closed
        else "not closed: the log is in use, its sidecar was killed, or its end was cut off;"
        " only a receipt kept elsewhere (--receipt) rules out the last"
    )


def _counted(report: VerifyReport) -> str:
    records = f"{report.records} record{'' if report.records == 1 else 's'}"
    if report.records:
        records += f" (seq {report.first_sequence} to {report.last_sequence})"
    segments = f"{report.segments} segment{'' if report.segments == 1 else 's'}"
    epochs = f"{report.epochs} epoch{'' if report.epochs == 1 else 's'}"
    return f"{records} in {segments}, {epochs}"


def _unusable(message: str) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(exit_codes.USAGE)


def _unreadable(path: Path, error: OSError) -> typer.Exit:
    return _unusable(f"{error.filename or path} can not be read: {error.strerror}.")
