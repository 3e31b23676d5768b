"""Calls that a model wants to make at the same time, asked of a real sidecar."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdp.api.v1 import authorization_pb2, budget_pb2, execution_pb2
from pdp.batch import MAX_QUESTIONS
from pdp.canonical import sha256_hex
from pdp.permit.ring import LiveKeys
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of
from tests.budget.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
Question = authorization_pb2.AuthorizeRequest
REUSED = "idempotency_key_reused"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("batch") / "bundle.tar.gz"
    return build_bundle(ROOT / "tests/server/policy", target, opa=ROOT / ".tools/opa")


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("batches")
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle) as process:
        yield process


@pytest.fixture
def caller(sidecar: SidecarProcess) -> Iterator[Caller]:
    """Of a tenant that no other test has."""
    with acting(sidecar, f"tenant_{uuid.uuid4().hex[:12]}") as opened:
        yield opened


def acting(sidecar: SidecarProcess, tenant: str) -> Caller:
    return Caller(sidecar.target, token=ISSUER.token(tenant, "user-7", roles=["agent"]))


def question(tool: str, arguments: str = "{}", request_id: str = "", **fields: Any) -> Question:
    return Question(
        request_id=request_id or str(uuid.uuid4()),
        action=authorization_pb2.Action(name=tool),
        arguments_json=arguments.encode(),
        **fields,
    )


def ask(
    caller: Caller, *questions: Question, all_or_nothing: bool = False
) -> list[authorization_pb2.BatchResult]:
    request = authorization_pb2.AuthorizeBatchRequest(
        questions=questions, all_or_nothing=all_or_nothing
    )
    return list(caller.authorization.AuthorizeBatch(request).results)


def codes(results: list[authorization_pb2.BatchResult]) -> list[str]:
    return [
        result.answer.reason_code if result.HasField("answer") else result.failure.reason_code
        for result in results
    ]


def held(caller: Caller, limit_id: str) -> int:
    limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
    (found,) = (limit for limit in limits if limit.limit_id == limit_id)
    return found.held


def records(sidecar: SidecarProcess, request_id: str) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for line in segment.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line.get("request_id") == request_id]


def test_each_call_is_decided_on_its_own_in_the_order_of_the_questions(
    sidecar: SidecarProcess, caller: Caller
) -> None:
    questions = [
        question("orders.update", '{"n": 1}'),
        question("tools.closed"),
        question("orders.read", '{"n": NaN}'),
        question("tools.runaway"),
        question("no tool's name"),
        question("orders.update", '{"n": 2}', audience="another"),
    ]
    results = ask(caller, *questions)
    assert codes(results) == [
        "ok", "closed_on_sundays", "arguments_invalid", "policy_timeout", "request_invalid", "ok",
    ]  # fmt: skip
    for index in (2, 4):
        assert results[index].failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert results[index].failure.message
    assert results[0].answer.permit != results[5].answer.permit
    assert held(caller, "tools-per-day") == 4
    for asked, result in zip(questions, results, strict=True):
        if result.HasField("answer"):
            (record,) = records(sidecar, asked.request_id)
            assert record["seq"] == result.answer.audit.sequence
            assert record["reason_code"] == result.answer.reason_code


def test_a_permit_out_of_a_batch_is_a_permit(caller: Caller) -> None:
    (result,) = ask(caller, question("orders.update", '{"n": 1}'))
    caller.execution.RedeemPermit(
        execution_pb2.RedeemPermitRequest(
            permit=result.answer.permit,
            idempotency_key="1",
            tool="orders.update",
            arguments_sha256=sha256_hex({"n": 1}),
            audience="tools",
        )
    )
    caller.execution.ReportOutcome(
        execution_pb2.ReportOutcomeRequest(
            permit=result.answer.permit, outcome=execution_pb2.OUTCOME_EXECUTED
        )
    )
    assert held(caller, "tools-per-day") == 0


def test_a_question_asked_in_a_batch_and_alone_is_the_same_question(caller: Caller) -> None:
    asked = question("orders.update")
    (first,) = ask(caller, asked)
    assert caller.authorization.Authorize(asked).permit == first.answer.permit
    (again,) = ask(caller, asked)
    assert (again.answer.permit, again.answer.replayed) == (first.answer.permit, True)


def test_all_or_nothing_holds_nothing_where_one_is_refused(
    sidecar: SidecarProcess, caller: Caller
) -> None:
    first, second = question("tools.costly"), question("tools.costly")
    results = ask(caller, question("orders.update"), first, second, all_or_nothing=True)
    assert sorted(codes(results)) == ["batch_refused", "batch_refused", "tenant_budget_exceeded"]
    for result in results:
        answer = result.answer
        assert (answer.decision, answer.permit, answer.hold.hold_id) == (False, "", "")
    assert (held(caller, "tools-per-day"), held(caller, "ten-a-day")) == (0, 0)
    undone = first if results[1].answer.reason_code == "batch_refused" else second
    decided, refused = records(sidecar, undone.request_id)
    assert decided["reason_code"] == "ok"
    assert (refused["reason_code"], refused["outcome"]) == ("batch_refused", "denied")
    assert refused["permit_id"] == decided["permit_id"]
    assert refused["decision_id"] == decided["decision_id"]


def test_what_was_undone_is_not_had_by_asking_again(caller: Caller) -> None:
    update, closed = question("orders.update"), question("tools.closed")
    first = ask(caller, update, closed, all_or_nothing=True)
    again = ask(caller, update, closed, all_or_nothing=True)
    assert codes(again) == codes(first) == ["batch_refused", "closed_on_sundays"]
    assert refusal_of(caller.authorization.Authorize, update).reason_code == REUSED
    assert codes(ask(caller, update)) == codes(ask(caller, update, all_or_nothing=True)) == [REUSED]
    assert held(caller, "tools-per-day") == 0


def test_a_batch_that_was_allowed_gives_its_permits_again_but_for_those_that_are_used(
    caller: Caller,
) -> None:
    asked = [question("orders.update", f'{{"n": {n}}}') for n in range(2)]
    first = ask(caller, *asked, all_or_nothing=True)
    assert [each.answer.permit for each in ask(caller, *asked, all_or_nothing=True)] == [
        each.answer.permit for each in first
    ]
    caller.execution.ReportOutcome(
        execution_pb2.ReportOutcomeRequest(
            permit=first[0].answer.permit, outcome=execution_pb2.OUTCOME_EXECUTED
        )
    )
    again = ask(caller, *asked, all_or_nothing=True)
    assert codes(again) == ["permit_used", "ok"]
    assert again[1].answer.permit == first[1].answer.permit
    assert held(caller, "tools-per-day") == 2


@pytest.mark.parametrize(
    ("questions", "field"),
    (
        ([], "questions"),
        ([question("orders.read") for _ in range(MAX_QUESTIONS + 1)], "questions"),
        ([question("orders.read", request_id="1"), question("a", request_id="1")], "questions"),
    ),
)
def test_a_batch_has_bounds(caller: Caller, questions: list[Question], field: str) -> None:
    refused = refusal_of(ask, caller, *questions)
    assert (refused.status, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


def test_all_or_nothing_is_refused_as_a_whole_for_a_malformed_question(caller: Caller) -> None:
    questions = question("orders.update"), question("no tool's name")
    refused = refusal_of(ask, caller, *questions, all_or_nothing=True)
    assert refused.fields == ("questions[1].action.name",)
    assert held(caller, "tools-per-day") == 0


def test_the_largest_batch_is_decided(caller: Caller) -> None:
    results = ask(caller, *(question("orders.update", f'{{"n": {n}}}') for n in range(32)))
    assert codes(results) == ["ok"] * MAX_QUESTIONS
    assert len({each.answer.permit for each in results}) == MAX_QUESTIONS


def test_a_stranger_s_batch_is_one_refusal_on_record(sidecar: SidecarProcess) -> None:
    def count() -> int:
        return sum(
            '"token_invalid"' in line
            for segment in (sidecar.state / "audit").glob("*.jsonl")
            for line in segment.read_text(encoding="utf-8").splitlines()
        )

    before = count()
    with Caller(sidecar.target, token="no-token") as stranger:
        refused = refusal_of(ask, stranger, *(question("orders.read") for _ in range(32)))
    assert (refused.status, refused.reason_code) == (
        grpc.StatusCode.UNAUTHENTICATED, "token_invalid",
    )  # fmt: skip
    assert count() == before + 1


def test_each_question_counts_as_a_call_of_its_tenant(tmp_path: Path, bundle: Path) -> None:
    config = {"limits": {"tenants": {"calls_per_second": 0.1, "burst": 4}}}
    with (
        SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=config) as own,
        acting(own, "tenant_acme") as caller,
        acting(own, "tenant_globex") as other,
    ):
        results = ask(caller, *(question("orders.update") for _ in range(6)))
        assert sorted(codes(results)) == ["ok"] * 4 + ["rate_limited"] * 2
        late = [each.failure for each in results if each.HasField("failure")]
        assert all(each.retry_after.ToTimedelta().total_seconds() > 1 for each in late)
        assert all(each.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] for each in late)
        assert codes(ask(other, question("orders.update"))) == ["ok"]


def test_a_sidecar_with_one_place_decides_batches_of_many_tenants(
    tmp_path: Path, bundle: Path
) -> None:
    config = {"limits": {"max_concurrent_calls": 1}}
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=config) as own:

        def whole(tenant: str) -> list[str]:
            with acting(own, tenant) as caller:
                return codes(
                    ask(caller, *(question("orders.read") for _ in range(16)), all_or_nothing=True)
                )

        with ThreadPoolExecutor(4) as threads:
            answered = list(threads.map(whole, [f"tenant_{n}" for n in range(4)]))
    assert answered == [["ok"] * 16] * 4


def test_a_sidecar_that_is_killed_in_the_middle_leaves_no_half_a_batch(
    tmp_path: Path, bundle: Path
) -> None:
    """Batches under way when the sidecar is killed, asked again of the next one: all of them
    have come to the same for each question, and what is held is what was allowed.
    """
    batches = [
        [question("orders.update", f'{{"n": {n}}}') for n in range(5)]
        + [question("tools.closed" if number % 2 else "orders.update", '{"n": 5}')]
        for number in range(12)
    ]
    expected = [
        ["batch_refused"] * 5 + ["closed_on_sundays"] if number % 2 else ["ok"] * 6
        for number in range(12)
    ]
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle) as own:
        answered = threading.Semaphore(0)

        def first_try(batch: list[Question]) -> None:
            with acting(own, "tenant_acme") as caller:
                try:
                    ask(caller, *batch, all_or_nothing=True)
                except grpc.RpcError:
                    return
                answered.release()

        with ThreadPoolExecutor(4) as threads:
            tries = [threads.submit(first_try, batch) for batch in batches]
            assert answered.acquire(timeout=20)
            own.kill()
            own.start()
            for each in tries:
                each.result()
        with acting(own, "tenant_acme") as caller:
            for batch, codes_of_it in zip(batches, expected, strict=True):
                assert codes(ask(caller, *batch, all_or_nothing=True)) == codes_of_it
            assert held(caller, "tools-per-day") == 6 * 6 * 2


@pytest.mark.parametrize("lease", (None, {"seconds": 60}))
def test_a_batch_comes_to_the_same_at_every_sidecar_of_a_store(
    tmp_path: Path, bundle: Path, redis_server: RedisServer, lease: object
) -> None:
    """Under a lease too, each sidecar for its own: what it holds is known to it alone."""
    key = tmp_path / "permit-key.pem"
    LiveKeys(key, make=True)
    store = {"unix": str(redis_server.socket), "timeout_ms": 5000}
    config = {
        "permit": {"key_file": str(key), "default_audience": "tools"},
        "budget": {"store": store, **({"lease": lease} if lease else {})},
    }
    places = [tmp_path / "one", tmp_path / "two"]
    with ExitStack() as stack:
        sidecars = []
        for place in places:
            place.mkdir()
            own = SidecarProcess(place, issuer=ISSUER, bundle=bundle, config=config)
            sidecars.append(stack.enter_context(own))
        one, two = (stack.enter_context(acting(each, "tenant_acme")) for each in sidecars)
        allowed = [question("orders.update", f'{{"n": {n}}}') for n in range(2)]
        refused = [
            *(question("orders.update", f'{{"n": {n}}}') for n in range(2)),
            question("none"),
        ]
        again = one if lease else two
        first = ask(one, *allowed, all_or_nothing=True)
        assert codes(first) == ["ok", "ok"]
        assert [each.answer.permit for each in ask(again, *allowed, all_or_nothing=True)] == [
            each.answer.permit for each in first
        ]
        for caller in (one, again):
            results = ask(caller, *refused, all_or_nothing=True)
            assert codes(results) == ["batch_refused", "batch_refused", "policy_undefined"]
        assert held(one, "tools-per-day") >= 4
        if not lease:
            assert held(two, "tools-per-day") == 4
