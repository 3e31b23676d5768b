"""``pdp budget grant``, ``refund`` and ``release``: corrections by hand, on record."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Final

import typer

from pdp.cli.budget.line import (
    TIMEOUT_SECONDS,
    ConfigFile,
    OutputOption,
    Socket,
    Tenant,
    charges_json,
    charges_text,
    operators_line,
    refuse,
)
from pdp.cli.output import Output

if TYPE_CHECKING:
    from pdp.api.v1 import admin_pb2, common_pb2
    from pdp.canonical import JsonObject

    _Answer = (
        admin_pb2.GrantBudgetResponse
        | admin_pb2.RefundSpendResponse
        | admin_pb2.ReleaseHoldResponse
    )

app = typer.Typer()

_CHARGE: Final = re.compile(r"([a-z0-9._-]{1,64})/([a-z0-9._-]{1,64})=([0-9]{1,16})")

HoldId = Annotated[str, typer.Argument(metavar="HOLD", help="The hold's id.")]
Reason = Annotated[str, typer.Option(help="Why, for the audit log.")]
By = Annotated[str, typer.Option(help="Who does it, for the audit log. [default: login name]")]
Key = Annotated[
    str,
    typer.Option(
        help="The key of an earlier try whose answer did not come: it is done once."
        " [default: a new one]"
    ),
]


@app.command(context_settings={"ignore_unknown_options": True})  # an amount may be below zero
def grant(
    tenant: Tenant,
    limit: Annotated[str, typer.Argument(help="The limit's id, as show names it.")],
    amount: Annotated[
        int, typer.Argument(help="How much more may be spent; below zero, of grants taken back.")
    ],
    *,
    reason: Reason,
    counts_for: Annotated[
        str, typer.Option("--for", help="Whose account of the limit, where it has several.")
    ] = "",
    budget: Annotated[str, typer.Option(help="Where the id names limits of several.")] = "",
    unit: Annotated[str, typer.Option(help="Where the id names limits of several.")] = "",
    window: Annotated[str, typer.Option(help="Where the id names limits of several.")] = "",
    by: By = "",
    key: Key = "",
    config: ConfigFile = None,
    socket: Socket = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Let a tenant spend more under a limit than it says, until its window ends.

    Exit codes: 0 done, 1 refused, 2 the sidecar can not be asked, or not for that.
    """
    from pdp.api.v1 import admin_pb2  # noqa: PLC0415 - start-up imports only what it needs
    from pdp.cli.budget.standing import account_json, account_lines  # noqa: PLC0415

    with operators_line(config, socket) as operators:
        answer = operators.GrantBudget(
            admin_pb2.GrantBudgetRequest(
                operation=_operation(key, by, reason),
                tenant_id=tenant,
                limit_id=limit,
                counts_for=counts_for,
                amount=amount,
                budget=budget,
                unit=unit,
                window=window,
            ),
            timeout=TIMEOUT_SECONDS,
        )
    account = answer.account if answer.HasField("account") else None
    if output is Output.JSON:
        _print_json(answer, {"account": None if account is None else account_json(account)})
        return
    _print_done(answer, f"granted {amount:,}")
    if account is not None:
        account_lines([account])


@app.command()
def refund(
    tenant: Tenant,
    hold: HoldId,
    *,
    reason: Reason,
    charge: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BUDGET/UNIT=AMOUNT",
            help="What is taken back; may be repeated. [default: all that is left of it]",
        ),
    ] = None,
    by: By = "",
    key: Key = "",
    config: ConfigFile = None,
    socket: Socket = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Take back what was settled or charged under an id, in the windows where it counts.

    Exit codes: 0 done, 1 refused, 2 the sidecar can not be asked, or not for that.
    """
    from pdp.api.v1 import admin_pb2  # noqa: PLC0415

    charges = [_charge(each) for each in charge or ()]
    with operators_line(config, socket) as operators:
        answer = operators.RefundSpend(
            admin_pb2.RefundSpendRequest(
                operation=_operation(key, by, reason),
                tenant_id=tenant,
                hold_id=hold,
                charges=charges,
            ),
            timeout=TIMEOUT_SECONDS,
        )
    if output is Output.JSON:
        _print_json(answer, {"refunded": charges_json(answer.refunded)})
    else:
        _print_done(answer, f"refunded {charges_text(answer.refunded)}")


@app.command()
def release(
    tenant: Tenant,
    hold: HoldId,
    *,
    reason: Reason,
    even_lease: Annotated[
        bool,
        typer.Option(
            "--even-lease",
            help="Also a lease. While its sidecar runs, what it spends comes on top of limits.",
        ),
    ] = False,
    by: By = "",
    key: Key = "",
    config: ConfigFile = None,
    socket: Socket = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Let a hold expire now. What it holds returns; a late settlement still counts in full.

    Exit codes: 0 done, 1 refused, 2 the sidecar can not be asked, or not for that.
    """
    from pdp.api.v1 import admin_pb2  # noqa: PLC0415

    with operators_line(config, socket) as operators:
        answer = operators.ReleaseHold(
            admin_pb2.ReleaseHoldRequest(
                operation=_operation(key, by, reason),
                tenant_id=tenant,
                hold_id=hold,
                even_lease=even_lease,
            ),
            timeout=TIMEOUT_SECONDS,
        )
    if output is Output.JSON:
        _print_json(answer, {"released": charges_json(answer.released)})
    else:
        _print_done(answer, f"released {charges_text(answer.released) or 'nothing'}")


def _operation(key: str, by: str, reason: str) -> admin_pb2.Operation:
    """Who and why. Its key is told before the first try, which may be cut off."""
    import uuid  # noqa: PLC0415

    from pdp.api.v1 import admin_pb2  # noqa: PLC0415

    if not key:
        key = str(uuid.uuid4())
        typer.echo(f"If this is cut off, try it again with --key {key}", err=True)
    return admin_pb2.Operation(idempotency_key=key, operator=by or _login_name(), reason=reason)


def _login_name() -> str:
    import getpass  # noqa: PLC0415

    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):
        refuse("you have no login name: say who you are with --by.")


def _charge(text: str) -> common_pb2.Charge:
    from pdp.api.v1 import common_pb2  # noqa: PLC0415

    match = _CHARGE.fullmatch(text)
    if match is None:
        refuse("--charge must be BUDGET/UNIT=AMOUNT, for example tools/calls=3.")
    return common_pb2.Charge(budget=match[1], unit=match[2], amount=int(match[3]))


def _print_json(answer: _Answer, result: JsonObject) -> None:
    receipt = {"seq": answer.audit.sequence, "hash": answer.audit.hash}
    typer.echo(json.dumps({**result, "replayed": answer.replayed, "audit": receipt}))


def _print_done(answer: _Answer, what: str) -> None:
    before = " before, and not again" if answer.replayed else ""
    typer.echo(f"{what}{before}; on record as {answer.audit.sequence}:{answer.audit.hash}")
