"""What is reserved, what of it is spent, and what the sidecar is told, without I/O.

The sidecar is told in parts: one at a time, in order, each with a key that was made
before its first try. A part without an answer is kept and sent again, just as it was,
before anything else.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from pdp.api.v1 import budget_pb2
from pdp.channel import CallError, Metadata
from pdp.client.acting import Identity
from pdp.client.desk import ASK_AGAIN, Ask, Steps
from pdp.client.errors import BudgetRefused
from pdp.client.spend import (
    Charge,
    Reservation,
    Usage,
    charge_messages,
    charges_of,
    checked_amount,
    checked_charges,
    quantity_messages,
)
from pdp.reason import ReasonCode

_log: Final = logging.getLogger(__name__)

_PARTS_BY_AMOUNT: Final = 10
"""A part is due at once when it is this fraction of what was reserved."""

Entry = str | tuple[str, str]
"""What amounts are counted by: a unit of usage, or budget and unit of a charge."""


def reserve(
    identity: Identity,
    what: Usage | Sequence[Charge],
    *,
    tool: str,
    ttl_seconds: int,
    observe: Callable[[Reservation], None] | None,
) -> Steps[Meter]:
    """Have it held, for whoever acts. Raises BudgetRefused, CallError and IdentityLacking."""
    acting = identity.current()
    request = budget_pb2.ReserveBudgetRequest(
        idempotency_key=str(uuid.uuid4()), tool=tool, ttl_seconds=ttl_seconds
    )
    most: dict[Entry, int] = {}
    if isinstance(what, Usage):
        request.usage.model = what.model
        request.usage.quantities.extend(quantity_messages(what.quantities))
        most.update(((unit, amount) for unit, amount in what.quantities.items()))
    else:
        charges = checked_charges(what)
        request.charges.extend(charge_messages(charges))
        for budget, unit, amount in charges:
            most[budget, unit] = amount
    response = yield Ask("ReserveBudget", request, acting.metadata)
    reservation = Reservation.of(request, response)
    if not reservation.hold_id or not reservation.charges:
        raise BudgetRefused(ReasonCode.INTERNAL, "the answer names nothing that is held")
    meter = Meter(reservation, most, acting.metadata)
    try:
        if observe is not None:
            observe(reservation)
        # The identity may have ended while the answer was under way.
        identity.current()
    except Exception:
        with contextlib.suppress(CallError):  # then it expires by itself
            yield from meter.end(failed=True)
        raise
    return meter


class Meter:
    """What is spent under one hold. Threads may share :meth:`add`; the steps are walked
    one after another.
    """

    def __init__(
        self, reservation: Reservation, most: Mapping[Entry, int], metadata: Metadata
    ) -> None:
        """``most`` is what was asked to be held."""
        self.reservation = reservation
        self._most = most
        self._metadata = metadata
        self._lock = threading.Lock()
        self._untold: dict[Entry, int] = {}
        self._counted = False  # whether anything was ever added
        self._unclear = False  # what was spent is not known: then it is all that is held
        self._ended = False
        self._failing = False
        self._part: Ask | None = None  # under way, or without an answer
        self._last: Ask | None = None
        self._settled: dict[tuple[str, str], int] = {}

    def add(self, charges: Sequence[Charge], quantities: Mapping[str, int]) -> bool:
        """Count what has been spent since; whether it is so much that the sidecar is to
        be told at once. Raises RuntimeError after the end, and TypeError or ValueError
        for what can not be counted: all that is held then counts as spent.
        """
        with self._lock:
            if self._ended:
                raise RuntimeError("the hold has ended: report what is spent inside its with")
            try:
                self._count(charges, quantities)
            except (TypeError, ValueError):
                self._unclear = True
                raise
            return not self._failing and any(
                _PARTS_BY_AMOUNT * amount >= self._most[entry] > 0
                for entry, amount in self._untold.items()
            )

    def part(self) -> Steps[None]:
        """Tell what has been spent since the part before. Raises CallError when the part
        is to be told again.
        """
        if self._part is None:
            self._part = self._cut_part()
        if self._part is None:
            return
        try:
            response = yield self._part
        except CallError as error:
            self._failing = self.may_be_told_again(error)
            if self._failing:
                raise
            self._refused(error)
        else:
            self._failing = False
            for budget, unit, amount in charges_of(response.settled):
                self._settled[budget, unit] = self._settled.get((budget, unit), 0) + amount
        self._part = None

    def end(self, *, failed: bool) -> Steps[None]:
        """End the hold with what has not been told yet. When nothing was ever counted, a
        block that failed has spent nothing, and one that did not has spent all.

        Raises CallError; where it :meth:`may_be_told_again`, this is walked again.
        """
        with self._lock:
            self._ended = True
        if self._part is not None:
            yield from self.part()
        if self._last is None:
            self._last = yield from self._closing(failed=failed)
        try:
            yield self._last
        except CallError as error:
            if self._unclear or self.may_be_told_again(error):
                raise
            self._refused(error)
            self._last = self._rest()
            yield self._last

    @staticmethod
    def may_be_told_again(error: Exception) -> bool:
        """Whether the sidecar may yet take what it did not take now."""
        return isinstance(error, CallError) and error.reason_code in ASK_AGAIN

    def _count(self, charges: Sequence[Charge], quantities: Mapping[str, int]) -> None:
        entries: list[tuple[Entry, int]] = [
            *(((budget, unit), amount) for budget, unit, amount in charges),
            *quantities.items(),
        ]
        counted = dict(self._untold)
        for entry, amount in entries:
            if entry not in self._most:
                kind = "units of the usage" if self.reservation.model else "charges"
                raise ValueError(f"only {kind} that were reserved can be spent")
            counted[entry] = checked_amount(counted.get(entry, 0) + checked_amount(amount))
        self._untold = counted
        self._counted = self._counted or bool(entries)

    def _closing(self, *, failed: bool) -> Steps[Ask]:
        if self._unclear:
            yield from self.part()
            return self._rest()
        if self._counted:
            return self._settlement(self._cut(), partial=False)
        if failed:
            request = budget_pb2.ReleaseBudgetRequest(
                idempotency_key=str(uuid.uuid4()), hold_id=self.reservation.hold_id
            )
            return Ask("ReleaseBudget", request, self._metadata)
        return self._rest()

    def _cut_part(self) -> Ask | None:
        untold = self._cut()
        return self._settlement(untold, partial=True) if untold else None

    def _cut(self) -> dict[Entry, int]:
        with self._lock:
            untold, self._untold = self._untold, {}
        return {entry: amount for entry, amount in untold.items() if amount}

    def _rest(self) -> Ask:
        """The settlement of all that is still held."""
        return self._settlement(
            {
                (budget, unit): amount - self._settled.get((budget, unit), 0)
                for budget, unit, amount in self.reservation.charges
                if amount > self._settled.get((budget, unit), 0)
            },
            partial=False,
        )

    def _settlement(self, amounts: Mapping[Entry, int], *, partial: bool) -> Ask:
        request = budget_pb2.SettleBudgetRequest(
            idempotency_key=str(uuid.uuid4()), hold_id=self.reservation.hold_id, partial=partial
        )
        request.charges.extend(charge_messages(_charges(amounts.items())))
        request.quantities.extend(
            quantity_messages(
                {entry: amount for entry, amount in amounts.items() if isinstance(entry, str)}
            )
        )
        return Ask("SettleBudget", request, self._metadata)

    def _refused(self, error: CallError) -> None:
        self._unclear = True
        _log.warning(
            "hold %s: what was spent was refused (%s); all that is held counts as spent",
            self.reservation.hold_id,
            error.reason_code,
        )


def _charges(amounts: Iterable[tuple[Entry, int]]) -> list[Charge]:
    return [(*entry, amount) for entry, amount in amounts if not isinstance(entry, str)]
