"""Same bundle, same input: the embedded engine and a real OPA give the same decision."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pdp.admission import Priority
from pdp.budget.ledger import Charge
from pdp.canonical import MAX_SAFE_INTEGER, JsonObject, JsonValue
from pdp.identity.subject import Subject
from pdp.policy.bundle import Bundle, load_bundle
from pdp.policy.contract import check_contract
from pdp.policy.engine import Entrypoint, PolicyEngine, PolicyError
from pdp.policy.opa.managed import ManagedOpa
from pdp.policy.opa.server import OpaEngine
from pdp.policy.question import authorize_input, budget_input, tools_input
from pdp.policy.service_class import parse_service_class, service_class_input
from pdp.policy.tools import parse_visible_tools
from pdp.policy.verdict import parse_budget_verdict, parse_limits, parse_verdict
from pdp.policy.wasm import WasmEngine
from tests.policy.conftest import Files
from tests.policy.opa.servers import served

DEADLINE_MS: Final = 5_000
QUICK: Final = 150
"""Examples of each kind in the quick tests."""
MANY: Final = 2_000
"""Examples of each of three kinds in the slow ones: 6,000 in all."""

NO: Final = '{"allow": false, "reason_code": "policy_denied"}'

Answers = tuple[JsonValue, JsonValue]
"""What the embedded engine and OPA say: a value, or the reason code of none."""
Ask = Callable[[Entrypoint, JsonObject], Answers]


@pytest.fixture(scope="module")
def ask(starter: Bundle, opa: Path) -> Iterator[Ask]:
    with asyncio.Runner() as runner:
        embedded = WasmEngine(starter, deadline_ms=DEADLINE_MS, workers=1, memory_max_mib=64)
        served = runner.run(ManagedOpa.start(starter, opa=opa, deadline_ms=DEADLINE_MS, workers=1))

        async def both(entrypoint: Entrypoint, document: JsonObject) -> Answers:
            return await _answer(embedded, entrypoint, document), await _answer(
                served, entrypoint, document
            )

        yield lambda entrypoint, document: runner.run(both(entrypoint, document))
        runner.run(served.close())
        runner.run(embedded.close())


async def _answer(engine: PolicyEngine, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
    try:
        return await engine.evaluate(entrypoint, document)
    except PolicyError as error:
        return error.reason_code


def agreed(answers: Answers) -> JsonValue:
    """What both say, types and all: 1 is not 1.0, and not true."""
    embedded, served = answers
    assert json.dumps(embedded, sort_keys=True) == json.dumps(served, sort_keys=True)
    return embedded


def subject_of(subject: dict[str, Any]) -> Subject:
    return Subject(
        tenant=subject["tenant"],
        actor="alice",
        roles=tuple(subject["roles"]),
        scopes=tuple(subject["scopes"]),
    )


argument_names = st.sampled_from(
    ("order_id", "status", "to", "subject", "body", "topic", "pages", "tenant_id", "")
)
plain_values = (
    st.none()
    | st.booleans()
    | st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-2, 22)
    | st.text(max_size=20)
    | st.from_regex(r"[0-9]{1,13}\n?", fullmatch=True)
    | st.from_regex(r"[a-z]{1,3}@(customers[.]example|CUSTOMERS[.]Example|evil[.]example)\n?")
    | st.sampled_from(
        ("shipped", "Shipped", "refunded", "\u0130", "\u212a", "\x00", "\x7f", "\ud7ff")
    )
)
argument_values: st.SearchStrategy[Any] = (
    plain_values | st.lists(plain_values, max_size=2) | st.just({})
)
tenants = st.sampled_from(("tenant_acme", "tenant_globex", "tenant_initech", "nobody", "status"))
EVERYTHING: Final[dict[str, Any]] = {
    "tenant": "tenant_acme",
    "roles": ["support_agent", "analyst", "agent"],
    "scopes": ["orders:read", "orders:write", "mail:send", "reports:generate"],
}
subjects = st.just(EVERYTHING) | st.fixed_dictionaries(
    {
        "tenant": tenants,
        "roles": st.lists(
            st.sampled_from(("support_agent", "analyst", "viewer", "agent", "nobody")), max_size=3
        ),
        "scopes": st.lists(st.sampled_from(EVERYTHING["scopes"]), max_size=4),
    }
)
tools = st.sampled_from(
    ("orders.read", "orders.update", "mail.send", "reports.generate", "no", "tenants")
)
arguments = st.dictionaries(argument_names, argument_values, max_size=4)
charges = st.lists(
    st.tuples(
        st.sampled_from(("llm", "tools", "spend", "gold")),
        st.sampled_from(("tokens_in", "tokens_out", "usd_micros", "calls", "bars")),
        st.integers(1, MAX_SAFE_INTEGER),
    ),
    max_size=3,
)
any_json: st.SearchStrategy[Any] = st.recursive(
    plain_values | st.sampled_from(("tenant_acme", "support_agent", "orders.read", "mail.send")),
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(argument_names | st.sampled_from(("tenant", "roles")), below, max_size=3)
    ),
    max_leaves=6,
)
MAIL: Final = {"to": "kim@customers.example", "subject": "Hello", "body": "Hello."}


@st.composite
def broken_documents(draw: st.DrawFn) -> JsonObject:
    """Inputs that the sidecar never makes: a part is gone, or of another type."""
    document = authorize_input(
        subject_of(draw(subjects)),
        tool=draw(tools),
        arguments=draw(arguments),
        resource=None,
        time=0,
        request_id="req-1",
        context={},
    )
    place: Any = document
    for key in draw(st.sampled_from(PATHS)):
        parent, name, place = place, key, place[key]
    if draw(st.booleans()):
        del parent[name]
    else:
        parent[name] = draw(any_json)
    return document


PATHS: Final = (
    ("subject",),
    ("subject", "id"),
    ("subject", "properties"),
    ("subject", "properties", "tenant"),
    ("subject", "properties", "roles"),
    ("subject", "properties", "scopes"),
    ("action",),
    ("action", "name"),
    ("action", "properties"),
    ("action", "properties", "arguments"),
    ("context",),
    ("tool",),
)


def check_call(ask: Ask, subject: dict[str, Any], tool: str, arguments: JsonObject) -> None:
    document = authorize_input(
        subject_of(subject),
        tool=tool,
        arguments=arguments,
        resource=None,
        time=0,
        request_id="req-1",
        context={},
    )
    parse_verdict(agreed(ask(Entrypoint.AUTHZ_DECISION, document)))


def check_spend(
    ask: Ask, subject: dict[str, Any], operation: str, spent: list[tuple[str, str, int]]
) -> None:
    document = budget_input(
        subject_of(subject),
        operation=operation,
        charges=[Charge(*charge) for charge in spent],
        tool="",
        time=0,
        request_id="req-1",
    )
    parse_budget_verdict(agreed(ask(Entrypoint.BUDGET_DECISION, document)))
    parse_limits(agreed(ask(Entrypoint.BUDGET_LIMITS, document)))


def test_each_tenant_has_the_same_service_class_in_both(ask: Ask, starter: Bundle) -> None:
    tenants = json.loads(starter.data)["tenants"]
    said = {
        tenant: agreed(ask(Entrypoint.SERVICE_CLASS, service_class_input(tenant)))
        for tenant in (*tenants, "nobody")
    }

    assert said == {"nobody": "policy_undefined"} | {
        tenant: data.get("service", "policy_undefined") for tenant, data in tenants.items()
    }
    assert parse_service_class(said["tenant_acme"]).priority is Priority.HIGH


@pytest.mark.parametrize("role", ("support_agent", "analyst", "nobody"))
def test_each_caller_sees_the_same_tools_in_both(ask: Ask, starter: Bundle, role: str) -> None:
    for tenant in (*json.loads(starter.data)["tenants"], "nobody"):
        subject = Subject(tenant=tenant, actor="alice", roles=(role,), scopes=("orders:read",))
        listed = agreed(ask(Entrypoint.TOOLS_VISIBLE, tools_input(subject, time=0, context={})))
        assert bool(parse_visible_tools(listed)) is (tenant != "nobody")


def test_a_bundle_without_the_optional_rule_gives_no_answer_in_either(
    opa: Path, write_policy: Callable[[Files], Path]
) -> None:
    source = write_policy(
        {
            "pdp/authz.rego": f"package pdp.authz\n\ndecision := {NO}\n",
            "pdp/budget.rego": f"package pdp.budget\n\nlimits := []\n\ndecision := {NO}\n",
        }
    )
    bundle = load_bundle(source, opa=opa)

    async def answers() -> list[JsonValue]:
        said = []
        embedded = WasmEngine(bundle, deadline_ms=DEADLINE_MS, workers=1, memory_max_mib=64)
        managed = await ManagedOpa.start(bundle, opa=opa, deadline_ms=DEADLINE_MS, workers=1)
        with served(opa, "--bundle", source) as url:
            external = OpaEngine(url, token_file=None, deadline_ms=DEADLINE_MS)
            with external.pin() as pinned:
                for engine in (embedded, managed, pinned):
                    document = service_class_input("tenant_acme")
                    said.append(await _answer(engine, Entrypoint.SERVICE_CLASS, document))
            for engine in (embedded, managed):
                await check_contract(engine)
                await engine.close()
            await external.close()
        return said

    assert asyncio.run(answers()) == ["policy_undefined"] * 3


def check_document(ask: Ask, document: JsonObject) -> None:
    for entrypoint in Entrypoint:
        answer = agreed(ask(entrypoint, document))
        assert answer != "policy_unavailable"


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@examples(QUICK)
@given(subject=subjects, tool=tools, arguments=arguments)
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": 1e300})
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": 5e-324})
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": 1.0000000000000002})
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": 20.000000000000004})
@example(EVERYTHING, "reports.generate", {"topic": "x", "pages": -0.0})
@example(EVERYTHING, "reports.generate", {"topic": "\U0001f600" * 200})
@example(EVERYTHING, "reports.generate", {"topic": "\U0001f600" * 201})
@example(EVERYTHING, "reports.generate", {"topic": "e\u0301" * 101})
@example(EVERYTHING, "mail.send", {**MAIL, "subject": "\u2028\u0085"})
@example(EVERYTHING, "mail.send", {**MAIL, "subject": "\x80\x9f"})
@example(EVERYTHING, "mail.send", {**MAIL, "subject": "a\x00b"})
@example(EVERYTHING, "mail.send", {**MAIL, "to": "kim@customers.example\n"})
@example(EVERYTHING, "mail.send", {**MAIL, "body": "\x00" * 10_000})
def test_both_engines_decide_alike_whatever_is_asked(
    ask: Ask, subject: dict[str, Any], tool: str, arguments: JsonObject
) -> None:
    check_call(ask, subject, tool, arguments)


@examples(QUICK)
@given(subject=subjects, operation=st.sampled_from(("charge", "reserve", "get")), spent=charges)
def test_both_engines_decide_alike_whatever_is_spent(
    ask: Ask, subject: dict[str, Any], operation: str, spent: list[tuple[str, str, int]]
) -> None:
    check_spend(ask, subject, operation, spent)


@examples(QUICK)
@given(document=broken_documents())
@example({})
@example({"subject": {"properties": {"tenant": None}}})
@example({"subject": {"properties": {"tenant": ["tenant_acme"]}}, "action": {"name": {}}})
def test_both_engines_decide_alike_of_inputs_that_are_broken(
    ask: Ask, document: JsonObject
) -> None:
    check_document(ask, document)


@pytest.mark.slow
@examples(MANY)
@given(subject=subjects, tool=tools, arguments=arguments)
def test_both_engines_decide_alike_thousands_of_calls(
    ask: Ask, subject: dict[str, Any], tool: str, arguments: JsonObject
) -> None:
    check_call(ask, subject, tool, arguments)


@pytest.mark.slow
@examples(MANY)
@given(subject=subjects, operation=st.sampled_from(("charge", "reserve", "get")), spent=charges)
def test_both_engines_decide_alike_thousands_of_spends(
    ask: Ask, subject: dict[str, Any], operation: str, spent: list[tuple[str, str, int]]
) -> None:
    check_spend(ask, subject, operation, spent)


@pytest.mark.slow
@examples(MANY)
@given(document=broken_documents())
def test_both_engines_decide_alike_of_thousands_of_broken_inputs(
    ask: Ask, document: JsonObject
) -> None:
    check_document(ask, document)
