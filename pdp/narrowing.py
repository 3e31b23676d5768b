"""What a delegation takes away: whatever the policy says, an agent has no more than was
delegated to it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final

from pdp.budget.bounds import MAX_LIMITS
from pdp.budget.ledger import Account, Charge, Limit, Scope, Window
from pdp.canonical import JsonObject, JsonValue
from pdp.errors import PdpError
from pdp.identity.subject import Delegation, Subject
from pdp.reason import ReasonCode

SLICE: Final = "~delegation."
"""What the id of a slice's limit begins with. It sorts behind the policy's own, so that
agents without number do not push those out of an operator's list."""


class NotDelegated(PdpError):  # noqa: N818 - it reads as what is wrong
    """The caller acts under a delegation that does not reach so far.

    Reason codes: tool_not_delegated, argument_not_delegated, budget_not_delegated.
    """

    def __init__(self, reason_code: ReasonCode) -> None:
        super().__init__(reason_code, reason_code.meaning)


def refusal(subject: Subject, *, tool: str, arguments: JsonObject) -> ReasonCode | None:
    """Why the caller may not make a call, whatever the policy says; None where it may
    ask the policy.
    """
    delegation = subject.delegation
    if delegation is None:
        return None
    if tool not in delegation.tools:
        return ReasonCode.TOOL_NOT_DELEGATED
    for name, rules in _rules_of(delegation, tool).items():
        if name not in arguments or not all(_keeps(arguments[name], rule) for rule in rules):
            return ReasonCode.ARGUMENT_NOT_DELEGATED
    return None


def check_delegated(subject: Subject, *, tool: str, arguments: JsonObject) -> None:
    """Raises NotDelegated where :func:`refusal` has something to say."""
    refused = refusal(subject, tool=tool, arguments=arguments)
    if refused is not None:
        raise NotDelegated(refused)


def _rules_of(delegation: Delegation, tool: str) -> dict[str, list[JsonValue]]:
    """By argument, the rules that it must keep in calls of the tool."""
    arguments = delegation.arguments.get(tool, {})
    # What is no list of rules is one rule that nothing keeps.
    return {
        name: rules if isinstance(rules, list) else [None]
        for name, rules in (arguments.items() if isinstance(arguments, dict) else ())
    }


def limits_within(
    subject: Subject,
    account: Account,
    charges: Sequence[Charge],
    policy_limits: Sequence[Limit],
    ledger_id: str,
) -> tuple[Limit, ...]:
    """The policy's limits, and those of the delegation, of what is charged. Raises
    NotDelegated.

    A slice takes away and never gives: a charge on which the policy sets no limit stays
    without one, and so is refused.
    """
    links = [link for link in subject.delegation.links if link.budget] if subject.delegation else []
    if subject.delegation is None or not links or not charges:
        return tuple(policy_limits)
    if subject.delegation.ledger != ledger_id:
        raise NotDelegated(ReasonCode.BUDGET_NOT_DELEGATED)
    pairs = {(charge.budget, charge.unit) for charge in charges}
    for link in links:
        if not pairs <= {(budget, unit) for budget, unit, _ in link.budget}:
            raise NotDelegated(ReasonCode.BUDGET_NOT_DELEGATED)
    applied = [limit for limit in policy_limits if (limit.budget, limit.unit) in pairs]
    bounded = {
        (limit.budget, limit.unit)
        for limit in applied
        if limit.enforced and limit.applies_to(account)
    }
    slices = [limit for limit in slices_of(subject) if (limit.budget, limit.unit) in bounded]
    if len(applied) + len(slices) > MAX_LIMITS:
        raise NotDelegated(ReasonCode.BUDGET_NOT_DELEGATED)
    return (*applied, *slices)


def slices_of(subject: Subject) -> tuple[Limit, ...]:
    """The budgets of each step of the delegation, as limits."""
    if subject.delegation is None:
        return ()
    return tuple(
        Limit(
            id=f"{SLICE}{link.id}",
            budget=budget,
            unit=unit,
            window=Window.LIFETIME,
            limit=amount,
            scope=Scope.TENANT,
            until=link.expires_at,
        )
        for link in subject.delegation.links
        for budget, unit, amount in link.budget
    )


def may_end(subject: Subject, made_under: Sequence[str]) -> bool:
    """Whether the caller may end what was begun under these delegations, the first one
    first: its own, and those of whom it has delegated to.
    """
    own = links_of(subject)
    return tuple(made_under[: len(own)]) == own


def links_of(subject: Subject) -> tuple[str, ...]:
    """The ids of the delegations under which the caller acts, the first one first."""
    return tuple(link.id for link in subject.delegation.links) if subject.delegation else ()


def _keeps(value: JsonValue, rule: JsonValue) -> bool:
    """Whether an argument keeps a rule. What is no rule that is known is kept by nothing."""
    if not isinstance(rule, dict) or not rule:
        return False
    return all(_keeps_one(value, name, bound) for name, bound in rule.items())


def _keeps_one(value: JsonValue, name: str, bound: JsonValue) -> bool:
    match name:
        case "one_of":
            return isinstance(bound, list) and any(_equal(value, each) for each in bound)
        case "min":
            return _is_number(value) and _is_number(bound) and value >= bound  # type: ignore[operator]
        case "max":
            return _is_number(value) and _is_number(bound) and value <= bound  # type: ignore[operator]
        case "prefix":
            return isinstance(value, str) and isinstance(bound, str) and _begins(value, bound)
    return False


def _is_number(value: JsonValue) -> bool:
    # bool is an int to Python, and none in JSON.
    return type(value) in (int, float)


def _equal(value: JsonValue, other: JsonValue) -> bool:
    """As JSON sees it: 1.0 is 1, and true is not."""
    if _is_number(value) and _is_number(other):
        return value == other
    return type(value) is type(other) and isinstance(value, str | bool) and value == other


def _begins(value: str, prefix: str) -> bool:
    """Whether the text begins so, and does so still when a tool normalises it: what follows
    must not change the prefix's last letter (a combining accent, part of a Hangul syllable).
    """
    after = value[len(prefix) : len(prefix) + 1]
    if not prefix or not value.startswith(prefix):
        return False
    joined = unicodedata.normalize("NFC", prefix[-1] + after)
    return not after or (unicodedata.combining(after) == 0 and joined.endswith(after))
