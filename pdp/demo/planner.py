"""A scripted planner in the place of a model: text in, tool calls out.

Like a model, it decides what to call and with which arguments, and nothing else. A
tenant that the text names means nothing to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pdp.canonical import JsonObject

MAX_TEXT_LENGTH: Final = 500
NEXT_STATUS: Final = "shipped"
""""Update order #918 status" names none; the orders of the demonstration are in
processing, and this comes next."""


class PlanError(ValueError):
    """The planner can not read the request; says what it reads."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a model proposes: data, until the sidecar has allowed it."""

    tool: str
    arguments: JsonObject


@dataclass(frozen=True, slots=True)
class Plan:
    """Change one order and, if asked to, tell its customer."""

    order_id: str
    status: str
    """Often one that the tool knows; the policy decides."""
    confirms: bool

    def update(self) -> ToolCall:
        """The change of the order."""
        return ToolCall("orders.update", {"order_id": self.order_id, "status": self.status})

    def confirmation(self, order: JsonObject) -> ToolCall:
        """The mail to the customer, whom the result of the change names."""
        return ToolCall(
            "mail.send",
            {
                "to": order["customer"],
                "subject": f"Your order #{self.order_id}",
                "body": f"Good news: order #{self.order_id} is now {self.status}.",
            },
        )


def read(text: str) -> Plan:
    """The plan for a request such as "Update order #918 status and send confirmation
    to the customer". Raises PlanError.
    """
    if len(text) > MAX_TEXT_LENGTH or not text.isprintable():
        raise PlanError(f"The request must be one line of at most {MAX_TEXT_LENGTH} characters.")
    if _NEGATION.search(text):
        raise PlanError("The planner reads no conditions and no negations: say what to do.")
    return Plan(order_id=_order_id(text), status=_status(text), confirms=bool(_MAIL.search(text)))


def _order_id(text: str) -> str:
    numbers = set(_NUMBER.findall(text))
    if len(numbers) != 1 or not _ORDER.search(text):
        raise PlanError('Name exactly one order by its number, such as "order #918".')
    [number] = numbers
    if len(number) > _MAX_DIGITS:
        raise PlanError(f"An order number has at most {_MAX_DIGITS} digits.")
    return str(number)


def _status(text: str) -> str:
    wish = " ".join(clause for clause in _CLAUSE_END.split(text) if not _MAIL.search(clause))
    if not wish.strip():
        wish = text
    named = [word for word in _TARGET.findall(wish) if word.lower() not in _ARTICLES]
    if named:
        word = str(named[0]).lower()
        return next((status for status, form in _FORMS.items() if form.fullmatch(word)), word)
    statuses = [status for status, form in _FORMS.items() if form.search(wish)]
    if len(statuses) > 1:
        raise PlanError(f"The request wants several things at once: {', '.join(statuses)}.")
    if statuses:
        return statuses[0]
    if _UPDATE.search(wish):
        return NEXT_STATUS
    raise PlanError(
        'The planner can not read what to do with the order. Say for example "Update order #918'
        ' status", "Mark order #12 as delivered" or "Cancel order #731"; add "and send'
        ' confirmation to the customer" for a mail.'
    )


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE | re.ASCII)


_MAX_DIGITS: Final = 12
_ORDER: Final = re.compile(r"\border\b|#", re.IGNORECASE)
_NUMBER: Final = re.compile(r"(?<![\w.-])([0-9]+)(?![\w-]|\.[0-9])", re.ASCII)
_NEGATION: Final = re.compile(r"\b(?:not|never|without|unless|except|if)\b|n\Wt\b", re.IGNORECASE)
_CLAUSE_END: Final = re.compile(r"\band\b|\bthen\b|[,;.&]", re.IGNORECASE)
_MAIL: Final = _words(r"confirm\w*|notif\w+|inform|e-?mail|mail|tell|let\s+.*know")
_UPDATE: Final = _words(r"update|advance|progress")
_TARGET: Final = re.compile(
    r"\b(?:status|mark|set|change|update|move)\b.*?\b(?:to|as|into)\s+[\"']?([a-z][a-z-]*)\b",
    re.IGNORECASE | re.ASCII,
)
_ARTICLES: Final = frozenset({"the", "a", "an", "our", "their", "its"})
_FORMS: Final = {
    "processing": _words("process(?:ing|ed)?"),
    "shipped": _words("ship(?:ped|ping)?|dispatch(?:ed)?"),
    "delivered": _words("deliver(?:ed)?"),
    "cancelled": _words("cancel(?:l?ed)?"),
    "refunded": _words("refund(?:ed)?"),
}
