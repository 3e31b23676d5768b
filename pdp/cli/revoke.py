"""``pdp revoke``: who may no longer act."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn, TypeVar

import typer

from pdp.cli import exit_codes
from pdp.cli.output import Output, printable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from pdp.revocation.revocations import RevocationStore, Target

_T = TypeVar("_T")

MAX_NAME: Final = 255
"""Characters of an actor's or workload's name, and of a token's id."""

app = typer.Typer(no_args_is_help=True)

ConfigFile = Annotated[
    Path,
    typer.Option(
        "--config", help="The sidecar's configuration, which says where revocations are kept."
    ),
]
Tenant = Annotated[str, typer.Argument(help="The tenant.")]
Reason = Annotated[str, typer.Option(help="Why, for the audit log.")]
By = Annotated[str, typer.Option(help="Who does it, for the audit log. [default: login name]")]
Hours = Annotated[
    int, typer.Option("--hours", min=0, max=87_600, help="When it ends by itself; 0: never.")
]


@app.command()
def tenant(
    tenant: Tenant, config: ConfigFile, reason: Reason, by: By = "", hours: Hours = 0
) -> None:
    """Suspend a tenant: nobody acts for it.

    Exit codes: 0 done, 2 the configuration or the store can not be used.
    """
    _add(config, _target("tenant", tenant), reason, by, hours)


@app.command()
def actor(
    tenant: Tenant,
    actor: Annotated[str, typer.Argument(help="The actor, as audit records name it.")],
    config: ConfigFile,
    reason: Reason,
    by: By = "",
    hours: Hours = 0,
) -> None:
    """Revoke an actor of a tenant: its tokens and permits count no more.

    Exit codes: 0 done, 2 the configuration or the store can not be used.
    """
    _add(config, _target("actor", tenant, actor), reason, by, hours)


@app.command()
def token(
    tenant: Tenant,
    token_id: Annotated[str, typer.Argument(help="The token's id (jti), not the token.")],
    config: ConfigFile,
    reason: Reason,
    by: By = "",
    hours: Hours = 0,
) -> None:
    """Revoke one token of a tenant.

    Exit codes: 0 done, 2 the configuration or the store can not be used.
    """
    _add(config, _target("token", tenant, token_id), reason, by, hours)


@app.command()
def workload(
    workload: Annotated[str, typer.Argument(help="The workload, as audit records name it.")],
    config: ConfigFile,
    reason: Reason,
    by: By = "",
    hours: Hours = 0,
) -> None:
    """Revoke a workload: it asks for no tenant any more, and its permits count no more.

    Exit codes: 0 done, 2 the configuration or the store can not be used.
    """
    _add(config, _target("workload", "", workload), reason, by, hours)


@app.command()
def lift(
    config: ConfigFile,
    tenant: Annotated[str, typer.Argument(help="The tenant, unless a workload was revoked.")] = "",
    actor: Annotated[str, typer.Option(help="The actor, where one was revoked.")] = "",
    token: Annotated[str, typer.Option(help="The token's id, where one was revoked.")] = "",
    workload: Annotated[str, typer.Option(help="The workload, where one was revoked.")] = "",
) -> None:
    """Take a revocation back.

    Exit codes: 0 done, 1 there is none, 2 the configuration or the store can not be used.
    """
    named = {"actor": actor, "token": token, "workload": workload}
    kinds = [kind for kind, name in named.items() if name]
    if len(kinds) > 1:
        _refuse("name one of --actor, --token and --workload")
    kind = kinds[0] if kinds else "tenant"
    target = _target(kind, tenant, named.get(kind, ""))
    if not _run(config, lambda store: store.lift(target)):
        typer.echo("pdp: nothing of the kind is revoked: pdp revoke list shows what is.", err=True)
        raise typer.Exit(exit_codes.FAILED)
    typer.echo("lifted")


@app.command("list")
def list_revocations(
    config: ConfigFile,
    output: Annotated[Output, typer.Option(help="For people, or as JSON.")] = Output.TEXT,
) -> None:
    """List what is revoked.

    Exit codes: 0 done, 2 the configuration or the store can not be used.
    """
    from datetime import UTC, datetime  # noqa: PLC0415 - start-up imports only what it needs

    from pdp.revocation.revocations import to_json  # noqa: PLC0415

    known = _run(config, lambda store: store.read())
    revocations = sorted(known.values(), key=lambda each: (each.target.tenant, each.at))
    if output is Output.JSON:
        typer.echo(to_json(revocations).decode())
        return
    for each in revocations:
        at = datetime.fromtimestamp(each.at, UTC).isoformat(timespec="seconds")
        ends = (
            f" until {datetime.fromtimestamp(each.until, UTC).isoformat(timespec='seconds')}"
            if each.until
            else ""
        )
        words = (each.target.kind, each.target.tenant, each.target.name, "by", each.by)
        named = " ".join(word for word in words if word)
        typer.echo(printable(f"{at} {named}{ends}: {each.reason}"))


def _target(kind: str, tenant: str, name: str = "") -> Target:
    from pdp.identity.subject import TENANT_PATTERN  # noqa: PLC0415
    from pdp.revocation.revocations import Kind, Target  # noqa: PLC0415

    if kind == "workload" and tenant:
        _refuse("a workload is revoked for all tenants: name none")
    if kind != "workload" and not TENANT_PATTERN.fullmatch(tenant):
        _refuse("name the tenant by its id, as audit records do")
    if kind != "tenant" and not (0 < len(name) <= MAX_NAME and name.isprintable()):
        _refuse(
            f"an actor or a workload, and a token's id, is 1 to {MAX_NAME} printable characters"
        )
    return Target(kind=Kind(kind), tenant=tenant, name=name)


def _add(config: Path, target: Target, reason: str, by: str, hours: int) -> None:
    import getpass  # noqa: PLC0415
    import time  # noqa: PLC0415

    from pdp.revocation.file import RevocationFile  # noqa: PLC0415
    from pdp.revocation.revocations import Revocation  # noqa: PLC0415

    for name, text, longest in (("--reason", reason, 256), ("--by", by or "-", 64)):
        if not 0 < len(text) <= longest or not text.isprintable():
            _refuse(f"{name} must be 1 to {longest} printable characters")
    now = int(time.time())
    revocation = Revocation(
        target=target,
        by=by or getpass.getuser(),
        reason=reason,
        at=now,
        until=now + hours * 3600 if hours else 0,
    )

    async def add(store: RevocationStore) -> str:
        await store.add(revocation)
        return (
            "the sidecar of this state directory"
            if isinstance(store, RevocationFile)
            else "every sidecar on this store"
        )

    typer.echo(f"revoked; {_run(config, add)} goes by it within a second")


def _run(config: Path, act: Callable[[RevocationStore], Awaitable[_T]]) -> _T:
    import asyncio  # noqa: PLC0415
    import os  # noqa: PLC0415

    from pdp.config import ConfigError, load_config  # noqa: PLC0415
    from pdp.errors import PdpError  # noqa: PLC0415
    from pdp.revocation.open import open_revocations  # noqa: PLC0415

    async def run() -> _T:
        async with open_revocations(load_config(config, os.environ)) as store:
            return await act(store)

    try:
        return asyncio.run(run())
    except (ConfigError, PdpError) as error:
        typer.echo(f"pdp: {error.message}", err=True)
        raise typer.Exit(exit_codes.USAGE) from None


def _refuse(what: str) -> NoReturn:
    typer.echo(f"pdp: {what}.", err=True)
    raise typer.Exit(exit_codes.USAGE)
