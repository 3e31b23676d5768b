"""What is asked for is what runs: exactly the arguments that were allowed."""

from __future__ import annotations

import contextlib
import enum
import inspect
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, get_type_hints

import pytest

from pdp.client import AsyncGuard, Guard, PermitDenied
from tests.client.faces import Face
from tests.client.stand_in import Context, Request, Response, StandIn


class Text(str):
    __slots__ = ()


class Colour(enum.IntEnum):
    RED = 1


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def asked(stand_in: StandIn) -> dict[str, Any]:
    """The arguments of the last question."""
    arguments: dict[str, Any] = json.loads(stand_in.asked[-1].arguments_json)
    return arguments


@pytest.fixture
def free(face_of: Callable[..., Face], stand_in: StandIn) -> Face:
    """A guard whose sidecar allows everything."""
    return face_of(stand_in.target)


NOT_JSON: dict[str, Any] = {
    "nan": float("nan"),
    "infinity": float("inf"),
    "2**60": 2**60,
    "-2**53": -(2**53),
    "tuple": (1, 2),
    "bytes": b"918",
    "set": {1},
    "object": object(),
    "subclass of str": Text("918"),
    "subclass of int": Colour.RED,
    "subclass of dict": OrderedDict(a=1),
    "key that is no text": {1: 2},
    "key of a subclass": {Text("a"): 1},
    "lone surrogate": "\ud800",
    "surrogate key": {"\udfff": 1},
    "63 deep within": nested(65),
    "1000 deep": nested(1000),
    "100000 deep": nested(100_000),
    "a cycle": cycle(),
    "2 MiB": "x" * 2**21,
    "hidden in a list": [{"a": [1, (2,)]}],
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_is_not_json_is_never_asked_for(free: Face, stand_in: StandIn, name: str) -> None:
    ran = []

    @free.tool("orders.update")
    def update_order(value: Any) -> None:
        ran.append(value)

    with free.acting_for("token"), pytest.raises(PermitDenied) as caught:
        update_order(NOT_JSON[name])
    assert caught.value.reason_code == "arguments_invalid"
    assert len(str(caught.value)) < 250
    assert not ran
    assert not stand_in.asked


@pytest.mark.parametrize(
    "value",
    (None, True, 0, -1, 2**53 - 1, 0.5, -0.0, 1e300, "", "\u0000\u2028é𐀀", [], {}, {"": [None]}),
)
def test_json_arrives_as_it_was_given(free: Face, stand_in: StandIn, value: Any) -> None:
    @free.tool("orders.update")
    def update_order(value: Any) -> Any:
        return value

    with free.acting_for("token"):
        found = update_order(value)
    assert found == value == asked(stand_in)["value"]
    assert type(found) is type(value)


def test_a_change_during_the_question_changes_nothing(free: Face, stand_in: StandIn) -> None:
    lines = ["1 apple"]

    def answer(request: Request, _context: Context) -> Response:
        lines.append("1000 apples")
        return stand_in.allow(request)

    stand_in.answer = answer

    @free.tool("orders.update")
    def order(lines: list[str]) -> list[str]:
        return lines

    with free.acting_for("token"):
        found = order(lines)
    assert lines == ["1 apple", "1000 apples"]
    assert found == ["1 apple"] == asked(stand_in)["lines"]


def test_a_thread_that_keeps_changing_the_arguments_is_never_ahead(stand_in: StandIn) -> None:
    lines: dict[str, Any] = {"a": [0]}
    stop = threading.Event()

    def change() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            lines["a"] = [number] * (number % 7)
            lines[str(number % 50)] = number
            lines.pop(str((number + 25) % 50), None)

    ran: list[dict[str, Any]] = []
    with Guard(stand_in.target) as guard, guard.acting_for("token"):

        @guard.tool("orders.update")
        def order(lines: dict[str, Any]) -> None:
            ran.append(lines)

        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(100):
                # Changed while it was read, it may have been no JSON for a moment.
                with contextlib.suppress(PermitDenied):
                    order(lines)
        finally:
            stop.set()
            changer.join()
    assert ran
    assert ran == [json.loads(request.arguments_json)["lines"] for request in stand_in.asked]


def test_the_resource_function_can_not_change_what_is_asked(free: Face, stand_in: StandIn) -> None:
    def resource(lines: list[str]) -> tuple[str, str]:
        lines.append("1000 apples")
        return "order", "918"

    @free.tool("orders.update", resource=resource)
    def order(lines: list[str]) -> list[str]:
        return lines

    with free.acting_for("token"):
        assert order(["1 apple"]) == ["1 apple"]
    assert asked(stand_in) == {"lines": ["1 apple"]}
    resource_asked = stand_in.asked[0].resource
    assert (resource_asked.type, resource_asked.id) == ("order", "918")


def test_a_default_is_seen_and_never_shared(free: Face, stand_in: StandIn) -> None:
    @free.tool("orders.update")
    def order(order_id: str, lines: list[str] = []) -> list[str]:  # noqa: B006 - the attack
        lines.append("changed")
        return lines

    with free.acting_for("token"):
        assert order("918") == ["changed"]
        assert order("918") == ["changed"]
    assert asked(stand_in) == {"order_id": "918", "lines": []}


def test_every_kind_of_parameter_is_asked_for_and_passed_on(free: Face, stand_in: StandIn) -> None:
    @free.tool("orders.update")
    def update(first: int, /, second: int, *rest: int, third: int = 3, **more: int) -> Any:
        return first, second, rest, third, more

    with free.acting_for("token"):
        assert update(1, 2, 8, 9, fourth=4) == (1, 2, (8, 9), 3, {"fourth": 4})
        assert asked(stand_in) == {
            "first": 1,
            "second": 2,
            "rest": [8, 9],
            "third": 3,
            "fourth": 4,
        }
        assert update(1, second=2) == (1, 2, (), 3, {})
        assert asked(stand_in) == {"first": 1, "second": 2, "rest": [], "third": 3}


def test_an_argument_that_is_named_twice_is_refused(free: Face, stand_in: StandIn) -> None:
    """The policy would see one of them, and the tool both."""

    @free.tool("orders.update")
    def update(order_id: str, /, **more: str) -> None:
        raise AssertionError

    with free.acting_for("token"), pytest.raises(PermitDenied) as caught:
        update("918", order_id="919")
    assert caught.value.reason_code == "arguments_invalid"
    assert not stand_in.asked


@pytest.mark.parametrize("arguments", ({}, {"order_id": "1", "tenant": "t"}, {"order": "1"}))
def test_arguments_that_the_function_does_not_take_are_a_type_error(
    free: Face, stand_in: StandIn, arguments: dict[str, str]
) -> None:
    @free.tool("orders.update")
    def update(order_id: str) -> None:
        raise AssertionError

    with free.acting_for("token"), pytest.raises(TypeError, match="argument"):
        update(**arguments)
    assert not stand_in.asked


def test_what_is_omitted_is_passed_on_unseen(stand_in: StandIn) -> None:
    with Guard(stand_in.target) as guard, guard.acting_for("token"):

        class Orders:
            def __init__(self) -> None:
                self.updated: list[str] = []

            @guard.tool("orders.update", omit=["self", "connection"])
            def update(self, order_id: str, connection: object = None) -> object:
                self.updated.append(order_id)
                return connection

        orders, connection = Orders(), object()
        assert orders.update("918", connection=connection) is connection
        assert orders.updated == ["918"]
        assert asked(stand_in) == {"order_id": "918"}


def test_what_is_to_be_omitted_must_exist(stand_in: StandIn) -> None:
    def update(order_id: str) -> None: ...

    with pytest.raises(TypeError, match="no parameter conection"):
        Guard(stand_in.target).tool("orders.update", omit=["conection"])(update)


def test_a_guarded_function_looks_like_the_function(free: Face) -> None:
    def update(order_id: str, *, status: str = "shipped") -> dict[str, str]:
        """Change an order."""
        return {order_id: status}

    guarded = free.tool("orders.update")(update)
    assert (guarded.__name__, guarded.__doc__) == ("update", "Change an order.")
    assert inspect.signature(guarded) == inspect.signature(update)
    assert get_type_hints(guarded) == get_type_hints(update)


def test_of_each_kind_of_function_one_face_guards_it() -> None:
    def plain() -> None: ...
    async def coroutine() -> None: ...
    def generator() -> Any:
        yield

    async def async_generator() -> Any:
        yield

    class Callable_:  # noqa: N801 - stands for any
        async def __call__(self) -> None: ...

    blocking, awaiting = Guard("unix:///x.sock"), AsyncGuard("unix:///x.sock")
    assert inspect.iscoroutinefunction(awaiting.tool("t")(coroutine))
    assert not inspect.iscoroutinefunction(blocking.tool("t")(plain))
    for guard, refused in (
        (blocking, (coroutine, generator, async_generator)),
        (awaiting, (plain, generator, async_generator, Callable_())),
    ):
        for function in refused:
            with pytest.raises(TypeError):
                guard.tool("t")(function)  # type: ignore[arg-type]


def unfinished_coroutine() -> Any:
    async def work() -> None:
        raise AssertionError

    return work()


def unfinished_generator() -> Any:
    raised = AssertionError()
    return (1 / 0 for _ in [raised])


def unfinished_async_generator() -> Any:
    async def work() -> Any:
        yield

    return work()


@pytest.mark.parametrize(
    "make", (unfinished_coroutine, unfinished_generator, unfinished_async_generator)
)
def test_a_tool_that_returns_work_still_to_run_fails(
    free: Face, stand_in: StandIn, make: Callable[[], Any]
) -> None:
    @free.tool("orders.read")
    def read() -> Any:
        return make()

    with free.acting_for("token"), pytest.raises(TypeError, match="still to run"):
        read()
    assert [report.error_type for report in stand_in.reports] == ["TypeError"]


@pytest.mark.parametrize("name", ("", "Orders Read!", "-orders", "o" * 129, lambda: None))
def test_a_tool_without_a_proper_name_is_refused_where_it_is_defined(face: Face, name: Any) -> None:
    with pytest.raises(TypeError, match="name the tool"):
        face.tool(name)(lambda: None)
