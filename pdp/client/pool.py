"""Permits for several calls whose uses are spent here, without asking for each.

Nothing in this module waits or sends: :mod:`pdp.client.keeper` does.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pdp.api.v1 import execution_pb2
from pdp.channel import CallError
from pdp.client.desk import ASK_AGAIN, Grant, Steps, charges_by, error_type, log_unreported, report
from pdp.client.spend import MAX_AMOUNT, Charge

if TYPE_CHECKING:
    from concurrent.futures import Future

MARGIN_SECONDS: Final = 1.0
"""A permit is spent no more when it has this long to go: its times are whole seconds, and
the tool has yet to run."""
MAX_KEPT: Final = 4_096
"""Permits that are kept at the same time; what comes beyond is for its one call."""
MAX_KEPT_PER_TENANT: Final = 1_024
"""Of one tenant's, so that no tenant takes all the room."""
REPORT_AGAIN_SECONDS: Final = 60.0
"""For how long a report is tried again while the sidecar can not take it in."""

Key = tuple[str, bytes, str, str]
"""What calls must have in common to be made under one permit: token, context, tool,
audience. It holds the token."""
_Spent = dict[tuple[str, str], int]


@dataclass(frozen=True, slots=True, eq=False)
class InForce:
    """What a Watch has told last. While it is this very object, nothing has happened that
    could end a permit.
    """

    revision: str


@dataclass(frozen=True, slots=True)
class Moment:
    """When a permit is asked for."""

    at: float
    """By the monotonic clock."""
    in_force: InForce | None
    """None where there is no Watch."""


class Kept:
    """A permit for several calls, in the middle of being spent."""

    def __init__(self, pool: PermitPool, grant: Grant, *, left: int, ends_at: float) -> None:
        """With ``left`` uses besides the one that is under way, until the monotonic clock
        says ``ends_at``.
        """
        self.permit = grant.permit
        self.left = left
        self.ends_at = ends_at
        self.expires_at = grant.permit.expires_at - MARGIN_SECONDS
        self.home = pool.home
        """The pool before a fork is not the pool after it."""
        self.report_until: float | None = None
        """When its report is given up; None before the first try."""
        self._pool = pool
        self._share = tuple(
            # What is held is held for all uses alike.
            (budget, unit, -(-amount // grant.permit.max_uses))
            for budget, unit, amount in grant.held
        )
        self._nothing = tuple((budget, unit, 0) for budget, unit, _ in self._share)
        self.under_way = 1
        self.made = 1
        self._executed = False
        self._error_type = ""
        self._shares = 0
        """Uses that have cost their share of what is held."""
        self._named: _Spent = {}
        """What the others have cost."""

    def executed(self, cost: Callable[[], Sequence[Charge]]) -> Steps[None] | None:
        """A use of it has run. Its report, if this was the last one."""
        charges = charges_by(self.permit.tool, cost)
        return self._ended(charges or self._share, error_type=None)

    def failed(
        self, error: BaseException, cost: Callable[[], Sequence[Charge]]
    ) -> Steps[None] | None:
        """A use of it has raised. Its report, if this was the last one."""
        charges = charges_by(self.permit.tool, cost)
        if charges is None:
            charges = self._share
        return self._ended(charges or self._nothing, error_type=error_type(error))

    def report(self) -> Steps[None]:
        """The one report on all of its uses. Raises CallError."""
        request = execution_pb2.ReportOutcomeRequest(
            permit=self.permit.token,
            outcome=(
                execution_pb2.OUTCOME_EXECUTED if self._executed else execution_pb2.OUTCOME_FAILED
            ),
            error_type="" if self._executed else self._error_type,
            uses=self.made,
        )
        spent: _Spent = {}
        if self._shares < self.made:
            # Otherwise none is named: the sidecar settles the uses' share of what is held.
            spent = dict(self._named)
            _add(spent, self._share, times=self._shares)
        all_of_it: _Spent = {}
        if not self._executed:
            _add(all_of_it, self._share, times=self.made)
        yield from report(
            self.permit.tool, request, charges=_charges(spent), otherwise=_charges(all_of_it)
        )

    def _ended(self, charges: Sequence[Charge], *, error_type: str | None) -> Steps[None] | None:
        with self._pool.lock:
            if self.home is not self._pool.home:
                return None  # begun before a fork: the parent reports on it
            if charges is self._share:
                self._shares += 1
            else:
                _add(self._named, charges)
            if error_type is None:
                self._executed = True
            else:
                self._error_type = error_type
            self.under_way -= 1
            if self.under_way or self.left:
                return None
        return self.reported()

    def reported(self) -> Steps[None]:
        """The report, which is made later where the sidecar can not be asked now."""
        try:
            yield from self.report()
        except CallError as error:
            self._pool.report_later(self, error)


class PermitPool:
    """The permits that are kept. Threads may share it.

    A permit is kept only while a Watch is open that would tell of its end, and that was
    open before it was asked for: nothing that ends it can then have gone unheard.
    """

    def __init__(
        self,
        *,
        keeps: bool,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without ``keeps``, a permit for several calls is for the one that asked for it.
        ``on_change`` is called when there is something to report, and when a permit is
        kept that ends before all others.
        """
        self._keeps = keeps
        self._on_change = on_change
        self._clock = clock
        self._monotonic = monotonic
        self.forget()

    def forget(self) -> None:
        """Begin anew, in the child of a fork: what was kept is the parent's."""
        self.lock = threading.Lock()
        self.home = object()
        self.in_force: InForce | None = None
        """None while there is no Watch."""
        self._kept: dict[Key, Kept] = {}
        self._kept_of: Counter[str] = Counter()
        """How many of each tenant's."""
        self._next_end = math.inf
        """No later than the first of them ends, by the monotonic clock."""
        self._asking: dict[Key, Future[bool]] = {}
        self._due: deque[Kept] = deque()

    def turn(self, key: Key) -> Future[bool] | None:
        """The question that is under way for such calls; where it is the caller's turn to
        ask, None, and :meth:`asked` is to follow.
        """
        from concurrent.futures import Future  # noqa: PLC0415 - only where permits are kept

        with self.lock:
            under_way = self._asking.get(key)
            if under_way is None:
                self._asking[key] = Future()
        return under_way

    def asked(self, key: Key, *, kept: bool) -> None:
        """The caller whose turn it was has asked: whether there is a permit to take now."""
        with self.lock:
            under_way = self._asking.pop(key, None)
        if under_way is not None:  # which it is in the child of a fork
            under_way.set_result(kept)

    def take(self, key: Key) -> Kept | None:
        """A kept permit, of which one use is taken: its end is to be told. None where no
        call can be made without asking.
        """
        kept = self._kept.get(key)
        if kept is None:
            return None
        with self.lock:
            if not kept.left or self._has_ended(kept):
                return None
            kept.left -= 1
            kept.under_way += 1
            kept.made += 1
            if not kept.left:
                self._remove(key)
        return kept

    def moment(self) -> Moment:
        """Now, which is before a permit is asked for."""
        return Moment(self._monotonic(), self.in_force)

    def put(self, grant: Grant, key: Key, *, asked: Moment) -> Kept:
        """A new permit for several calls, of which one use is taken: its end is to be told.
        What is left of it is kept, if nothing has happened since it was asked for.
        """
        permit = grant.permit
        # It was issued after it was asked for, whatever the two clocks say.
        ends_at = asked.at + permit.expires_at - permit.issued_at - MARGIN_SECONDS
        kept = Kept(self, grant, left=0, ends_at=ends_at)
        is_next = False
        with self.lock:
            before = self._kept.get(key)
            if before is not None and self._has_ended(before):
                self._drop(key)
            if (
                self._keeps
                and asked.in_force is not None
                and asked.in_force is self.in_force
                and asked.in_force.revision == permit.policy_revision
                and not self._has_ended(kept)
                and key not in self._kept
                and len(self._kept) < MAX_KEPT
                and self._kept_of[permit.tenant] < MAX_KEPT_PER_TENANT
            ):
                kept.left = permit.max_uses - 1
                self._kept[key] = kept
                self._kept_of[permit.tenant] += 1
                is_next = ends_at < self._next_end
        if is_next:
            self._on_change()
        return kept

    def told(self, in_force: InForce | None) -> None:
        """The Watch has told something, or there is none any more: nothing is kept that
        was permitted before.
        """
        with self.lock:
            self.in_force = in_force
            for key in tuple(self._kept):
                self._drop(key)
            due = bool(self._due)
        if due:
            self._on_change()

    def seconds_to_next_end(self) -> float | None:
        """Drop what has ended. How long until more will have; None where nothing is kept."""
        with self.lock:
            for key, kept in tuple(self._kept.items()):
                if self._has_ended(kept):
                    self._drop(key)
            self._next_end = min((kept.ends_at for kept in self._kept.values()), default=math.inf)
            return self._next_end - self._monotonic() if self._kept else None

    def next_due(self) -> Kept | None:
        """One whose report nobody else will make."""
        with self.lock:
            return self._due.popleft() if self._due else None

    def abandon_due(self) -> int:
        """Report on nothing that is due. How many they were."""
        with self.lock:
            unsent = len(self._due)
            self._due.clear()
        return unsent

    def report_later(self, kept: Kept, error: CallError) -> bool:
        """A report has failed: whether it is due again, which it is where that can help."""
        now = self._monotonic()
        if kept.report_until is None:
            kept.report_until = now + REPORT_AGAIN_SECONDS
        if error.reason_code not in ASK_AGAIN or now >= kept.report_until:
            log_unreported(error)
            return False
        with self.lock:
            self._due.append(kept)
        self._on_change()
        return True

    def _has_ended(self, kept: Kept) -> bool:
        # By both clocks: the one can be set back, and the other stands still while the
        # machine sleeps.
        return self._monotonic() >= kept.ends_at or self._clock() >= kept.expires_at

    def _drop(self, key: Key) -> None:
        """With the lock held."""
        kept = self._remove(key)
        kept.left = 0
        if not kept.under_way:
            self._due.append(kept)  # otherwise the last use that ends reports

    def _remove(self, key: Key) -> Kept:
        """With the lock held."""
        kept = self._kept.pop(key)
        self._kept_of[kept.permit.tenant] -= 1
        if not self._kept_of[kept.permit.tenant]:
            del self._kept_of[kept.permit.tenant]
        return kept


def _add(spent: _Spent, charges: Sequence[Charge], *, times: int = 1) -> None:
    if not times:
        return
    for budget, unit, amount in charges:
        total = spent.get((budget, unit), 0) + amount * times
        spent[budget, unit] = min(total, MAX_AMOUNT)


def _charges(spent: _Spent) -> tuple[Charge, ...]:
    return tuple((budget, unit, amount) for (budget, unit), amount in spent.items())
