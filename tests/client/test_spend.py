"""Reservations at a real sidecar, with the prices of the starter bundle."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pdp.api.v1 import budget_pb2
from pdp.client import AsyncGuard, BudgetRefused, Guard, Hold, Usage
from pdp.testing import Caller, TokenIssuer
from tests.client.faces import Condition, Face

Audit = Callable[[], list[dict[str, Any]]]
USAGE = Usage("gpt-x", tokens_in=1200, tokens_out=4000)


@pytest.fixture
def token(issuer: TokenIssuer, actor: str) -> str:
    """An agent's, who may charge what models cost."""
    return issuer.token("tenant_acme", actor, roles=["agent"])


def llm(target: str, token: str) -> dict[str, tuple[int, int]]:
    """Spent and held today, by unit."""
    with Caller(target, token=token) as caller:
        limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
    return {
        limit.unit: (limit.spent, limit.held)
        for limit in limits
        if (limit.budget, limit.window, limit.scope) == ("llm", "day", "tenant")
    }


def cost(target: str, token: str, spend: Callable[[], None]) -> dict[str, int]:
    """What it adds to the tenant's day, by unit; in the end nothing may be held."""
    before = llm(target, token)
    spend()
    after = llm(target, token)
    assert {unit: held for unit, (_, held) in after.items()} == {
        unit: held for unit, (_, held) in before.items()
    }
    return {unit: after[unit][0] - before[unit][0] for unit in after}


def test_a_stream_costs_what_it_used_and_leaves_nothing_held(
    face: Face, target: str, token: str, audit: Audit
) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        assert hold.reservation.charges == (
            ("llm", "tokens_in", 1200),
            ("llm", "tokens_out", 4000),
            ("llm", "usd_micros", 43000),
        )
        hold.spent(tokens_in=1000)
        yield lambda: len(audit()) == 2
        hold.spent(tokens_out=600)
        yield lambda: len(audit()) == 3
        hold.spent(tokens_out=20)

    def spend() -> None:
        with face.acting_for(token):
            face.spend(USAGE, block, report_every_seconds=3600.0)

    found = cost(target, token, spend)
    assert found == {"tokens_in": 1000, "tokens_out": 620, "usd_micros": 2500 + 6200}
    reserved, *settled = audit()
    assert reserved["action"] == "budget.reserve"
    assert [record["action"] for record in settled] == ["budget.settle"] * 3
    assert [record.get("detail", {}).get("partial") for record in settled] == [True, True, None]


def test_a_stream_that_died_half_way_costs_what_it_used(
    face: Face, target: str, token: str
) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_in=1200, tokens_out=100)
        yield from ()
        raise ConnectionError

    def spend() -> None:
        with face.acting_for(token), pytest.raises(ConnectionError):
            face.spend(USAGE, block)

    assert cost(target, token, spend)["usd_micros"] == 4000


def test_nothing_counted_costs_all_or_nothing(face: Face, target: str, token: str) -> None:
    def ends(_hold: Hold) -> Iterator[Condition]:
        yield from ()

    def raises(_hold: Hold) -> Iterator[Condition]:
        yield from ()
        raise ConnectionError

    def spend() -> None:
        with face.acting_for(token):
            face.spend(USAGE, ends)
            with pytest.raises(ConnectionError):
                face.spend(USAGE, raises)

    assert cost(target, token, spend)["usd_micros"] == 43000


def test_a_miscount_costs_all_that_parts_have_left(face: Face, target: str, token: str) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=1000)
        yield from ()
        with pytest.raises(ValueError, match="were reserved"):
            hold.spent(tokens_cached=5)

    def spend() -> None:
        with face.acting_for(token):
            face.spend(USAGE, block)

    found = cost(target, token, spend)
    assert found == {"tokens_in": 1200, "tokens_out": 4000, "usd_micros": 43000}


def test_more_than_was_held_is_charged_in_full(face: Face, target: str, token: str) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent(tokens_out=300)
        yield from ()

    def spend() -> None:
        with face.acting_for(token):
            face.spend(Usage("gpt-x", tokens_out=100), block)

    assert cost(target, token, spend)["tokens_out"] == 300


def test_charges_are_reserved_without_a_price(face: Face, target: str, token: str) -> None:
    def block(hold: Hold) -> Iterator[Condition]:
        hold.spent([("llm", "usd_micros", 40)])
        yield from ()

    def spend() -> None:
        with face.acting_for(token):
            face.spend([("llm", "usd_micros", 900)], block)

    assert cost(target, token, spend) == {"tokens_in": 0, "tokens_out": 0, "usd_micros": 40}


def refused(face: Face, token: str, what: Any) -> BudgetRefused:
    with face.acting_for(token), pytest.raises(BudgetRefused) as caught:
        face.spend(what, lambda _hold: iter(()))
    return caught.value


def test_an_unknown_model_is_refused_and_not_free(face: Face, token: str) -> None:
    assert refused(face, token, Usage("gpt-9", tokens_in=1)).reason_code == "model_unknown"
    assert refused(face, token, Usage("gpt-x", pictures=1)).reason_code == "model_unknown"


def test_a_rate_that_is_spent_says_when_to_ask_again(face: Face, token: str) -> None:
    half = Usage("gpt-x-mini", tokens_out=15_000)
    with face.acting_for(token):
        face.spend(half, lambda _hold: iter(()))
    error = refused(face, token, half)
    assert (error.reason_code, error.refused_by) == ("rate_limited", "llm-tokens-per-actor")
    assert error.retry_after_seconds is not None
    assert 1 <= error.retry_after_seconds <= 60


def test_a_limit_that_is_passed_is_named(face: Face, token: str) -> None:
    error = refused(face, token, Usage("gpt-x-mini", tokens_in=3_000_000))
    assert error.reason_code == "tenant_budget_exceeded"
    assert error.refused_by == "llm-tokens-in-per-day"


def test_a_threshold_that_is_crossed_is_told_once(
    face: Face, issuer: TokenIssuer, actor: str
) -> None:
    team = f"team-{uuid.uuid4().hex[:8]}"
    token = issuer.token("tenant_acme", actor, roles=["agent"], team=team)
    seen: list[tuple[tuple[str, int], ...]] = []

    def block(hold: Hold) -> Iterator[Condition]:
        seen.append(hold.reservation.warnings)
        yield from ()
        raise ConnectionError  # it costs nothing

    for _ in range(2):
        with face.acting_for(token), pytest.raises(ConnectionError):
            face.spend(Usage("gpt-x", tokens_in=640_000), block)
    first, second = (
        [warning for warning in warnings if warning[0] == "llm-spend-per-team-day"]
        for warnings in seen
    )
    assert first == [("llm-spend-per-team-day", 80)]
    assert second == []


def test_both_faces_spend_side_by_side(target: str, token: str) -> None:
    async def awaited() -> None:
        async with AsyncGuard(target) as guard:
            with guard.acting_for(token):

                async def stream() -> None:
                    async with guard.reserve(Usage("gpt-x", tokens_out=100)) as hold:
                        for _ in range(10):
                            hold.spent(tokens_out=1)
                            await asyncio.sleep(0)

                await asyncio.gather(*(stream() for _ in range(8)))

    def spend() -> None:
        asyncio.run(awaited())
        usage = Usage("gpt-x", tokens_out=100)
        with Guard(target) as guard, guard.acting_for(token), guard.reserve(usage) as hold:
            hold.spent(tokens_out=20)

    assert cost(target, token, spend)["tokens_out"] == 100
