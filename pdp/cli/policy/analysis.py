"""``pdp policy matrix``, ``diff``, ``prove-isolation`` and ``replay``."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TextIO

import typer

from pdp.cli import exit_codes
from pdp.cli.output import Output, printable

if TYPE_CHECKING:
    from rich.console import Console

    from pdp.canonical import JsonObject, JsonValue
    from pdp.policy.analysis.cases import Cases
    from pdp.policy.analysis.diff import Comparison, Differing
    from pdp.policy.analysis.evaluator import Answer
    from pdp.policy.analysis.isolation import Leak, Search
    from pdp.policy.analysis.matrix import Cell
    from pdp.policy.analysis.questions import Only
    from pdp.policy.analysis.replay import Replay
    from pdp.policy.analysis.workers import Progress
    from pdp.policy.bundle import Bundle

app = typer.Typer()

NAMES_SHOWN: Final = 5
"""Names of a long list that are shown before the rest is counted."""
GROUPS_SHOWN: Final = 40
LEAKS_SHOWN: Final = 10
FLIPS_SHOWN: Final = 20
WIDTH_OF_A_FILE: Final = 240
"""Columns of a table that is not written to a terminal."""
PROGRESS_STEPS: Final = 10
"""Lines of progress where there is no terminal."""


class MatrixOutput(StrEnum):
    """How a matrix is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    HTML = "html"


class DiffOutput(StrEnum):
    """How a comparison is written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


class FailOn(StrEnum):
    """Which changes make ``pdp policy diff`` exit with 1."""

    GRANT = "grant"
    REVOKE = "revoke"
    ANY = "any"


BundlePath = Annotated[Path, typer.Argument(help="A bundle: a .tar.gz or a directory.")]
CasesOption = Annotated[
    Path | None,
    typer.Option("--cases", help="YAML: how each tool is called, roles, scopes, time."),
]
TenantOption = Annotated[
    list[str] | None, typer.Option("--tenant", help="Only this tenant; may be repeated.")
]
RoleOption = Annotated[
    list[str] | None, typer.Option("--role", help="Only this role; may be repeated.")
]
ToolOption = Annotated[
    list[str] | None, typer.Option("--tool", help="Only this tool; may be repeated.")
]
OpaOption = Annotated[
    Path | None,
    typer.Option("--opa", help="The opa command, if Rego has to be compiled. Default: on PATH."),
]


@app.command()
def matrix(
    bundle: BundlePath,
    *,
    cases: CasesOption = None,
    tenant: TenantOption = None,
    role: RoleOption = None,
    tool: ToolOption = None,
    output: Annotated[
        MatrixOutput,
        typer.Option(help="A table for people, CSV, an object a line, or one page of HTML."),
    ] = MatrixOutput.TABLE,
    out: Annotated[Path | None, typer.Option(help="Write to this file.")] = None,
    opa: OpaOption = None,
) -> None:
    """Show who may do what: every tenant x role x tool, and why not.

    Exit codes: 0 shown, 2 the bundle or the cases file can not be used.
    """
    from pdp.policy.analysis.matrix import matrix as cells_of  # noqa: PLC0415

    with _refusals():
        loaded, asked = _load(bundle, opa), _cases(cases)
        only = _only(tenant, role, tool)
        _check_names([loaded], asked, only)
        with _opened(out) as file, _progress("tenants") as progress:
            cells = cells_of(loaded, asked, only, processes=_processes(), progress=progress)
            _write_matrix(file, cells, output, loaded.revision)


@app.command()
def diff(
    old: BundlePath,
    new: BundlePath,
    *,
    cases: CasesOption = None,
    tenant: TenantOption = None,
    role: RoleOption = None,
    tool: ToolOption = None,
    fail_on: Annotated[
        FailOn | None, typer.Option(help="Exit with 1 when there is such a change.")
    ] = None,
    output: Annotated[
        DiffOutput, typer.Option(help="A summary for people, or every change as CSV or JSON.")
    ] = DiffOutput.TABLE,
    opa: OpaOption = None,
) -> None:
    """Show what a change grants and what it takes away, with an example of each.

    Exit codes: 0 compared, 1 there is a change that --fail-on names, 2 a bundle or the
    cases file can not be used.
    """
    from pdp.policy.analysis.diff import Change, compare  # noqa: PLC0415

    with _refusals():
        before, after, asked = _load(old, opa), _load(new, opa), _cases(cases)
        only = _only(tenant, role, tool)
        _check_names([before, after], asked, only)
        with _progress("tenants") as progress:
            found = compare(before, after, asked, only, processes=_processes(), progress=progress)
    if output is DiffOutput.JSON:
        typer.echo(json.dumps(_comparison_json(found)))
    elif output is DiffOutput.CSV:
        _write_differing(sys.stdout, found.differing)
    else:
        _show_comparison(found, before.revision, after.revision)
    failing = {
        None: (),
        FailOn.GRANT: (Change.GRANT,),
        FailOn.REVOKE: (Change.REVOKE,),
        FailOn.ANY: tuple(Change),
    }[fail_on]
    names_differ = fail_on is FailOn.ANY and bool(_names_json(found))
    if names_differ or any(each.change in failing for each in found.differing):
        raise typer.Exit(exit_codes.FAILED)


@app.command("prove-isolation")
def prove_isolation(
    bundle: BundlePath,
    *,
    cases: CasesOption = None,
    tenant: TenantOption = None,
    role: RoleOption = None,
    tool: ToolOption = None,
    output: Annotated[Output, typer.Option(help="For people, or as JSON.")] = Output.TEXT,
    opa: OpaOption = None,
) -> None:
    """Search for a decision or limit of one tenant that depends on another's data.

    Changes the data of the other tenants (deleted, everything allowed, everything denied,
    wrong types, a copy), and names other tenants in arguments, context and resource. It is
    a search over these cases, not a proof over all inputs.

    Exit codes: 0 none found, 1 found, 2 the bundle or the cases file can not be used.
    """
    from pdp.policy.analysis.isolation import search  # noqa: PLC0415

    with _refusals():
        loaded, asked = _load(bundle, opa), _cases(cases)
        only = _only(tenant, role, tool)
        _check_names([loaded], asked, only)
        with _progress("tenants") as progress:
            found = search(loaded, asked, only, processes=_processes(), progress=progress)
    if output is Output.JSON:
        typer.echo(json.dumps(_search_json(found)))
    else:
        _show_search(found)
    if found.leaks_found:
        raise typer.Exit(exit_codes.FAILED)


@app.command()
def replay(
    audit: Annotated[Path, typer.Argument(help="An audit log: its directory, or a file of it.")],
    *,
    bundle: Annotated[Path, typer.Option(help="The candidate: a .tar.gz or a directory.")],
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's records.")] = None,
    since: Annotated[
        str | None, typer.Option(help="Records from this time on, RFC 3339 with an offset.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Records before this time.")] = None,
    allow_broken: Annotated[
        bool, typer.Option("--allow-broken", help="Replay a log whose chain is broken, too.")
    ] = False,
    output: Annotated[Output, typer.Option(help="For people, or as JSON.")] = Output.TEXT,
    opa: OpaOption = None,
) -> None:
    """Ask a candidate what was asked before, and list what it would decide otherwise.

    Only decisions whose input is recorded can be replayed (audit.record_policy_input).

    Exit codes: 0 replayed, 2 the log is broken or can not be read, or the bundle not used.
    """
    from pdp.policy.analysis.replay import replay as replay_log  # noqa: PLC0415

    with _refusals():
        begin, end = _moment(since, "--since"), _moment(until, "--until")
        _check_chain(audit, allow_broken=allow_broken)
        found = replay_log(audit, _load(bundle, opa), tenant=tenant, since=begin, until=end)
    if output is Output.JSON:
        typer.echo(json.dumps(_replay_json(found)))
    else:
        _show_replay(found)


@contextmanager
def _refusals() -> Iterator[None]:
    """What can not be used is told on stderr, and ends the command with 2."""
    from pdp.errors import PdpError  # noqa: PLC0415

    try:
        yield
    except PdpError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(exit_codes.USAGE) from None
    except BrokenPipeError:
        # Nobody reads any more; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        typer.echo(f"{error.filename or 'a file'} can not be used: {error.strerror}.", err=True)
        raise typer.Exit(exit_codes.USAGE) from None


def _load(path: Path, opa: Path | None) -> Bundle:
    from pdp.policy.bundle import load_bundle  # noqa: PLC0415

    return load_bundle(path, opa=opa)


def _cases(path: Path | None) -> Cases:
    from pdp.policy.analysis.cases import Cases, read_cases  # noqa: PLC0415

    return Cases() if path is None else read_cases(path)


def _only(tenants: list[str] | None, roles: list[str] | None, tools: list[str] | None) -> Only:
    from pdp.policy.analysis.questions import Only  # noqa: PLC0415

    return Only(
        tenants=frozenset(tenants or ()), roles=frozenset(roles or ()), tools=frozenset(tools or ())
    )


def _check_names(bundles: list[Bundle], cases: Cases, only: Only) -> None:
    """Refuse to narrow to what nobody knows, and tell which tools need a case."""
    from pdp.policy.analysis.cases import CasesError  # noqa: PLC0415
    from pdp.policy.analysis.questions import Estate, Questionnaire  # noqa: PLC0415

    questions = Questionnaire([Estate(bundle.data) for bundle in bundles], cases, only)
    unknown = questions.unknown()
    if unknown:
        raise CasesError(f"Neither the bundle nor the cases know {_named(unknown)}.")
    for tool, like in questions.cases_without_tool().items():
        typer.echo(
            f"The cases name the tool {printable(tool)}, which data.tools has not"
            f"{printable(like)}.",
            err=True,
        )
    for tool, reason in questions.without_case().items():
        typer.echo(
            f"{printable(tool)}: {printable(reason)}, so it is asked about without arguments,"
            " and what allows it may not show. Add a case for it (--cases).",
            err=True,
        )


def _processes() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    if out is None:
        yield sys.stdout
    else:
        with out.open("w", encoding="utf-8", newline="") as file:
            yield file


@contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A bar on stderr if that is a terminal, otherwise a few lines."""
    if not sys.stderr.isatty():
        yield _progress_lines(what)
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _progress_lines(what: str) -> Progress:
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        step = done * PROGRESS_STEPS // max(total, 1)
        if step > told and total > PROGRESS_STEPS:
            told = step
            typer.echo(f"{done} of {total} {what}", err=True)

    return tell


def _moment(text: str | None, option: str) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise typer.BadParameter(
            "must be RFC 3339 with an offset, such as 2026-01-01T12:00:00Z.", param_hint=option
        )
    return moment


def _check_chain(audit: Path, *, allow_broken: bool) -> None:
    """Refuse a log that `pdp audit verify` would."""
    from pdp.audit.record import AuditError  # noqa: PLC0415
    from pdp.audit.verify import verify  # noqa: PLC0415
    from pdp.reason import ReasonCode  # noqa: PLC0415

    fault = verify(audit).fault
    if fault is None:
        return
    message = f"The log is broken at {fault.file}, line {fault.line}: {fault.message}."
    if not allow_broken:
        raise AuditError(
            ReasonCode.AUDIT_UNAVAILABLE,
            f"{message} See `pdp audit verify`; --allow-broken replays it all the same.",
        )
    typer.echo(message, err=True)


def _console() -> Console:
    from rich.console import Console  # noqa: PLC0415

    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _named(names: Iterable[str]) -> str:
    """The first names of a list, and how many more there are."""
    listed = [printable(name) for name in names]
    more = len(listed) - NAMES_SHOWN
    return ", ".join(listed[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _role(role: str) -> str:
    return printable(role) or "(no role)"


# Matrix


def _write_matrix(file: TextIO, cells: Iterator[Cell], output: MatrixOutput, revision: str) -> None:
    from pdp.policy.analysis import matrix_output  # noqa: PLC0415

    if output is MatrixOutput.CSV:
        matrix_output.write_matrix_csv(file, cells)
    elif output is MatrixOutput.JSON:
        matrix_output.write_matrix_json(file, cells)
    elif output is MatrixOutput.HTML:
        matrix_output.write_matrix_page(file, cells, revision=revision)
    else:
        _write_tables(file, cells)


def _write_tables(file: TextIO, cells: Iterator[Cell]) -> None:
    from itertools import groupby  # noqa: PLC0415

    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    from pdp.policy.analysis.matrix_output import call_text  # noqa: PLC0415

    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    for tenant, of_tenant in groupby(cells, key=lambda cell: cell.tenant):
        rows = list(of_tenant)
        roles = list(dict.fromkeys(cell.role for cell in rows))
        table = Table(title=Text(printable(tenant), "bold"), title_justify="left")
        for name in ("tool", *map(_role, roles)):
            table.add_column(Text(name), overflow="fold")
        for (tool, case), of_call in groupby(rows, key=lambda cell: (cell.tool, cell.case)):
            answers = {cell.role: cell.answer for cell in of_call}
            shown = [_answer_text(answers[role]) if role in answers else "" for role in roles]
            table.add_row(
                Text(printable(call_text(tool, case))),
                *(Text(each, "green" if each.startswith("allow") else "red") for each in shown),
            )
        console.print(table)


def _answer_text(answer: Answer) -> str:
    from pdp.policy.analysis.matrix_output import allowed_text  # noqa: PLC0415

    if not answer.allow:
        return printable(answer.reason_code)
    told = allowed_text(answer)
    return f"allow: {told}" if told else "allow"


# Diff


def _show_comparison(found: Comparison, old: str, new: str) -> None:
    from pdp.policy.analysis.diff import Change, summary  # noqa: PLC0415

    console = _console()
    console.print(f"{printable(old)} -> {printable(new)}")
    for kind, names in _names_json(found).items():
        console.print(f"{kind.replace('_', ' ')}: {_named(_joined(names))}")
    console.print(f"asked: {_counted(found.asked, 'call')} of both")
    for change, (title, style) in _CHANGES.items():
        groups = summary(found.of(Change(change)))
        calls = sum(each.calls for group in groups for each in group)
        console.print(f"{title}: {_counted(calls, 'call')}", style=style if calls else "dim")
        for group in groups[:GROUPS_SHOWN]:
            _show_group(console, group)
        if len(groups) > GROUPS_SHOWN:
            console.print(f"  and {len(groups) - GROUPS_SHOWN:,} more: --output json has all")


def _show_group(console: Console, group: list[Differing]) -> None:
    """What changed alike at several tenants."""
    first = group[0]
    calls = _counted(sum(each.calls for each in group), "call")
    console.print(f"  {_role(first.role)}, {printable(first.tool)}: {_moved(first)} ({calls})")
    console.print(f"    at {_named(each.tenant for each in group)}")
    if first.change != "reason":
        console.print(f"    for example {json.dumps(first.example)}", style="dim")


_CHANGES: Final = {
    "grant": ("newly granted", "bold red"),
    "revoke": ("taken away", "bold yellow"),
    "terms": ("allowed on other terms", "bold"),
    "reason": ("denied for another reason", "bold"),
}


def _joined(names: JsonValue) -> list[str]:
    found = names if isinstance(names, list) else []
    return [": ".join(map(str, each)) if isinstance(each, list) else str(each) for each in found]


def _moved(differing: Differing) -> str:
    """What differs between two answers."""
    before, after = differing.before, differing.after
    if not (before.allow and after.allow):
        return f"{_answer_text(before)} -> {_answer_text(after)}"
    from pdp.policy.analysis.matrix_output import binds_text, charges_text  # noqa: PLC0415

    pairs = {
        "scopes": (" ".join(before.scopes), " ".join(after.scopes)),
        "charges": (charges_text(before), charges_text(after)),
        "ttl_seconds": (str(before.ttl_seconds), str(after.ttl_seconds)),
        "binds": (binds_text(before), binds_text(after)),
        "max_uses": (str(before.max_uses), str(after.max_uses)),
    }
    return "; ".join(
        f"{name} {was or 'none'} -> {now or 'none'}"
        for name, (was, now) in pairs.items()
        if was != now
    )


def _names_json(found: Comparison) -> JsonObject:
    names = found.names
    every: JsonObject = {
        "tenants_added": list(names.tenants_added),
        "tenants_removed": list(names.tenants_removed),
        "roles_added": [list(pair) for pair in names.roles_added],
        "roles_removed": [list(pair) for pair in names.roles_removed],
        "tools_added": list(names.tools_added),
        "tools_removed": list(names.tools_removed),
    }
    return {key: value for key, value in every.items() if value}


def _comparison_json(found: Comparison) -> JsonObject:
    from pdp.policy.analysis.matrix_output import answer_json  # noqa: PLC0415

    return {
        "asked": found.asked,
        "names": _names_json(found),
        "changes": [
            {
                "change": each.change.value,
                "tenant": each.tenant,
                "role": each.role,
                "tool": each.tool,
                "calls": each.calls,
                "before": answer_json(each.before),
                "after": answer_json(each.after),
                "example": each.example,
            }
            for each in found.differing
        ],
    }


def _write_differing(file: TextIO, differing: Iterable[Differing]) -> None:
    from pdp.policy.analysis.spreadsheet import write_csv  # noqa: PLC0415

    write_csv(
        file,
        ("change", "tenant", "role", "tool", "calls", "before", "after", "example"),
        (
            (
                each.change.value,
                each.tenant,
                each.role,
                each.tool,
                str(each.calls),
                _answer_text(each.before),
                _answer_text(each.after),
                json.dumps(each.example),
            )
            for each in differing
        ),
    )


# Isolation


def _show_search(found: Search) -> None:
    console = _console()
    for leak in found.leaks[:LEAKS_SHOWN]:
        _show_leak(console, leak)
    if found.leaks_found:
        console.print(
            f"NOT isolated: {_counted(found.leaks_found, 'answer')} moved with another tenant's"
            f" data or name; {min(len(found.leaks), LEAKS_SHOWN)} of them above."
        )
    else:
        console.print("no answer of a tenant moved with another tenant's data or name.")
    console.print(
        f"tried: {_counted(found.tenants, 'tenant')}, {_counted(found.questions, 'question')},"
        f" {_counted(found.data_documents, 'data document')},"
        f" {_counted(found.evaluations, 'evaluation')}."
    )
    console.print(
        "This is a search over these cases, not a proof over all inputs: it asks as the cases"
        " and the data say, and changes the others' data in five ways."
    )


def _show_leak(console: Console, leak: Leak) -> None:
    console.print(
        f"{printable(leak.tenant)}, {_role(leak.role)}, {printable(leak.tool) or '(no tool)'}:"
        f" {leak.entrypoint}",
        style="bold red",
    )
    console.print(f"  changed: {leak.changed} ({_named(leak.others)})")
    console.print(f"  before:  {json.dumps(leak.before)}")
    console.print(f"  after:   {json.dumps(leak.after)}")


def _search_json(found: Search) -> JsonObject:
    return {
        "isolated": not found.leaks_found,
        "tenants": found.tenants,
        "questions": found.questions,
        "data_documents": found.data_documents,
        "evaluations": found.evaluations,
        "leaks_found": found.leaks_found,
        "leaks": [
            {
                "tenant": leak.tenant,
                "role": leak.role,
                "tool": leak.tool,
                "entrypoint": leak.entrypoint,
                "changed": leak.changed,
                "others": list(leak.others),
                "before": leak.before,
                "after": leak.after,
                "input": leak.document,
            }
            for leak in found.leaks
        ],
    }


# Replay


def _show_replay(found: Replay) -> None:
    console = _console()
    flips = Counter((flip.tenant, flip.change.value) for flip in found.flips)
    for name, count in sorted(found.replayed_by_tenant.items()):
        moved = [f"{flips[name, kind]:,} {kind}" for kind in _CHANGES if flips[name, kind]]
        told = ", ".join(moved) if moved else "none moves"
        console.print(f"{printable(name)}: {_counted(count, 'decision')} replayed, {told}")
    for flip in found.flips[:FLIPS_SHOWN]:
        console.print(
            f"  {flip.change.value}: {printable(flip.tenant)}, {printable(flip.tool)}:"
            f" {printable(flip.before)} -> {printable(flip.after)}"
            f" (decision {printable(flip.decision_id)}, seq {flip.sequence}, {flip.time})"
        )
    if len(found.flips) > FLIPS_SHOWN:
        console.print(f"  and {len(found.flips) - FLIPS_SHOWN:,} more: --output json has all")
    console.print(f"replayed: {_counted(found.replayed, 'decision')}")
    missing = sum(found.not_replayed.values())
    console.print(f"not replayed: {_counted(missing, 'record')}")
    for reason, count in sorted(found.not_replayed.items()):
        console.print(f"  {count:,}: {reason}")


def _replay_json(found: Replay) -> JsonObject:
    return {
        "replayed": found.replayed,
        "replayed_by_tenant": dict(found.replayed_by_tenant),
        "not_replayed": dict(found.not_replayed),
        "flips": [
            {
                "change": flip.change.value,
                "tenant": flip.tenant,
                "tool": flip.tool,
                "decision_id": flip.decision_id,
                "time": flip.time,
                "seq": flip.sequence,
                "before": flip.before,
                "after": flip.after,
                "input": flip.document,
            }
            for flip in found.flips
        ],
    }
