"""What must be true at the end, whatever the scenes said of themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pdp.api.v1 import common_pb2
from pdp.audit.chain import MAX_LINE_BYTES
from pdp.audit.record import AuditReceipt
from pdp.audit.segments import list_segments
from pdp.audit.verify import verify
from pdp.canonical import JsonObject, parse_object
from pdp.demo.recorder import EXECUTED, Call
from pdp.demo.smtp import Delivered
from pdp.demo.stage import FIRST_STATUS, Stage
from pdp.reason import ReasonCode


@dataclass(frozen=True, slots=True)
class Check:
    """One assertion."""

    name: str
    title: str
    holds: bool
    found: str
    """What was found."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """The limits of both tenants, read while the sidecar still ran."""

    own: Sequence[common_pb2.LimitStatus]
    other: Sequence[common_pb2.LimitStatus]


def read_budgets(stage: Stage) -> Budgets:
    """Ask the sidecar for both tenants' limits."""
    return Budgets(stage.limits_of(stage.tenant), stage.limits_of(stage.other))


def check_all(stage: Stage, budgets: Budgets) -> Iterator[Check]:
    """Every check, once the sidecar has stopped."""
    yield _other_order(stage)
    yield _own_order(stage)
    yield _mail(stage)
    yield from _budgets(stage, budgets)
    yield from _audit(stage)


def _other_order(stage: Stage) -> Check:
    order = stage.order_of(stage.other)
    with stage.database_of(stage.other) as database:
        changes = database.changes()
    return Check(
        "other_order_untouched",
        f"{stage.other.id}'s order #{order.id} is untouched",
        order.status == FIRST_STATUS and not changes,
        f"{order.status}, changed {len(changes)} times",
    )


def _own_order(stage: Stage) -> Check:
    with stage.database_of(stage.tenant) as database:
        logins = [change.login for change in database.changes()]
    executed = [call for call in _executed(stage) if call.action == "orders.update"]
    own = stage.orders_logins[stage.tenant.id].name
    return Check(
        "order_changed_once_per_permit",
        f"{stage.tenant.id}'s order: one change a permit",
        logins == [own] * len(executed),
        f"{len(logins)} changes by login {', '.join(sorted(set(logins))) or 'none'}",
    )


def _mail(stage: Stage) -> Check:
    delivered = stage.smtp.delivered
    expected = Delivered(
        login=f"{stage.tenant.id}-mail",
        sender=stage.tenant.sender,
        recipients=(stage.tenant.customer,),
        subject=f"Your order #{stage.plan.order_id}",
    )
    number = 1 if stage.plan.confirms else 0
    return Check(
        "one_mail",
        "one mail, to the customer" if number else "no mail, as none was asked for",
        delivered == [expected] * number,
        ", ".join(f"{mail.login} to {' '.join(mail.recipients)}" for mail in delivered) or "none",
    )


def _budgets(stage: Stage, budgets: Budgets) -> Iterator[Check]:
    spent = Counter[tuple[str, str]]()
    for call in _executed(stage):
        for budget, unit, amount in call.decision.charges if call.decision else ():
            spent[budget, unit] += amount
    whole = [limit for limit in budgets.own if limit.scope == "tenant"]
    yield Check(
        "budgets_as_expected",
        f"{stage.tenant.id} spent what its calls cost",
        bool(whole)
        and all(
            limit.spent == spent[limit.budget, limit.unit] and limit.remaining >= 0
            for limit in whole
        )
        and all(limit.held == 0 for limit in budgets.own),
        ", ".join(f"{amount} {budget}/{unit}" for (budget, unit), amount in sorted(spent.items())),
    )
    yield Check(
        "other_budgets_untouched",
        f"{stage.other.id} spent nothing",
        all(limit.spent == 0 and limit.held == 0 for limit in budgets.other),
        f"{len(budgets.other)} limits at 0",
    )


def _audit(stage: Stage) -> Iterator[Check]:
    directory = stage.sidecar.directory / "state" / "audit"
    receipts = [
        AuditReceipt(call.decision.audit_sequence, call.decision.audit_hash)
        for call in stage.recorder.calls
        if call.decision
    ]
    newest = max(receipts, key=lambda receipt: receipt.sequence, default=None)
    report = verify(directory, receipt=newest)
    yield Check(
        "audit_chain_intact",
        "the audit chain verifies, to its end",
        report.is_intact and report.is_closed and report.has_receipt is True,
        f"{report.records} records, chained by hash",
    )
    records = list(_read(directory))
    tenants = {record["tenant_id"] for record in records if record.get("tenant_id")}
    yield Check(
        "audit_names_one_tenant",
        f"every record names {stage.tenant.id} or nobody",
        tenants == {stage.tenant.id},
        ", ".join(sorted(str(tenant) for tenant in tenants)),
    )
    recorded = {str(record["reason_code"]) for record in records if "reason_code" in record}
    refusals = set(_asked_and_refused(stage.recorder.calls))
    yield Check(
        "refusals_on_record",
        "every refusal by the sidecar is on record",
        refusals <= recorded,
        f"{len(refusals)} reason codes",
    )


def _executed(stage: Stage) -> list[Call]:
    return [call for call in stage.recorder.calls if call.outcome == EXECUTED]


def _asked_and_refused(calls: Iterable[Call]) -> Iterator[str]:
    """Reason codes of refusals that the sidecar made; not those of a tool that
    verified a permit by itself, nor those for want of a sidecar.
    """
    for call in calls:
        by_sidecar = call.decision is None or not call.decision.allowed
        if by_sidecar and call.reason_code != ReasonCode.PDP_UNAVAILABLE:
            yield call.reason_code


def _read(directory: Path) -> Iterator[JsonObject]:
    for segment in list_segments(directory):
        for line in segment.path.read_bytes().splitlines():
            yield parse_object(line, max_bytes=MAX_LINE_BYTES)
