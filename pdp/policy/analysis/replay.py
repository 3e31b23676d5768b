"""Recorded decisions, asked again of a candidate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from pdp.audit.chain import MAX_LINE_BYTES
from pdp.audit.segments import list_segments
from pdp.canonical import JsonError, JsonObject, JsonValue, parse_object
from pdp.policy.analysis.diff import Change, change_of
from pdp.policy.analysis.evaluator import Answer, decide, open_evaluator
from pdp.policy.bundle import Bundle
from pdp.reason import ReasonCode

NO_INPUT: Final = "no input is recorded (audit.record_policy_input is off)"
INPUT_TOO_LARGE: Final = "the input was too large to be recorded"
NOT_ASKED: Final = "refused before the policy was asked"
BUDGET: Final = "refused by a budget, not by the policy"
NO_ANSWER: Final = "the policy gave no answer in time"
REPEATED: Final = "an answer that was given before"
UNREADABLE: Final = "the line is no record"
_BY_BUDGET: Final = frozenset(
    {
        ReasonCode.TENANT_BUDGET_EXCEEDED,
        ReasonCode.BUDGET_UNAVAILABLE,
        ReasonCode.BUDGET_UNLIMITED,
        ReasonCode.BUDGET_NOT_DELEGATED,
        ReasonCode.IDEMPOTENCY_KEY_REUSED,
    }
)
_WITHOUT_POLICY: Final = frozenset(
    {
        ReasonCode.TOOL_NOT_DELEGATED,
        ReasonCode.ARGUMENT_NOT_DELEGATED,
        ReasonCode.SENDER_UNKNOWN,
    }
)
"""What is refused before the policy is asked."""
_WITHOUT_ANSWER: Final = frozenset(
    {ReasonCode.POLICY_TIMEOUT, ReasonCode.POLICY_UNAVAILABLE, ReasonCode.POLICY_STALE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A recorded decision that the candidate would make otherwise."""

    change: Change
    tenant: str
    tool: str
    decision_id: str
    time: str
    """As recorded, RFC 3339."""
    sequence: int
    before: str
    """The reason code on record."""
    after: str
    document: JsonObject = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What became of the records that were asked for."""

    replayed: int
    flips: tuple[Flip, ...]
    not_replayed: Mapping[str, int]
    """How many, by the reason."""
    replayed_by_tenant: Mapping[str, int]


def replay(
    path: Path,
    bundle: Bundle,
    *,
    tenant: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Replay:
    """Ask a candidate what an audit log's decisions were asked. The log is not verified
    here. ``since`` is included, ``until`` is not. Raises BundleError and OSError.
    """
    skipped: Counter[str] = Counter()
    replayed: Counter[str] = Counter()
    flips: list[Flip] = []
    now = 0.0
    with open_evaluator(bundle, clock=lambda: now) as evaluator:
        for record in _records(path):
            if record is None:
                skipped[UNREADABLE] += 1
                continue
            time = datetime.fromisoformat(str(record["time"]))
            if not _is_wanted(record, time, tenant=tenant, since=since, until=until):
                continue
            reason = _why_not(record)
            document = record.get("input")
            if reason is not None or not isinstance(document, dict):
                skipped[reason or NO_INPUT] += 1
                continue
            now = time.timestamp()
            flip = _flip(record, document, decide(evaluator, document))
            replayed[str(record["tenant_id"])] += 1
            if flip is not None:
                flips.append(flip)
    return Replay(
        replayed=replayed.total(),
        flips=tuple(flips),
        not_replayed=dict(skipped),
        replayed_by_tenant=dict(replayed),
    )


def find_decision(path: Path, decision_id: str) -> JsonObject | None:
    """The first record of a decision. Raises OSError."""
    for record in _records(path):
        if record and record["type"] == "decision" and record.get("decision_id") == decision_id:
            return record
    return None


def _records(path: Path) -> Iterator[JsonObject | None]:
    """Every whole line; None for one that is no record."""
    files = [segment.path for segment in list_segments(path)] if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    continue
                try:
                    record = parse_object(line[:-1], max_bytes=MAX_LINE_BYTES)
                    datetime.fromisoformat(str(record["time"]))
                    yield record if record.keys() >= _REQUIRED else None
                except (JsonError, KeyError, ValueError):
                    yield None


_REQUIRED: Final = frozenset({"type", "time", "seq", "tenant_id", "action", "reason_code"})


def _is_wanted(
    record: JsonObject,
    time: datetime,
    *,
    tenant: str | None,
    since: datetime | None,
    until: datetime | None,
) -> bool:
    return (
        record["type"] == "decision"
        and (tenant is None or record["tenant_id"] == tenant)
        and (since is None or time >= since)
        and (until is None or time < until)
    )


def _why_not(record: JsonObject) -> str | None:
    """Why a record can not be replayed; None when it can."""
    code = record["reason_code"]
    if record.get("replayed") or code == ReasonCode.PERMIT_UNAVAILABLE:
        return REPEATED
    if code in _BY_BUDGET:
        return BUDGET
    if code in _WITHOUT_ANSWER:
        return NO_ANSWER
    if code in _WITHOUT_POLICY or record.get("policy_revision") is None:
        return NOT_ASKED
    if isinstance(record.get("input"), dict):
        return None
    detail = record.get("detail")
    too_large = isinstance(detail, dict) and detail.get("input_omitted") is True
    return INPUT_TOO_LARGE if too_large else NO_INPUT


def _flip(record: JsonObject, document: JsonObject, after: Answer) -> Flip | None:
    code = str(record["reason_code"])
    held_for, max_uses = _uses(record)
    before = Answer(allow=code == ReasonCode.OK, reason_code=code, max_uses=max_uses)
    decided = Answer(allow=after.allow, reason_code=after.reason_code, max_uses=after.max_uses)
    change = change_of(before, decided)
    if change is None and after.allow and _charges(record) != _charged(after, held_for):
        change = Change.TERMS
    if change is None:
        return None
    sequence = record["seq"]
    return Flip(
        change=change,
        tenant=str(record["tenant_id"]),
        tool=str(record["action"]),
        decision_id=str(record.get("decision_id")),
        time=str(record["time"]),
        sequence=sequence if isinstance(sequence, int) else 0,
        before=code,
        after=after.reason_code,
        document=document,
    )


def _uses(record: JsonObject) -> tuple[int, int]:
    """For how many calls the permit was that was given, and would have been as far as the
    policy goes.
    """
    detail = record.get("detail")
    uses = detail.get("max_uses", 1) if isinstance(detail, dict) else 1
    most = detail.get("policy_max_uses", uses) if isinstance(detail, dict) else uses
    return uses if isinstance(uses, int) else 1, most if isinstance(most, int) else 1


def _charges(record: JsonObject) -> set[tuple[JsonValue, ...]]:
    charges = record.get("charges")
    return {
        (charge.get("budget"), charge.get("unit"), charge.get("amount"))
        for charge in (charges if isinstance(charges, list) else [])
        if isinstance(charge, dict)
    }


def _charged(answer: Answer, times: int) -> set[tuple[JsonValue, ...]]:
    return {(charge.budget, charge.unit, charge.amount * times) for charge in answer.charges}
