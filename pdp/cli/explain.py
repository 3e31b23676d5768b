"""``pdp explain``: why one call is decided as it is, and what would have allowed it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pdp.cli import exit_codes
from pdp.cli.output import Output, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pdp.canonical import JsonObject, JsonValue
    from pdp.policy.analysis.explain import Explanation
    from pdp.policy.analysis.trace import Place
    from pdp.policy.bundle import Bundle

MAX_INPUT_BYTES: Final = 4 * 1024 * 1024
REQUEST_ID: Final = "explain"


def explain(
    *,
    bundle: Annotated[Path, typer.Option(help="The bundle: a .tar.gz or a directory.")],
    tenant: Annotated[str | None, typer.Option(help="The caller's tenant.")] = None,
    actor: Annotated[str, typer.Option(help="The caller's id.")] = "someone",
    role: Annotated[
        list[str] | None, typer.Option("--role", help="A role of the caller; may be repeated.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="A scope of the caller's token; may be repeated."),
    ] = None,
    workload: Annotated[str, typer.Option(help="The workload that asks, if it is shown.")] = "",
    tool: Annotated[str | None, typer.Option(help="The tool that is called.")] = None,
    arguments: Annotated[
        str, typer.Option(metavar="JSON", help="The arguments, a JSON object.")
    ] = "{}",
    resource: Annotated[
        str | None, typer.Option(metavar="TYPE/ID", help="The resource that is named.")
    ] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="The whole input, a JSON file, instead.")
    ] = None,
    decision: Annotated[
        str | None, typer.Option(metavar="ID", help="A decision out of --audit, instead.")
    ] = None,
    audit: Annotated[
        Path | None, typer.Option(help="The audit log that holds it, with its input.")
    ] = None,
    opa: Annotated[
        Path | None, typer.Option(help="The opa command, to trace the rules. Default: on PATH.")
    ] = None,
    output: Annotated[Output, typer.Option(help="For people, or as JSON.")] = Output.TEXT,
) -> None:
    """Explain one call: the decision, the rules behind it, and what would have allowed it.

    The call comes from --tenant and --tool, from --input, or from --decision with --audit.

    Exit codes: 0 explained (whatever the decision is), 2 the call or the bundle can not
    be used.
    """
    from pdp.errors import PdpError  # noqa: PLC0415
    from pdp.policy.analysis.explain import explain_call  # noqa: PLC0415
    from pdp.policy.bundle import load_bundle  # noqa: PLC0415

    ways = [tenant is not None or tool is not None, input_file is not None, decision is not None]
    if ways.count(True) != 1:
        raise typer.BadParameter(
            "name one call: --tenant and --tool, or --input FILE, or --decision ID --audit DIR."
        )
    try:
        if decision is not None:
            document = _recorded(decision, audit)
        elif input_file is not None:
            document = _object(input_file.read_bytes(), str(input_file))
        else:
            document = _asked(tenant, actor, role, scope, workload, tool, arguments, resource)
        loaded = load_bundle(bundle, opa=opa)
        for unknown in _unknown(loaded, document):
            typer.echo(printable(unknown), err=True)
        found = explain_call(loaded, document, opa=opa)
    except PdpError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(exit_codes.USAGE) from None
    except OSError as error:
        typer.echo(f"{error.filename or 'a file'} can not be read: {error.strerror}.", err=True)
        raise typer.Exit(exit_codes.USAGE) from None
    if output is Output.JSON:
        typer.echo(json.dumps(_explanation_json(found)))
    else:
        for line in _lines(found):
            typer.echo(line)


def _asked(
    tenant: str | None,
    actor: str,
    roles: list[str] | None,
    scopes: list[str] | None,
    workload: str,
    tool: str | None,
    arguments: str,
    resource: str | None,
) -> JsonObject:
    """The input, as the sidecar makes it from a verified token and a call."""
    from pdp.identity.subject import Subject  # noqa: PLC0415
    from pdp.policy.question import authorize_input  # noqa: PLC0415

    if tenant is None or tool is None:
        raise typer.BadParameter("--tenant and --tool belong together.")
    named: JsonObject | None = None
    if resource is not None:
        kind, separator, identifier = resource.partition("/")
        if not separator:
            raise typer.BadParameter("must be TYPE/ID.", param_hint="--resource")
        named = {"type": kind, "id": identifier}
    subject = Subject(
        tenant=tenant,
        actor=actor,
        roles=tuple(roles or ()),
        scopes=tuple(scopes or ()),
        workload=workload,
    )
    return authorize_input(
        subject,
        tool=tool,
        arguments=_object(arguments.encode(errors="surrogatepass"), "--arguments"),
        resource=named,
        time=time.time(),
        request_id=REQUEST_ID,
        context={},
    )


def _object(content: bytes, place: str) -> JsonObject:
    from pdp.canonical import JsonError, parse_object  # noqa: PLC0415

    try:
        return parse_object(content, max_bytes=MAX_INPUT_BYTES)
    except JsonError as error:
        typer.echo(f"{place} {error}.", err=True)
        raise typer.Exit(exit_codes.USAGE) from None


def _recorded(decision: str, audit: Path | None) -> JsonObject:
    """The input of a recorded decision, of a log that is not verified here."""
    from pdp.policy.analysis.replay import find_decision  # noqa: PLC0415

    if audit is None:
        raise typer.BadParameter(
            "needs the log that holds it: --audit DIR.", param_hint="--decision"
        )
    record = find_decision(audit, decision)
    if record is None:
        message = (
            f"{audit} holds no decision {printable(decision)}. The ids are the decision_id of"
            f" `pdp audit tail {audit} --output json`."
        )
    elif not isinstance(document := record.get("input"), dict):
        message = (
            f"The input of {printable(decision)} is not on record, and without it nothing can be"
            " evaluated: it is kept only where audit.record_policy_input is true and it is not"
            " too large. Give the call with --tenant and --tool instead."
        )
    else:
        typer.echo(
            f"on record: {record['reason_code']} by policy revision"
            f" {printable(str(record.get('policy_revision')))}",
            err=True,
        )
        return document
    typer.echo(message, err=True)
    raise typer.Exit(exit_codes.USAGE)


def _unknown(bundle: Bundle, document: JsonObject) -> Iterator[str]:
    """Tenant, roles and tool of the call that the bundle's data do not name: most likely
    slips. Nothing where the data name none at all.
    """
    from pdp.policy.analysis.questions import Estate, did_you_mean  # noqa: PLC0415

    estate = Estate(bundle.data)
    subject: Any = document.get("subject") or {}
    action: Any = document.get("action") or {}
    try:
        tenant, roles = subject["properties"]["tenant"], subject["properties"]["roles"]
        asked = [("tenant", tenant, estate.tenants), ("tool", action["name"], estate.tools)]
        if tenant in estate.tenants:
            asked += [("role", role, dict.fromkeys(estate.roles(tenant))) for role in roles]
        for kind, name, known in asked:
            if known and name not in known:
                yield f"The bundle's data have no {kind} {name}{did_you_mean(name, known)}."
    except (KeyError, TypeError):
        return  # no input as the sidecar makes it; the rules say what they make of it


def _lines(found: Explanation) -> Iterator[str]:
    from pdp.policy.analysis.matrix_output import charges_text, permit_text  # noqa: PLC0415
    from pdp.reason import ReasonCode  # noqa: PLC0415

    answer = found.answer
    yield f"{'allowed' if answer.allow else 'denied'}: {printable(answer.reason_code)}"
    for code in ReasonCode:
        if code.value == answer.reason_code:
            yield f"  {code.meaning}"
    if answer.allow:
        yield f"  scopes: {' '.join(answer.scopes) or 'none'}"
        yield f"  charges: {charges_text(answer) or 'none'}"
        yield f"  permit: {permit_text(answer) or 'this call'}"
    yield f"  by policy revision {printable(found.revision)}"
    yield ""
    yield "input"
    for line in json.dumps(found.document, indent=2).splitlines():
        yield f"  {line}"
    if found.trace is None:
        yield ""
        yield f"The rules can not be named: {found.no_trace}"
    else:
        if found.trace.error:
            yield ""
            yield "why it failed"
            for line in found.trace.error.splitlines():
                yield f"  {printable(line)}"
        yield from _listed("the rule that says so", found.trace.decisive)
        yield from _listed("conditions that failed", found.trace.failed)
        yield from _listed("conditions that held, and so denied it", found.trace.held)
        yield from _listed("rules that fired", found.trace.fired)
    if not answer.allow:
        yield ""
        yield from _would_allow(found)


def _listed(title: str, places: Iterable[Place]) -> Iterator[str]:
    for number, place in enumerate(places):
        if number == 0:
            yield ""
            yield title
        values = ", ".join(f"{name} = {value}" for name, value in place.values.items())
        told = f", where {printable(values)}" if values else ""
        yield f"  {place.where} in {place.rule}: {printable(place.text)}{told}"


def _would_allow(found: Explanation) -> Iterator[str]:
    from pdp.reason import ReasonCode  # noqa: PLC0415

    if not found.would_allow:
        yield (
            "Nothing that was tried would have allowed it: no single change and no pair of the"
            " caller's roles and scopes, the arguments, and the tenant's status, allowlist,"
            " scopes and roles."
        )
        if found.answer.reason_code == ReasonCode.WORKLOAD_NOT_ALLOWED:
            yield "Workloads are not tried: name the one that asks with --workload."
        return
    yield "it would have been allowed if"
    for number, each in enumerate(found.would_allow):
        yield f"  {'or ' if number else ''}{printable(' and '.join(each.changes))}"


def _explanation_json(found: Explanation) -> JsonObject:
    from pdp.policy.analysis.matrix_output import answer_json  # noqa: PLC0415

    explanation: JsonObject = {
        "revision": found.revision,
        "input": found.document,
        "decision": answer_json(found.answer),
        "would_allow": [list(each.changes) for each in found.would_allow],
    }
    if found.trace is None:
        explanation["no_trace"] = found.no_trace
    else:
        explanation["error"] = found.trace.error
        explanation["decisive"] = _places_json(found.trace.decisive)
        explanation["failed"] = _places_json(found.trace.failed)
        explanation["held"] = _places_json(found.trace.held)
        explanation["fired"] = _places_json(found.trace.fired)
    return explanation


def _places_json(places: Iterable[Place]) -> list[JsonValue]:
    return [
        {
            "file": place.file,
            "line": place.row,
            "rule": place.rule,
            "text": place.text,
            "values": dict(place.values),
        }
        for place in places
    ]
