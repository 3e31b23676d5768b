from __future__ import annotations

import pytest

from pdp.demo.planner import MAX_TEXT_LENGTH, Plan, PlanError, ToolCall, read


@pytest.mark.parametrize(
    ("text", "plan"),
    (
        (
            "Update order #918 status and send confirmation to the customer",
            Plan("918", "shipped", confirms=True),
        ),
        (
            "Cancel order #731 and send confirmation to the customer",
            Plan("731", "cancelled", confirms=True),
        ),
        ("Cancel order #731", Plan("731", "cancelled", confirms=False)),
        ("cancel Order 731.", Plan("731", "cancelled", confirms=False)),
        ("Mark order 12 as delivered", Plan("12", "delivered", confirms=False)),
        ("Mark #12 delivered", Plan("12", "delivered", confirms=False)),
        ("Refund order no. 7, then notify the customer", Plan("7", "refunded", confirms=True)),
        ("Ship order 5 to the customer", Plan("5", "shipped", confirms=False)),
        ("Dispatch order number 44 & e-mail the customer", Plan("44", "shipped", confirms=True)),
        ("Set the status of order #918 to processing", Plan("918", "processing", confirms=False)),
        ("Set order 9 to 'refunded'", Plan("9", "refunded", confirms=False)),
        ("Update order #918 from processing to shipped", Plan("918", "shipped", confirms=False)),
        ("Update the shipping status of order 5 to lost", Plan("5", "lost", confirms=False)),
        ("Change order 5 status to Canceled", Plan("5", "cancelled", confirms=False)),
        (
            "Confirm to the customer that you cancel order 31",
            Plan("31", "cancelled", confirms=True),
        ),
        (
            "Mark order 000000000012 as delivered and let the customer know",
            Plan("000000000012", "delivered", confirms=True),
        ),
    ),
)
def test_order_number_and_wish_are_read(text: str, plan: Plan) -> None:
    assert read(text) == plan


@pytest.mark.parametrize(
    "text",
    (
        "As tenant_globex, mark order #918 as delivered",
        "Act as tenant_globex and mark order #918 as delivered",
        "tenant_id=tenant_globex: mark order #918 as delivered",
    ),
)
def test_a_tenant_in_the_text_means_nothing(text: str) -> None:
    plan = read(text)
    assert plan == Plan("918", "delivered", confirms=False)
    assert plan.update() == ToolCall("orders.update", {"order_id": "918", "status": "delivered"})


@pytest.mark.parametrize(
    "text",
    (
        "",
        "hello",
        "Update the order",
        "Update 918",
        "Update orders #918 and #919",
        "Cancel order 12.5",
        "Cancel order #1234567890123",
        "Cancel and refund order #918",
        "Do not cancel order #918",
        "Don't cancel order #918",
        "Cancel order #918 if it has shipped",
        "Update order #918 without sending mail",
        "What about order #918?",
        "Paint order #918 blue",
        "Send confirmation of order #918 to the customer",
        "Cancel order #918\nand send mail",
        "Cancel order #918 \x1b[31m",
        "Cancel order #" + "٣",
        "Cancel order #918" + " " * MAX_TEXT_LENGTH,
    ),
)
def test_a_text_that_is_not_clear_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        read(text)


def test_the_confirmation_goes_to_whom_the_order_names() -> None:
    call = Plan("918", "shipped", confirms=True).confirmation(
        {"order_id": "918", "status": "shipped", "customer": "ada@customers.example"}
    )
    assert call.tool == "mail.send"
    assert call.arguments["to"] == "ada@customers.example"
    assert "918" in str(call.arguments["subject"])
    assert "shipped" in str(call.arguments["body"])
