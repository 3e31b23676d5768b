"""Who calls, under which limits: small ones that are always full, and large ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from pdp.budget.ledger import Account, Charge, Limit, OnExpiry, Scope, Window

TENANTS: Final = (("acme", "north"), ("globex", "north"), ("initech", ""))
"""With the organisations that they belong to."""
ACTORS: Final = ("alice", "bob")
TOOLS: Final = ("", "orders.update")

_CALLS: Final = Limit(
    id="calls-a-session",
    budget="tools",
    unit="calls",
    window=Window.LIFETIME,
    limit=25,
    scope=Scope.SESSION,
)
_MONEY: Final = replace(
    _CALLS,
    id="money-a-session",
    unit="usd_micros",
    limit=300,
    on_expiry=OnExpiry.CHARGE,
)
_EXACT: Final = (
    replace(_CALLS, id="calls-at-once", window=Window.CONCURRENT, limit=9, scope=Scope.TENANT),
    replace(
        _CALLS,
        id="calls-a-second",
        window=Window.ROLLING,
        limit=20,
        seconds=1,
        burst=15,
        scope=Scope.ACTOR,
    ),
)
"""Never leased."""
_LIMITS: Final[tuple[Limit, ...]] = (
    _CALLS,
    replace(_CALLS, id="calls-of-a-tool", window=Window.MINUTE, limit=250, scope=Scope.TOOL),
    replace(
        _CALLS,
        id="calls-a-month",
        window=Window.MONTH,
        limit=10**9,
        scope=Scope.TENANT,
        timezone="America/New_York",
    ),
    replace(_CALLS, id="calls-an-hour", window=Window.HOUR, limit=10**9, scope=Scope.ORGANISATION),
    _MONEY,
    replace(
        _MONEY,
        id="money-a-day",
        window=Window.DAY,
        limit=10**9,
        scope=Scope.ACTOR,
        timezone="Europe/Berlin",
        on_expiry=OnExpiry.RELEASE,
    ),
    *_EXACT,
)


class World:
    """What callers of one kind of store choose from, with dice of their own."""

    def __init__(self, *, leased: bool) -> None:
        self.leased = leased
        self.session_seconds = 6 if leased else 2
        limits: tuple[Limit, ...] = _LIMITS
        if leased:
            # Room for a lease; and what is leased together expires alike.
            wide = {"calls-a-session": 250, "money-a-session": 2500, "calls-of-a-tool": 4000}
            limits = tuple(
                replace(
                    limit,
                    limit=wide.get(limit.id, limit.limit),
                    on_expiry=_MONEY.on_expiry if limit.unit == _MONEY.unit else limit.on_expiry,
                )
                for limit in limits
            )
        self.limits: Mapping[str, Limit] = {limit.id: limit for limit in limits}

    def account(self, dice: random.Random, clock: float) -> Account:
        """Sessions come and go with time, each for all callers, so that their limits are
        reached by many at once. Where they lease, the same few do so often.
        """
        tenant, organisation = dice.choice(TENANTS[:2] if self.leased else TENANTS)
        kind = dice.choice(("strict", "loose"))
        return Account(
            tenant=tenant,
            organisation=organisation,
            actor=dice.choice(ACTORS[:1] if self.leased else ACTORS),
            tool=dice.choice(TOOLS[1:] if self.leased else TOOLS),
            session=f"{kind}-{int(clock) // self.session_seconds}",
        )

    def charges(self, dice: random.Random) -> tuple[Charge, ...]:
        calls = Charge("tools", "calls", dice.choice((1, 1, 2, 3)))
        money = Charge("tools", "usd_micros", dice.choice((1, 10, 25)))
        return dice.choice(((calls,), (calls,), (money,), (calls, money)))

    def limits_of(self, dice: random.Random, charges: Sequence[Charge]) -> tuple[str, ...]:
        """Ids of the limits that an operation is done under: most often all."""
        units = {charge.unit for charge in charges}
        exact = {limit.id for limit in _EXACT}
        skipped = exact if dice.random() < (0.85 if self.leased else 0.3) else set()
        return tuple(
            limit.id
            for limit in self.limits.values()
            if limit.unit in units and limit.id not in skipped
        )

    def may_overspend(self, account: Account) -> bool:
        """Whether holds of the session are settled above what they hold, or late, on
        purpose. Where they are not, its limits are known to the unit.
        """
        return account.session.startswith("loose")
