from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import pytest

from pdp.canonical import JsonObject, JsonValue
from pdp.permit import Permit, PermitError
from pdp.tool import PermitDoor
from tests.tool.permits import ORDER, Register, permit, verifier


@pytest.fixture
def door() -> PermitDoor:
    return PermitDoor(verifier(), Register())


def refused(reason_code: str, call: Callable[[], object]) -> None:
    with pytest.raises(PermitError) as caught:
        call()
    assert caught.value.reason_code == reason_code


def test_a_tool_runs_once_under_a_permit_for_exactly_this_call(door: PermitDoor) -> None:
    ran: list[tuple[str, str, str]] = []

    @door.tool("orders.update")
    def update(permit: Permit, *, order_id: str, status: str) -> str:
        ran.append((permit.tenant, order_id, status))
        return "done"

    token = permit().token
    assert update(token, order_id="918", status="shipped") == "done"
    refused("permit_used", lambda: update(token, order_id="918", status="shipped"))
    refused("permit_mismatch", lambda: update(permit().token, order_id="919", status="shipped"))
    refused("permit_mismatch", lambda: update(permit("mail.send").token, **ORDER))
    refused("permit_missing", lambda: update("", **ORDER))
    refused("permit_invalid", lambda: update("nonsense", **ORDER))
    assert ran == [("tenant_acme", "918", "shipped")]
    assert update.__name__ == "update"


def test_what_can_not_be_a_tool_is_refused_when_it_is_made_one(door: PermitDoor) -> None:
    def without_permit(*, order_id: str) -> None:
        raise AssertionError(order_id)

    def without_anything() -> None:
        raise AssertionError

    def later(permit: Permit) -> Iterator[Permit]:
        yield permit

    async def later_still(permit: Permit) -> AsyncIterator[Permit]:
        yield permit

    for function in (without_permit, without_anything, later, later_still):
        with pytest.raises(TypeError, match="orders"):
            door.tool("orders.update")(function)
    for name in ("", without_anything):
        with pytest.raises(TypeError, match="name the tool"):
            door.tool(name)  # type: ignore[arg-type]


def test_a_permit_is_not_spent_on_a_call_that_it_is_not_for(door: PermitDoor) -> None:
    token = permit().token
    refused(
        "permit_mismatch",
        lambda: door.admit(token, tool="orders.update", arguments={"order_id": "1"}),
    )
    assert door.admit(token, tool="orders.update", arguments=ORDER).token == token


def test_arguments_that_are_no_json_are_refused(door: PermitDoor) -> None:
    @door.tool("orders.update")
    def update(permit: Permit, **arguments: object) -> None:
        raise AssertionError

    refused("permit_mismatch", lambda: update(permit().token, order_id=("918",)))
    refused("permit_mismatch", lambda: update(permit().token, order_id=float("nan")))


def test_a_coroutine_stays_one(door: PermitDoor) -> None:
    @door.tool("orders.update")
    async def update(permit: Permit, **arguments: JsonValue) -> str:
        return permit.tenant

    assert asyncio.iscoroutinefunction(update)
    token = permit().token
    assert asyncio.run(update(token, **ORDER)) == "tenant_acme"
    refused("permit_used", lambda: asyncio.run(update(token, **ORDER)))


def test_a_server_of_one_tenant_lets_no_other_in() -> None:
    door = PermitDoor(verifier(), Register(), only_tenant="tenant_globex")
    refused(
        "permit_mismatch",
        lambda: door.admit(permit().token, tool="orders.update", arguments=ORDER),
    )


def test_what_changes_something_takes_no_permit_for_whatever_arguments() -> None:
    for only_bound in (True, {"orders.update"}):
        register = Register()
        door = PermitDoor(verifier(), register, only_bound=only_bound)
        wide, bound = permit(arguments_sha256="", max_uses=5).token, permit().token
        refused("permit_mismatch", partial(door.admit, wide, tool="orders.update", arguments=ORDER))
        assert register.used == []
        assert door.admit(bound, tool="orders.update", arguments=ORDER).token == bound


def test_the_other_tools_of_a_server_may_take_one() -> None:
    door = PermitDoor(verifier(), Register(), only_bound={"orders.update"})
    wide = permit("orders.read", arguments_sha256="", max_uses=2).token
    for order_id in ("1", "2"):
        arguments: JsonObject = {"order_id": order_id}
        assert door.admit(wide, tool="orders.read", arguments=arguments).token == wide


def test_without_a_redeemer_a_permit_counts_until_it_expires() -> None:
    door = PermitDoor(verifier(), None)
    token = permit().token
    for _ in range(2):
        assert door.admit(token, tool="orders.update", arguments=ORDER).token == token
    refused(
        "permit_expired",
        lambda: door.admit(
            permit(issued_at=1, expires_at=2).token, tool="orders.update", arguments=ORDER
        ),
    )
