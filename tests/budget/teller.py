"""A ledger asked in turn, with the hands of its clock: what tests of ledgers share."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import pytest

from pdp.budget.ledger import (
    Account,
    AccountState,
    Charge,
    HoldState,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    OnExpiry,
    Receipt,
    Scope,
    Window,
)
from tests.budget.stores import Store

T = TypeVar("T")

NOON = 1_795_521_600
"""2026-11-24T12:00:00Z."""
DAY = 86_400

ALICE = Account(tenant="acme", actor="alice", tool="orders.update")
BOB = Account(tenant="acme", actor="bob", tool="orders.update")
MALLORY = Account(tenant="globex", actor="alice", tool="orders.update")
SAME = "a" * 64
OTHER = "b" * 64


def calls(amount: int) -> Charge:
    return Charge("tools", "calls", amount)


def money(amount: int) -> Charge:
    return Charge("tools", "usd_micros", amount)


def limit(
    most: int,
    *,
    name: str = "calls-a-day",
    unit: str = "calls",
    window: Window = Window.DAY,
    scope: Scope = Scope.TENANT,
    timezone: str = "UTC",
    warn_at: tuple[int, ...] = (),
    enforced: bool = True,
    on_expiry: OnExpiry = OnExpiry.RELEASE,
) -> Limit:
    return Limit(
        id=name,
        budget="tools",
        unit=unit,
        window=window,
        limit=most,
        scope=scope,
        timezone=timezone,
        warn_at=warn_at,
        enforced=enforced,
        on_expiry=on_expiry,
    )


def rate(most: int, *, seconds: int = 60, burst: int = 0, scope: Scope = Scope.TENANT) -> Limit:
    return Limit(
        id="rate",
        budget="tools",
        unit="calls",
        window=Window.ROLLING,
        limit=most,
        scope=scope,
        seconds=seconds,
        burst=burst or most,
    )


TEN = limit(10)


def refused(reason_code: str, call: Callable[[], object]) -> None:
    with pytest.raises(LedgerError) as caught:
        call()
    assert caught.value.reason_code == reason_code


class Teller:
    """A ledger with the hands of its clock, asked in turn."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.now: float = NOON
        self._runner = asyncio.Runner()
        self._keys = itertools.count()
        self.open()

    def open(self) -> None:
        self.ledger = self.do(self.store.open(lambda: self.now))

    def close(self) -> None:
        self.do(self.ledger.close())
        self._runner.close()

    def reopen(self) -> None:
        self.do(self.ledger.close())
        self.open()

    def do(self, answer: Awaitable[T]) -> T:
        async def wait() -> T:
            return await answer

        return self._runner.run(wait())

    def key(
        self, operation: str, name: str | None = None, content: str = SAME, note: str = ""
    ) -> IdempotencyKey:
        name = name or f"key-{next(self._keys)}"
        return IdempotencyKey(operation=operation, key=name, content_sha256=content, note=note)

    def reserve(
        self,
        *charges: Charge,
        limits: Sequence[Limit] = (TEN,),
        account: Account = ALICE,
        key: IdempotencyKey | None = None,
        ttl_seconds: int = 60,
        memo: str = "",
    ) -> Receipt:
        return self.do(
            self.ledger.reserve(
                account,
                key or self.key("reserve"),
                charges=charges,
                limits=limits,
                ttl_seconds=ttl_seconds,
                memo=memo,
            )
        )

    def charge(
        self,
        *charges: Charge,
        limits: Sequence[Limit] = (TEN,),
        account: Account = ALICE,
        key: IdempotencyKey | None = None,
    ) -> Receipt:
        return self.do(
            self.ledger.charge(account, key or self.key("charge"), charges=charges, limits=limits)
        )

    def settle(
        self,
        hold_id: str,
        *charges: Charge,
        account: Account = ALICE,
        key: IdempotencyKey | None = None,
        final: bool = True,
    ) -> Receipt:
        return self.do(
            self.ledger.settle(
                account,
                key or self.key("settle"),
                hold_id=hold_id,
                charges=charges or None,
                final=final,
            )
        )

    def refund(
        self,
        hold_id: str,
        *charges: Charge,
        account: Account = ALICE,
        key: IdempotencyKey | None = None,
    ) -> Receipt:
        return self.do(
            self.ledger.refund(
                account, key or self.key("refund"), hold_id=hold_id, charges=charges or None
            )
        )

    def expire(
        self, hold_id: str, *, account: Account = ALICE, key: IdempotencyKey | None = None
    ) -> Receipt:
        return self.do(self.ledger.expire(account, key or self.key("expire"), hold_id=hold_id))

    def grant(
        self,
        limit_id: str,
        amount: int,
        *,
        account: Account = ALICE,
        key: IdempotencyKey | None = None,
    ) -> Receipt:
        """Grant to the one account of that limit."""
        [granted] = [each for each in self.accounts(account.tenant) if each.limit.id == limit_id]
        return self.do(
            self.ledger.grant(
                account, key or self.key("grant"), account_id=granted.id, amount=amount
            )
        )

    def accounts(self, tenant: str = "acme") -> tuple[AccountState, ...]:
        return self.do(self.ledger.accounts(tenant, most=1000))

    def holds(self, tenant: str = "acme") -> tuple[HoldState, ...]:
        return self.do(self.ledger.holds(tenant, most=1000))

    def release(
        self, hold_id: str, *, account: Account = ALICE, key: IdempotencyKey | None = None
    ) -> Receipt:
        return self.do(self.ledger.release(account, key or self.key("release"), hold_id=hold_id))

    def state(self, *limits: Limit, account: Account = ALICE) -> tuple[LimitState, ...]:
        return self.do(self.ledger.state(account, limits=limits or (TEN,)))

    def counts(self, *limits: Limit, account: Account = ALICE) -> list[tuple[int, int]]:
        """(spent, held) of each limit."""
        return [(each.spent, each.held) for each in self.state(*limits, account=account)]
