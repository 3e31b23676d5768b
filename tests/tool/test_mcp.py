"""What holds for every kind of MCP server behind the door."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from mcp.shared.exceptions import MCPError

from pdp.canonical import JsonObject
from pdp.permit import Permit
from pdp.tool import PermitDoor
from tests.tool.mcp_servers import Asks, Ran, Serve, fast, high_level, low_level, with_handshake
from tests.tool.permits import ORDER, Register, permit, verifier

META_KEY = "agent-pdp/permit"


class Shop:
    """A server and whoever asks it; each question on a connection of its own."""

    def __init__(self, serve: Serve) -> None:
        self.ran = Ran()
        self.connect = serve(PermitDoor(verifier(), Register()), self.ran)

    def do(self, ask: Callable[[Asks], Awaitable[Any]]) -> Any:
        async def connected() -> Any:
            async with self.connect() as client:
                try:
                    return await ask(client)
                except MCPError as error:
                    return error  # raised further in, it would come out in a group

        answer = asyncio.run(connected())
        if isinstance(answer, MCPError):
            raise answer
        return answer

    def call(self, meta: Any, arguments: JsonObject | None = None, name: str = "") -> str:
        given = ORDER if arguments is None else arguments
        result = self.do(lambda client: client.call_tool(name or "orders.update", given, meta=meta))
        return str(result.content[0].text)

    def refused(self, meta: Any, arguments: JsonObject | None = None, name: str = "") -> str:
        before = len(self.ran.calls)
        with pytest.raises(MCPError) as caught:
            self.call(meta, arguments, name)
        assert len(self.ran.calls) == before, "the tool has run"
        for token in (meta or {}).values():
            assert not token or str(token) not in str(caught.value.error)
        reason: str = caught.value.error.data["reason_code"]
        return reason


@pytest.fixture(params=[low_level, high_level, with_handshake, fast])
def shop(request: pytest.FixtureRequest) -> Shop:
    return Shop(request.param)


def brings(found: Permit) -> dict[str, str]:
    return {META_KEY: found.token}


def test_a_call_with_a_permit_for_it_runs_once_for_the_permits_tenant(shop: Shop) -> None:
    meta = brings(permit())
    assert shop.call(meta) == "918 of tenant_acme"
    assert shop.refused(meta) == "permit_used"
    assert shop.ran.calls == [{**ORDER, "count": 0, "tags": None}]


def test_any_other_call_is_refused(shop: Shop) -> None:
    assert shop.refused(None) == "permit_missing"
    assert shop.refused({META_KEY: ""}) == "permit_missing"
    assert shop.refused({META_KEY: 7}) == "permit_missing"
    assert shop.refused({META_KEY: [permit().token]}) == "permit_missing"
    assert shop.refused({"permit": permit().token}) == "permit_missing"
    assert shop.refused({META_KEY: "nonsense"}) == "permit_invalid"
    assert shop.refused(brings(permit("mail.send"))) == "permit_mismatch"
    assert shop.refused(brings(permit()), {**ORDER, "order_id": "919"}) == "permit_mismatch"
    assert shop.refused(brings(permit()), {"order_id": "918"}) == "permit_mismatch"
    assert shop.refused(brings(permit(audience="mail"))) == "permit_mismatch"
    assert shop.refused(brings(permit(expires_at=1, issued_at=0))) == "permit_expired"


def test_a_permit_among_the_arguments_is_an_argument(shop: Shop) -> None:
    assert shop.refused(None, {**ORDER, META_KEY: permit().token}) == "permit_missing"


def test_tools_may_be_listed(shop: Shop) -> None:
    assert shop.do(lambda client: client.list_tools())


@pytest.mark.parametrize(
    ("method", "given"),
    (
        ("read_resource", ("orders://all",)),
        ("list_resources", ()),
        ("list_resource_templates", ()),
        ("list_prompts", ()),
        ("get_prompt", ("secret",)),
    ),
)
def test_nothing_else_may_be_asked_for(shop: Shop, method: str, given: tuple[str, ...]) -> None:
    with pytest.raises(MCPError) as caught:
        shop.do(lambda client: getattr(client, method)(*given))
    assert caught.value.error.data == {"reason_code": "permit_mismatch"}


def test_a_permit_for_any_arguments_counts_as_often_as_it_says(shop: Shop) -> None:
    meta = brings(permit(arguments_sha256="", max_uses=2))
    assert shop.call(meta, {"order_id": "1"}) == "1 of tenant_acme"
    assert shop.call(meta, {"order_id": "2"}) == "2 of tenant_acme"
    assert shop.refused(meta, {"order_id": "3"}) == "permit_used"


def test_a_permit_that_is_bound_to_a_certificate_needs_a_transport_that_shows_it(
    shop: Shop,
) -> None:
    assert shop.refused(brings(permit(certificate_sha256="A" * 43))) == "permit_mismatch"


@pytest.mark.parametrize("serve", (high_level, fast))
@pytest.mark.parametrize(
    "arguments",
    (
        {"order_id": "918", "count": "1"},
        {"order_id": "918", "count": True},
        {"order_id": 918},
        {"order_id": "918", "tags": '["a"]'},
        {"order_id": "918", "status": "shipped", "unknown": 1},
    ),
)
def test_a_tool_is_never_given_other_arguments_than_were_permitted(
    serve: Serve, arguments: JsonObject
) -> None:
    shop = Shop(serve)
    try:
        told = shop.call(brings(permit(arguments=arguments)), arguments)
    except Exception:  # noqa: BLE001 - each server has its own way to say no
        told = ""
    assert shop.ran.calls == [], told


@pytest.mark.parametrize("serve", (high_level, fast))
@pytest.mark.parametrize(
    "arguments",
    (
        {"order_id": "918"},
        {"order_id": "918", "count": -7, "tags": ["é", "b"], "status": "2"},
        {"order_id": "918", "tags": None},
    ),
)
def test_arguments_as_the_schema_says_are_accepted(serve: Serve, arguments: JsonObject) -> None:
    shop = Shop(serve)
    assert shop.call(brings(permit(arguments=arguments)), arguments) == "918 of tenant_acme"
    assert shop.ran.calls == [{"status": "", "count": 0, "tags": None, **arguments}]


def test_many_at_once_with_one_permit_run_once(shop: Shop) -> None:
    meta = brings(permit())

    async def all_at_once(client: Asks) -> list[Any]:
        calls = [client.call_tool("orders.update", ORDER, meta=meta) for _ in range(20)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = shop.do(all_at_once)
    assert len([answer for answer in answers if not isinstance(answer, Exception)]) == 1
    assert len(shop.ran.calls) == 1


def test_concurrent_calls_each_see_their_own_permit(shop: Shop) -> None:
    async def all_at_once(client: Asks) -> list[Any]:
        return await asyncio.gather(
            *(
                client.call_tool(
                    "orders.update",
                    {"order_id": f"{number}"},
                    meta=brings(
                        permit(arguments={"order_id": f"{number}"}, tenant=f"tenant_{number}")
                    ),
                )
                for number in range(10)
            )
        )

    told = [answer.content[0].text for answer in shop.do(all_at_once)]
    assert told == [f"{number} of tenant_{number}" for number in range(10)]
