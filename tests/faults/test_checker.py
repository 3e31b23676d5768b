"""The checker finds each kind of fault, and none in a history that could be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pdp.budget.ledger import Account, Charge, Limit, Scope, Window
from tests.faults.checker import check, excerpt
from tests.faults.history import STATE, Answer, Call, Event, Kind, Reading, event_of, read_events

CLOCK = 1_795_521_600.0
ALICE = Account(tenant="acme", actor="alice")
BOB = Account(tenant="globex", actor="bob")
LIMIT = Limit(
    id="calls", budget="tools", unit="calls", window=Window.LIFETIME, limit=5, scope=Scope.TENANT
)
RATE = replace(LIMIT, id="rate", window=Window.ROLLING, limit=2, seconds=1, burst=2)
LIMITS = {limit.id: limit for limit in (LIMIT, RATE)}


def calls(amount: int) -> tuple[Charge, ...]:
    return (Charge("tools", "calls", amount),)


class History:
    """Attempts one after the other, a second each."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.at = 1.0

    def add(
        self, call: Call, answer: Answer | None = None, *, reason: str = "", seconds: float = 1
    ) -> None:
        name = f"attempt-{len(self.events)}"
        begin = Event(kind=Kind.INVOKE, attempt=name, at=self.at, clock=CLOCK + self.at, call=call)
        self.at += seconds / 2
        kind = Kind.OK if answer is not None else Kind.INFO if reason == "?" else Kind.FAIL
        end = Event(
            kind=kind,
            attempt=name,
            at=self.at,
            clock=CLOCK + self.at,
            answer=answer,
            reason=reason,
        )
        self.at += seconds / 2
        self.events += [begin, end]

    def faults(self) -> list[str]:
        return [fault.kind for fault in check(self.events, LIMITS, leased=False)]


@pytest.fixture
def history() -> History:
    return History()


def reserve(key: str, amount: int, *, account: Account = ALICE) -> Call:
    return Call(
        operation="reserve",
        account=account,
        key=key,
        limits=("calls",),
        charges=calls(amount),
        ttl_seconds=60,
        note=key,
    )


def charge(key: str, amount: int, limits: Sequence[str] = ("calls",)) -> Call:
    return replace(reserve(key, amount), operation="charge", limits=tuple(limits), ttl_seconds=0)


def settle(key: str, hold: str, amount: int, *, account: Account = ALICE) -> Call:
    return Call(
        operation="settle",
        account=account,
        key=key,
        charges=calls(amount),
        hold_id=hold,
        note=key,
    )


def took(key: str, hold: str, amount: int, **more: object) -> Answer:
    expires = 0 if hold.startswith("charge") else int(CLOCK + 1_000)
    plain = Answer(note=key, id=hold, expires_at=expires, charges=calls(amount))
    return replace(plain, **more)  # type: ignore[arg-type]


def ended(key: str, hold: str, amount: int) -> Answer:
    return Answer(note=key, id=hold, charges=calls(amount))


def state(spent: int, held: int) -> tuple[Call, Answer]:
    call = Call(operation=STATE, account=ALICE, limits=("calls",))
    return call, Answer(limits=(Reading("calls", spent, held, None),))


def test_a_history_that_could_be_has_no_fault(history: History) -> None:
    history.add(reserve("a", 3), took("a", "hold-a", 3))
    history.add(*state(0, 3))
    history.add(reserve("b", 3), Answer(note="b", refused_by=Reading("calls", 0, 3, None)))
    history.add(settle("c", "hold-a", 2), ended("c", "hold-a", 2))
    history.add(settle("c", "hold-a", 2), replace(ended("c", "hold-a", 2), replayed=True))
    history.add(settle("d", "hold-a", 2), reason="hold_already_settled")
    history.add(charge("e", 1), reason="?")
    history.add(*state(2, 0))
    history.add(*state(3, 0))
    assert history.faults() == []


def test_what_is_done_twice_is_found(history: History) -> None:
    history.add(charge("a", 1), reason="?")
    history.add(charge("a", 1), took("a", "charge-1", 1))
    history.add(charge("a", 1), took("a", "charge-1", 1))
    assert "done twice" in history.faults()


def test_another_answer_to_the_same_call_is_found(history: History) -> None:
    history.add(charge("a", 1), took("a", "charge-1", 1))
    history.add(charge("a", 1), took("a", "charge-2", 1, replayed=True))
    assert "answers differ" in history.faults()


@pytest.mark.parametrize(
    "answer",
    (
        took("b", "charge-1", 1),
        took("a", "charge-1", 2),
        took("a", "", 1),
    ),
)
def test_an_answer_that_is_anothers_is_found(history: History, answer: Answer) -> None:
    history.add(charge("a", 1), answer)
    assert "another's answer" in history.faults()


def test_an_answer_that_was_lost_is_found(history: History) -> None:
    history.add(charge("a", 1), took("a", "charge-1", 1))
    history.add(charge("a", 1), reason="budget_unlimited")
    assert "answer lost" in history.faults()


def test_an_id_that_is_given_twice_is_found(history: History) -> None:
    history.add(charge("a", 1), took("a", "charge-1", 1))
    history.add(charge("b", 1), took("b", "charge-1", 1))
    assert "id given twice" in history.faults()


def test_a_hold_that_is_ended_twice_is_found(history: History) -> None:
    history.add(reserve("a", 3), took("a", "hold-a", 3))
    for key in ("b", "c"):
        history.add(settle(key, "hold-a", 1), ended(key, "hold-a", 1))
    assert "ended twice" in history.faults()


def test_a_hold_that_another_ends_is_found(history: History) -> None:
    history.add(reserve("a", 3), took("a", "hold-a", 3))
    history.add(settle("b", "hold-a", 1, account=BOB), ended("b", "hold-a", 1))
    assert "another's hold" in history.faults()


def test_a_refusal_without_need_is_found(history: History) -> None:
    history.add(reserve("a", 3), took("a", "hold-a", 3))
    history.add(reserve("b", 2), Answer(note="b", refused_by=Reading("calls", 0, 3, None)))
    history.add(settle("c", "hold-a", 1), reason="hold_already_settled")
    assert history.faults().count("refused without need") == 2


def test_a_settlement_that_is_wrongly_late_or_in_time_is_found(history: History) -> None:
    history.add(reserve("a", 1), took("a", "hold-a", 1, expires_at=int(CLOCK + 10)))
    history.add(settle("b", "hold-a", 1), replace(ended("b", "hold-a", 1), late=True))
    assert "wrongly late" in history.faults()
    later = History()
    later.add(reserve("a", 1), took("a", "hold-a", 1, expires_at=int(CLOCK + 10)))
    later.at = 60
    later.add(settle("b", "hold-a", 1), ended("b", "hold-a", 1))
    assert "wrongly in time" in later.faults()


def test_a_limit_that_is_passed_is_found_by_what_was_answered_alone(history: History) -> None:
    for key in ("a", "b"):
        history.add(charge(key, 3), took(key, f"charge-{key}", 3))
    assert history.faults() == ["limit passed"]


def test_a_reading_above_the_limit_is_found(history: History) -> None:
    for key in ("a", "b"):
        history.add(charge(key, 3), reason="?")
    history.add(*state(6, 0))
    assert "limit passed" in history.faults()


@pytest.mark.parametrize(
    ("spent", "held", "fault"),
    (
        (0, 3, "spent too little"),
        (3, 3, "spent too much"),
        (2, 0, "held too little"),
        (1, 4, "held too much"),
    ),
)
def test_a_sum_that_can_not_be_is_found(
    history: History, spent: int, held: int, fault: str
) -> None:
    history.add(reserve("a", 2), took("a", "hold-a", 2))
    history.add(settle("b", "hold-a", 2), ended("b", "hold-a", 2))
    history.add(reserve("c", 3), took("c", "hold-c", 3))
    history.add(*state(spent, held))
    assert fault in history.faults()


def test_spend_that_was_acknowledged_and_is_lost_is_found(history: History) -> None:
    history.add(charge("a", 2), took("a", "charge-1", 2))
    history.add(*state(0, 0))
    assert history.faults() == ["spent too little"]


def test_more_refunds_than_spend_are_found(history: History) -> None:
    history.add(charge("a", 2), took("a", "charge-1", 2))
    for key in ("b", "c"):
        call = replace(settle(key, "charge-1", 2), operation="refund")
        history.add(call, ended(key, "charge-1", 2))
    assert "refunded twice" in history.faults()


def test_a_rate_that_is_passed_is_found(history: History) -> None:
    for key in ("a", "b", "c", "d", "e"):
        history.add(charge(key, 1, ("rate",)), took(key, f"charge-{key}", 1), seconds=0.01)
    assert "rate passed" in history.faults()


def test_a_history_is_read_as_it_was_written_without_half_lines(
    history: History, tmp_path: Path
) -> None:
    history.add(reserve("a", 3), took("a", "hold-a", 3, limits=(Reading("calls", 0, 3, None),)))
    history.add(charge("b", 1), reason="?")
    assert [event_of(event.line()) for event in history.events] == history.events
    file = tmp_path / "one.jsonl"
    file.write_text("".join(event.line() + "\n" for event in history.events) + '{"kind": "ok", ')
    assert read_events([file]) == history.events


def test_the_excerpt_shows_the_attempts_of_the_fault(history: History) -> None:
    history.add(charge("a", 1), took("a", "charge-1", 1))
    history.add(charge("b", 1), took("b", "charge-1", 1))
    history.add(charge("c", 1), took("c", "charge-3", 1))
    [fault] = check(history.events, LIMITS, leased=False)
    shown = excerpt(history.events, fault)
    assert "attempt-0" in shown
    assert "attempt-2" in shown
    assert "attempt-4" not in shown
