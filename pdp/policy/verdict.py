"""What a policy answers: read strictly, and anything else is a denial."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from pdp.budget.ledger import MAX_AMOUNT, Charge, Limit, Scope, Window
from pdp.canonical import JsonObject, JsonValue
from pdp.policy.engine import PolicyError
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

MAX_SCOPES: Final = 64
MAX_SCOPES_LENGTH: Final = 2048
"""Characters of all scopes together: with every other claim at its longest, a permit
then stays within what verifiers read."""
MAX_CHARGES: Final = 16
MAX_LIMITS: Final = 64
MAX_TTL_SECONDS: Final = 3600
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,255}")
"""A scope-token of RFC 6749 3.3."""
_BINDS: Final[JsonValue] = ["tool", "arguments"]
_E = TypeVar("_E", Window, Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the policy says of one call."""

    allow: bool
    reason_code: str
    """ReasonCode.OK exactly when allow."""
    scopes: tuple[str, ...] = ()
    """The scopes under which the tool is to run."""
    permit_ttl_seconds: int | None = None
    """How long the permit may be used; None leaves it to the configuration."""
    charges: tuple[Charge, ...] = ()
    """What is to be held for the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetVerdict:
    """Whether the actor may charge what it asks to charge."""

    allow: bool
    reason_code: str


def parse_verdict(value: JsonValue) -> Verdict:
    """The value of pdp/authz/decision. Raises PolicyError (policy_invalid)."""
    answer = _object(value, required={"allow", "reason_code"}, optional=_VERDICT_OPTIONS)
    allow, reason_code = _ruling(answer)
    if allow and "approval" in answer:
        _object(answer["approval"], required=set(), optional=_APPROVAL)
        return Verdict(allow=False, reason_code=ReasonCode.APPROVAL_REQUIRED)
    ttl_seconds: int | None = None
    if "permit" in answer:
        permit = _object(answer["permit"], required=set(), optional=_PERMIT)
        if permit.get("binds", _BINDS) != _BINDS:
            raise _invalid('permit.binds must be ["tool", "arguments"]')
        if _integer(permit.get("max_uses", 1), "permit.max_uses", least=1, most=1) != 1:
            raise _invalid("permit.max_uses must be 1")
        if "ttl_seconds" in permit:
            ttl_seconds = _integer(
                permit["ttl_seconds"], "permit.ttl_seconds", least=1, most=MAX_TTL_SECONDS
            )
    charges = [_charge(item) for item in _list(answer.get("charge", []), "charge", MAX_CHARGES)]
    if len({(charge.budget, charge.unit) for charge in charges}) != len(charges):
        raise _invalid("charge names a budget and unit twice")
    return Verdict(
        allow=allow,
        reason_code=reason_code,
        # In an order of their own: the engines list the members of a set in different ones.
        scopes=tuple(sorted(_scopes(answer.get("scopes", [])))),
        permit_ttl_seconds=ttl_seconds,
        charges=tuple(sorted(charges, key=lambda charge: (charge.budget, charge.unit))),
    )


def parse_budget_verdict(value: JsonValue) -> BudgetVerdict:
    """The value of pdp/budget/decision. Raises PolicyError (policy_invalid)."""
    answer = _object(value, required={"allow", "reason_code"}, optional=set())
    allow, reason_code = _ruling(answer)
    return BudgetVerdict(allow=allow, reason_code=reason_code)


def parse_limits(value: JsonValue) -> tuple[Limit, ...]:
    """The value of pdp/budget/limits, by id. Raises PolicyError (policy_invalid)."""
    limits = []
    for item in _list(value, "limits", MAX_LIMITS):
        limit = _object(item, required=_LIMIT, optional=set())
        limits.append(
            Limit(
                id=_text(limit["id"], "limit.id", _NAME),
                budget=_text(limit["budget"], "limit.budget", _NAME),
                unit=_text(limit["unit"], "limit.unit", _NAME),
                window=_member(limit["window"], "limit.window", Window),
                limit=_integer(limit["limit"], "limit.limit", least=0, most=MAX_AMOUNT),
                scope=_member(limit["scope"], "limit.scope", Scope),
            )
        )
    if len({limit.id for limit in limits}) != len(limits):
        raise _invalid("a limit's id stands twice")
    return tuple(sorted(limits, key=lambda limit: limit.id))


_VERDICT_OPTIONS: Final = {"scopes", "permit", "charge", "approval"}
_APPROVAL: Final = {"roles", "expires_seconds", "four_eyes"}
_PERMIT: Final = {"binds", "ttl_seconds", "max_uses"}
_LIMIT: Final = {"id", "budget", "unit", "window", "limit", "scope"}


def _ruling(answer: JsonObject) -> tuple[bool, str]:
    allow = answer["allow"]
    if not isinstance(allow, bool):
        raise _invalid("allow must be true or false")
    reason_code = _text(answer["reason_code"], "reason_code", REASON_CODE_PATTERN)
    if allow is not (reason_code == ReasonCode.OK):
        raise _invalid('reason_code must be "ok" exactly when allow is true')
    return allow, reason_code


def _scopes(value: JsonValue) -> tuple[str, ...]:
    scopes = [_text(scope, "scopes", _SCOPE) for scope in _list(value, "scopes", MAX_SCOPES)]
    if len(set(scopes)) != len(scopes):
        raise _invalid("scopes names a scope twice")
    if sum(map(len, scopes)) > MAX_SCOPES_LENGTH:
        raise _invalid(f"scopes must be at most {MAX_SCOPES_LENGTH} characters together")
    return tuple(scopes)


def _charge(value: JsonValue) -> Charge:
    charge = _object(value, required={"budget", "unit", "amount"}, optional=set())
    return Charge(
        budget=_text(charge["budget"], "charge.budget", _NAME),
        unit=_text(charge["unit"], "charge.unit", _NAME),
        amount=_integer(charge["amount"], "charge.amount", least=1, most=MAX_AMOUNT),
    )


def _object(value: JsonValue, *, required: set[str], optional: set[str]) -> JsonObject:
    if not isinstance(value, dict):
        raise _invalid("an object was expected")
    missing = required - value.keys()
    if missing:
        raise _invalid(f"keys are missing: {_listed(missing)}")
    if not value.keys() <= required | optional:
        # Not named: a policy may have made the key out of what it was asked.
        raise _invalid(f"a key is none of {_listed(required | optional)}")
    return value


def _list(value: JsonValue, field: str, most: int) -> list[JsonValue]:
    if not isinstance(value, list) or len(value) > most:
        raise _invalid(f"{field} must be a list of at most {most}")
    return value


def _text(value: JsonValue, field: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise _invalid(f"{field} must match {pattern.pattern}")
    return value


def _integer(value: JsonValue, field: str, *, least: int, most: int) -> int:
    """Accepts 1.0 for 1, as JSON knows one kind of number only."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _invalid(f"{field} must be an integer from {least} to {most}")
    return value


def _member(value: JsonValue, field: str, kind: type[_E]) -> _E:
    if not isinstance(value, str) or value not in set(kind):
        raise _invalid(f"{field} must be one of {_listed(kind)}")
    return kind(value)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _invalid(what: str) -> PolicyError:
    return PolicyError(
        ReasonCode.POLICY_INVALID, f"The policy's answer is not of the agreed form: {what}."
    )
