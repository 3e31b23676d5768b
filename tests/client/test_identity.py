"""For whom a call is made: never for anybody but whom its own code acts for."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pdp.client import AsyncGuard, Guard, PermitDenied, current_permit
from tests.client.faces import Face
from tests.client.stand_in import StandIn

TokenOf = Callable[[str, str], str]


@pytest.fixture
def acme(token_of: TokenOf, actor: str) -> str:
    return token_of("tenant_acme", actor)


@pytest.fixture
def globex(token_of: TokenOf, actor: str) -> str:
    return token_of("tenant_globex", actor)


@pytest.fixture
def whose(guard: Guard) -> Callable[[], str]:
    """A guarded tool: the tenant it ran for, or why it did not run."""

    @guard.tool("orders.read")
    def read_order(order_id: str) -> str:
        return current_permit().tenant

    return lambda: outcome(lambda: read_order("918"))


def outcome(call: Callable[[], str]) -> str:
    try:
        return call()
    except PermitDenied as denied:
        return denied.reason_code


def test_the_token_names_the_tenant_and_nothing_else_does(
    guard: Guard, whose: Callable[[], str], acme: str, globex: str
) -> None:
    with guard.acting_for(globex, context={"tenant": "tenant_acme", "tenant_id": "tenant_acme"}):
        assert whose() == "tenant_globex"
    with guard.acting_for(acme):
        assert whose() == "tenant_acme"
    assert whose() == "identity_missing"


def test_nested_scopes_restore_the_outer_one_also_on_errors(
    guard: Guard, whose: Callable[[], str], acme: str, globex: str
) -> None:
    with guard.acting_for(acme):
        with contextlib.suppress(KeyError), guard.acting_for(globex):
            assert whose() == "tenant_globex"
            raise KeyError
        assert whose() == "tenant_acme"
        with guard.acting_for(""):
            assert whose() == "identity_missing"
        assert whose() == "tenant_acme"
    assert whose() == "identity_missing"


def test_a_scope_is_entered_once(guard: Guard, whose: Callable[[], str], acme: str) -> None:
    scope = guard.acting_for(acme)
    with scope:
        with pytest.raises(RuntimeError, match="call acting_for again"), scope:
            pass
        assert whose() == "tenant_acme"
    with pytest.raises(RuntimeError, match="call acting_for again"), scope:
        pass
    assert whose() == "identity_missing"


def test_a_new_thread_has_no_identity(guard: Guard, whose: Callable[[], str], acme: str) -> None:
    found: list[str] = []
    with guard.acting_for(acme):
        thread = threading.Thread(target=lambda: found.append(whose()))
        thread.start()
        thread.join()
    assert found == ["identity_missing"]


def test_a_pool_of_threads_keeps_none_from_one_job_to_the_next(
    guard: Guard, whose: Callable[[], str], acme: str, globex: str
) -> None:
    def job(token: str | None) -> str:
        if token is None:
            return whose()
        with guard.acting_for(token):
            return whose()

    expected = {acme: "tenant_acme", globex: "tenant_globex", None: "identity_missing"}
    jobs = [acme, None, globex, None] * 10
    with ThreadPoolExecutor(4) as pool, guard.acting_for(acme):
        assert list(pool.map(job, jobs)) == [expected[each] for each in jobs]


def test_two_guards_know_nothing_of_each_other(target: str, acme: str) -> None:
    with Guard(target) as one, Guard(target) as other:

        @other.tool("orders.read")
        def read_order(order_id: str) -> str:
            return current_permit().tenant

        with one.acting_for(acme):
            assert outcome(lambda: read_order("918")) == "identity_missing"


def test_a_tool_may_call_a_tool_and_gets_its_own_permit_back(guard: Guard, acme: str) -> None:
    permits: list[str] = []

    @guard.tool("orders.read")
    def read_order(order_id: str) -> None:
        permits.append(current_permit().id)

    @guard.tool("orders.update")
    def update_order(order_id: str, status: str) -> None:
        permits.append(current_permit().id)
        read_order(order_id)
        permits.append(current_permit().id)

    with guard.acting_for(acme):
        update_order("918", "shipped")
    outer, inner, again = permits
    assert outer == again != inner


def test_outside_a_tool_there_is_no_permit(face: Face, acme: str) -> None:
    @face.tool("orders.read")
    def read_order(order_id: str) -> str:
        return current_permit().namespace

    with face.acting_for(acme):
        assert read_order("918") == "tenant/tenant_acme/"
        with pytest.raises(LookupError):
            current_permit()


def test_200_tasks_of_two_tenants_do_not_mix(target: str, acme: str, globex: str) -> None:
    async def run() -> list[tuple[str, str]]:
        async with AsyncGuard(target, timeout_seconds=30) as guard:

            @guard.tool("orders.read")
            async def read_order(order_id: str) -> str:
                await asyncio.sleep(0)
                return current_permit().tenant

            async def act(number: int) -> tuple[str, str]:
                token, tenant = ((acme, "tenant_acme"), (globex, "tenant_globex"))[number % 2]
                with guard.acting_for(token):
                    await asyncio.sleep(0)
                    return tenant, await read_order(str(number))

            return await asyncio.gather(*(act(number) for number in range(200)))

    found = asyncio.run(run())
    assert len(found) == 200
    assert all(expected == tenant for expected, tenant in found)


def test_tasks_and_threads_started_inside_carry_the_identity_until_it_ends(
    target: str, acme: str, globex: str
) -> None:
    async def run() -> list[str]:
        async with AsyncGuard(target) as guard:
            with Guard(target) as blocking:

                @guard.tool("orders.read")
                async def read_order(order_id: str) -> str:
                    return current_permit().tenant

                @blocking.tool("orders.read")
                def read_order_blocking(order_id: str) -> str:
                    return current_permit().tenant

                async def whose() -> str:
                    try:
                        return await read_order("918")
                    except PermitDenied as denied:
                        return denied.reason_code

                async def later(ended: asyncio.Event) -> str:
                    await ended.wait()
                    return await whose()

                ended = asyncio.Event()
                with guard.acting_for(acme), blocking.acting_for(acme):
                    child = await asyncio.create_task(whose())
                    in_thread = await asyncio.to_thread(read_order_blocking, "918")
                    left_over = asyncio.create_task(later(ended))
                    await asyncio.sleep(0)
                with guard.acting_for(globex):
                    ended.set()
                    return [child, in_thread, await left_over, await whose()]

    assert asyncio.run(run()) == ["tenant_acme", "tenant_acme", "identity_ended", "tenant_globex"]


def test_generators_side_by_side_never_act_for_each_other(
    guard: Guard, whose: Callable[[], str], acme: str, globex: str
) -> None:
    """They share one context, so the one that was opened last is on top of all."""

    def stream(token: str) -> Generator[str, None, None]:
        with guard.acting_for(token):
            yield whose()
            yield whose()

    one, other = stream(acme), stream(globex)
    assert next(one) == "tenant_acme"
    assert whose() == "identity_missing"  # the consumer does not act for it
    assert next(other) == "tenant_globex"
    assert next(one) == "identity_missing"  # and not for the other
    one.close()
    assert next(other) == "tenant_globex"
    other.close()
    assert whose() == "identity_missing"


def test_a_generator_does_not_act_for_its_consumer(
    guard: Guard, whose: Callable[[], str], acme: str, globex: str
) -> None:
    def stream() -> Iterator[str]:
        def inner() -> Iterator[str]:
            with guard.acting_for(acme):
                yield whose()
                yield whose()

        yield from inner()

    with guard.acting_for(globex):
        found = [(seen, whose()) for seen in stream()]
        assert found == [("tenant_acme", "identity_missing")] * 2
        assert whose() == "tenant_globex"


def test_generators_that_end_out_of_order_leave_nothing_behind(
    guard: Guard, whose: Callable[[], str], acme: str, globex: str
) -> None:
    def stream() -> Generator[None, None, None]:
        with guard.acting_for(acme):
            yield

    held = stream()
    next(held)
    with guard.acting_for(globex):
        assert whose() == "tenant_globex"
        held.close()
        assert whose() == "tenant_globex"
    assert whose() == "identity_missing"


def test_a_scope_of_ones_own_may_be_a_context_manager(
    guard: Guard, whose: Callable[[], str], acme: str, globex: str
) -> None:
    @contextlib.contextmanager
    def request(token: str) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(guard.acting_for(token))
            yield

    with guard.acting_for(globex):
        with request(acme):
            assert whose() == "tenant_acme"
        assert whose() == "tenant_globex"


def test_async_generators_act_only_in_their_own_code(target: str, acme: str, globex: str) -> None:
    async def run() -> list[str]:
        async with AsyncGuard(target) as guard:

            @guard.tool("orders.read")
            async def read_order(order_id: str) -> str:
                return current_permit().tenant

            async def whose() -> str:
                try:
                    return await read_order("918")
                except PermitDenied as denied:
                    return denied.reason_code

            async def whose_anew(token: str) -> str:
                with guard.acting_for(token):
                    return await whose()

            async def stream(token: str) -> AsyncIterator[str]:
                with guard.acting_for(token):
                    yield await whose()
                    # A task can not be told from one of the consumer's: it opens its own.
                    for found in await asyncio.gather(whose(), whose_anew(token)):
                        yield found
                    yield await whose()

            one, other = stream(acme), stream(globex)
            found = [await anext(one), await anext(one), await anext(one), await whose()]
            found += [await anext(other), await anext(one)]
            del other  # collected, and so closed, in a context of the event loop's choice
            await asyncio.sleep(0)
            found.append(await whose())
            return found

    assert asyncio.run(run()) == [
        "tenant_acme",
        "identity_missing",
        "tenant_acme",
        "identity_missing",
        "tenant_globex",
        "identity_missing",
        "identity_missing",
    ]


class Iterates:
    """A generator behind another face."""

    def __init__(self, generator: Iterator[None]) -> None:
        self._generator = generator

    def __iter__(self) -> Iterates:
        return self

    def __next__(self) -> None:
        next(self._generator)


@contextlib.contextmanager
def through_a_helper(guard: Guard, token: str) -> Iterator[None]:
    with guard.acting_for(token):
        yield


def test_a_suspended_generator_lends_its_identity_to_nobody(
    guard: Guard, whose: Callable[[], str], acme: str, globex: str
) -> None:
    def stream() -> Iterator[None]:
        with through_a_helper(guard, acme):
            yield
            yield

    def primed() -> Iterator[None]:
        generator = stream()
        next(generator)
        return generator

    with guard.acting_for(globex):
        behind = Iterates(stream())
        next(behind)
        assert whose() == "identity_missing"
        with ThreadPoolExecutor(1) as pool:
            run = contextvars.copy_context().run
            assert pool.submit(run, whose).result() == "identity_missing"
    kept = primed()
    assert whose() == "identity_missing"
    del behind, kept


def test_tasks_of_a_consumer_do_not_act_for_the_generator_it_reads(
    target: str, acme: str, globex: str
) -> None:
    async def run() -> list[str]:
        async with AsyncGuard(target) as guard:

            @guard.tool("orders.read")
            async def read_order(order_id: str) -> str:
                return current_permit().tenant

            async def whose() -> str:
                try:
                    return await read_order("918")
                except PermitDenied as denied:
                    return denied.reason_code

            async def stream() -> AsyncIterator[None]:
                with guard.acting_for(acme):
                    yield

            found: list[str] = []
            with guard.acting_for(globex):
                async for _ in stream():
                    found += await asyncio.gather(whose(), whose())
                    found.append(await asyncio.wait_for(whose(), 5))
                    async with asyncio.TaskGroup() as group:
                        task = group.create_task(whose())
                    found.append(task.result())
                found.append(await whose())
            return found

    assert asyncio.run(run()) == ["identity_missing"] * 4 + ["tenant_globex"]


def test_a_scope_that_is_closed_before_the_generator_yields_is_as_any_other(
    guard: Guard, whose: Callable[[], str], acme: str
) -> None:
    def whose_for(token: str) -> str:
        with guard.acting_for(token):
            return whose()

    def stream() -> Iterator[str]:
        yield whose_for(acme)
        yield whose()

    assert list(stream()) == ["tenant_acme", "identity_missing"]


def test_no_frame_that_a_denial_remembers_holds_the_token(face: Face, acme: str) -> None:
    """Error trackers record the locals of every frame, cause and context."""

    @face.tool("orders.read")
    def read_order(order_id: str) -> str:
        return order_id

    def denied(call: Callable[[], str]) -> PermitDenied:
        with pytest.raises(PermitDenied) as caught:
            call()
        return caught.value

    with face.acting_for(acme):
        errors = [denied(lambda: read_order("not a number"))]
    with face.acting_for("forged." + acme):
        errors.append(denied(lambda: read_order("918")))
    for error in errors:
        shown = traceback.TracebackException.from_exception(error, capture_locals=True).format()
        assert error.__context__ is None
        assert error.__cause__ is None
        assert acme not in "".join(shown)


def test_a_context_that_is_not_json_is_refused_at_once(stand_in: StandIn) -> None:
    contexts: tuple[Any, ...] = ({"n": float("nan")}, {"n": 2**60}, {"o": object()}, {1: 2}, [1])
    with Guard(stand_in.target) as guard:
        for context in contexts:
            with pytest.raises(ValueError, match="context"):
                guard.acting_for("token", context=context)


def test_context_and_trace_are_those_of_the_beginning(
    face_of: Callable[..., Face], stand_in: StandIn
) -> None:
    face = face_of(stand_in.target)
    context = {"channel": "chat"}
    with face.acting_for("token", context=context, traceparent="00-\r\n-x"):
        context["channel"] = "mail"
        face.authorize("orders.read", {})
    assert stand_in.asked[0].context_json == b'{"channel": "chat"}'


def test_the_trace_of_a_call_stands_in_the_audit_log(
    face: Face, acme: str, audit: Callable[[], list[dict[str, Any]]]
) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    with face.acting_for(acme, traceparent=f"00-{trace}-00f067aa0ba902b7-01"):
        face.authorize("orders.read", {"order_id": "918"})
    assert [record["trace_id"] for record in audit()] == [trace]
