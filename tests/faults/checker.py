"""Whether a history could be that of a ledger which keeps its promises.

What was answered is certain, and what was not may have been done at any time, or never:
from both follow, for every account and moment, the least and the most that can stand
there. After Jepsen; see Kingsbury and Alvaro, "Elle" (2020), for the manner of reasoning.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pdp.budget.ledger import Charge, Limit, OnExpiry, Window
from pdp.budget.windows import window_bounds
from tests.faults.history import COUNT, STATE, Answer, Call, Event, Kind, Reading

SLACK_SECONDS = 0.25
"""By how much clocks, and what a store takes for now, may differ."""

TAKES = ("reserve", "charge")
ENDS = ("settle", "release")
ALWAYS = math.inf

AccountKey = tuple[str, str, str, int | None]
"""Id of the limit, the tenant that it counts in, whom it counts for, end of its window."""
PartKey = tuple[str, str]
"""Budget and unit."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A promise that was broken, and the attempts that show it."""

    kind: str
    text: str
    attempts: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Attempt:
    """One try of a call, and how it ended."""

    invoke: Event
    end: Event | None = None

    @property
    def call(self) -> Call:
        assert self.invoke.call is not None
        return self.invoke.call

    @property
    def answer(self) -> Answer | None:
        return None if self.end is None else self.end.answer

    @property
    def is_unknown(self) -> bool:
        return self.end is None or self.end.kind is Kind.INFO


@dataclass(slots=True, eq=False)
class Operation:
    """Every try of one call."""

    call: Call
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.invoke.attempt for each in self.attempts)

    @property
    def begun(self) -> Event:
        """Not done before."""
        return self.attempts[0].invoke

    @property
    def done(self) -> Event | None:
        """The first end that told that it was done; None where nothing did."""
        ends = [each.end for each in self.attempts if each.answer is not None and each.end]
        return min(ends, key=lambda end: end.at, default=None)

    @property
    def answer(self) -> Answer | None:
        return None if self.done is None else self.done.answer

    @property
    def may_be_done(self) -> bool:
        return self.done is not None or any(each.is_unknown for each in self.attempts)


class Tally:
    """A sum that grows with time."""

    def __init__(self) -> None:
        self._entries: list[tuple[float, int]] = []
        self._times: list[float] = []
        self._sums: list[int] = []

    def add(self, at: float, amount: int) -> None:
        if amount and at != ALWAYS:
            self._entries.append((at, amount))

    def at(self, moment: float) -> int:
        """The sum of what was added for times until the moment."""
        if len(self._times) != len(self._entries):
            self._entries.sort()
            self._times = [at for at, _ in self._entries]
            self._sums = [0, *itertools.accumulate(amount for _, amount in self._entries)]
        return self._sums[bisect.bisect_right(self._times, moment)] if self._times else 0


@dataclass(slots=True, eq=False)
class Interval:
    """The least and the most of a number while it is read: some of either depends on when
    the reading began, the rest on when it ended.
    """

    least_by_begin: Tally = field(default_factory=Tally)
    least_by_end: Tally = field(default_factory=Tally)
    most_by_begin: Tally = field(default_factory=Tally)
    most_by_end: Tally = field(default_factory=Tally)

    def least(self, begin: float, end: float) -> int:
        return self.least_by_begin.at(begin) + self.least_by_end.at(end)

    def most(self, begin: float, end: float) -> int:
        return self.most_by_begin.at(begin) + self.most_by_end.at(end)


@dataclass(slots=True, eq=False)
class Book:
    """What the history says of one account."""

    spent: Interval = field(default_factory=Interval)
    held: Interval = field(default_factory=Interval)
    excess: Tally = field(default_factory=Tally)
    """What settlements may have added beyond what was held."""
    takes: list[Operation] = field(default_factory=list)
    touched: list[Operation] = field(default_factory=list)

    def attempts(self) -> tuple[str, ...]:
        return tuple(name for operation in self.touched for name in operation.names)


@dataclass(slots=True, eq=False)
class Made:
    """A hold or a charge, and all that was tried with it."""

    by: Operation
    ends: list[Operation] = field(default_factory=list)
    refunds: list[Operation] = field(default_factory=list)

    def amounts(self) -> dict[PartKey, int]:
        return amounts(self.by.call.charges)


def check(events: Sequence[Event], limits: Mapping[str, Limit], *, leased: bool) -> list[Fault]:
    """Every broken promise, in the order in which they are looked for.

    ``leased``: what a sidecar reads of the ledger that all share is behind what it knows
    itself, so that the sums are held only against COUNT, and what is known to be spent and
    held against the limits alone.
    """
    return _Checker(events, limits, leased=leased).check()


class _Checker:
    def __init__(
        self, events: Sequence[Event], limits: Mapping[str, Limit], *, leased: bool
    ) -> None:
        self._limits = limits
        self._leased = leased
        self._attempts = _attempts(events)
        self._clock_ahead = events[0].clock - events[0].at if events else 0.0
        self._ends_at = events[-1].clock if events else 0.0
        self._operations = _operations(self._attempts)
        self._faults: list[Fault] = []
        self._made: dict[str, Made] = {}
        self._books: defaultdict[AccountKey, Book] = defaultdict(Book)

    def check(self) -> list[Fault]:
        for operation in self._operations:
            self._check_answers(operation)
        self._find_made()
        for made in self._made.values():
            self._check_ends(made)
            self._check_refunds(made)
        for operation in self._operations:
            if operation.call.operation in TAKES and operation.may_be_done:
                self._book(operation)
        for attempt in self._attempts:
            self._check_readings(attempt)
        self._check_never_above()
        self._check_rates()
        return self._faults

    def _fault(self, kind: str, text: str, *attempts: str) -> None:
        self._faults.append(Fault(kind, text, attempts))

    # Each call by itself

    def _check_answers(self, operation: Operation) -> None:
        """One call is done once, has one answer, and the answer is its own."""
        answered = [each for each in operation.attempts if each.answer is not None]
        anew = [each for each in answered if each.answer and not each.answer.replayed]
        if len(anew) > 1:
            self._fault("done twice", f"{_name(operation)} was done anew", *operation.names)
        first = operation.done
        for attempt in answered:
            answer = attempt.answer
            assert answer is not None
            if answer.note != attempt.call.note:
                self._fault(
                    "another's answer", f"{_name(operation)} got a foreign note", *operation.names
                )
            if operation.answer is not None and _lasting(answer) != _lasting(operation.answer):
                self._fault(
                    "answers differ", f"{_name(operation)} got two answers", *operation.names
                )
            if first is not None and attempt.invoke.at > first.at and not answer.replayed:
                self._fault(
                    "answer lost", f"{_name(operation)} was answered before", *operation.names
                )
            self._check_content(operation, answer)
        for attempt in operation.attempts:
            if (
                first is not None
                and attempt.end is not None
                and attempt.end.kind is Kind.FAIL
                and attempt.invoke.at > first.at
            ):
                self._fault(
                    "answer lost",
                    f"{_name(operation)} was answered before, and then refused with"
                    f" {attempt.end.reason}",
                    *operation.names,
                )

    def _check_content(self, operation: Operation, answer: Answer) -> None:
        call = operation.call
        if call.hold_id and answer.id != call.hold_id:
            self._fault("another's answer", f"{_name(operation)} got another id", *operation.names)
        taken = call.operation in TAKES and answer.refused_by is None
        if taken and (amounts(answer.charges) != amounts(call.charges) or not answer.id):
            self._fault(
                "another's answer", f"{_name(operation)} took something else", *operation.names
            )
        refused_by = answer.refused_by
        if refused_by is not None and not answer.replayed:
            limit = self._limits[refused_by.limit_id]
            asked = amounts(call.charges).get((limit.budget, limit.unit), 0)
            if refused_by.spent + refused_by.held + asked <= limit.most:
                self._fault(
                    "refused without need",
                    f"{_name(operation)} was refused by {refused_by}",
                    *operation.names,
                )

    # Each hold by itself

    def _find_made(self) -> None:
        for operation in self._operations:
            answer = operation.answer
            if operation.call.operation in TAKES and answer is not None and answer.id:
                known = self._made.setdefault(answer.id, Made(operation))
                if known.by is not operation:
                    self._fault("id given twice", answer.id, *known.by.names, *operation.names)
        for operation in self._operations:
            call = operation.call
            if call.operation not in {*ENDS, "refund"}:
                continue
            made = self._made.get(call.hold_id)
            if made is None or not _finds(call, made.by.call):
                if operation.done is not None:
                    self._fault("another's hold", f"{_name(operation)} ended it", *operation.names)
            elif call.operation == "refund":
                made.refunds.append(operation)
            else:
                made.ends.append(operation)

    def _check_ends(self, made: Made) -> None:
        final = [each for each in made.ends if _is_final(each)]
        done = [each for each in final if each.done is not None]
        names = (*made.by.names, *itertools.chain.from_iterable(each.names for each in made.ends))
        if len(done) > 1:
            self._fault("ended twice", f"hold {made.by.answer and made.by.answer.id}", *names)
        over = min((each.done.at for each in done if each.done), default=ALWAYS)
        for each in made.ends:
            if each not in done and each.done is not None and each.begun.at > over:
                self._fault("ended twice", f"{_name(each)} after it had ended", *names)
            self._check_late(made, each)
            for attempt in each.attempts:
                self._check_refusal(made, each, attempt, names)

    def _check_late(self, made: Made, end: Operation) -> None:
        answer, done = end.answer, end.done
        if answer is None or done is None or made.by.answer is None:
            return
        expires_at = made.by.answer.expires_at
        early = answer.late and done.clock < expires_at - SLACK_SECONDS
        # A replay says when it was done, not when it was told.
        overdue = not answer.late and end.begun.clock > expires_at + SLACK_SECONDS
        if early or overdue:
            self._fault(
                "wrongly late" if early else "wrongly in time",
                f"{_name(end)} of a hold until {expires_at}",
                *made.by.names,
                *end.names,
            )

    def _check_refusal(
        self, made: Made, end: Operation, attempt: Attempt, names: tuple[str, ...]
    ) -> None:
        if attempt.end is None or attempt.end.kind is not Kind.FAIL or made.by.answer is None:
            return
        reason = attempt.end.reason
        others = [
            other.call.operation
            for other in made.ends
            if other is not end
            and _is_final(other)
            and other.may_be_done
            and other.begun.at < attempt.end.at
        ]
        expired = attempt.end.clock > made.by.answer.expires_at - SLACK_SECONDS
        fits = {
            "hold_already_settled": "settle" in others,
            "hold_already_released": "release" in others,
            "hold_expired": expired and end.call.operation == "release",
        }.get(reason, False)
        if not fits:
            self._fault("refused without need", f"{_name(end)}: {reason}", *names)

    def _check_refunds(self, made: Made) -> None:
        """No more comes back than was settled."""
        refunded: defaultdict[PartKey, int] = defaultdict(int)
        settled: defaultdict[PartKey, int] = defaultdict(int)
        for refund in made.refunds:
            back = () if refund.answer is None else refund.answer.charges
            for part, amount in amounts(back).items():
                refunded[part] += amount
        for part, amount in _settlements(made):
            settled[part] += amount
        if any(amount > settled[part] for part, amount in refunded.items()):
            names = [name for each in (made.by, *made.ends, *made.refunds) for name in each.names]
            self._fault("refunded twice", f"{dict(refunded)} of {dict(settled)}", *names)

    # Accounts

    def _book(self, operation: Operation) -> None:
        """Put down what a hold or charge did, for certain and possibly, where it counts."""
        answer = operation.answer
        if answer is not None and not answer.id:
            return  # refused
        made = self._made[answer.id] if answer is not None else Made(operation)
        for (budget, unit), amount in made.amounts().items():
            for limit_id in operation.call.limits:
                limit = self._limits[limit_id]
                if (limit.budget, limit.unit) != (budget, unit):
                    continue
                if not limit.applies_to(operation.call.account):
                    continue
                places = self._places(limit, operation)
                for place in places:
                    book = self._books[place]
                    book.touched += (operation, *made.ends, *made.refunds)
                    self._put_down(
                        book, made, limit, (budget, unit), amount, certain=len(places) == 1
                    )

    def _places(self, limit: Limit, operation: Operation) -> list[AccountKey]:
        """The accounts in one of which it counts: whose windows it may have met."""
        account = operation.call.account
        names = (limit.id, limit.shared_by(account), limit.counts_for(account))
        until = operation.done.clock if operation.done else self._ends_at
        at = operation.begun.clock - SLACK_SECONDS
        places: list[AccountKey] = []
        while True:
            ends_at = window_bounds(limit, at).ends_at
            places.append((*names, ends_at))
            if ends_at is None or ends_at > until + SLACK_SECONDS:
                return places
            at = ends_at

    def _put_down(
        self, book: Book, made: Made, limit: Limit, part: PartKey, amount: int, *, certain: bool
    ) -> None:
        if limit.window is Window.ROLLING:
            book.takes.append(made.by)
            return
        taken = made.by.done
        taken_at = taken.at if taken is not None and certain else ALWAYS
        if made.by.call.operation == "reserve":
            self._put_down_hold(book, made, limit, amount, taken_at)
        if limit.window is Window.CONCURRENT:
            return
        if made.by.call.operation == "charge":
            book.spent.most_by_end.add(made.by.begun.at, amount)
            book.spent.least_by_begin.add(taken_at, amount)
        _put_down_settlements(book, made, limit, part, certain=certain)
        _put_down_refunds(book, made, part, certain=certain)

    def _put_down_hold(
        self, book: Book, made: Made, limit: Limit, amount: int, taken_at: float
    ) -> None:
        expires_at = ALWAYS
        if made.by.answer is not None:
            expires_at = made.by.answer.expires_at - self._clock_ahead
        ended = [each for each in made.ends if each.may_be_done]
        first_end = min((each.begun.at for each in ended), default=ALWAYS)
        surely_ended = min(
            (each.done.at for each in ended if each.done and _is_final(each)), default=ALWAYS
        )
        book.held.most_by_end.add(made.by.begun.at, amount)
        book.held.most_by_begin.add(min(surely_ended, expires_at + SLACK_SECONDS), -amount)
        may_end = min(first_end, expires_at - SLACK_SECONDS)
        if taken_at < may_end:
            book.held.least_by_begin.add(taken_at, amount)
            book.held.least_by_end.add(may_end, -amount)
        if limit.on_expiry is not OnExpiry.CHARGE:
            return
        # An expired hold's amount counts as spent until the hold is settled.
        if surely_ended > expires_at - SLACK_SECONDS:
            book.spent.most_by_end.add(expires_at - SLACK_SECONDS, amount)
            book.spent.most_by_begin.add(surely_ended, -amount)
        if first_end > expires_at + SLACK_SECONDS and taken_at != ALWAYS:
            book.spent.least_by_begin.add(max(taken_at, expires_at + SLACK_SECONDS), amount)
            book.spent.least_by_end.add(first_end, -amount)

    def _check_readings(self, attempt: Attempt) -> None:
        answer, call, end = attempt.answer, attempt.call, attempt.end
        if answer is None or end is None or answer.replayed:
            return
        if self._leased and call.operation not in {STATE, COUNT}:
            return  # what the sidecar had heard last
        begin = attempt.invoke.at
        told = answer.limits if answer.refused_by is None else (*answer.limits, answer.refused_by)
        for reading in told:
            limit = self._limits[reading.limit_id]
            if limit.window is Window.ROLLING:
                continue
            book = self._books.get(_place(limit, call, reading), Book())
            about = (attempt.invoke.attempt, *book.attempts())
            where = f"{reading} of {limit.limit}, by {attempt.invoke.attempt}"
            if reading.spent + reading.held > limit.limit + book.excess.at(end.at):
                self._fault("limit passed", where, *about)
            if self._leased and call.operation != COUNT:
                continue
            for name, value, bounds in (
                ("spent", reading.spent, book.spent),
                ("held", reading.held, book.held),
            ):
                least, most = bounds.least(begin, end.at), bounds.most(begin, end.at)
                if not least <= value <= most:
                    kind = f"{name} too little" if value < least else f"{name} too much"
                    self._fault(kind, f"{where}: {least} to {most} are possible", *about)

    def _check_never_above(self) -> None:
        """Whatever a ledger says: what is certainly spent and held at one moment."""
        for place, book in self._books.items():
            limit = self._limits[place[0]]
            if limit.window is Window.ROLLING:
                continue
            for operation in book.touched:
                if operation.done is None or operation.call.operation not in TAKES:
                    continue
                at = operation.done.at
                least = book.spent.least(at, at) + book.held.least(at, at)
                if least > limit.limit + book.excess.at(at):
                    self._fault(
                        "limit passed",
                        f"{least} of {limit.limit} are taken of {place}",
                        *operation.names,
                        *book.attempts(),
                    )
                    break

    def _check_rates(self) -> None:
        """Between any two moments no more than the burst, and what drains meanwhile."""
        if self._leased:
            return  # a lease has been paid for when it was drawn
        for place, book in self._books.items():
            limit = self._limits[place[0]]
            if limit.window is not Window.ROLLING:
                continue
            takes = [take for take in book.takes if take.done is not None]
            takes.sort(key=lambda take: 0 if take.done is None else take.done.at)
            for first in takes:
                passed = _passes(limit, first.begun.at, takes)
                if passed:
                    self._fault("rate passed", f"{passed} of {place}", *book.attempts())
                    break


def excerpt(events: Sequence[Event], fault: Fault, *, most: int = 40) -> str:
    """The lines of the history that show the fault; the last ones, where they are many."""
    attempts = set(fault.attempts)
    lines = [event.line() for event in events if event.attempt in attempts]
    return "\n".join([f"{fault.kind}: {fault.text}", *lines[-most:]])


def amounts(charges: Iterable[Charge] | None) -> dict[PartKey, int]:
    """By budget and unit."""
    return {(each.budget, each.unit): each.amount for each in charges or ()}


def _put_down_settlements(
    book: Book, made: Made, limit: Limit, part: PartKey, *, certain: bool
) -> None:
    held = made.amounts()[part]
    in_time = 0
    for end in sorted(made.ends, key=lambda end: end.begun.at):
        if end.call.operation != "settle" or not end.may_be_done:
            continue
        posted = _posted(made, end).get(part, 0)
        book.spent.most_by_end.add(end.begun.at, posted)
        if end.done is not None and end.answer is not None and certain:
            book.spent.least_by_begin.add(end.done.at, posted)
        may_be_late = end.answer is None or end.answer.late
        if may_be_late and limit.on_expiry is OnExpiry.RELEASE:
            book.excess.add(end.begun.at, posted)
        else:
            beyond = max(0, in_time + posted - held) - max(0, in_time - held)
            book.excess.add(end.begun.at, beyond)
            in_time += posted


def _put_down_refunds(book: Book, made: Made, part: PartKey, *, certain: bool) -> None:
    for refund in made.refunds:
        if not refund.may_be_done or not certain:
            continue
        if refund.answer is not None:
            most = amounts(refund.answer.charges).get(part, 0)
        elif refund.call.charges is not None:
            most = amounts(refund.call.charges).get(part, 0)
        else:
            most = sum(posted for name, posted in _settlements(made) if name == part)
        book.spent.least_by_end.add(refund.begun.at, -most)
        if refund.done is not None:
            book.spent.most_by_begin.add(refund.done.at, -most)


def _attempts(events: Sequence[Event]) -> list[Attempt]:
    """In the order in which they began."""
    begun: dict[str, Attempt] = {}
    for event in events:
        if event.kind is Kind.INVOKE:
            begun[event.attempt] = Attempt(event)
        else:
            begun[event.attempt].end = event
    return list(begun.values())


def _operations(attempts: Sequence[Attempt]) -> list[Operation]:
    operations: dict[tuple[str, str, str, str], Operation] = {}
    for attempt in attempts:
        call = attempt.call
        if call.key:
            account = call.account
            name = (account.tenant, account.actor, call.operation, call.key)
            operations.setdefault(name, Operation(call)).attempts.append(attempt)
    return list(operations.values())


def _settlements(made: Made) -> Iterator[tuple[PartKey, int]]:
    """What was spent under it at most, call by call."""
    if made.by.call.operation == "charge":
        yield from made.amounts().items()
    for end in made.ends:
        if end.call.operation == "settle" and end.may_be_done:
            yield from _posted(made, end).items()


def _posted(made: Made, settle: Operation) -> dict[PartKey, int]:
    """What a settlement posts, or can have posted at most."""
    if settle.answer is not None:
        return amounts(settle.answer.charges)
    return made.amounts() if settle.call.charges is None else amounts(settle.call.charges)


def _passes(limit: Limit, begin: float, takes: Sequence[Operation]) -> str:
    """What was taken too fast since a moment; "" where nothing was."""
    taken = 0
    for take in takes:
        if take.done is None or take.begun.at < begin:
            continue
        taken += amounts(take.call.charges)[limit.budget, limit.unit]
        seconds = take.done.at - begin
        if taken > limit.burst + limit.limit * (seconds + SLACK_SECONDS / 10) / limit.seconds:
            return f"{taken} in {seconds:.3f} s"
    return ""


def _finds(call: Call, made: Call) -> bool:
    """Whether a call may end or refund what another has made."""
    if call.account.tenant != made.account.tenant:
        return False
    if call.operation == "refund":
        return True
    return made.operation == "reserve" and call.account.actor == made.account.actor


def _is_final(end: Operation) -> bool:
    return end.call.operation == "release" or end.call.final


def _lasting(answer: Answer) -> Answer:
    """What is the same in every answer to a call."""
    return replace(answer, replayed=False, limits=())


def _name(operation: Operation) -> str:
    call = operation.call
    return f"{call.operation} {call.key} of {call.account.actor}@{call.account.tenant}"


def _place(limit: Limit, call: Call, reading: Reading) -> AccountKey:
    return (
        limit.id,
        limit.shared_by(call.account),
        limit.counts_for(call.account),
        reading.resets_at if limit.window.is_calendar else None,
    )
