"""The line to a sidecar's admin socket, and the options that every command shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from pdp.cli import exit_codes
from pdp.cli.output import Output, printable

if TYPE_CHECKING:
    from rich.console import Console

    from pdp.api.v1 import admin_pb2_grpc, common_pb2
    from pdp.canonical import JsonValue
    from pdp.channel import CallError
    from pdp.config import Config

TIMEOUT_SECONDS: Final = 30.0
"""For one call, tries again included."""
WIDTH_OF_A_FILE: Final = 240
"""Columns where what is shown goes to no terminal."""


Tenant = Annotated[str, typer.Argument(help="The tenant.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="The sidecar's configuration, which says where it lies."),
]
Socket = Annotated[
    Path | None,
    typer.Option("--socket", help="The admin socket itself. [default: that of --config]"),
]
OutputOption = Annotated[
    Output, typer.Option("--output", help="For people, or one JSON object a line.")
]


def settings_of(config: Path) -> Config:
    """The configuration. Ends the command where it can not be used."""
    import os  # noqa: PLC0415 - start-up imports only what the command needs

    from pdp.config import ConfigError, load_config  # noqa: PLC0415

    try:
        return load_config(config, os.environ)
    except ConfigError as error:
        refuse(error.message)


@contextlib.contextmanager
def operators_line(
    config: Path | None, socket: Path | None
) -> Iterator[admin_pb2_grpc.BudgetAdminServiceStub]:
    """A stub on the admin socket. What fails on it ends the command: exit code 1 where
    the sidecar says no, 2 where it can not be asked or what was asked for is malformed.
    """
    import grpc  # noqa: PLC0415

    from pdp.admin_socket import target_of  # noqa: PLC0415
    from pdp.api.v1 import admin_pb2_grpc  # noqa: PLC0415
    from pdp.channel import call_error, connect  # noqa: PLC0415

    path = _socket_path(config, socket)
    try:
        if not path.is_socket():
            refuse(
                f"{path} is no socket. See that the sidecar runs, that listen.admin is not false,"
                " and that you are its user; name its configuration with --config."
            )
        with target_of(path) as target, connect(target) as channel:
            yield admin_pb2_grpc.BudgetAdminServiceStub(channel)
    except grpc.RpcError as error:
        _fail(call_error(error))
    except OSError as error:
        refuse(f"{path} can not be opened: {error.strerror}. Only the sidecar's user can.")


def _socket_path(config: Path | None, socket: Path | None) -> Path:
    if (config is None) is (socket is None):
        refuse("name the sidecar by --config or by --socket.")
    if socket is not None:
        return socket.absolute()
    assert config is not None  # noqa: S101 - one of the two was named
    settings = settings_of(config)
    if not settings.listen.admin:
        refuse("listen.admin is false in this configuration: the sidecar has no admin socket.")
    return settings.admin_socket


def _fail(error: CallError) -> NoReturn:
    typer.echo(f"pdp: {error.reason_code}: {printable(error.message)}", err=True)
    raise typer.Exit(exit_codes.USAGE if error.reason_code in _COULD_NOT_ASK else exit_codes.FAILED)


_COULD_NOT_ASK: Final = frozenset(
    {
        "request_invalid",
        "pdp_unavailable",
        "budget_unavailable",
        "audit_unavailable",
        "deadline_exceeded",
        "rate_limited",
        "internal",
    }
)


def refuse(what: str) -> NoReturn:
    """End the command: what it was given can not be used."""
    for row in what.splitlines():
        typer.echo(f"pdp: {printable(row)}", err=True)
    raise typer.Exit(exit_codes.USAGE)


def console_for_people() -> Console:
    """Where people read: what is shown is never taken for markup."""
    from rich.console import Console  # noqa: PLC0415

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    return console


def charges_json(charges: Iterable[common_pb2.Charge]) -> list[JsonValue]:
    """Charges for machines."""
    return [{"budget": each.budget, "unit": each.unit, "amount": each.amount} for each in charges]


def charges_text(charges: Iterable[common_pb2.Charge]) -> str:
    """Charges for people, as --charge takes them."""
    return printable(" ".join(f"{each.budget}/{each.unit}={each.amount}" for each in charges))
