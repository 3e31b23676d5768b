"""What a delegation takes away, whatever the policy says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pdp.budget.ledger import Account, Charge, Limit, Scope, Window
from pdp.canonical import JsonObject, JsonValue
from pdp.identity.subject import Delegation, Link, Subject
from pdp.narrowing import (
    SLICE,
    NotDelegated,
    limits_within,
    may_end,
    refusal,
)

USER = Subject(tenant="acme", actor="user-7")
ACCOUNT = Account(tenant="acme", actor="user-7", tool="orders.update")
CALLS = Charge("tools", "calls", 1)
LEDGER = "here"


def acting(*links: Link, arguments: dict[str, Any] | None = None, ledger: str = LEDGER) -> Subject:
    return replace(
        USER,
        delegation=Delegation(
            links=links or (Link("d1", "worker"),),
            tools=frozenset({"refunds.create", "orders.read"}),
            arguments=arguments or {},
            root_token_id="root",
            ledger=ledger,
        ),
    )


def with_slice(name: str, *budget: tuple[str, str, int]) -> Link:
    return Link(name, "worker", budget, expires_at=2_000_000_000)


def limit(most: int = 100, **fields: Any) -> Limit:
    usual: dict[str, Any] = {
        "id": "calls-a-day",
        "budget": "tools",
        "unit": "calls",
        "window": Window.DAY,
        "limit": most,
        "scope": Scope.TENANT,
    }
    return Limit(**{**usual, **fields})


def kept(value: JsonValue, *rules: JsonValue) -> bool:
    """Whether a call with this argument may be put to the policy."""
    subject = acting(arguments={"refunds.create": {"amount": list(rules)}})
    code = refusal(subject, tool="refunds.create", arguments={"amount": value})
    assert code in (None, "argument_not_delegated")
    return code is None


def test_an_agent_calls_what_was_delegated_and_nothing_else() -> None:
    subject = acting()
    assert refusal(subject, tool="orders.read", arguments={}) is None
    for tool in ("orders.update", "orders.Read", "orders.read ", "orders", ""):
        assert refusal(subject, tool=tool, arguments={}) == "tool_not_delegated"
    assert refusal(USER, tool="orders.update", arguments={}) is None


def test_an_argument_that_has_rules_must_be_given() -> None:
    subject = acting(arguments={"refunds.create": {"amount": [{"max": 500}]}})
    without: list[JsonObject] = [{}, {"Amount": 1}, {"nested": {"amount": 1}}, {"amount": None}]
    for arguments in without:
        code = refusal(subject, tool="refunds.create", arguments=arguments)
        assert code == "argument_not_delegated"
    assert refusal(subject, tool="refunds.create", arguments={"amount": 1, "why": "x"}) is None
    # Rules of one tool say nothing of another.
    assert refusal(subject, tool="orders.read", arguments={}) is None


@pytest.mark.parametrize(
    ("value", "rule", "is_kept"),
    (
        (500, {"max": 500}, True),
        (500.0, {"max": 500}, True),
        (501, {"max": 500}, False),
        (500.0000001, {"max": 500}, False),
        (2**53 - 1, {"max": 2**53 - 2}, False),
        (2**53 - 1, {"max": 9007199254740990.0}, False),
        (1e308, {"max": 500}, False),
        (-1, {"min": 0}, False),
        (-0.0, {"min": 0}, True),
        (True, {"max": 500}, False),
        (False, {"min": 0}, False),
        ("1", {"max": 500}, False),
        ([1], {"max": 500}, False),
        ({"amount": 1}, {"max": 500}, False),
        (None, {"max": 500}, False),
        (5, {"min": 1, "max": 10}, True),
        (11, {"min": 1, "max": 10}, False),
        (0, {"min": 1, "max": 10}, False),
    ),
)
def test_a_bound_is_for_numbers_and_exact(
    value: JsonValue, rule: JsonValue, *, is_kept: bool
) -> None:
    assert kept(value, rule) is is_kept


@pytest.mark.parametrize(
    ("value", "listed", "is_kept"),
    (
        ("a", ["a", "b"], True),
        ("A", ["a"], False),
        ("a ", ["a"], False),
        (1, [1], True),
        (1.0, [1], True),
        (True, [1], False),
        (1, [True], False),
        (True, [True], True),
        (0, [False], False),
        ("1", [1], False),
        (2**53 - 1, [9007199254740992.0], False),
        (None, [None], False),
        (["a"], [["a"]], False),
        ("\u00e9", ["e\u0301"], False),
        ("a", [], False),
    ),
)
def test_a_list_is_of_values_of_the_same_kind(
    value: JsonValue, listed: list[JsonValue], *, is_kept: bool
) -> None:
    assert kept(value, {"one_of": listed}) is is_kept


@pytest.mark.parametrize(
    ("value", "prefix", "is_kept"),
    (
        ("/orders/918", "/orders/", True),
        ("/orders/", "/orders/", True),
        ("/orders", "/orders/", False),
        ("//orders/918", "/orders/", False),
        ("/Orders/918", "/orders/", False),
        # Normalised, these begin with another letter.
        ("cafe\u0301/x", "cafe", False),
        ("cafe\u0316\u0301", "cafe", False),
        ("\u1100\u1161", "\u1100", False),
        ("caf\u00e9", "cafe\u0301", False),
        ("cafe/\u0301", "cafe", True),
        ("\u200b/orders/918", "/orders/", False),
        (5, "5", False),
        (["/orders/1"], "/orders/", False),
        ("anything", "", False),
    ),
)
def test_a_prefix_is_of_texts_and_survives_normalisation(
    value: JsonValue, prefix: str, *, is_kept: bool
) -> None:
    assert kept(value, {"prefix": prefix}) is is_kept


def test_all_rules_of_an_argument_hold() -> None:
    assert kept(5, {"min": 1}, {"max": 10}, {"one_of": [5, 6]})
    assert not kept(7, {"min": 1}, {"max": 10}, {"one_of": [5, 6]})


@pytest.mark.parametrize(
    "rule", ({"regex": ".*"}, {"max": "500"}, {"one_of": 5}, {"prefix": 1}, {}, [], None, "max")
)
def test_what_is_no_rule_that_is_known_is_kept_by_nothing(rule: JsonValue) -> None:
    assert not kept(5, rule)
    assert not kept("x", {"prefix": "x"}, rule)


@pytest.mark.parametrize("rules", (None, {"max": 500}, 5))
def test_what_is_no_list_of_rules_is_kept_by_nothing(rules: JsonValue) -> None:
    subject = acting(arguments={"refunds.create": {"amount": rules}})
    code = refusal(subject, tool="refunds.create", arguments={"amount": 1})
    assert code == "argument_not_delegated"


# Budgets


def test_every_slice_of_the_chain_is_a_limit_besides_the_policys() -> None:
    subject = acting(
        with_slice("d1", ("tools", "calls", 10), ("llm", "usd_micros", 5)),
        Link("d2", "helper"),
        with_slice("d3", ("tools", "calls", 3)),
    )
    found = limits_within(subject, ACCOUNT, [CALLS], [limit()], LEDGER)
    assert [(each.id, each.limit) for each in found] == [
        ("calls-a-day", 100),
        ("~delegation.d1", 10),
        ("~delegation.d3", 3),
    ]
    assert {each.until for each in found[1:]} == {2_000_000_000}
    assert limits_within(USER, ACCOUNT, [CALLS], [limit()], LEDGER) == (limit(),)
    assert limits_within(acting(), ACCOUNT, [CALLS], [limit()], "elsewhere") == (limit(),)


@pytest.mark.parametrize(
    "policys",
    (
        [],
        [limit(enforced=False)],
        [limit(budget="llm")],
        [limit(unit="usd_micros")],
    ),
)
def test_a_slice_does_not_stand_in_for_a_limit_that_the_policy_lacks(policys: list[Limit]) -> None:
    subject = acting(with_slice("d1", ("tools", "calls", 10)))
    found = limits_within(subject, ACCOUNT, [CALLS], policys, LEDGER)
    assert not any(each.id.startswith(SLICE) for each in found)


def test_a_limit_for_tools_bounds_nothing_that_is_spent_for_none() -> None:
    subject = acting(with_slice("d1", ("tools", "calls", 10)))
    policys = [limit(scope=Scope.TOOL)]
    assert len(limits_within(subject, ACCOUNT, [CALLS], policys, LEDGER)) == 2
    account = replace(ACCOUNT, tool="")
    assert len(limits_within(subject, account, [CALLS], policys, LEDGER)) == 1


@pytest.mark.parametrize("charge", (Charge("tools", "usd_micros", 1), Charge("llm", "calls", 1)))
def test_a_budget_that_was_not_delegated_can_not_be_spent(charge: Charge) -> None:
    subject = acting(with_slice("d1", ("tools", "calls", 10)), Link("d2", "helper"))
    with pytest.raises(NotDelegated) as refused:
        limits_within(subject, ACCOUNT, [CALLS, charge], [limit()], LEDGER)
    assert refused.value.reason_code == "budget_not_delegated"


def test_a_slice_is_spent_where_it_is_counted() -> None:
    subject = acting(with_slice("d1", ("tools", "calls", 10)), ledger="elsewhere")
    with pytest.raises(NotDelegated) as refused:
        limits_within(subject, ACCOUNT, [CALLS], [limit()], LEDGER)
    assert refused.value.reason_code == "budget_not_delegated"
    assert limits_within(subject, ACCOUNT, [], [limit()], LEDGER) == (limit(),)


def test_more_limits_than_the_ledger_takes_are_refused() -> None:
    subject = acting(*(with_slice(f"d{n}", ("tools", "calls", 10)) for n in range(16)))
    policys = [limit(id=f"limit-{n}") for n in range(60)]
    with pytest.raises(NotDelegated):
        limits_within(subject, ACCOUNT, [CALLS], policys, LEDGER)


# Holds


def test_an_agent_ends_its_own_holds_and_those_of_whom_it_delegated_to() -> None:
    child = acting(Link("d1", "worker"), Link("d2", "helper"))
    assert may_end(child, ["d1", "d2"])
    assert may_end(child, ["d1", "d2", "d3"])
    for other in ([], ["d1"], ["d1", "d4"], ["d2"], ["d2", "d1"], ["d4", "d2"]):
        assert not may_end(child, other)
    assert may_end(USER, ["d1"])
    assert may_end(USER, [])
