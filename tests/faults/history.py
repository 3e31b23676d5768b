"""What callers of ledgers asked, and what they were told: one line of JSON for each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from pdp.budget.ledger import Account, Charge, LimitState, Receipt


class Kind(StrEnum):
    """What an event tells of an attempt."""

    INVOKE = "invoke"
    OK = "ok"
    FAIL = "fail"
    """Refused with a reason: surely not done, by this attempt."""
    INFO = "info"
    """Nobody knows whether it was done. As good as an attempt that has no end."""


STATE = "state"
"""Operation of an attempt that reads limits, of whatever ledger the caller has."""
COUNT = "count"
"""Operation of one that reads them of the ledger that all share, when all is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What was asked. Attempts with the same account, operation and key are one call."""

    operation: str
    account: Account
    key: str = ""
    limits: tuple[str, ...] = ()
    """Their ids."""
    charges: tuple[Charge, ...] | None = ()
    hold_id: str = ""
    ttl_seconds: int = 0
    final: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """A limit as a ledger told of it."""

    limit_id: str
    spent: int
    held: int
    resets_at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was told."""

    replayed: bool = False
    note: str = ""
    id: str = ""
    expires_at: int = 0
    charges: tuple[Charge, ...] = ()
    limits: tuple[Reading, ...] = ()
    refused_by: Reading | None = None
    over_hold: bool = False
    late: bool = False

    @classmethod
    def of(cls, receipt: Receipt) -> Answer:
        """As much of a receipt as is the same again when the call is tried again, and
        the limits.
        """
        return cls(
            replayed=receipt.replayed,
            note=receipt.note,
            id=receipt.id,
            expires_at=receipt.expires_at,
            charges=receipt.charges,
            limits=readings(receipt.limits),
            refused_by=None if receipt.refused_by is None else readings([receipt.refused_by])[0],
            over_hold=receipt.over_hold,
            late=receipt.late,
        )


def readings(states: Sequence[LimitState]) -> tuple[Reading, ...]:
    """The limits as they are told of."""
    return tuple(Reading(each.limit.id, each.spent, each.held, each.resets_at) for each in states)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """The begin of an attempt, which has a call, or its end."""

    kind: Kind
    attempt: str
    """Names the process and its run, too."""
    at: float
    """Seconds by the clock that all processes share and that nobody sets."""
    clock: float
    """Unix seconds."""
    call: Call | None = None
    answer: Answer | None = None
    reason: str = ""
    """Of a FAIL or an INFO."""

    def line(self) -> str:
        """One line of JSON, without its end."""
        told = {name: value for name, value in asdict(self).items() if value}
        return json.dumps(told, separators=(",", ":"))


def read_events(files: Iterable[Path]) -> list[Event]:
    """All events, in the order of time. Half lines, of processes that were killed, are left
    out.
    """
    events = [event for file in files for event in _events_of(file)]
    events.sort(key=lambda event: event.at)
    return events


def _events_of(file: Path) -> Iterator[Event]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("{") and line.endswith("}\n"):
                with contextlib.suppress(json.JSONDecodeError):
                    yield event_of(line)


def event_of(line: str) -> Event:
    """The event that :meth:`Event.line` has written."""
    told = json.loads(line)
    call, answer = told.get("call"), told.get("answer")
    return Event(
        kind=Kind(told["kind"]),
        attempt=told["attempt"],
        at=told["at"],
        clock=told["clock"],
        call=None if call is None else _call(call),
        answer=None if answer is None else _answer(answer),
        reason=told.get("reason", ""),
    )


def _call(told: dict[str, object]) -> Call:
    return Call(
        **told  # type: ignore[arg-type]
        | {
            "account": Account(**told["account"]),  # type: ignore[arg-type]
            "limits": tuple(told["limits"]),  # type: ignore[arg-type]
            "charges": None if told["charges"] is None else _charges(told["charges"]),
        }
    )


def _answer(told: dict[str, object]) -> Answer:
    refused_by = told["refused_by"]
    return Answer(
        **told  # type: ignore[arg-type]
        | {
            "charges": _charges(told["charges"]),
            "limits": tuple(Reading(**each) for each in told["limits"]),  # type: ignore[attr-defined]
            "refused_by": None if refused_by is None else Reading(**refused_by),  # type: ignore[arg-type]
        }
    )


def _charges(told: object) -> tuple[Charge, ...]:
    assert isinstance(told, list)
    return tuple(Charge(**each) for each in told)
