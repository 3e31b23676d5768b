"""``pdp budget history``: what was done with a tenant's budgets, from the audit log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pdp.cli.budget.line import (
    ConfigFile,
    OutputOption,
    Tenant,
    console_for_people,
    refuse,
    settings_of,
)
from pdp.cli.output import Output, printable

if TYPE_CHECKING:
    from datetime import datetime

    from pdp.canonical import JsonObject, JsonValue

app = typer.Typer()

_AGO: Final = re.compile(r"([0-9]{1,6})([smhd])")
_SECONDS_OF: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@app.command()
def history(
    tenant: Tenant,
    *,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=100_000, help="The newest so many.")
    ] = 50,
    since: Annotated[
        str, typer.Option(metavar="TIME", help="Not before: 2h, 7d, or an ISO 8601 time (UTC).")
    ] = "",
    config: ConfigFile = None,
    audit: Annotated[
        Path | None, typer.Option(help="The audit log itself. [default: that of --config]")
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show who charged, held, settled and corrected what, by this sidecar's audit log.

    The log is not verified here: `pdp audit verify` does.

    Exit codes: 0 shown, 2 the log can not be read.
    """
    from pdp.audit.tail import newest_lines  # noqa: PLC0415 - start-up imports what it needs

    directory = _log_of(config, audit)
    begins = _moment(since) if since else None
    # Most lines are of other tenants: they need not be parsed.
    named = f'"tenant_id":{json.dumps(tenant)}'.encode()

    def is_wanted(line: bytes) -> bool:
        if named not in line:
            return False
        record = _read(line)
        if record.get("tenant_id") != tenant or not _is_of_budgets(record):
            return False
        return begins is None or _made_at(record) >= begins

    try:
        lines, position = newest_lines(directory, count=limit, wanted=is_wanted)
    except OSError as error:
        refuse(f"{error.filename or directory} can not be read: {error.strerror}.")
    if position.file is None:
        refuse(f"{directory} holds no audit log: name the directory with audit-*.jsonl.")
    if output is Output.JSON:
        for line in lines:
            typer.echo(line.decode())
    else:
        _show([_read(line) for line in lines])


def _log_of(config: Path | None, audit: Path | None) -> Path:
    if (config is None) is (audit is None):
        refuse("name the log by --config or by --audit.")
    if audit is not None:
        return audit
    assert config is not None  # noqa: S101 - one of the two was named
    return settings_of(config).state_dir / "audit"


def _moment(text: str) -> datetime:
    from datetime import UTC, datetime, timedelta  # noqa: PLC0415

    ago = _AGO.fullmatch(text)
    if ago is not None:
        return datetime.now(UTC) - timedelta(seconds=int(ago[1]) * _SECONDS_OF[ago[2]])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        refuse("--since must be like 90m, 2h, 7d, 2026-11-25 or 2026-11-25T08:00:00Z.")
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _read(line: bytes) -> JsonObject:
    """The record; an empty one if the line is none."""
    from pdp.audit.chain import MAX_LINE_BYTES  # noqa: PLC0415
    from pdp.canonical import JsonError, parse_object  # noqa: PLC0415

    try:
        return parse_object(line, max_bytes=MAX_LINE_BYTES)
    except JsonError:
        return {}


def _is_of_budgets(record: JsonObject) -> bool:
    """Also decisions and outcomes that charged, or would have."""
    return record.get("type") == "budget" or "charges" in record


def _made_at(record: JsonObject) -> datetime:
    from datetime import UTC, datetime  # noqa: PLC0415

    try:
        return datetime.fromisoformat(str(record.get("time")))
    except ValueError:
        return datetime.max.replace(tzinfo=UTC)  # shown rather than hidden


def _show(records: list[JsonObject]) -> None:
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = console_for_people()
    table = Table()
    for name in ("when", "who", "what", "outcome", "why", "charges", "hold", "detail"):
        table.add_column(name, overflow="fold")
    for record in records:
        outcome = _text(record.get("outcome"))
        detail = record.get("detail")
        told = dict(detail) if isinstance(detail, dict) else {}
        if "limit_id" in record:
            told["limit_id"] = record["limit_id"]
        table.add_row(
            _text(record.get("time")),
            _text(record.get("actor_id")),
            _text(record.get("action")),
            Text(outcome, style="red" if outcome in ("denied", "failed") else ""),
            _text(record.get("reason_code")),
            _charges(record.get("charges")),
            _text(record.get("hold_id")),
            " ".join(f"{_text(name)}={_text(value)}" for name, value in told.items()),
        )
    if records:
        console.print(table, soft_wrap=False)
    else:
        console.print("nothing of the tenant's budgets is on record here")


def _charges(charges: JsonValue) -> str:
    if not isinstance(charges, list):
        return ""
    return printable(
        " ".join(
            f"{each.get('budget')}/{each.get('unit')}={each.get('amount')}"
            for each in charges
            if isinstance(each, dict)
        )
    )


def _text(value: JsonValue) -> str:
    """A value in one line, without what would act on the terminal."""
    if value is None:
        return ""
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
