"""What a policy answers is read strictly: anything of another form is a denial."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdp.budget.bounds import check_limits
from pdp.budget.ledger import (
    DEFAULT_WARN_AT,
    MAX_AMOUNT,
    MAX_BUCKET,
    Charge,
    Limit,
    OnExpiry,
    Scope,
    Window,
)
from pdp.canonical import JsonObject, JsonValue
from pdp.permit import claims
from pdp.policy.engine import PolicyError
from pdp.policy.verdict import (
    MAX_KNOWN_LIMITS,
    MAX_USES,
    BudgetVerdict,
    Verdict,
    _known_limits,
    parse_budget_verdict,
    parse_limits,
    parse_verdict,
)

ALLOW: JsonObject = {"allow": True, "reason_code": "ok"}
CHARGE: JsonObject = {"budget": "tools", "unit": "calls", "amount": 1}
LIMIT: JsonObject = {
    "id": "tools-per-day",
    "budget": "tools",
    "unit": "calls",
    "window": "day",
    "limit": 10,
    "scope": "tenant",
}
RATE: JsonObject = {**LIMIT, "window": "rolling", "seconds": 60}
ANY_ARGUMENTS: JsonObject = {"binds": ["tool"]}
SECRET = "s3cret-argument"

ODD_VALUES: list[JsonValue] = [None, True, 1, 1.5, "text", [], {}]


def each(key: str, *values: JsonValue) -> list[JsonObject]:
    """Documents with one key, one for each value."""
    return [{key: value} for value in values]


def without(document: JsonObject, key: str) -> JsonObject:
    return {name: value for name, value in document.items() if name != key}


def test_an_allow_is_read_in_full() -> None:
    verdict = parse_verdict(
        {
            "allow": True,
            "reason_code": "ok",
            "scopes": ["orders:write", "mail:send"],
            "permit": {"binds": ["tool", "arguments"], "ttl_seconds": 30, "max_uses": 1},
            "charge": [CHARGE, {"budget": "spend", "unit": "usd_micros", "amount": MAX_AMOUNT}],
        }
    )

    assert verdict == Verdict(
        allow=True,
        reason_code="ok",
        scopes=("mail:send", "orders:write"),
        permit_ttl_seconds=30,
        charges=(Charge("spend", "usd_micros", MAX_AMOUNT), Charge("tools", "calls", 1)),
    )


def test_a_permit_for_any_arguments_may_allow_several_calls() -> None:
    verdict = parse_verdict(
        {**ALLOW, "permit": {"binds": ["tool"], "max_uses": MAX_USES}, "charge": [CHARGE]}
    )

    assert verdict == Verdict(
        allow=True,
        reason_code="ok",
        binds_arguments=False,
        max_uses=MAX_USES,
        charges=(Charge("tools", "calls", 1),),
    )
    assert MAX_USES == claims.MAX_USES
    assert parse_verdict({**ALLOW, "permit": {"binds": ["tool"]}}).max_uses == 1


@pytest.mark.parametrize("uses", (3, MAX_USES))
def test_a_permit_whose_calls_together_cost_more_than_can_be_held_is_invalid(uses: int) -> None:
    half: JsonObject = {**CHARGE, "budget": "spend", "amount": MAX_AMOUNT // 2}

    def answer(max_uses: int) -> JsonObject:
        permit: JsonObject = {"binds": ["tool"], "max_uses": max_uses}
        return {**ALLOW, "permit": permit, "charge": [CHARGE, half]}

    assert parse_verdict(answer(2)).max_uses == 2
    with pytest.raises(PolicyError, match=r"permit\.max_uses") as refused:
        parse_verdict(answer(uses))
    assert refused.value.reason_code == "policy_invalid"


def test_the_least_allow_and_the_least_denial() -> None:
    assert parse_verdict(ALLOW) == Verdict(allow=True, reason_code="ok")
    assert parse_verdict({"allow": False, "reason_code": "closed_on_sundays"}) == Verdict(
        allow=False, reason_code="closed_on_sundays"
    )


def test_a_number_that_json_wrote_with_a_fraction_of_zero_is_an_integer() -> None:
    verdict = parse_verdict({**ALLOW, "charge": [{**CHARGE, "amount": 3.0}]})

    assert verdict.charges == (Charge("tools", "calls", 3),)
    assert type(verdict.charges[0].amount) is int


def test_an_allow_that_asks_for_approval_is_a_denial() -> None:
    approval: JsonObject = {"roles": ["manager"], "expires_seconds": 600, "four_eyes": True}

    verdict = parse_verdict({**ALLOW, "approval": approval, "charge": [CHARGE]})

    assert verdict == Verdict(allow=False, reason_code="approval_required")


@pytest.mark.parametrize(
    "answer",
    (
        *ODD_VALUES,
        without(ALLOW, "allow"),
        without(ALLOW, "reason_code"),
        *(ALLOW | odd for odd in each("allow", None, 1, 0, "true", "yes", [], {})),
        *(ALLOW | odd for odd in each("reason_code", None, True, 0, [], {}, "", "Ok", "o k")),
        {"allow": False, "reason_code": "9lives"},
        {"allow": False, "reason_code": "a" * 65},
        {"allow": False, "reason_code": "denied\n"},
        {"allow": False, "reason_code": "ok"},
        {"allow": True, "reason_code": "tool_not_allowed"},
        {**ALLOW, "obligations": []},
        {**ALLOW, "credential": {"provider": "vault"}},
        {**ALLOW, "": True},
        *(ALLOW | odd for odd in each("scopes", None, True, 1, "orders:read", {})),
        {**ALLOW, "scopes": ["orders read"]},
        {**ALLOW, "scopes": [""]},
        {**ALLOW, "scopes": ["a" * 256]},
        {**ALLOW, "scopes": ["caf\u00e9"]},
        {**ALLOW, "scopes": [1]},
        {**ALLOW, "scopes": ["one", "one"]},
        {**ALLOW, "scopes": [f"scope-{n}" for n in range(65)]},
        {**ALLOW, "scopes": [f"{n:0>100}" for n in range(42)]},
        {**ALLOW, "scopes": [f"{n:0>100}" for n in range(21)]},
        *(ALLOW | odd for odd in each("permit", None, True, 1, "tool", [])),
        {**ALLOW, "permit": {"binds": ["arguments", "tool"]}},
        {**ALLOW, "permit": {"binds": ["tool", "arguments", "tenant"]}},
        {**ALLOW, "permit": {"binds": []}},
        {**ALLOW, "permit": {"binds": "tool"}},
        {**ALLOW, "permit": {"binds": None}},
        *(
            {**ALLOW, "permit": {"ttl_seconds": odd}}
            for odd in (0, -1, 3601, 1.5, True, "60", None, [60], float("inf"), float("nan"))
        ),
        *({**ALLOW, "permit": {"max_uses": odd}} for odd in (0, 2, True, "1", None)),
        *(
            {**ALLOW, "permit": {**ANY_ARGUMENTS, "max_uses": odd}}
            for odd in (0, -1, MAX_USES + 1, 1.5, True, "1", None)
        ),
        *(
            {**ALLOW, "permit": {**binds, "max_uses": 2}}
            for binds in each("binds", ["tool", "arguments"])
        ),
        {**ALLOW, "permit": {"audience": "tools"}},
        *({**ALLOW, "charge": odd} for odd in (None, True, 1, "tools", {}, CHARGE)),
        {**ALLOW, "charge": [CHARGE, CHARGE]},
        {**ALLOW, "charge": [{**CHARGE, "budget": f"b{n}"} for n in range(17)]},
        *({**ALLOW, "charge": [odd]} for odd in ODD_VALUES),
        *({**ALLOW, "charge": [without(CHARGE, key)]} for key in CHARGE),
        {**ALLOW, "charge": [{**CHARGE, "tenant": "tenant_globex"}]},
        *(
            {**ALLOW, "charge": [{**CHARGE, "amount": odd}]}
            for odd in (0, -1, MAX_AMOUNT + 1, 2.0**53, 1e300, 0.5, True, "1", None, float("nan"))
        ),
        *({**ALLOW, "charge": [{**CHARGE, "budget": odd}]} for odd in ("", "A", "a/b", 1, None)),
        *({**ALLOW, "charge": [{**CHARGE, "unit": odd}]} for odd in ("", "a b", "a" * 65)),
        *(ALLOW | odd for odd in each("approval", None, True, 1, "manager", [])),
        {**ALLOW, "approval": {"by": ["manager"]}},
    ),
    ids=repr,
)
def test_a_verdict_of_another_form_is_invalid(answer: JsonValue) -> None:
    with pytest.raises(PolicyError) as refusal:
        parse_verdict(answer)

    assert refusal.value.reason_code == "policy_invalid"


@pytest.mark.parametrize(
    "answer",
    (
        *ODD_VALUES,
        without(ALLOW, "allow"),
        without(ALLOW, "reason_code"),
        {"allow": "true", "reason_code": "ok"},
        {"allow": True, "reason_code": "budget_not_allowed"},
        {"allow": False, "reason_code": "ok"},
        {**ALLOW, "charge": []},
        *(ALLOW | odd for odd in each("charges", None, True, 1, "tools", {}, CHARGE)),
        {**ALLOW, "charges": [CHARGE, CHARGE]},
        {**ALLOW, "charges": [{**CHARGE, "amount": 0}]},
        {**ALLOW, "charges": [{**CHARGE, "budget": f"b{n}"} for n in range(17)]},
        *(ALLOW | odd for odd in each("price_version", None, True, 1, "", [], {})),
        *(ALLOW | odd for odd in each("price_version", "a b", "a\n", "a" * 65, "caf\u00e9")),
    ),
    ids=repr,
)
def test_a_budget_verdict_of_another_form_is_invalid(answer: JsonValue) -> None:
    with pytest.raises(PolicyError) as refusal:
        parse_budget_verdict(answer)

    assert refusal.value.reason_code == "policy_invalid"


def test_a_budget_verdict_is_read() -> None:
    assert parse_budget_verdict(ALLOW) == BudgetVerdict(allow=True, reason_code="ok")
    denial: JsonObject = {"allow": False, "reason_code": "budget_not_allowed"}
    assert parse_budget_verdict(denial) == BudgetVerdict(
        allow=False, reason_code="budget_not_allowed"
    )


def test_a_price_is_read_with_its_version() -> None:
    dollars: JsonObject = {"budget": "llm", "unit": "usd_micros", "amount": 7.0}
    tokens: JsonObject = {"budget": "llm", "unit": "tokens_in", "amount": 1200}

    verdict = parse_budget_verdict(
        {**ALLOW, "charges": [dollars, tokens], "price_version": "2026-11-01"}
    )

    assert verdict.charges == (Charge("llm", "tokens_in", 1200), Charge("llm", "usd_micros", 7))
    assert verdict.price_version == "2026-11-01"


def test_a_price_of_nothing_is_not_the_want_of_a_price() -> None:
    assert parse_budget_verdict({**ALLOW, "charges": []}).charges == ()
    assert parse_budget_verdict(ALLOW).charges is None


def test_limits_are_read_in_an_order_of_their_own() -> None:
    last: JsonObject = {**LIMIT, "id": "a-minute", "window": "minute", "limit": 0, "scope": "tool"}

    limits = parse_limits([LIMIT, last])

    assert [limit.id for limit in limits] == ["a-minute", "tools-per-day"]
    assert limits[0] == Limit(
        id="a-minute",
        budget="tools",
        unit="calls",
        window=Window.MINUTE,
        limit=0,
        scope=Scope.TOOL,
    )
    assert parse_limits([]) == ()


@pytest.mark.parametrize(
    "answer",
    (
        None,
        True,
        {},
        "limits",
        LIMIT,
        [LIMIT, LIMIT],
        [{**LIMIT, "id": f"limit-{n}"} for n in range(65)],
        *([odd] for odd in ODD_VALUES),
        *([without(LIMIT, key)] for key in LIMIT),
        [{**LIMIT, "tenant": "tenant_globex"}],
        *([{**LIMIT, "limit": odd}] for odd in (-1, MAX_AMOUNT + 1, 0.5, "10", True, None)),
        *([LIMIT | odd] for odd in each("window", "week", "DAY", "", 1, None, ["day"])),
        *([LIMIT | odd] for odd in each("scope", "organization", "", 1, None, {})),
        *([{**LIMIT, "id": odd}] for odd in ("", "Tools", "a" * 65, 1, None)),
        *([LIMIT | odd] for odd in each("timezone", "", "CET/", "../UTC", "/etc/localtime")),
        *([LIMIT | odd] for odd in each("timezone", "Europe", "a" * 999, "\0", "\ud800", 1, None)),
        *([LIMIT | odd] for odd in each("warn_at", 80, None, {}, [0], [101], [50.5], ["80"])),
        *([LIMIT | odd] for odd in each("warn_at", [80, 50], [80, 80], list(range(1, 10)))),
        *([LIMIT | odd] for odd in each("enforced", None, 0, 1, "false", [], {})),
        *([LIMIT | odd] for odd in each("on_expiry", None, 1, "", "keep", "RELEASE", [])),
        *([LIMIT | odd] for odd in each("seconds", 0, 60, None)),
        *([LIMIT | odd] for odd in each("burst", 0, 60, None)),
        *([without(RATE, key)] for key in RATE),
        *([{**RATE, "limit": odd}] for odd in (0, -1, MAX_AMOUNT + 1)),
        *([RATE | odd] for odd in each("seconds", 0, -1, 31 * 86_400 + 1, 0.5, "60", True, None)),
        *([RATE | odd] for odd in each("burst", 0, -1, 0.5, "60", True, None)),
        *([RATE | odd] for odd in each("burst", MAX_BUCKET // 60 + 1)),
        [{**RATE, "limit": MAX_AMOUNT}],
        *(
            [{**limit, **odd}]
            for limit in (RATE, {**LIMIT, "window": "concurrent"})
            for odd in (
                {"timezone": "Europe/Berlin"},
                {"warn_at": [80]},
                {"on_expiry": "charge"},
                {"on_expiry": "release"},
            )
        ),
    ),
    ids=repr,
)
def test_limits_of_another_form_are_invalid(answer: JsonValue) -> None:
    with pytest.raises(PolicyError) as refusal:
        parse_limits(answer)

    assert refusal.value.reason_code == "policy_invalid"


def test_a_limit_is_read_in_full() -> None:
    said: JsonObject = {
        "timezone": "America/New_York",
        "warn_at": [1, 99.0, 100],
        "enforced": False,
        "on_expiry": "charge",
        "scope": "organisation",
    }

    (limit,) = parse_limits([{**LIMIT, **said}])

    assert limit == Limit(
        id="tools-per-day",
        budget="tools",
        unit="calls",
        window=Window.DAY,
        limit=10,
        scope=Scope.ORGANISATION,
        timezone="America/New_York",
        warn_at=(1, 99, 100),
        enforced=False,
        on_expiry=OnExpiry.CHARGE,
    )


def test_a_limit_that_says_no_more_is_enforced_in_utc_and_warns_at_the_usual_marks() -> None:
    (limit,) = parse_limits([LIMIT])

    assert (limit.timezone, limit.warn_at, limit.enforced) == ("UTC", DEFAULT_WARN_AT, True)
    assert limit.on_expiry is OnExpiry.RELEASE


def test_warnings_can_be_left_out() -> None:
    assert parse_limits([{**LIMIT, "warn_at": []}])[0].warn_at == ()


def test_a_rate_holds_as_much_at_once_as_drains_in_its_time_unless_it_says_otherwise() -> None:
    usual, bounded = parse_limits([{**RATE, "id": "a"}, {**RATE, "id": "b", "burst": 3}])

    assert (usual.window, usual.limit, usual.seconds, usual.burst) == (Window.ROLLING, 10, 60, 10)
    assert (bounded.limit, bounded.seconds, bounded.burst) == (10, 60, 3)


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize("window", list(Window))
def test_every_window_goes_with_every_scope(window: Window, scope: Scope) -> None:
    said: JsonObject = {**LIMIT, "window": window.value, "scope": scope.value}
    if window is Window.ROLLING:
        said["seconds"] = 1

    limits = parse_limits([said])

    assert [(limit.window, limit.scope) for limit in limits] == [(window, scope)]
    check_limits(limits)


def test_a_time_zone_that_is_not_known_is_called_that() -> None:
    with pytest.raises(PolicyError, match="timezone is no name of the IANA time zone database"):
        parse_limits([{**LIMIT, "timezone": "Mars/Olympus_Mons"}])


@given(
    st.lists(
        st.fixed_dictionaries(
            {key: st.just(value) for key, value in LIMIT.items() if key not in ("window", "limit")}
            | {
                "window": st.sampled_from([window.value for window in Window]),
                "limit": st.integers(-1, MAX_AMOUNT + 1),
            },
            optional={
                "timezone": st.sampled_from(["UTC", "Asia/Kathmandu", "Moon"]),
                "seconds": st.integers(0, 31 * 86_400 + 1),
                "burst": st.integers(0, MAX_BUCKET + 1),
                "warn_at": st.lists(st.integers(0, 101), max_size=9),
                "enforced": st.booleans(),
                "on_expiry": st.sampled_from([each.value for each in OnExpiry]),
            },
        ),
        max_size=2,
    )
)
def test_a_limit_that_is_read_is_one_that_every_ledger_takes(answer: list[JsonValue]) -> None:
    try:
        limits = parse_limits(answer)
    except PolicyError:
        return
    check_limits(limits)


@pytest.mark.parametrize(
    "answer",
    (
        {**ALLOW, SECRET: 1},
        {**ALLOW, "permit": {SECRET: 1}},
        {**ALLOW, "permit": {"binds": [SECRET]}},
        {**ALLOW, "permit": {"ttl_seconds": SECRET}},
        {**ALLOW, "scopes": [SECRET + " "]},
        {**ALLOW, "charge": [{**CHARGE, SECRET: 1}]},
        {**ALLOW, "charge": [{**CHARGE, "budget": SECRET + "/"}]},
        {**ALLOW, "approval": {SECRET: 1}},
        {"allow": SECRET, "reason_code": "ok"},
        {"allow": False, "reason_code": SECRET},
        {**ALLOW, "charges": [{**CHARGE, "unit": SECRET + "/"}]},
        {**ALLOW, "price_version": SECRET + "/"},
        [{**LIMIT, "timezone": SECRET}],
        [{**LIMIT, "window": SECRET}],
        [{**LIMIT, "on_expiry": SECRET}],
        [{**LIMIT, "warn_at": [SECRET]}],
        [{**RATE, "seconds": SECRET}],
        SECRET,
        [SECRET],
    ),
    ids=repr,
)
def test_a_message_never_holds_what_the_policy_said(answer: JsonValue) -> None:
    for parse in (parse_verdict, parse_budget_verdict, parse_limits):
        with pytest.raises(PolicyError) as refusal:
            parse(answer)

        assert SECRET not in str(refusal.value)
        assert SECRET not in repr(refusal.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["allow", "reason_code", "scopes", "permit", "charge", "approval"])
            | st.text(max_size=3),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(answer=json_values)
def test_any_answer_is_a_sound_verdict_or_a_policy_error(answer: JsonValue) -> None:
    for parse in (parse_verdict, parse_budget_verdict):
        try:
            verdict = parse(answer)
        except PolicyError:
            continue
        assert verdict.allow is (verdict.reason_code == "ok")


def test_what_was_read_of_one_limit_is_not_taken_for_one_that_is_written_alike() -> None:
    (first,) = parse_limits([{**LIMIT, "enforced": True}])
    assert parse_limits([{**LIMIT, "enforced": True}]) == (first,)
    for written in (1, 1.0, "true"):
        with pytest.raises(PolicyError):
            parse_limits([{**LIMIT, "enforced": written}])
    (other,) = parse_limits([{**LIMIT, "enforced": False}])
    assert first.enforced
    assert not other.enforced


def test_only_so_many_limits_are_remembered() -> None:
    for number in range(MAX_KNOWN_LIMITS + 8):
        (limit,) = parse_limits([{**LIMIT, "id": f"limit-{number}"}])
        assert limit.id == f"limit-{number}"
        assert len(_known_limits) <= MAX_KNOWN_LIMITS
