from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pdp.audit.record import AuditRecord, Outcome
from pdp.canonical import JsonObject
from pdp.identity.subject import Subject
from pdp.policy.analysis import replay as replaying
from pdp.policy.analysis.diff import Change
from pdp.policy.analysis.replay import Replay, find_decision, replay
from pdp.policy.bundle import Bundle
from pdp.policy.question import authorize_input
from tests.audit.conftest import make_record, write_in
from tests.policy.analysis.small import changed

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def input_of(tenant: str, role: str, tool: str, arguments: JsonObject) -> JsonObject:
    subject = Subject(
        tenant=tenant, actor="alice", roles=(role,), scopes=("notes:read", "notes:write")
    )
    return authorize_input(
        subject,
        tool=tool,
        arguments=arguments,
        resource=None,
        time=NOON.timestamp(),
        request_id="r",
        context={},
    )


def decision(number: int, tenant: str = "acme", **fields: Any) -> AuditRecord:
    """A recorded decision on a call of notes.read, which the small data allows."""
    known: dict[str, Any] = {
        "tenant_id": tenant,
        "action": "notes.read",
        "decision_id": f"d{number}",
        "policy_revision": "old",
        "input": input_of(tenant, "reader", "notes.read", {"id": "1"}),
    }
    return make_record(**(known | fields))


def denied(code: str, **fields: Any) -> dict[str, Any]:
    return {"outcome": Outcome.DENIED, "reason_code": code, **fields}


@pytest.fixture
def log(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: AuditRecord) -> Path:
        write_in(tmp_path / "audit", records)
        return tmp_path / "audit"

    return write


def replayed(path: Path, bundle: Bundle, change: Any = lambda data: None, **only: Any) -> Replay:
    return replay(path, changed(bundle, change), **only)


def test_the_same_rules_flip_nothing(starter: Bundle, log: Callable[..., Path]) -> None:
    found = replayed(log(decision(1), decision(2, "globex")), starter)
    assert found.replayed == 2
    assert found.flips == ()
    assert found.replayed_by_tenant == {"acme": 1, "globex": 1}
    assert found.not_replayed == {}


def test_flips_of_each_kind_are_listed(starter: Bundle, log: Callable[..., Path]) -> None:
    write = input_of("acme", "writer", "notes.write", {"kind": "memo"})
    charge: JsonObject = {"budget": "tools", "unit": "calls", "amount": 1}
    path = log(
        decision(1),
        decision(2, **denied("role_not_allowed")),
        decision(3, action="notes.write", input=write, charges=(charge,)),
        decision(4, "globex", **denied("tool_not_allowed")),
    )

    def change(data: Any) -> None:
        data["tools"]["notes.write"]["charge"][0]["amount"] = 2
        data["tenants"]["globex"]["status"] = "suspended"

    flips = {flip.decision_id: flip for flip in replayed(path, starter, change).flips}
    assert {name: flip.change for name, flip in flips.items()} == {
        "d2": Change.GRANT,
        "d3": Change.TERMS,
        "d4": Change.REASON,
    }
    assert (flips["d4"].before, flips["d4"].after) == ("tool_not_allowed", "tenant_suspended")
    assert flips["d2"].sequence == 3
    revoked = replayed(path, starter, lambda data: data["tenants"].pop("acme"))
    assert revoked.flips[0].change is Change.REVOKE


def test_a_permit_for_several_calls_is_held_against_what_the_policy_had_said(
    starter: Bundle, log: Callable[..., Path]
) -> None:
    write = input_of("acme", "writer", "notes.write", {"kind": "memo"})

    def held(number: int, amount: int, **detail: int) -> AuditRecord:
        charge: JsonObject = {"budget": "tools", "unit": "calls", "amount": amount}
        return decision(
            number,
            action="notes.write",
            input=write,
            charges=(charge,),
            detail=dict(detail) or None,
        )

    path = log(held(1, 4, max_uses=4), held(2, 1, policy_max_uses=4), held(3, 1))

    def several(number: int) -> Callable[[Any], None]:
        def change(data: Any) -> None:
            permit = {"binds": ["tool"], "max_uses": number}
            data["tools"]["notes.write"]["permit"] = permit

        return change

    def flips(change: Callable[[Any], None]) -> dict[str, Change]:
        return {flip.decision_id: flip.change for flip in replayed(path, starter, change).flips}

    assert flips(several(4)) == {"d3": Change.GRANT}
    assert flips(several(5)) == dict.fromkeys(("d1", "d2", "d3"), Change.GRANT)
    assert flips(lambda data: None) == dict.fromkeys(("d1", "d2"), Change.TERMS)


def test_what_can_not_be_replayed_is_counted_by_its_reason(
    starter: Bundle, log: Callable[..., Path]
) -> None:
    path = log(
        decision(1, input=None),
        decision(2, input=None, detail={"input_omitted": True}),
        decision(3, input=None, policy_revision=None, **denied("arguments_invalid")),
        decision(4, **denied("tenant_budget_exceeded")),
        decision(5, **denied("policy_timeout")),
        decision(6, replayed=True),
        decision(7),
        decision(8, **denied("tool_not_delegated")),
        decision(9, **denied("argument_not_delegated")),
        decision(10, **denied("budget_not_delegated")),
        make_record(type="outcome", outcome=Outcome.EXECUTED),
    )
    found = replayed(path, starter)
    assert found.replayed == 1
    assert found.not_replayed == {
        replaying.NO_INPUT: 1,
        replaying.INPUT_TOO_LARGE: 1,
        replaying.NOT_ASKED: 3,
        replaying.BUDGET: 2,
        replaying.NO_ANSWER: 1,
        replaying.REPEATED: 1,
    }


def test_it_is_narrowed_by_tenant_and_time(starter: Bundle, log: Callable[..., Path]) -> None:
    path = log(decision(1), decision(2, "globex"))
    assert replayed(path, starter, tenant="acme").replayed_by_tenant == {"acme": 1}
    hour = timedelta(hours=1)
    assert replayed(path, starter, since=NOON - hour, until=NOON + hour).replayed == 2
    assert replayed(path, starter, since=NOON + hour).replayed == 0
    assert replayed(path, starter, until=NOON - hour).replayed == 0


def test_a_line_that_is_no_record_is_counted(starter: Bundle, log: Callable[..., Path]) -> None:
    path = log(decision(1))
    (segment,) = path.iterdir()
    segment.write_bytes(segment.read_bytes() + b'not json\n{"type":"decision"}\n{"torn')
    found = replayed(path, starter)
    assert found.replayed == 1
    assert found.not_replayed == {replaying.UNREADABLE: 2}
    assert find_decision(path, "d9") is None


def test_a_decision_is_found_by_its_id(log: Callable[..., Path]) -> None:
    path = log(decision(1), decision(2, "globex"))
    record = find_decision(path, "d2")
    assert record is not None
    assert record["tenant_id"] == "globex"
    assert find_decision(path, "d3") is None
