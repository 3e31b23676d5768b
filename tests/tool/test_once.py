from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from pdp.canonical import JsonValue
from pdp.tool import Once, OnceError, RedisOnce, SqliteOnce
from tests.budget.redis_server import RedisServer
from tests.tool.permits import permit


@pytest.fixture(params=("sqlite", "redis"))
def once(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Once]:
    if request.param == "sqlite":
        store = SqliteOnce(tmp_path / "once.sqlite")
        yield Once(store)
        store.close()
        return
    server: RedisServer = request.getfixturevalue("redis_server")
    with Redis(unix_socket_path=str(server.socket)) as redis:
        yield Once(RedisOnce(redis))


class Mutation:
    def __init__(self, result: JsonValue = None) -> None:
        self.result: JsonValue = {"order_id": "918"} if result is None else result
        self.runs = 0

    def __call__(self) -> JsonValue:
        self.runs += 1
        return self.result


def refused(reason_code: str, call: Callable[[], object]) -> None:
    with pytest.raises(OnceError) as caught:
        call()
    assert caught.value.reason_code == reason_code


def test_a_call_that_comes_again_gets_the_first_result(once: Once) -> None:
    change = Mutation()
    first = permit()
    again = replace(first, id="another permit for the same request")
    assert once.run(first, change) == once.run(again, change) == {"order_id": "918"}
    assert change.runs == 1


@pytest.mark.parametrize(
    "other", ({"tenant": "tenant_globex"}, {"tool": "mail.send"}, {"transaction": "request-x"})
)
def test_another_call_is_another_call(once: Once, other: dict[str, str]) -> None:
    change = Mutation()
    first = permit()
    once.run(first, change)
    once.run(replace(first, **other), change)  # type: ignore[arg-type]
    assert change.runs == 2


def test_the_same_request_with_other_arguments_is_refused(once: Once) -> None:
    first = permit()
    once.run(first, Mutation())
    refused(
        "idempotency_key_reused",
        lambda: once.run(replace(first, arguments_sha256="0" * 64), Mutation()),
    )


@pytest.mark.parametrize("max_uses", (1, 3))
def test_a_permit_for_any_arguments_tells_no_mutation_from_another(
    once: Once, max_uses: int
) -> None:
    change = Mutation()
    several = replace(permit(), arguments_sha256="", max_uses=max_uses)

    async def mutation() -> JsonValue:
        return change()

    refused("permit_mismatch", lambda: once.run(several, change))
    refused("permit_mismatch", lambda: asyncio.run(once.run_async(several, mutation)))
    refused("permit_mismatch", lambda: once.forget(several))
    assert change.runs == 0


def test_what_fails_runs_again(once: Once) -> None:
    call = permit()

    def fails() -> JsonValue:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        once.run(call, fails)
    change = Mutation()
    assert once.run(call, change) == {"order_id": "918"}
    assert change.runs == 1


def test_a_result_that_can_not_be_kept_does_not_let_the_mutation_run_twice(once: Once) -> None:
    call, change = permit(), Mutation("x" * 300_000)
    with pytest.raises(ValueError, match="larger than"):
        once.run(call, change)
    refused("call_under_way", lambda: once.run(call, change))
    assert change.runs == 1
    once.forget(call)
    change.result = "done"
    assert once.run(call, change) == "done"


def test_of_many_at_once_one_runs(once: Once) -> None:
    call, change = permit(), Mutation()
    going, entered = threading.Event(), threading.Event()

    def slow() -> JsonValue:
        entered.set()
        going.wait(10)
        return change()

    results: list[JsonValue] = []
    first = threading.Thread(target=lambda: results.append(once.run(call, slow)))
    first.start()
    assert entered.wait(10)
    for _ in range(5):
        refused("call_under_way", lambda: once.run(call, change))
    going.set()
    first.join()
    assert results == [once.run(call, change)]
    assert change.runs == 1


def test_a_coroutine_runs_once_too(once: Once) -> None:
    call, change = permit(), Mutation()

    async def mutation() -> JsonValue:
        return change()

    async def twice() -> list[JsonValue]:
        return [await once.run_async(call, mutation) for _ in range(2)]

    assert asyncio.run(twice()) == [{"order_id": "918"}] * 2
    assert change.runs == 1


def test_results_outlive_the_process_and_are_forgotten_after_a_while(tmp_path: Path) -> None:
    now = 1_000.0
    call, change = permit(), Mutation()
    for _ in range(2):
        store = SqliteOnce(tmp_path / "once.sqlite", keep_seconds=60, clock=lambda: now)
        Once(store).run(call, change)
        store.close()
    assert change.runs == 1
    now += 60
    store = SqliteOnce(tmp_path / "once.sqlite", keep_seconds=60, clock=lambda: now)
    Once(store).run(call, change)
    store.close()
    assert change.runs == 2
