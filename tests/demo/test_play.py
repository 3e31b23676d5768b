"""That the checks notice: a scene that breaks the boundary fails the demonstration."""

from __future__ import annotations

import io
import smtplib

from rich.console import Console

from pdp.demo.checks import Check
from pdp.demo.planner import read
from pdp.demo.play import play
from pdp.demo.scenes import Ending, Scene
from pdp.demo.show import JsonShow, TextShow
from pdp.demo.stage import Stage, find_bundle
from pdp.demo.tenants import TENANTS

REQUEST = "Update order #918 status and send confirmation to the customer"


class KeepingShow(JsonShow):
    """Keeps what is shown, and the checks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.checks: list[Check] = []
        super().__init__(self.lines.append)

    def checked(self, checks: list[Check]) -> None:
        super().checked(checks)
        self.checks = checks


def test_a_broken_boundary_fails_exactly_the_checks_that_watch_it() -> None:
    secrets: list[str] = []

    def sabotage(stage: Stage) -> Ending:
        with stage.database_of(stage.other) as database:
            database.change(stage.plan.order_id, "refunded")
        host, port = stage.smtp.address
        account = stage.mail._accounts[stage.other.id]
        with smtplib.SMTP(host, port, local_hostname="localhost") as smtp:
            smtp.login(account.login.name, account.login.password)
            smtp.sendmail(account.sender, ["x@customers.example"], "Subject: stolen\n\n.")
        [log] = (stage.sidecar.directory / "state" / "audit").glob("audit-*.jsonl")
        with log.open("r+b") as file:
            content = file.read()
            file.seek(content.index(b"maria"))
            file.write(b"mario")
        secrets.extend(login.password for login in stage.orders_logins.values())
        secrets.append(account.login.password)
        return Ending((), holds=True, note="done")

    show = KeepingShow()
    attacks = (Scene("sabotage", "sabotage", sabotage),)
    holds = play(REQUEST, read(REQUEST), TENANTS["tenant_acme"], show, attacks=attacks)

    assert not holds
    failed = {check.name for check in show.checks if not check.holds}
    assert failed == {"other_order_untouched", "one_mail", "audit_chain_intact"}
    assert secrets
    assert not [secret for secret in secrets if secret in "\n".join(show.lines)]


def test_a_scene_that_does_not_end_as_it_must_fails_the_demo() -> None:
    def hapless(stage: Stage) -> Ending:
        with stage.guard.acting_for(stage.token(role="viewer")):
            stage.guard.authorize("orders.update", {})
        return Ending((), holds=True, note="never reached")

    screen = io.StringIO()
    show = TextShow(Console(file=screen, width=100))
    attacks = (Scene("hapless", "a hapless attack", hapless),)
    assert not play(REQUEST, read(REQUEST), TENANTS["tenant_acme"], show, attacks=attacks)
    assert "could not be played" in screen.getvalue()
    assert "FAILED: hapless." in screen.getvalue()


def test_the_starter_policy_is_found() -> None:
    assert find_bundle().is_file()
