"""``pdp status``: how a running sidecar does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from pdp.cli import exit_codes
from pdp.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pdp.canonical import JsonObject, JsonValue

TIMEOUT_SECONDS: Final = 5.0
MAX_STATUS_BYTES: Final = 4 * 1024 * 1024
WIDTH_OF_A_FILE: Final = 240
"""Columns of the table where it is not written to a terminal."""


def status(
    url: Annotated[
        str, typer.Option(help="The sidecar's HTTP listener (listen.metrics).")
    ] = "http://127.0.0.1:9464",
    output: Annotated[Output, typer.Option(help="For people, or as JSON.")] = Output.TEXT,
) -> None:
    """Show what a running sidecar has in force, and how each bundle's source does.

    Exit codes: 0 all is well, 1 something is not (a bundle refused, a source out of
    reach, a policy past its age, an audit log that can not be written), 2 no answer.
    """
    import json  # noqa: PLC0415 - start-up imports only what the command needs

    from pdp.canonical import JsonError, parse_object  # noqa: PLC0415

    try:
        found = parse_object(_read(url), max_bytes=MAX_STATUS_BYTES)
    except (OSError, ValueError, JsonError) as error:
        reason = getattr(error, "reason", None) or error
        typer.echo(
            f"pdp: {url} does not answer ({reason}). Name the sidecar's listen.metrics with --url.",
            err=True,
        )
        raise typer.Exit(exit_codes.USAGE) from None
    faults = list(_faults(found))
    if output is Output.JSON:
        typer.echo(json.dumps({**found, "faults": faults}))
    else:
        _show(found, faults)
    if faults:
        raise typer.Exit(exit_codes.FAILED)


def _read(url: str) -> bytes:
    """The body of /status. Raises OSError, ValueError."""
    import urllib.request  # noqa: PLC0415

    if not url.startswith(("http://", "https://")):
        raise ValueError("not an http address")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url.rstrip('/')}/status", timeout=TIMEOUT_SECONDS) as response:
        body: bytes = response.read(MAX_STATUS_BYTES + 1)
    return body


def _faults(found: JsonObject) -> Iterator[str]:
    """What is not well, a line each."""
    if _object(found.get("audit")).get("healthy") is not True:
        yield "the audit log can not be written; every call is refused"
    policy = _object(found.get("policy"))
    if policy.get("answers") is not True:
        yield "the policy gives no answers; every call is refused"
    if policy.get("stale") is True:
        yield "the policy could not be renewed for longer than policy.max_age_seconds"
    for issuer in _objects(found.get("issuers")):
        if issuer.get("error"):
            yield f"issuer {issuer.get('issuer')}: {issuer.get('error')}"
        if issuer.get("usable") is not True:
            yield f"issuer {issuer.get('issuer')}: there are no keys; its tokens are refused"
    for name, side in (("", policy), ("shadow ", _object(policy.get("shadow")))):
        for bundle in _objects(side.get("bundles")):
            if bundle.get("error"):
                yield f"{name}bundle {bundle.get('name')}: {bundle.get('error')}"


def _show(found: JsonObject, faults: list[str]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    policy = _object(found.get("policy"))
    console.print(
        Text(
            f"{found.get('instance')} (pdp {found.get('version')}): policy {policy.get('revision')}"
        )
    )
    table = Table()
    for name in ("bundle", "revision", "in force since", "confirmed", "from"):
        table.add_column(name, overflow="fold")
    for prefix, side in (("", policy), ("shadow: ", _object(policy.get("shadow")))):
        for bundle in _objects(side.get("bundles")):
            table.add_row(
                Text(f"{prefix}{bundle.get('name')}"),
                Text(str(bundle.get("revision"))),
                Text(_time(bundle.get("activated_at"))),
                Text(_time(bundle.get("checked_at"))),
                Text(str(bundle.get("place"))),
            )
    if table.row_count:
        console.print(table, soft_wrap=False)
    for fault in faults:
        console.print(Text(fault, style="red"))
    if not faults:
        console.print(Text("all is well", style="green"))


def _time(value: JsonValue) -> str:
    from datetime import UTC, datetime  # noqa: PLC0415

    if not isinstance(value, int | float):
        return ""
    return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _object(value: JsonValue) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _objects(value: JsonValue) -> list[JsonObject]:
    return [_object(item) for item in value] if isinstance(value, list) else []
