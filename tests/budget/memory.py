"""What the port says of a ledger, in the fewest words: sums are taken anew each time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pdp.budget.bounds import (
    MAX_HOLD_SECONDS,
    check_account,
    check_charges,
    check_hold_id,
    check_key,
    check_limits,
    check_ttl,
)
from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    Receipt,
    Scope,
    Window,
)
from pdp.budget.windows import window_bounds

Place = tuple[str, str, str, str, Scope, str, Window, int]
KeyName = tuple[str, str, str, str]


@dataclass
class Hold:
    tenant: str
    actor: str
    backs_permit: bool
    made_at: int
    expires_at: int
    parts: list[tuple[Charge, list[Place]]]
    state: str = "open"


class MemoryLedger:
    """A ledger that nobody would run, and that stores are held against.

    ``clock_per_tenant``: whether the time that one tenant has seen binds the others.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        retention_seconds: int = 86_400,
        clock_per_tenant: bool = False,
    ) -> None:
        self.clock = clock
        self.new_id = new_id
        self.kept_seconds = retention_seconds + MAX_HOLD_SECONDS
        self.clock_per_tenant = clock_per_tenant
        self.closed = False
        self.highest: dict[str, int] = {}
        self.spent: dict[Place, int] = {}
        self.holds: dict[str, Hold] = {}
        self.answers: dict[KeyName, tuple[str, int, Receipt]] = {}

    async def reserve(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int,
    ) -> Receipt:
        check_ttl(ttl_seconds)
        answer = self._take(account, key, charges, limits, ttl_seconds)
        await asyncio.sleep(0)  # as any store would let others have their turn
        return answer

    async def charge(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
    ) -> Receipt:
        answer = self._take(account, key, charges, limits, None)
        await asyncio.sleep(0)
        return answer

    async def settle(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        check_hold_id(hold_id)
        check_charges(charges or (), least=0)

        def answer(now: float) -> Receipt:
            hold = self._own(account, key, hold_id, now)
            held = {(charge.budget, charge.unit): charge.amount for charge, _ in hold.parts}
            places = {(charge.budget, charge.unit): places for charge, places in hold.parts}
            spent = [charge for charge, _ in hold.parts] if charges is None else charges
            if {(charge.budget, charge.unit) for charge in spent} - held.keys():
                raise LedgerError("charge_not_held", "")
            self._post([(charge, places[charge.budget, charge.unit]) for charge in spent])
            hold.state = "settled"
            return Receipt(
                replayed=False,
                note=key.note,
                id=hold_id,
                charges=tuple(spent),
                over_hold=any(each.amount > held[each.budget, each.unit] for each in spent),
                late=hold.expires_at <= now,
            )

        return self._once(account, key, answer)

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        check_hold_id(hold_id)

        def answer(now: float) -> Receipt:
            hold = self._own(account, key, hold_id, now)
            if hold.expires_at <= now:
                raise LedgerError("hold_expired", "")
            hold.state = "released"
            held = tuple(charge for charge, _ in hold.parts)
            return Receipt(replayed=False, note=key.note, id=hold_id, charges=held)

        return self._once(account, key, answer)

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        self._check_open()
        check_account(account)
        check_limits(limits)
        now = self._now(account)
        self._keep(account, now)
        return self._state(account, limits, now)

    async def close(self) -> None:
        self.closed = True

    def _check_open(self) -> None:
        if self.closed:
            raise LedgerError("budget_unavailable", "")

    def _now(self, account: Account) -> float:
        return max(self.clock(), self.highest.get(self._clock_of(account), 0))

    def _keep(self, account: Account, now: float) -> None:
        self.highest[self._clock_of(account)] = math.floor(now)

    def _clock_of(self, account: Account) -> str:
        return account.tenant if self.clock_per_tenant else ""

    def _once(
        self, account: Account, key: IdempotencyKey, answer: Callable[[float], Receipt]
    ) -> Receipt:
        """An error leaves no trace, of the time neither."""
        self._check_open()
        check_account(account)
        check_key(key)
        now = self._now(account)
        name = (account.tenant, account.actor, key.operation, key.key)
        content, answered_at, first = self.answers.get(name, (None, 0, None))
        if first is not None and self._is_kept(answered_at, now):
            if content != key.content_sha256:
                raise LedgerError("idempotency_key_reused", "")
            return replace(first, replayed=True, limits=())
        given = answer(now)
        self._keep(account, now)
        self.answers[name] = (key.content_sha256, math.floor(now), given)
        return given

    def _is_kept(self, made_at: int, now: float) -> bool:
        return made_at > math.floor(now) - self.kept_seconds

    def _take(
        self,
        account: Account,
        key: IdempotencyKey,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
    ) -> Receipt:
        check_charges(charges, least=1)
        check_limits(limits)
        amounts = {(charge.budget, charge.unit): charge.amount for charge in charges}

        def answer(now: float) -> Receipt:
            applied = [
                state
                for state in self._state(account, limits, now)
                if (state.limit.budget, state.limit.unit) in amounts
            ]
            if amounts.keys() - {(state.limit.budget, state.limit.unit) for state in applied}:
                raise LedgerError("budget_unlimited", "")
            if not charges:
                return Receipt(replayed=False, note=key.note)
            for state in applied:
                amount = amounts[state.limit.budget, state.limit.unit]
                if amount > state.remaining:
                    return Receipt(
                        replayed=False,
                        note=key.note,
                        limits=tuple(applied),
                        refused_by=state,
                        retry_after_seconds=self._wait(account, state, amount, now),
                    )
            parts = [
                (
                    charge,
                    [
                        self._place(account, state.limit, now)
                        for state in applied
                        if (state.limit.budget, state.limit.unit) == (charge.budget, charge.unit)
                    ],
                )
                for charge in charges
            ]
            taken_id, expires_at = self.new_id(), 0
            if ttl_seconds is None:
                self._post(parts)
            else:
                expires_at = math.ceil(now + ttl_seconds)
                self.holds[taken_id] = Hold(
                    account.tenant,
                    account.actor,
                    key.operation == "authorize",
                    math.floor(now),
                    expires_at,
                    parts,
                )
            return Receipt(
                replayed=False,
                note=key.note,
                id=taken_id,
                expires_at=expires_at,
                charges=tuple(charges),
                limits=self._state(account, [state.limit for state in applied], now),
            )

        return self._once(account, key, answer)

    def _wait(self, account: Account, state: LimitState, amount: int, now: float) -> int | None:
        waits = []
        if state.resets_at is not None and amount <= state.limit.limit:
            waits.append(state.resets_at)
        live = self._live(self._place(account, state.limit, now), now)
        if live and state.spent + amount <= state.limit.limit:
            waits.append(min(live)[0])
        return math.ceil(min(waits) - now) if waits else None

    def _state(
        self, account: Account, limits: Sequence[Limit], now: float
    ) -> tuple[LimitState, ...]:
        return tuple(
            LimitState(
                limit=limit,
                spent=self.spent.get(self._place(account, limit, now), 0),
                held=sum(amount for _, amount in self._live(self._place(account, limit, now), now)),
                resets_at=window_bounds(limit.window, now).ends_at,
            )
            for limit in limits
            if limit.scope is not Scope.TOOL or account.tool
        )

    def _live(self, place: Place, now: float) -> list[tuple[int, int]]:
        """(expires_at, amount) of what is held there."""
        return [
            (hold.expires_at, charge.amount)
            for hold in self.holds.values()
            if hold.state == "open" and hold.expires_at > now
            for charge, places in hold.parts
            if place in places
        ]

    def _place(self, account: Account, limit: Limit, now: float) -> Place:
        value = {Scope.TENANT: "", Scope.ACTOR: account.actor, Scope.TOOL: account.tool}
        starts_at = window_bounds(limit.window, now).starts_at
        return (
            account.tenant,
            limit.id,
            limit.budget,
            limit.unit,
            limit.scope,
            value[limit.scope],
            limit.window,
            starts_at,
        )

    def _post(self, parts: Sequence[tuple[Charge, list[Place]]]) -> None:
        sums = {
            place: self.spent.get(place, 0) + charge.amount
            for charge, places in parts
            for place in places
        }
        if any(spent > MAX_AMOUNT for spent in sums.values()):
            raise LedgerError("budget_unavailable", "would pass 2^53 - 1")
        self.spent |= sums

    def _own(self, account: Account, key: IdempotencyKey, hold_id: str, now: float) -> Hold:
        hold = self.holds.get(hold_id)
        asked = (account.tenant, account.actor, key.operation == "outcome")
        if (
            hold is None
            or (hold.tenant, hold.actor, hold.backs_permit) != asked
            or not self._is_kept(hold.made_at, now)
        ):
            raise LedgerError("hold_not_found", "")
        if hold.state != "open":
            raise LedgerError(f"hold_already_{hold.state}", "")
        return hold
