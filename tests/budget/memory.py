"""What the port says of a ledger, in the fewest words: sums are taken anew each time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from pdp.budget.bounds import (
    ENDED_BY,
    MAX_HOLD_SECONDS,
    check_account,
    check_charges,
    check_grant,
    check_hold_id,
    check_key,
    check_limits,
    check_memo,
    check_most,
    check_ttl,
)
from pdp.budget.ledger import (
    MAX_AMOUNT,
    Account,
    AccountState,
    Charge,
    HoldState,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    OnExpiry,
    PartState,
    Receipt,
    Scope,
    Warned,
    Window,
)
from pdp.budget.windows import window_bounds

KeyName = tuple[str, str, str, str]
Place = tuple[str, ...]
"""(tenant or "", organisation, limit, budget, unit, scope, counts_for, window, start)."""
HELD: Final = {OnExpiry.RELEASE: "returns", OnExpiry.CHARGE: "charged"}


@dataclass
class Spend:
    """What counts in one place, but for what is held."""

    limit: Limit
    tenant: str
    ends_at: int | None
    spent: int = 0
    granted: int = 0
    warned: int = 0
    level: int = 0
    drained_at: int = 0


@dataclass
class Part:
    charge: Charge
    modes: dict[Place, str]
    """"returns" or "charged" on expiry; "held" only, for concurrency; "rate"."""
    left: int
    settled: int = 0
    refunded: int = 0


@dataclass
class Hold:
    id: str
    operation: str
    tenant: str
    actor: str
    tool: str
    made_at: int
    expires_at: int
    parts: list[Part]
    memo: str
    state: str = "open"
    is_over: bool = False
    """Whether what was held under it has been let go."""


@dataclass
class Answer:
    content_sha256: str
    at: int
    receipt: Receipt


@dataclass
class Books:
    """What a tenant's operations read and write."""

    spends: dict[Place, Spend] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    answers: dict[KeyName, Answer] = field(default_factory=dict)


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
        self.books = Books()

    # Take

    async def reserve(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int,
        memo: str = "",
    ) -> Receipt:
        check_ttl(ttl_seconds)
        answer = self._take(account, key, charges, limits, ttl_seconds, memo)
        await asyncio.sleep(0)  # as any store would let others have their turn
        return answer

    async def charge(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        memo: str = "",
    ) -> Receipt:
        answer = self._take(account, key, charges, limits, None, memo)
        await asyncio.sleep(0)
        return answer

    def _take(
        self,
        account: Account,
        key: IdempotencyKey,
        charges: Sequence[Charge],
        limits: Sequence[Limit],
        ttl_seconds: int | None,
        memo: str,
    ) -> Receipt:
        check_charges(charges, least=1)
        check_limits(limits)
        check_memo(memo)
        amounts = {(charge.budget, charge.unit): charge.amount for charge in charges}

        applied = [
            limit
            for limit in limits
            if limit.applies_to(account) and (limit.budget, limit.unit) in amounts
        ]
        bounded = {(limit.budget, limit.unit) for limit in applied if limit.enforced}

        def answer(now: float) -> Receipt:
            if amounts.keys() - bounded:
                raise LedgerError("budget_unlimited", "")
            if not charges:
                return Receipt(replayed=False, note=key.note)
            before = self._states(account, applied, now)
            over = [
                (state, amount)
                for state in before
                for amount in [amounts[state.limit.budget, state.limit.unit]]
                if not self._has_room(account, state, amount, now)
            ]
            for state, amount in over:
                if state.limit.enforced:
                    return Receipt(
                        replayed=False,
                        note=key.note,
                        limits=before,
                        refused_by=state,
                        retry_after_seconds=self._wait(account, state, amount, now),
                    )
            if any(
                state.spent + state.held + amounts[state.limit.budget, state.limit.unit]
                > MAX_AMOUNT
                for state in before
                if state.limit.window is not Window.ROLLING
            ):
                raise LedgerError("budget_unavailable", "would pass 2^53 - 1")
            for limit in applied:
                self._open(account, limit, now, amounts[limit.budget, limit.unit])
            hold = Hold(
                self.new_id(),
                key.operation,
                account.tenant,
                account.actor,
                account.tool,
                math.floor(now),
                math.ceil(now + ttl_seconds) if ttl_seconds is not None else 0,
                [
                    Part(charge, self._modes(account, charge, applied, now), charge.amount)
                    for charge in charges
                ],
                memo,
            )
            self.books.holds[hold.id] = hold
            if ttl_seconds is None:
                hold.state, hold.is_over = "settled", True
                for part in hold.parts:
                    self._post(part, part.charge.amount)
                    part.left = 0
            after = self._states(account, applied, now)
            return Receipt(
                replayed=False,
                note=key.note,
                id=hold.id,
                expires_at=hold.expires_at,
                charges=tuple(charges),
                limits=after,
                shadow_refusals=tuple(state for state, _ in over),
                warnings=tuple(self._warnings(account, after, now)),
            )

        return self._once(account, key, answer)

    def _modes(
        self, account: Account, charge: Charge, limits: Sequence[Limit], now: float
    ) -> dict[Place, str]:
        return {
            self._place(account, limit, now): _mode(limit)
            for limit in limits
            if (limit.budget, limit.unit) == (charge.budget, charge.unit)
        }

    def _open(self, account: Account, limit: Limit, now: float, amount: int) -> None:
        """The place where a limit counts, from now on; a rate counts at once."""
        place = self._place(account, limit, now)
        spend = self.books.spends.setdefault(
            place,
            Spend(limit, limit.shared_by(account), window_bounds(limit, now).ends_at),
        )
        if limit.window is Window.ROLLING:
            spend.level = min(
                self._level(place, limit, now) + amount * limit.seconds * 1000, MAX_AMOUNT
            )
            spend.drained_at = max(spend.drained_at, math.floor(now * 1000))
        spend.limit = limit

    def _has_room(self, account: Account, state: LimitState, amount: int, now: float) -> bool:
        limit = state.limit
        if limit.window is not Window.ROLLING:
            return amount <= state.remaining
        level = self._level(self._place(account, limit, now), limit, now)
        period = limit.seconds * 1000
        return level + amount * period <= limit.burst * period

    def _wait(self, account: Account, state: LimitState, amount: int, now: float) -> int | None:
        limit, place = state.limit, self._place(account, state.limit, now)
        if limit.window is Window.CONCURRENT:
            return 1 if amount <= limit.limit else None
        if limit.window is Window.ROLLING:
            if amount > limit.burst:
                return None
            period = limit.seconds * 1000
            above = self._level(place, limit, now) + (amount - limit.burst) * period
            return max(1, _up(_up(above, limit.limit), 1000))
        waits = []
        if state.resets_at is not None and amount <= limit.limit:
            waits.append(state.resets_at)
        returning = [
            hold.expires_at
            for hold, part in self._live(place, now)
            if part.modes[place] == "returns" and part.left
        ]
        if returning and state.spent + amount <= limit.limit + state.granted:
            waits.append(min(returning))
        return max(1, math.ceil(min(waits) - now)) if waits else None

    def _warnings(self, account: Account, states: Sequence[LimitState], now: float) -> list[Warned]:
        warnings = []
        for state in states:
            spend = self.books.spends[self._place(account, state.limit, now)]
            for percent, amount in state.limit.warnings_at():
                if percent > spend.warned and state.spent + state.held >= amount:
                    warnings.append(Warned(limit_id=state.limit.id, percent=percent))
                    spend.warned = percent
        return warnings

    # End

    async def settle(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
        final: bool = True,
    ) -> Receipt:
        check_hold_id(hold_id)
        check_charges(charges or (), least=0)

        def answer(now: float) -> Receipt:
            hold = self._own(account, key, hold_id, now)
            parts = {(part.charge.budget, part.charge.unit): part for part in hold.parts}
            if charges is None:
                spent = tuple(replace(part.charge, amount=part.left) for part in hold.parts)
            else:
                spent = tuple(charges)
            if {(charge.budget, charge.unit) for charge in spent} - parts.keys():
                raise LedgerError("charge_not_held", "")
            posted = {(charge.budget, charge.unit): charge.amount for charge in spent}
            late = hold.state != "open" or hold.expires_at <= now
            self._check_sums(parts, posted, late=late, final=final)
            over_hold = False
            for pair, part in parts.items():
                amount = posted.get(pair, 0)
                drop = part.left if final else min(part.left, amount)
                self._post(part, amount, charged_before=drop if late else 0)
                part.left -= drop
                over_hold = over_hold or (pair in posted and part.settled > part.charge.amount)
            if final:
                hold.state = "settled"
            return Receipt(
                replayed=False,
                note=key.note,
                id=hold_id,
                charges=spent,
                over_hold=over_hold,
                late=late,
            )

        return self._once(account, key, answer)

    def _check_sums(
        self,
        parts: dict[tuple[str, str], Part],
        posted: dict[tuple[str, str], int],
        *,
        late: bool,
        final: bool,
    ) -> None:
        for pair, part in parts.items():
            amount = posted.get(pair, 0)
            drop = part.left if final else min(part.left, amount)
            for place, mode in part.modes.items():
                more = amount - drop if late and mode == "charged" else amount
                if (
                    mode in HELD.values()
                    and place in self.books.spends
                    and self.books.spends[place].spent + more > MAX_AMOUNT
                ):
                    raise LedgerError("budget_unavailable", "would pass 2^53 - 1")

    def _post(self, part: Part, amount: int, *, charged_before: int = 0) -> None:
        for place, mode in part.modes.items():
            if mode in HELD.values():
                spend = self.books.spends[place]
                spend.spent += amount - (charged_before if mode == "charged" else 0)
        part.settled += amount

    async def release(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        check_hold_id(hold_id)

        def answer(now: float) -> Receipt:
            hold = self._own(account, key, hold_id, now)
            if hold.expires_at <= now:
                raise LedgerError("hold_expired", "")
            hold.state = "released"
            return Receipt(replayed=False, note=key.note, id=hold_id, charges=_let_go(hold))

        return self._once(account, key, answer)

    async def refund(
        self,
        account: Account,
        key: IdempotencyKey,
        *,
        hold_id: str,
        charges: Sequence[Charge] | None,
    ) -> Receipt:
        check_hold_id(hold_id)
        check_charges(charges or (), least=1)

        def answer(now: float) -> Receipt:
            hold = self._of_tenant(account, hold_id, now)
            parts = {(part.charge.budget, part.charge.unit): part for part in hold.parts}
            refunded = (
                tuple(charges)
                if charges is not None
                else tuple(
                    replace(part.charge, amount=part.settled - part.refunded)
                    for part in hold.parts
                    if part.settled > part.refunded
                )
            )
            if {(charge.budget, charge.unit) for charge in refunded} - parts.keys():
                raise LedgerError("charge_not_held", "")
            if not refunded or any(
                charge.amount > part.settled - part.refunded
                for charge in refunded
                for part in [parts[charge.budget, charge.unit]]
            ):
                raise LedgerError("refund_exceeds_spend", "")
            for charge in refunded:
                part = parts[charge.budget, charge.unit]
                part.refunded += charge.amount
                for place, mode in part.modes.items():
                    if mode in HELD.values() and place in self.books.spends:
                        spend = self.books.spends[place]
                        spend.spent = max(0, spend.spent - charge.amount)
            return Receipt(replayed=False, note=key.note, id=hold_id, charges=refunded)

        return self._once(account, key, answer)

    # Look

    async def state(self, account: Account, *, limits: Sequence[Limit]) -> tuple[LimitState, ...]:
        check_account(account)
        check_limits(limits)
        now = self._look(account.tenant)
        applied = [limit for limit in limits if limit.applies_to(account)]
        return self._states(account, applied, now)

    async def hold(self, tenant: str, hold_id: str) -> HoldState | None:
        check_hold_id(hold_id)
        now = self._look(tenant)
        hold = self.books.holds.get(hold_id)
        if hold is None or hold.tenant != tenant or not self._is_kept(hold.made_at, now):
            return None
        return _hold_state(hold)

    async def holds(self, tenant: str, *, most: int) -> tuple[HoldState, ...]:
        check_most(most)
        now = self._look(tenant)
        live = [
            hold
            for hold in self.books.holds.values()
            if hold.tenant == tenant and hold.state == "open" and hold.expires_at > now
        ]
        live.sort(key=lambda hold: (hold.expires_at, hold.id))
        return tuple(map(_hold_state, live[:most]))

    async def accounts(self, tenant: str, *, most: int) -> tuple[AccountState, ...]:
        check_most(most)
        now = self._look(tenant)
        own = [
            (place, spend)
            for place, spend in self.books.spends.items()
            if spend.tenant == tenant and (spend.ends_at is None or spend.ends_at > now)
        ]
        states = [self._account_state(place, spend, now) for place, spend in own]
        states.sort(key=lambda each: (each.limit.id, each.counts_for, each.starts_at, each.id))
        return tuple(states[:most])

    async def tenants(self, *, most: int) -> tuple[str, ...]:
        check_most(most, highest=10_000)
        self._check_open()
        names = {hold.tenant for hold in self.books.holds.values()}
        names |= {spend.tenant for spend in self.books.spends.values()} - {""}
        names |= {tenant for tenant, *_ in self.books.answers}
        return tuple(sorted(names)[:most])

    # Operators

    async def grant(
        self, account: Account, key: IdempotencyKey, *, account_id: str, amount: int
    ) -> Receipt:
        check_grant(amount)

        def answer(now: float) -> Receipt:
            place = next((each for each in self.books.spends if _name(each) == account_id), None)
            spend = self.books.spends[place] if place is not None else None
            if (
                place is None
                or spend is None
                or spend.tenant != account.tenant
                or not spend.limit.window.is_calendar
                or (spend.ends_at is not None and spend.ends_at <= now)
            ):
                raise LedgerError("account_not_found", "")
            spend.granted = min(max(0, spend.granted + amount), MAX_AMOUNT)
            state = self._account_state(place, spend, now)
            return Receipt(
                replayed=False,
                note=key.note,
                limits=(
                    LimitState(
                        limit=spend.limit,
                        spent=state.spent,
                        held=state.held,
                        resets_at=spend.ends_at,
                        granted=spend.granted,
                    ),
                ),
            )

        return self._once(account, key, answer)

    async def expire(self, account: Account, key: IdempotencyKey, *, hold_id: str) -> Receipt:
        check_hold_id(hold_id)

        def answer(now: float) -> Receipt:
            hold = self._of_tenant(account, hold_id, now)
            if hold.state != "open":
                raise LedgerError(f"hold_already_{hold.state}", "")
            if hold.expires_at <= now:
                raise LedgerError("hold_expired", "")
            hold.expires_at = math.floor(now)
            hold.is_over = True
            for part in hold.parts:
                part.modes = {
                    place: "returns" if mode == "charged" else mode
                    for place, mode in part.modes.items()
                }
            held = tuple(replace(part.charge, amount=part.left) for part in hold.parts if part.left)
            return Receipt(replayed=False, note=key.note, id=hold_id, charges=held)

        return self._once(account, key, answer)

    async def close(self) -> None:
        self.closed = True

    # Time, answers and sums

    def _check_open(self) -> None:
        if self.closed:
            raise LedgerError("budget_unavailable", "")

    def _look(self, tenant: str) -> float:
        """The time at which something is looked at; from then on it is not earlier."""
        self._check_open()
        now = self._now(tenant)
        self._keep(tenant, now)
        self._let_expired_go(tenant, now)
        return now

    def _now(self, tenant: str) -> float:
        return max(self.clock(), self.highest.get(self._clock_of(tenant), 0))

    def _keep(self, tenant: str, now: float) -> None:
        self.highest[self._clock_of(tenant)] = math.floor(now)

    def _clock_of(self, tenant: str) -> str:
        return tenant if self.clock_per_tenant else ""

    def _once(
        self, account: Account, key: IdempotencyKey, answer: Callable[[float], Receipt]
    ) -> Receipt:
        """An error leaves no trace, of the time neither."""
        self._check_open()
        check_account(account)
        check_key(key)
        now = self._now(account.tenant)
        name = (account.tenant, account.actor, key.operation, key.key)
        first = self.books.answers.get(name)
        if first is not None and self._is_kept(first.at, now):
            if first.content_sha256 != key.content_sha256:
                raise LedgerError("idempotency_key_reused", "")
            return replace(first.receipt, replayed=True, limits=(), shadow_refusals=(), warnings=())
        undo = self._let_expired_go(account.tenant, now)
        try:
            given = answer(now)
        except LedgerError:
            for step in undo:
                step()
            raise
        self._keep(account.tenant, now)
        self.books.answers[name] = Answer(key.content_sha256, math.floor(now), given)
        return given

    def _is_kept(self, made_at: int, now: float) -> bool:
        return made_at > math.floor(now) - self.kept_seconds

    def _let_expired_go(self, tenant: str, now: float) -> list[Callable[[], None]]:
        """What is charged on expiry is spent from then on. Returns how that is undone."""
        undo: list[Callable[[], None]] = []
        for hold in self.books.holds.values():
            same_clock = not self.clock_per_tenant or hold.tenant == tenant
            if same_clock and hold.state == "open" and not hold.is_over and hold.expires_at <= now:
                hold.is_over = True
                undo.append(partial(setattr, hold, "is_over", False))
                for part in hold.parts:
                    for place, mode in part.modes.items():
                        if mode == "charged":
                            spend = self.books.spends[place]
                            undo.insert(0, partial(setattr, spend, "spent", spend.spent))
                            spend.spent = min(spend.spent + part.left, MAX_AMOUNT)
        return undo

    def _states(
        self, account: Account, limits: Sequence[Limit], now: float
    ) -> tuple[LimitState, ...]:
        return tuple(self._limit_state(account, limit, now) for limit in limits)

    def _limit_state(self, account: Account, limit: Limit, now: float) -> LimitState:
        place = self._place(account, limit, now)
        spend = self.books.spends.get(place)
        spent, resets_at = self._spent(place, limit, now)
        return LimitState(
            limit=limit,
            spent=spent,
            held=sum(part.left for _, part in self._live(place, now)),
            resets_at=resets_at,
            granted=spend.granted if spend is not None else 0,
        )

    def _spent(self, place: Place, limit: Limit, now: float) -> tuple[int, int | None]:
        spend = self.books.spends.get(place)
        if limit.window is Window.ROLLING:
            level = self._level(place, limit, now)
            if not level:
                return 0, None
            empty_at = max(math.floor(now * 1000), spend.drained_at if spend else 0)
            return _up(level, limit.seconds * 1000), _up(empty_at + _up(level, limit.limit), 1000)
        return spend.spent if spend is not None else 0, window_bounds(limit, now).ends_at

    def _account_state(self, place: Place, spend: Spend, now: float) -> AccountState:
        spent, resets_at = self._spent(place, spend.limit, now)
        return AccountState(
            id=_name(place),
            limit=spend.limit,
            counts_for=place[6],
            starts_at=int(place[8]),
            spent=spent,
            held=sum(part.left for _, part in self._live(place, now)),
            granted=spend.granted,
            resets_at=resets_at if spend.limit.window is Window.ROLLING else spend.ends_at,
        )

    def _level(self, place: Place, limit: Limit, now: float) -> int:
        """What is in a rate's bucket now."""
        spend = self.books.spends.get(place)
        if spend is None:
            return 0
        elapsed = max(0, math.floor(now * 1000) - spend.drained_at)
        return max(0, spend.level - limit.limit * elapsed)

    def _live(self, place: Place, now: float) -> list[tuple[Hold, Part]]:
        """What holds there."""
        return [
            (hold, part)
            for hold in self.books.holds.values()
            if hold.state == "open" and not hold.is_over and hold.expires_at > now
            for part in hold.parts
            if part.modes.get(place, "rate") != "rate"
        ]

    def _place(self, account: Account, limit: Limit, now: float) -> Place:
        window = limit.window.value
        if limit.window is Window.ROLLING:
            window = f"{window}:{limit.seconds}"
        shared_by = limit.shared_by(account)
        return (
            shared_by,
            "" if shared_by else account.organisation,
            limit.id,
            limit.budget,
            limit.unit,
            limit.scope.value,
            "" if limit.scope is Scope.ORGANISATION else limit.counts_for(account),
            window,
            str(window_bounds(limit, now).starts_at),
        )

    def _of_tenant(self, account: Account, hold_id: str, now: float) -> Hold:
        hold = self.books.holds.get(hold_id)
        if hold is None or hold.tenant != account.tenant or not self._is_kept(hold.made_at, now):
            raise LedgerError("hold_not_found", "")
        return hold

    def _own(self, account: Account, key: IdempotencyKey, hold_id: str, now: float) -> Hold:
        hold = self.books.holds.get(hold_id)
        asked = (account.tenant, account.actor, ENDED_BY.get(key.operation))
        if (
            hold is None
            or (hold.tenant, hold.actor, hold.operation) != asked
            or not self._is_kept(hold.made_at, now)
        ):
            raise LedgerError("hold_not_found", "")
        if hold.state == "settled" and key.operation == "lease_settle":
            return hold
        if hold.state != "open":
            raise LedgerError(f"hold_already_{hold.state}", "")
        return hold


def _mode(limit: Limit) -> str:
    if limit.window is Window.ROLLING:
        return "rate"
    if limit.window is Window.CONCURRENT:
        return "held"
    return HELD[limit.on_expiry]


def _let_go(hold: Hold) -> tuple[Charge, ...]:
    held = tuple(replace(part.charge, amount=part.left) for part in hold.parts if part.left)
    for part in hold.parts:
        part.left = 0
    return held


def _hold_state(hold: Hold) -> HoldState:
    return HoldState(
        id=hold.id,
        operation=hold.operation,
        actor=hold.actor,
        tool=hold.tool,
        made_at=hold.made_at,
        expires_at=hold.expires_at,
        state=hold.state,
        parts=tuple(
            PartState(charge=part.charge, settled=part.settled, refunded=part.refunded)
            for part in hold.parts
        ),
        memo=hold.memo,
    )


def _name(place: Place) -> str:
    return "/".join(place)


def _up(value: int, by: int) -> int:
    return -(-value // by)
