"""The commands, put together. Each imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pdp import __version__
from pdp.cli.audit import app as audit
from pdp.cli.budget import app as budget
from pdp.cli.config import app as config
from pdp.cli.demo import demo
from pdp.cli.explain import explain
from pdp.cli.injection import injection_webhook
from pdp.cli.keys import app as keys
from pdp.cli.policy import app as policy
from pdp.cli.revoke import app as revoke
from pdp.cli.serve import serve
from pdp.cli.status import status

app = typer.Typer(
    name="pdp",
    help="A policy decision point beside every agent runtime.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(serve)
app.command()(status)
app.command()(explain)
app.command()(demo)
app.command()(injection_webhook)
app.add_typer(config, name="config", help="Check and describe the configuration.")
app.add_typer(audit, name="audit", help="Read and verify the audit log.")
app.add_typer(budget, name="budget", help="Show budgets, and correct them by hand.")
app.add_typer(keys, name="keys", help="Show and rotate the keys that sign permits.")
app.add_typer(revoke, name="revoke", help="Say who may no longer act, and take it back.")
app.add_typer(policy, name="policy", help="Write, check, compare and release policy bundles.")


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass
