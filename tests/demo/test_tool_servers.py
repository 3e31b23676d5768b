"""The tool servers, attacked directly: they trust neither agent nor arguments."""

from __future__ import annotations

import smtplib
from collections.abc import Iterator

import pytest

from pdp.client import Permit
from pdp.demo.orders import OrdersDatabase, OrdersError
from pdp.demo.planner import Plan
from pdp.demo.stage import Stage, set_stage
from pdp.demo.tenants import TENANTS, Login
from pdp.permit import PermitError
from pdp.permit.signing import SigningKey

ORDER = {"order_id": "918", "status": "shipped"}
MAIL = {"to": "ada@customers.example", "subject": "Hello", "body": "There."}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    plan = Plan("918", "shipped", confirms=True)
    with set_stage(plan, TENANTS["tenant_acme"], listener=lambda _call: None) as stage:
        yield stage


def permit_for(stage: Stage, tool: str, arguments: dict[str, str], audience: str) -> Permit:
    with stage.guard.acting_for(stage.token()):
        return stage.guard.authorize(tool, arguments, audience=audience)


def changes(stage: Stage) -> int:
    count = 0
    for tenant in TENANTS.values():
        with stage.database_of(tenant) as database:
            count += len(database.changes())
    return count


def assert_refused(stage: Stage, permit: str, arguments: dict[str, str], reason_code: str) -> None:
    before = changes(stage)
    with pytest.raises(PermitError) as refused:
        stage.orders.update(permit, dict(arguments))
    assert refused.value.reason_code == reason_code
    assert changes(stage) == before


def test_without_a_permit_nothing_is_changed(stage: Stage) -> None:
    assert_refused(stage, "", ORDER, "permit_missing")
    assert_refused(stage, "not-a-permit", ORDER, "permit_invalid")


def test_the_token_of_a_user_is_no_permit(stage: Stage) -> None:
    assert_refused(stage, stage.token(), ORDER, "permit_invalid")


def test_a_permit_that_another_key_signed_is_refused(stage: Stage) -> None:
    permit = permit_for(stage, "orders.update", ORDER, "orders")
    forged = SigningKey.generate().sign(permit.to_claims())
    assert_refused(stage, forged, ORDER, "permit_invalid")


def test_a_permit_with_changed_arguments_is_refused(stage: Stage) -> None:
    permit = permit_for(stage, "orders.update", ORDER, "orders").token
    assert_refused(stage, permit, {**ORDER, "status": "refunded"}, "permit_mismatch")
    assert_refused(stage, permit, {**ORDER, "order_id": "919"}, "permit_mismatch")
    assert_refused(stage, permit, {**ORDER, "tenant_id": "tenant_globex"}, "permit_mismatch")


def test_a_permit_for_the_mail_server_opens_no_orders(stage: Stage) -> None:
    permit = permit_for(stage, "orders.update", ORDER, "mail").token
    assert_refused(stage, permit, ORDER, "permit_mismatch")
    permit = permit_for(stage, "mail.send", MAIL, "orders").token
    assert_refused(stage, permit, ORDER, "permit_mismatch")


def test_another_tenants_own_server_refuses_a_good_permit(stage: Stage) -> None:
    permit = permit_for(stage, "orders.update", ORDER, "orders")
    with pytest.raises(PermitError) as refused:
        stage.others_orders.update(permit.token, dict(ORDER))
    assert refused.value.reason_code == "permit_mismatch"
    # The refusal did not use it up: at the right server it is still good, once.
    stage.orders.update(permit.token, dict(ORDER))
    assert_refused(stage, permit.token, ORDER, "permit_used")


def test_a_message_needs_a_permit_of_its_own(stage: Stage) -> None:
    permit = permit_for(stage, "mail.send", MAIL, "mail").token
    sent = len(stage.smtp.delivered)
    with pytest.raises(PermitError):
        stage.mail.send(permit, {**MAIL, "to": "eve@customers.example"})
    assert len(stage.smtp.delivered) == sent
    stage.mail.send(permit, dict(MAIL))
    with pytest.raises(PermitError):
        stage.mail.send(permit, dict(MAIL))
    [*_, mail] = stage.smtp.delivered
    assert len(stage.smtp.delivered) == sent + 1
    assert (mail.login, mail.sender) == ("tenant_acme-mail", "support@acme.example")


def test_a_tenants_database_opens_with_its_own_login_only(stage: Stage) -> None:
    globex = stage.databases["tenant_globex"]
    own = stage.orders_logins["tenant_globex"]
    OrdersDatabase(globex, own).close()
    for wrong in (
        stage.orders_logins["tenant_acme"],
        Login(own.name, stage.orders_logins["tenant_acme"].password),
        Login(own.name, ""),
    ):
        with pytest.raises(OrdersError):
            OrdersDatabase(globex, wrong)


def test_mail_without_a_login_or_from_anothers_address_is_refused(stage: Stage) -> None:
    host, port = stage.smtp.address
    account = stage.mail._accounts["tenant_acme"]
    sent = len(stage.smtp.delivered)
    with smtplib.SMTP(host, port, local_hostname="localhost") as smtp:
        with pytest.raises(smtplib.SMTPSenderRefused):
            smtp.sendmail(account.sender, ["x@customers.example"], "Subject: no login\n\n.")
        with pytest.raises(smtplib.SMTPAuthenticationError):
            smtp.login("tenant_globex-mail", account.login.password)
        smtp.login(account.login.name, account.login.password)
        with pytest.raises(smtplib.SMTPSenderRefused):
            smtp.sendmail("help@globex.example", ["x@customers.example"], "Subject: spoof\n\n.")
    assert len(stage.smtp.delivered) == sent


def test_a_login_does_not_show_its_password() -> None:
    assert "hunter2" not in repr(Login("acme", "hunter2"))
