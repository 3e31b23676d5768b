"""The schemas fit what is asked and what is accepted, and nothing else.

OPA itself holds the documents against them, as it does for editors.
"""

from __future__ import annotations

import json
import string
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdp.budget.ledger import MAX_AMOUNT, MAX_BUCKET, Charge, Scope, Window
from pdp.budget.windows import is_timezone
from pdp.identity.subject import TENANT_PATTERN, Delegation, Link, Subject
from pdp.policy.authoring.schemas import schema_names, schema_text
from pdp.policy.engine import PolicyError
from pdp.policy.question import Usage, authorize_input, budget_input, tools_input
from pdp.policy.service_class import parse_service_class, service_class_input
from pdp.policy.tools import parse_visible_tools
from pdp.policy.verdict import (
    MAX_SCOPES_LENGTH,
    parse_budget_verdict,
    parse_limits,
    parse_verdict,
)

OPA = Path(__file__).resolve().parents[3] / ".tools" / "opa"
FEW = settings(max_examples=15, deadline=None)
MANY = 60
"""Documents of one example; each example asks OPA once."""


def fits(name: str, documents: Sequence[Any]) -> list[bool]:
    """Whether each document fits the schema."""
    done = subprocess.run(
        [
            *(OPA, "eval", "--stdin-input", "--format", "raw"),
            "[json.match_schema(d, input.schema)[0] | some d in input.documents]",
        ],
        # As texts: OPA takes documents that are no objects only so.
        input=json.dumps(
            {
                "schema": json.loads(schema_text(name)),
                "documents": list(map(json.dumps, documents)),
            }
        ),
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[bool] = json.loads(done.stdout)
    return answers


# What is asked

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,20}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
objects = st.dictionaries(texts, values, max_size=3)
subjects = st.builds(
    Subject,
    tenant=st.from_regex(TENANT_PATTERN, fullmatch=True),
    actor=texts,
    roles=st.lists(texts, max_size=3).map(tuple),
    scopes=st.lists(texts, max_size=3).map(tuple),
    organisation=st.just("") | texts,
    team=st.just("") | texts,
    session=st.just("") | texts,
    issuer=st.just("") | texts,
    workload=st.just("") | texts,
    delegation=st.none()
    | st.builds(
        Delegation,
        links=st.lists(st.builds(Link, id=texts, agent=texts), min_size=1, max_size=3).map(tuple),
        tools=st.frozensets(names, max_size=3),
        arguments=st.just({}),
        root_token_id=texts,
        ledger=texts,
    ),
)
times = st.floats(0, 4e9)
budgets = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
amounts = st.integers(1, 2**53 - 1)
charges = st.builds(Charge, budget=budgets, unit=budgets, amount=amounts)
calls = st.builds(
    authorize_input,
    subjects,
    tool=names,
    arguments=objects,
    resource=st.none()
    | st.fixed_dictionaries(
        {"type": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,20}", fullmatch=True), "id": texts}
    ),
    time=times,
    request_id=names,
    context=objects,
)
spends = st.builds(
    budget_input,
    subjects,
    operation=st.sampled_from(["charge", "reserve", "settle", "refund", "get"]),
    charges=st.lists(charges, max_size=3),
    tool=st.just("") | names,
    time=times,
    request_id=names,
    usage=st.none()
    | st.builds(
        Usage,
        model=names,
        quantities=st.dictionaries(budgets, st.integers(0, 2**53 - 1), max_size=3).map(
            lambda quantities: tuple(quantities.items())
        ),
    ),
    price_version=st.just("") | st.from_regex(r"[A-Za-z0-9._-]{1,20}", fullmatch=True),
)


@FEW
@given(st.lists(calls, min_size=1, max_size=MANY))
def test_every_call_fits_its_schema_and_that_of_any_input(documents: list[Any]) -> None:
    assert all(fits("authz_input", documents))
    assert all(fits("input", documents))


@FEW
@given(st.lists(spends, min_size=1, max_size=MANY))
def test_every_spend_fits_its_schema_and_that_of_any_input(documents: list[Any]) -> None:
    assert all(fits("budget_input", documents))
    assert all(fits("input", documents))
    assert not any(fits("authz_input", documents))


@pytest.mark.parametrize("name", ("authz_input", "budget_input", "tools_input", "input"))
def test_what_all_inputs_have_is_described_alike(name: str) -> None:
    one, other = json.loads(schema_text(name)), json.loads(schema_text("input"))

    assert one["properties"]["subject"] == other["properties"]["subject"]
    assert set(one["properties"]) <= set(other["properties"])
    for key in ("time", "request_id"):
        mine, theirs = (schema["properties"]["context"]["properties"] for schema in (one, other))
        assert mine[key] == theirs[key]


# What is answered

NOT_JSON_OF_IT = [None, True, False, 0, -1, 1.5, "", "x", "OK", [], {}, [None], {"a": 1}, 2**53]
odd = st.sampled_from(NOT_JSON_OF_IT)
reasons = st.sampled_from(["ok", "policy_denied", "Mine", "my_own", "9", "a" * 65, "ok "])
scopes = st.lists(
    st.text(string.ascii_lowercase + ':"\\ ', max_size=3) | st.just("s" * 256), max_size=3
) | st.just([f"scope-{number}" for number in range(65)])
amount_like = st.sampled_from([0, 1, 1.0, 1.5, 2**53 - 1, 2**53, "1", True, None])
charge_like = st.fixed_dictionaries(
    {"budget": st.sampled_from(["llm", "a b", "", 1]), "unit": st.sampled_from(["calls", "C"])},
    optional={"amount": amount_like, "more": st.just(1)},
)
permit_like = st.fixed_dictionaries(
    {},
    optional={
        "binds": st.sampled_from([["tool", "arguments"], ["tool"], ["arguments", "tool"], "tool"]),
        "ttl_seconds": st.sampled_from([0, 1, 60.0, 3600, 3601, 1.5, "60", True]),
        "max_uses": st.sampled_from([0, 1, 1.0, 2, 1000.0, 1001, True]),
        "more": st.just(1),
    },
)
charge_lists = st.lists(charge_like, max_size=2) | st.just(
    [{"budget": f"b{number}", "unit": "calls", "amount": 1} for number in range(17)]
)
decisions = st.fixed_dictionaries(
    {"allow": st.booleans() | odd, "reason_code": reasons | odd},
    optional={
        "scopes": scopes | odd,
        "permit": permit_like | odd,
        "charge": charge_lists | odd,
        "more": st.just(1),
    },
)
sound = st.fixed_dictionaries(
    {"allow": st.just(True), "reason_code": st.just("ok")},
    optional={
        "scopes": st.lists(st.sampled_from(["a:b", "c"]), max_size=2),
        "permit": permit_like,
        "charge": charge_lists,
    },
)
percents = st.sampled_from([0, 1, 50, 80.0, 100, 101, 0.5, "50"])
limit_like = st.fixed_dictionaries(
    {
        "id": budgets | odd,
        "budget": budgets,
        "unit": budgets,
        "window": st.sampled_from([*map(str, Window), "week", 1]),
        "limit": amount_like,
        "scope": st.sampled_from([*map(str, Scope), "department"]),
    },
    optional={"more": st.just(1)},
)
any_limit = st.fixed_dictionaries(
    {
        "id": budgets,
        "budget": st.just("llm"),
        "unit": st.just("calls"),
        "window": st.sampled_from(list(map(str, Window))),
        "limit": st.sampled_from([0, 1, 100]),
        "scope": st.sampled_from(list(map(str, Scope))),
    },
    optional={
        "timezone": st.sampled_from(["UTC", "Etc/GMT+5", "America/Argentina/Buenos_Aires"])
        | st.sampled_from(["", "Mars/Base", "../UTC", "UTC\n", 1]),
        "seconds": st.sampled_from([0, 1, 60.0, 31 * 86_400, 31 * 86_400 + 1, 0.5, "1", True]),
        "burst": st.sampled_from([0, 1, 60.0, MAX_BUCKET, MAX_BUCKET + 1, 0.5, "1", True]),
        "warn_at": st.lists(percents, max_size=3) | st.just(list(range(1, 10))) | odd,
        "enforced": st.booleans() | odd,
        "on_expiry": st.sampled_from(["release", "charge", "keep"]) | odd,
    },
)


def accepted(parse: Callable[[Any], object], value: Any) -> bool:
    try:
        parse(value)
    except PolicyError:
        return False
    return True


def odd_names() -> list[Any]:
    return ["a", "a" * 64, "a" * 65, "A", "", "-a", "9", "a b", "a\n", "\u00e9", 1, None]


def pairs_are_unique(decision: Any, key: str = "charge") -> bool:
    """What a schema can not say: each pair of budget and unit once."""
    pairs = [(each["budget"], each["unit"]) for each in decision.get(key, [])]
    return len(set(pairs)) == len(pairs)


def is_held_for_all_calls(decision: Any) -> bool:
    """What a schema can not say: a permit for several calls costs no more than can be held."""
    uses = decision.get("permit", {}).get("max_uses", 1)
    return all(each["amount"] * uses <= MAX_AMOUNT for each in decision.get("charge", []))


def keeps_what_a_schema_can_not_say(limit: Any) -> bool:
    warn_at = limit.get("warn_at", [])
    burst = limit.get("burst", limit["limit"]) if "seconds" in limit else 0
    return (
        is_timezone(limit.get("timezone", "UTC"))
        and warn_at == sorted(warn_at)
        and burst * limit.get("seconds", 0) <= MAX_BUCKET
    )


CHARGE: dict[str, Any] = {"budget": "llm", "unit": "calls", "amount": 1}
OBJECTS: list[Any] = [{}, {"more": 1}, [], None]
LISTS: list[Any] = [[{}], [{**CHARGE, "more": 1}]]
EDGES: list[dict[str, Any]] = [
    *({"permit": {"ttl_seconds": value}} for value in (0, 1, 1.0, 1.5, 3600, 3601, "60", True)),
    *({"permit": {"max_uses": value}} for value in (0, 1, 1.0, 2, True, None)),
    *({"permit": {"binds": ["tool"], "max_uses": value}} for value in (0, 2.0, 1000, 1001, None)),
    *({"permit": {"binds": value}} for value in (["tool", "arguments"], ["tool"], [], None)),
    *({"permit": value} for value in OBJECTS),
    *({"scopes": value} for value in ([], ["a"], ["a", "a"], ["a", 1], [""], ["a b"], ['"'], "a")),
    *({"scopes": ["s" * length]} for length in (255, 256)),
    *({"scopes": [f"s{number}" for number in range(count)]} for count in (64, 65)),
    *({"scopes": [chr(code)]} for code in range(0x1F, 0x81)),
    *({"charge": [{**CHARGE, "amount": value}]} for value in (0, 1, 1.5, 2**53 - 1, 2**53, "1")),
    *({"charge": [{**CHARGE, key: value}]} for key in ("budget", "unit") for value in odd_names()),
    *({"charge": [{**CHARGE, "budget": f"b{n}"} for n in range(count)]} for count in (0, 16, 17)),
    *({"charge": value} for value in (*LISTS, {}, None)),
    *({"reason_code": value} for value in ("ok", "OK", "my_own", "a" * 64, "a" * 65, "", 1)),
    *({"allow": value} for value in (False, "true", 1, None)),
    {"more": 1},
]


def test_the_decision_schema_takes_each_edge_that_is_accepted_and_no_other() -> None:
    base = {"allow": True, "reason_code": "ok"}
    denied = {"allow": False, "reason_code": "my_own"}
    documents = [{**start, **edge} for edge in EDGES for start in (base, denied)]

    for document, fit in zip(documents, fits("authz_decision", documents), strict=True):
        assert accepted(parse_verdict, document) is fit, document


@FEW
@given(st.lists(decisions | sound | odd, min_size=1, max_size=MANY))
def test_the_decision_schema_takes_just_what_is_accepted(documents: list[Any]) -> None:
    for document, fit in zip(documents, fits("authz_decision", documents), strict=True):
        expected = fit and pairs_are_unique(document) and is_held_for_all_calls(document)
        assert accepted(parse_verdict, document) is expected, document


spend_decisions = st.fixed_dictionaries(
    {
        "allow": st.booleans(),
        "reason_code": st.sampled_from(["ok", "model_unknown"]),
    },
    optional={
        "charges": charge_lists | odd,
        "price_version": st.sampled_from(["2026-11-01", "v1_B", "a" * 64, "a" * 65, "a b", "a\n"])
        | odd,
    },
)


@FEW
@given(st.lists(decisions | spend_decisions | odd, min_size=1, max_size=MANY))
def test_the_schema_of_budget_decisions_takes_just_what_is_accepted(documents: list[Any]) -> None:
    for document, fit in zip(documents, fits("budget_decision", documents), strict=True):
        expected = fit and pairs_are_unique(document, "charges")
        assert accepted(parse_budget_verdict, document) is expected, document


@FEW
@given(st.lists(st.lists(limit_like | any_limit, max_size=2) | odd, min_size=1, max_size=MANY))
def test_the_schema_of_limits_takes_just_what_is_accepted(documents: list[Any]) -> None:
    for document, fit in zip(documents, fits("budget_limits", documents), strict=True):
        ids = [limit["id"] for limit in document] if fit else []
        expected = (
            fit
            and len(set(ids)) == len(ids)
            and all(map(keeps_what_a_schema_can_not_say, document))
        )
        assert accepted(parse_limits, document) is expected, document


class_like = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.sampled_from(("high", "normal", "low", "HIGH", "")) | odd,
        **{
            key: st.sampled_from((0, 0.009, 0.01, 0.5, 1, 1.0, 1.5, 100_000, 100_001)) | odd
            for key in ("max_concurrent_calls", "calls_per_second", "burst")
        },
        "other": odd,
    },
)


@FEW
@given(st.lists(class_like | odd, min_size=1, max_size=MANY))
def test_the_schema_of_service_classes_takes_just_what_is_accepted(documents: list[Any]) -> None:
    for document, fit in zip(documents, fits("service_class", documents), strict=True):
        assert accepted(parse_service_class, document) is fit, document


@FEW
@given(st.lists(names, min_size=1, max_size=MANY))
def test_every_question_for_a_service_class_fits_its_schema(tenants: list[str]) -> None:
    documents = [service_class_input(tenant.translate(_NO_TENANT)) for tenant in tenants]

    assert all(fits("service_class_input", documents))


_NO_TENANT = str.maketrans(":/", "--")


listings = st.builds(
    tools_input, subjects, time=times, context=st.dictionaries(names, st.integers(), max_size=2)
)


@FEW
@given(st.lists(listings, min_size=1, max_size=MANY))
def test_every_listing_of_tools_fits_its_schema_and_that_of_any_input(documents: list[Any]) -> None:
    assert all(fits("tools_input", documents))
    assert all(fits("input", documents))
    assert not any(fits("authz_input", documents))


tool_like = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["orders.read", "a" * 128, "a" * 129, "", "-a", "a b"]) | odd,
        "callable": st.booleans() | odd,
        "reason_code": reasons | odd,
    },
    optional={"more": st.just(1)},
)
sound_tools = st.builds(
    lambda name, code: {"name": name, "callable": code == "ok", "reason_code": code},
    names,
    st.sampled_from(["ok", "my_own"]),
)


@FEW
@given(st.lists(st.lists(sound_tools | tool_like, max_size=3) | odd, min_size=1, max_size=MANY))
def test_the_schema_of_visible_tools_takes_just_what_is_accepted(documents: list[Any]) -> None:
    for document, fit in zip(documents, fits("tools_visible", documents), strict=True):
        expected = fit and len({each["name"] for each in document}) == len(document)
        assert accepted(parse_visible_tools, document) is expected, document


def test_an_answer_with_approval_fits_and_is_read_as_a_denial() -> None:
    approval = {"roles": ["lead"], "expires_seconds": 600, "four_eyes": True}
    decision: Any = {"allow": True, "reason_code": "ok", "approval": approval}

    assert fits("authz_decision", [decision]) == [True]
    assert not parse_verdict(decision).allow


def test_scopes_that_are_too_long_together_are_beyond_what_a_schema_says() -> None:
    scopes = [f"{number:0255}" for number in range(MAX_SCOPES_LENGTH // 255 + 1)]
    decision: Any = {"allow": True, "reason_code": "ok", "scopes": scopes}

    assert fits("authz_decision", [decision]) == [True]
    assert not accepted(parse_verdict, decision)
    assert "2048 characters together" in schema_text("authz_decision")


def test_there_is_a_schema_for_everything_that_is_asked_and_answered() -> None:
    assert schema_names() == [
        "authz_decision",
        "authz_input",
        "budget_decision",
        "budget_input",
        "budget_limits",
        "input",
        "service_class",
        "service_class_input",
        "tools_input",
        "tools_visible",
    ]


@pytest.mark.parametrize("name", ("nothing", "../archive", "", "input.json"))
def test_another_name_names_no_schema(name: str) -> None:
    with pytest.raises(KeyError):
        schema_text(name)
