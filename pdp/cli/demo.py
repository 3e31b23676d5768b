"""``pdp demo``: watch the tenant boundary work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pdp.cli import exit_codes
from pdp.cli.output import Output

if TYPE_CHECKING:
    from pdp.demo.show import Show


def demo(
    *,
    request: Annotated[
        str, typer.Option(help="What the agent is asked to do: one order, any number and status.")
    ] = "Update order #918 status and send confirmation to the customer",
    tenant: Annotated[
        str, typer.Option(help="Whose request it is: tenant_acme or tenant_globex.")
    ] = "tenant_acme",
    output: Annotated[
        Output, typer.Option(help="Tables for people, or one JSON object a line.")
    ] = Output.TEXT,
) -> None:
    """Send one request through a real sidecar, tool by tool, then attack it.

    Everything runs on loopback and in a temporary directory. Exit codes: 0 every
    check holds, 1 one does not, 2 the request or the tenant can not be used, 3 the
    sidecar does not start.
    """
    from pdp.demo.planner import PlanError, read  # noqa: PLC0415 - as in pdp.cli.serve
    from pdp.demo.tenants import TENANTS  # noqa: PLC0415

    chosen = TENANTS.get(tenant)
    if chosen is None:
        raise typer.BadParameter(f"choose one of {', '.join(TENANTS)}.", param_hint="--tenant")
    try:
        plan = read(request)
    except PlanError as error:
        raise typer.BadParameter(str(error), param_hint="--request") from None
    try:
        from pdp.demo.play import play  # noqa: PLC0415
        from pdp.demo.stage import StageError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        typer.echo(f'{error.name} is missing: pip install "agent-pdp[demo]"', err=True)
        raise typer.Exit(exit_codes.USAGE) from None
    try:
        holds = play(request, plan, chosen, _show(output))
    except StageError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(exit_codes.CAN_NOT_START) from None
    if not holds:
        raise typer.Exit(exit_codes.FAILED)


def _show(output: Output) -> Show:
    import sys  # noqa: PLC0415
    from io import TextIOWrapper  # noqa: PLC0415

    from rich.console import Console  # noqa: PLC0415

    from pdp.demo.show import JsonShow, TextShow  # noqa: PLC0415

    if output is Output.JSON:
        return JsonShow(typer.echo)
    if isinstance(sys.stdout, TextIOWrapper):
        # The request is shown, whatever letters it has and the terminal lacks.
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False, emoji=False)
    # A pipe has no width; the tables need this one.
    return TextShow(console if console.is_terminal else Console(highlight=False, width=100))
