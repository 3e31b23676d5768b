"""``pdp budget show`` and ``holds``: what stands now."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
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
    console_for_people,
    operators_line,
)
from pdp.cli.output import Output, printable

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp
    from rich.text import Text

    from pdp.api.v1 import admin_pb2, admin_pb2_grpc, common_pb2
    from pdp.canonical import JsonObject

app = typer.Typer()

BAR_WIDTH: Final = 30
MOST_LISTED: Final = 1000
"""What the sidecar tells of at most: there may be more."""
HIGH_PERCENT: Final = 80
"""From here on a bar is yellow; past the limit it is red."""
_BLOCKS: Final = ("█", "▓", "░", "·")
_SIGNS: Final = ("#", "+", "-", ".")
"""Spent, leased, held otherwise, free; the second where the terminal has no blocks."""

Most = Annotated[
    int, typer.Option("--top", min=1, max=MOST_LISTED, help="Accounts shown of each limit.")
]


@app.command()
def show(
    tenant: Annotated[
        str, typer.Argument(help="The tenant. [default: every tenant, with its tightest limit]")
    ] = "",
    *,
    top: Most = 10,
    config: ConfigFile = None,
    socket: Socket = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show what is spent, held and left under each limit, and who spends most.

    Exit codes: 0 shown, 2 the sidecar can not be asked, or not for that.
    """
    from pdp.api.v1 import admin_pb2  # noqa: PLC0415 - start-up imports only what it needs

    with operators_line(config, socket) as operators:
        if tenant:
            accounts = _accounts(operators, tenant)
            holds = _holds(operators, tenant)
            if output is Output.JSON:
                _print_tenant_json(tenant, accounts, holds)
            else:
                _show_tenant(accounts, holds, top)
            return
        listed = operators.ListTenants(admin_pb2.ListTenantsRequest(), timeout=TIMEOUT_SECONDS)
        tightest = [(each, _tightest(_accounts(operators, each))) for each in listed.tenants]
    if output is Output.JSON:
        for name, account in tightest:
            shown = None if account is None else account_json(account)
            typer.echo(json.dumps({"tenant": name, "tightest": shown}))
    else:
        _show_tenants(tightest)


@app.command()
def holds(
    tenant: Tenant,
    *,
    config: ConfigFile = None,
    socket: Socket = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """List a tenant's open holds, the earliest to expire first; leases are among them.

    Exit codes: 0 listed, 2 the sidecar can not be asked, or not for that.
    """
    with operators_line(config, socket) as operators:
        found = _holds(operators, tenant)
    if output is Output.JSON:
        for hold in found:
            typer.echo(json.dumps(_hold_json(hold)))
        return
    from rich.table import Table  # noqa: PLC0415

    console = console_for_people()
    table = Table()
    for name in ("hold", "made by", "for", "tool", "holds", "made", "expires", "memo"):
        table.add_column(name, overflow="fold")
    for hold in found:
        words = (hold.hold_id, hold.operation, hold.actor_id, hold.tool)
        table.add_row(
            *(printable(word) for word in words),
            charges_text(_left(hold)),
            _time(hold.made_at),
            _time(hold.expires_at),
            printable(hold.memo),
        )
    if found:
        console.print(table, soft_wrap=False)
    console.print(_counted(found))


def _accounts(
    operators: admin_pb2_grpc.BudgetAdminServiceStub, tenant: str
) -> list[admin_pb2.BudgetAccount]:
    from pdp.api.v1 import admin_pb2  # noqa: PLC0415

    request = admin_pb2.ListAccountsRequest(tenant_id=tenant)
    return list(operators.ListAccounts(request, timeout=TIMEOUT_SECONDS).accounts)


def _holds(
    operators: admin_pb2_grpc.BudgetAdminServiceStub, tenant: str
) -> list[admin_pb2.BudgetHold]:
    from pdp.api.v1 import admin_pb2  # noqa: PLC0415

    request = admin_pb2.ListHoldsRequest(tenant_id=tenant)
    return list(operators.ListHolds(request, timeout=TIMEOUT_SECONDS).holds)


def _left(hold: admin_pb2.BudgetHold) -> Iterator[common_pb2.Charge]:
    """What a hold still holds."""
    from pdp.api.v1 import common_pb2  # noqa: PLC0415

    settled = {(each.budget, each.unit): each.amount for each in hold.settled}
    for each in hold.charges:
        left = each.amount - settled.get((each.budget, each.unit), 0)
        if left > 0:
            yield common_pb2.Charge(budget=each.budget, unit=each.unit, amount=left)


# For people


def _show_tenant(
    accounts: Sequence[admin_pb2.BudgetAccount], holds: Sequence[admin_pb2.BudgetHold], top: int
) -> None:
    groups: dict[tuple[str, ...], list[admin_pb2.BudgetAccount]] = {}
    for account in accounts:
        limit = account.status
        rule = (limit.limit_id, limit.budget, limit.unit, limit.window, limit.scope)
        groups.setdefault(rule, []).append(account)
    for group in groups.values():
        account_lines(sorted(group, key=_used_most)[:top], of=len(group))
    if not accounts:
        typer.echo("nothing is counted in a window that has not ended")
    if len(accounts) == MOST_LISTED:
        typer.echo(f"only the first {MOST_LISTED} accounts are shown")
    typer.echo(_counted(holds))


def account_lines(accounts: Sequence[admin_pb2.BudgetAccount], *, of: int = 1) -> None:
    """Print accounts of one limit, under its name; ``of`` is how many there are."""
    from rich.text import Text  # noqa: PLC0415

    console = console_for_people()
    limit = accounts[0].status
    title = Text(printable(limit.limit_id), style="bold")
    title.append(printable(f"  {_rule(limit)}"), style="not bold")
    if limit.shadow:
        title.append("  shadow: refuses nothing", style="not bold magenta")
    console.print(title)
    width = max(len(printable(each.counts_for)) for each in accounts)
    blocks = _BLOCKS if console.encoding.lower().startswith("utf") else _SIGNS
    for account in accounts:
        row = Text("  ")
        if width:
            row.append(f"{printable(account.counts_for) or '(none)':<{max(width, 6)}}  ")
        console.print(row.append_text(_bar(account, blocks)).append(f"  {_figures(account)}"))
    if of > len(accounts):
        console.print(f"  and {of - len(accounts):,} more: show them with --top")


def _rule(limit: common_pb2.LimitStatus) -> str:
    what = f"{limit.unit} of {limit.budget}"
    scope = "" if limit.scope == "tenant" else f", for each {limit.scope}"
    if limit.window == "rolling":
        return f"{what}: {limit.limit:,} in {limit.seconds:,} s, {limit.burst:,} at once{scope}"
    if limit.window == "concurrent":
        return f"{what}: {limit.limit:,} at the same time{scope}"
    article = "an" if limit.window == "hour" else "a"
    return f"{what}: {limit.limit:,} in {article} {limit.window}{scope}"


def _bar(account: admin_pb2.BudgetAccount, blocks: tuple[str, ...]) -> Text:
    from rich.text import Text  # noqa: PLC0415

    spent, leased, held, free = blocks
    limit, most = account.status, max(_most(account), 1)
    drawn, ends = "", 0
    for amount, sign in (
        (limit.spent, spent),
        (account.leased, leased),
        (limit.held - account.leased, held),
    ):
        ends += amount
        drawn += sign * (min(BAR_WIDTH, round(BAR_WIDTH * ends / most)) - len(drawn))
    percent = _percent(account)
    style = "red" if limit.remaining < 0 else "yellow" if percent >= HIGH_PERCENT else "green"
    bar = Text(drawn, style=style)
    bar.append(free * (BAR_WIDTH - len(drawn)), style="dim")
    return bar.append(f" {percent:>4} %", style=style)


def _figures(account: admin_pb2.BudgetAccount) -> Text:
    from rich.text import Text  # noqa: PLC0415

    limit = account.status
    figures = Text(f"spent {limit.spent:,}  held {limit.held:,}")
    if account.leased:
        figures.append(f" ({account.leased:,} leased)")
    if limit.remaining < 0:
        figures.append(f"  over by {-limit.remaining:,}", style="bold red")
    else:
        figures.append(f"  left {limit.remaining:,}")
    figures.append(f" of {_most(account):,}")
    if limit.granted:
        figures.append(f" ({limit.granted:,} granted)", style="cyan")
    if limit.HasField("resets_at"):
        word = "drained at" if limit.window == "rolling" else "until"
        figures.append(f"  {word} {_time(limit.resets_at, limit.timezone)}")
    return figures


def _show_tenants(
    tightest: Iterable[tuple[str, admin_pb2.BudgetAccount | None]],
) -> None:
    from rich.table import Table  # noqa: PLC0415

    console = console_for_people()
    blocks = _BLOCKS if console.encoding.lower().startswith("utf") else _SIGNS
    table = Table()
    for name in ("tenant", "tightest limit", "used", "", "until"):
        table.add_column(name, overflow="fold")
    for tenant, account in tightest:
        if account is None:
            table.add_row(printable(tenant), "nothing is counted", "", "", "")
            continue
        limit = account.status
        whose = f" ({account.counts_for})" if account.counts_for else ""
        table.add_row(
            printable(tenant),
            printable(f"{limit.limit_id}{whose}"),
            _bar(account, blocks),
            f"{limit.remaining:,} left of {_most(account):,}",
            _time(limit.resets_at, limit.timezone) if limit.HasField("resets_at") else "",
        )
    if table.row_count:
        console.print(table, soft_wrap=False)
    else:
        console.print("the ledger keeps nothing of any tenant")


def _tightest(accounts: Iterable[admin_pb2.BudgetAccount]) -> admin_pb2.BudgetAccount | None:
    """The account with least left for its size; shadow limits only where there is no other."""
    return min(
        accounts,
        key=lambda each: (each.status.shadow, each.status.remaining / max(_most(each), 1)),
        default=None,
    )


def _used_most(account: admin_pb2.BudgetAccount) -> tuple[int, str]:
    return -(account.status.spent + account.status.held), account.counts_for


def _most(account: admin_pb2.BudgetAccount) -> int:
    """What may be spent and held in the account, grants included."""
    limit = account.status
    return (limit.burst if limit.window == "rolling" else limit.limit) + limit.granted


def _percent(account: admin_pb2.BudgetAccount) -> int:
    """Rounded down: 100 only where nothing is left."""
    used, most = account.status.spent + account.status.held, _most(account)
    return used * 100 // most if most else 100


def _counted(holds: Sequence[admin_pb2.BudgetHold]) -> str:
    leases = sum(each.operation == "lease" for each in holds)
    more = " or more" if len(holds) == MOST_LISTED else ""
    named = f", {leases:,} of them leases" if leases else ""
    return f"{len(holds):,} open hold{'' if len(holds) == 1 else 's'}{more}{named}"


def _time(moment: Timestamp, timezone: str = "UTC") -> str:
    from datetime import UTC, datetime  # noqa: PLC0415
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError  # noqa: PLC0415

    try:
        zone = ZoneInfo(timezone)
    except (ValueError, OSError, ZoneInfoNotFoundError):
        zone = None  # this machine does not know it
    at = datetime.fromtimestamp(moment.seconds, zone or UTC)
    return f"{at:%Y-%m-%d %H:%M:%S} {timezone if zone else 'UTC'}"


# For machines


def _print_tenant_json(
    tenant: str,
    accounts: Iterable[admin_pb2.BudgetAccount],
    holds: Sequence[admin_pb2.BudgetHold],
) -> None:
    typer.echo(
        json.dumps(
            {
                "tenant": tenant,
                "accounts": [account_json(each) for each in accounts],
                "holds": len(holds),
                "leases": sum(each.operation == "lease" for each in holds),
            }
        )
    )


def account_json(account: admin_pb2.BudgetAccount) -> JsonObject:
    """An account for machines; times are Unix seconds."""
    limit = account.status
    return {
        "limit_id": limit.limit_id,
        "budget": limit.budget,
        "unit": limit.unit,
        "window": limit.window,
        "timezone": limit.timezone,
        "seconds": limit.seconds,
        "burst": limit.burst,
        "scope": limit.scope,
        "counts_for": account.counts_for,
        "shadow": limit.shadow,
        "limit": limit.limit,
        "granted": limit.granted,
        "spent": limit.spent,
        "held": limit.held,
        "leased": account.leased,
        "remaining": limit.remaining,
        "percent": _percent(account),
        "starts_at": account.starts_at.seconds if account.HasField("starts_at") else None,
        "resets_at": limit.resets_at.seconds if limit.HasField("resets_at") else None,
    }


def _hold_json(hold: admin_pb2.BudgetHold) -> JsonObject:
    return {
        "hold_id": hold.hold_id,
        "operation": hold.operation,
        "actor_id": hold.actor_id,
        "tool": hold.tool,
        "charges": charges_json(hold.charges),
        "settled": charges_json(hold.settled),
        "made_at": hold.made_at.seconds,
        "expires_at": hold.expires_at.seconds,
        "memo": hold.memo,
    }
