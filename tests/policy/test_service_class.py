"""Each tenant's class follows the policy in force, and no call ever waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from pdp.admission import Priority, ServiceClass
from pdp.canonical import JsonObject, JsonValue
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.live import LivePolicy
from pdp.policy.service_class import (
    RETRY_SECONDS,
    ServiceAnswer,
    ServiceClasses,
    parse_service_class,
)
from pdp.reason import ReasonCode

CONFIGURED: Final = ServiceClass(
    priority=Priority.NORMAL, max_concurrent_calls=50, calls_per_second=20.0, burst=40
)
HUSH: Final = "hush-4711"


# The answer


@pytest.mark.parametrize(
    ("answer", "expected"),
    (
        ({"priority": "low"}, ServiceAnswer(priority=Priority.LOW)),
        (
            {
                "priority": "high",
                "max_concurrent_calls": 1,
                "calls_per_second": 0.01,
                "burst": 100_000,
            },
            ServiceAnswer(
                priority=Priority.HIGH,
                max_concurrent_calls=1,
                calls_per_second=0.01,
                burst=100_000,
            ),
        ),
        ({"priority": "normal", "burst": 3.0}, ServiceAnswer(priority=Priority.NORMAL, burst=3)),
    ),
)
def test_an_answer_of_the_agreed_form_is_read(answer: JsonValue, expected: ServiceAnswer) -> None:
    assert parse_service_class(answer) == expected


_NO_NUMBERS: Final[list[JsonValue]] = [0, -1, 100_001, 1e300, "1", True, None, [], {}]
MALFORMED: Final[list[JsonValue]] = [
    None,
    True,
    "high",
    [],
    {},
    {"burst": 1},
    {"priority": "highest"},
    {"priority": "HIGH"},
    {"priority": 1},
    {"priority": ["high"]},
    {"priority": "high", HUSH: 1},
    {"priority": HUSH},
    *[
        {"priority": "high", key: value}
        for key in ("max_concurrent_calls", "calls_per_second", "burst")
        for value in _NO_NUMBERS
    ],
    {"priority": "high", "burst": 1.5},
    {"priority": "high", "max_concurrent_calls": 2.5},
    {"priority": "high", "calls_per_second": 0.009},
]


@pytest.mark.parametrize("answer", MALFORMED)
def test_any_other_answer_is_refused_and_never_quoted(answer: JsonValue) -> None:
    with pytest.raises(PolicyError) as refusal:
        parse_service_class(answer)

    assert refusal.value.reason_code == "policy_invalid"
    assert HUSH not in refusal.value.message


def test_the_policy_lowers_what_the_operator_allows_and_never_lifts_it() -> None:
    lower = ServiceAnswer(
        priority=Priority.LOW, max_concurrent_calls=5, calls_per_second=0.5, burst=4
    )
    higher = ServiceAnswer(
        priority=Priority.HIGH, max_concurrent_calls=500, calls_per_second=200.0, burst=400
    )

    assert lower.within(CONFIGURED) == ServiceClass(
        priority=Priority.LOW, max_concurrent_calls=5, calls_per_second=0.5, burst=4
    )
    assert higher.within(CONFIGURED) == service(Priority.HIGH)


def test_what_is_left_out_is_the_configuration_s() -> None:
    assert ServiceAnswer(priority=Priority.LOW).within(CONFIGURED) == service(Priority.LOW)
    assert ServiceAnswer(priority=Priority.NORMAL, burst=4).within(CONFIGURED) == ServiceClass(
        priority=Priority.NORMAL, max_concurrent_calls=50, calls_per_second=20.0, burst=4
    )


def service(priority: Priority) -> ServiceClass:
    """The configured class at another priority."""
    return ServiceAnswer(priority=priority).within(CONFIGURED)


# Tenant by tenant


class Engine:
    """Answers from a table, and notes what it was asked."""

    def __init__(self, revision: str, answers: dict[str, JsonValue | Exception]) -> None:
        self.revision = revision
        self.answers = answers
        self.asked: list[str] = []
        self.let = asyncio.Event()
        self.let.set()

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        assert entrypoint is Entrypoint.SERVICE_CLASS
        subject: Any = document["subject"]
        assert document == {"subject": {"properties": {"tenant": subject["properties"]["tenant"]}}}
        tenant = subject["properties"]["tenant"]
        self.asked.append(tenant)
        await self.let.wait()
        answer = self.answers.get(tenant, undefined())
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        """Nothing is held."""


def undefined() -> PolicyError:
    return PolicyError(ReasonCode.POLICY_UNDEFINED, "The policy gives no answer.")


@dataclass
class Desk:
    """Classes of one policy, and a clock to be turned."""

    policy: LivePolicy
    max_tenants: int = 100
    now: float = 1_000.0
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.classes = ServiceClasses(
            self.policy,
            CONFIGURED,
            failed=self.failures.append,
            max_tenants=self.max_tenants,
            clock=lambda: self.now,
        )

    async def settled(self, tenant: str) -> ServiceClass:
        """What a tenant has once everything that can be asked was asked."""
        self.classes.of(tenant)
        await quiet()
        return self.classes.of(tenant)


async def quiet() -> None:
    """Everything that can run has run."""
    for _ in range(20):
        await asyncio.sleep(0)


@asynccontextmanager
async def desk(engine: Engine, **options: Any) -> AsyncIterator[Desk]:
    opened = Desk(LivePolicy(engine), **options)
    async with opened.classes.kept_current():
        yield opened


def test_the_first_call_has_the_configured_class_and_the_next_the_policy_s() -> None:
    async def run() -> None:
        engine = Engine("1", {"acme": {"priority": "high"}})
        async with desk(engine) as opened:
            assert opened.classes.of("acme") == CONFIGURED
            await quiet()
            assert opened.classes.of("acme") == service(Priority.HIGH)

    asyncio.run(run())


def test_each_tenant_is_asked_about_once_for_a_revision() -> None:
    async def run() -> None:
        first = Engine("1", {"acme": {"priority": "high"}, "globex": {"priority": "low"}})
        second = Engine("2", {"acme": {"priority": "low"}})
        async with desk(first) as opened:
            for _ in range(5):
                for tenant in ("acme", "globex", "nobody"):
                    opened.classes.of(tenant)
                await quiet()
            assert first.asked == ["acme", "globex", "nobody"]
            opened.policy.activate(second)
            for _ in range(5):
                await opened.settled("acme")
            assert second.asked == ["acme"]

    asyncio.run(run())


def test_calls_during_the_question_ask_nothing_more() -> None:
    async def run() -> None:
        engine = Engine("1", {"acme": {"priority": "high"}})
        engine.let.clear()
        async with desk(engine) as opened:
            for _ in range(10):
                assert opened.classes.of("acme") == CONFIGURED
                await quiet()
            engine.let.set()
            assert await opened.settled("acme") == service(Priority.HIGH)
            assert engine.asked == ["acme"]

    asyncio.run(run())


def test_a_new_revision_changes_the_class_and_until_then_the_former_one_holds() -> None:
    async def run() -> None:
        first = Engine("1", {"acme": {"priority": "high"}})
        second = Engine("2", {"acme": {"priority": "low"}})
        async with desk(first) as opened:
            assert await opened.settled("acme") == service(Priority.HIGH)
            second.let.clear()
            opened.policy.activate(second)
            for _ in range(3):
                assert await opened.settled("acme") == service(Priority.HIGH)
            second.let.set()
            assert await opened.settled("acme") == service(Priority.LOW)

    asyncio.run(run())


def test_a_revision_that_comes_during_the_question_is_asked_too() -> None:
    async def run() -> None:
        first = Engine("1", {"acme": {"priority": "high"}})
        second = Engine("2", {"acme": {"priority": "low"}})
        first.let.clear()
        async with desk(first) as opened:
            await opened.settled("acme")
            opened.policy.activate(second)
            first.let.set()
            await opened.settled("acme")
            assert await opened.settled("acme") == service(Priority.LOW)

    asyncio.run(run())


def test_a_tenant_that_the_new_revision_says_nothing_of_has_the_configured_class() -> None:
    async def run() -> None:
        async with desk(Engine("1", {"acme": {"priority": "high"}})) as opened:
            assert await opened.settled("acme") == service(Priority.HIGH)
            opened.policy.activate(Engine("2", {}))
            assert await opened.settled("acme") == CONFIGURED
            assert opened.failures == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("answer", "reason_code"),
    (
        ({"priority": "highest"}, "policy_invalid"),
        (PolicyError(ReasonCode.POLICY_ERROR, "The policy failed."), "policy_error"),
        (PolicyError(ReasonCode.POLICY_TIMEOUT, "Too slow."), "policy_timeout"),
        (RuntimeError(HUSH), "policy_error"),
    ),
)
def test_an_answer_that_can_not_be_used_leaves_the_configured_class_and_is_counted(
    answer: JsonValue | Exception, reason_code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        engine = Engine("1", dict.fromkeys(("acme", "globex"), answer) | {"last": FINE})
        async with desk(engine) as opened:
            for tenant in ("acme", "globex"):
                assert await opened.settled(tenant) == CONFIGURED
            assert await opened.settled("last") == service(Priority.HIGH)
            assert opened.failures == [reason_code, reason_code]
            opened.policy.activate(Engine("2", {"acme": answer}))
            assert await opened.settled("acme") == CONFIGURED

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())

    told = [record.getMessage() for record in caplog.records]
    assert [message.split()[2] for message in told] == ["1", "2"], "once for each revision"
    assert not any(HUSH in message or "acme" in message for message in told)


FINE: Final[JsonObject] = {"priority": "high"}


@pytest.mark.parametrize(
    ("reason_code", "times"),
    (
        (ReasonCode.POLICY_UNAVAILABLE, 2),
        (ReasonCode.POLICY_TIMEOUT, 2),
        (ReasonCode.POLICY_ERROR, 1),
        (ReasonCode.POLICY_UNDEFINED, 1),
    ),
)
def test_what_may_pass_is_asked_again_after_a_while_and_what_stays_is_not(
    reason_code: ReasonCode, times: int
) -> None:
    async def run() -> None:
        engine = Engine("1", {"acme": PolicyError(reason_code, "No.")})
        async with desk(engine) as opened:
            for _ in range(3):
                await opened.settled("acme")
                opened.now += RETRY_SECONDS / 3 - 1
            assert engine.asked == ["acme"]
            opened.now += RETRY_SECONDS
            engine.answers["acme"] = FINE
            assert await opened.settled("acme") == service(
                Priority.HIGH if times == 2 else Priority.NORMAL
            )
            assert engine.asked == ["acme"] * times

    asyncio.run(run())


def test_a_policy_that_is_too_old_to_be_asked_leaves_the_configured_class() -> None:
    async def run() -> None:
        engine = Engine("1", {"acme": FINE})
        now = [1_000.0]
        policy = LivePolicy(engine, max_age_seconds=10, clock=lambda: now[0])
        opened = Desk(policy)
        async with opened.classes.kept_current():
            now[0] += 60
            assert await opened.settled("acme") == CONFIGURED
            assert opened.failures == ["policy_stale"]
            policy.checked_at = now[0]
            opened.now += RETRY_SECONDS
            assert await opened.settled("acme") == service(Priority.HIGH)

    asyncio.run(run())


def test_of_too_many_tenants_the_one_seen_least_lately_is_forgotten() -> None:
    async def run() -> None:
        engine = Engine("1", {})
        async with desk(engine, max_tenants=2) as opened:
            for tenant in ("a", "b", "a", "c", "a"):
                await opened.settled(tenant)
            assert engine.asked == ["a", "b", "c"]
            await opened.settled("b")
            assert engine.asked == ["a", "b", "c", "b"]

    asyncio.run(run())


def test_a_crowd_of_tenants_waits_for_no_more_questions_than_are_kept() -> None:
    async def run() -> None:
        engine = Engine("1", {f"t{number}": FINE for number in range(1_000)})
        engine.let.clear()
        async with desk(engine, max_tenants=10) as opened:
            for number in range(1_000):
                assert opened.classes.of(f"t{number}") == CONFIGURED
                await asyncio.sleep(0)
            engine.let.set()
            await quiet()
            await quiet()
            assert engine.asked == ["t0", *(f"t{number}" for number in range(990, 1_000))]
            assert opened.classes.of("t999") == service(Priority.HIGH)
            # What became known of it after it was forgotten was not kept.
            assert opened.classes.of("t0") == CONFIGURED

    asyncio.run(run())


def test_nothing_is_asked_any_more_once_the_rooms_are_closed() -> None:
    async def run() -> None:
        engine = Engine("1", {"acme": FINE})
        async with desk(engine) as opened:
            pass
        assert await opened.settled("acme") == CONFIGURED
        assert engine.asked == []

    asyncio.run(run())


def test_an_unanswered_question_does_not_hold_up_the_end() -> None:
    async def run() -> None:
        engine = Engine("1", {"acme": FINE})
        engine.let.clear()
        async with desk(engine) as opened:
            await opened.settled("acme")
            assert engine.asked == ["acme"]
        with opened.policy.pin():
            pass
        await opened.policy.close()

    asyncio.run(run())
