"""What a policy answers: read strictly, and anything else is a denial."""

from __future__ import annotations

import contextlib
import marshal
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeVar

from pdp.budget.bounds import MAX_RATE_SECONDS, MAX_WARNINGS
from pdp.budget.ledger import (
    DEFAULT_WARN_AT,
    MAX_AMOUNT,
    MAX_BUCKET,
    Charge,
    Limit,
    OnExpiry,
    Scope,
    Window,
)
from pdp.budget.windows import is_timezone
from pdp.canonical import JsonObject, JsonValue
from pdp.policy.engine import PolicyError
from pdp.reason import REASON_CODE_PATTERN, ReasonCode

MAX_SCOPES: Final = 64
MAX_SCOPES_LENGTH: Final = 2048
"""Characters of all scopes together: with every other claim at its longest, a permit
then stays within what verifiers read."""
MAX_CHARGES: Final = 16
MAX_LIMITS: Final = 64
MAX_KNOWN_LIMITS: Final = 4_096
"""Limits that are remembered as they were read."""
MAX_TTL_SECONDS: Final = 3600
MAX_USES: Final = 1_000
"""Calls that one permit allows at most; as in pdp.permit.claims."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,255}")
"""A scope-token of RFC 6749 3.3."""
_TOOL_AND_ARGUMENTS: Final[JsonValue] = ["tool", "arguments"]
_TOOL: Final[JsonValue] = ["tool"]
_E = TypeVar("_E", Window, Scope, OnExpiry)


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
    binds_arguments: bool = True
    """Whether the permit is for the arguments of the question; else it is for the tool with
    any arguments."""
    max_uses: int = 1
    """How many calls the permit allows; 1 where it binds the arguments."""
    charges: tuple[Charge, ...] = ()
    """What is to be held for each call. For all of them together no amount passes
    MAX_AMOUNT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetVerdict:
    """Whether the actor may spend, or take back, what it asks to."""

    allow: bool
    reason_code: str
    charges: tuple[Charge, ...] | None = None
    """What usage costs; None where the policy put no price on anything."""
    price_version: str = ""
    """Which prices they are; empty where the policy does not say."""


def parse_verdict(value: JsonValue) -> Verdict:
    """The value of pdp/authz/decision. Raises PolicyError (policy_invalid)."""
    answer = _object(value, required={"allow", "reason_code"}, optional=_VERDICT_OPTIONS)
    allow, reason_code = _ruling(answer)
    if allow and "approval" in answer:
        _object(answer["approval"], required=set(), optional=_APPROVAL)
        return Verdict(allow=False, reason_code=ReasonCode.APPROVAL_REQUIRED)
    permit = _permit(answer.get("permit", {}))
    return Verdict(
        allow=allow,
        reason_code=reason_code,
        # In an order of their own: the engines list the members of a set in different ones.
        scopes=tuple(sorted(_scopes(answer.get("scopes", [])))),
        permit_ttl_seconds=permit.ttl_seconds,
        binds_arguments=permit.binds_arguments,
        max_uses=permit.max_uses,
        charges=_charges(answer.get("charge", []), "charge", times=permit.max_uses),
    )


def parse_budget_verdict(value: JsonValue) -> BudgetVerdict:
    """The value of pdp/budget/decision. Raises PolicyError (policy_invalid)."""
    answer = _object(value, required={"allow", "reason_code"}, optional=_PRICED)
    allow, reason_code = _ruling(answer)
    charges: tuple[Charge, ...] | None = None
    if "charges" in answer:
        charges = _charges(answer["charges"], "charges")
    price_version = ""
    if "price_version" in answer:
        price_version = _text(answer["price_version"], "price_version", _PRICE_VERSION)
    return BudgetVerdict(
        allow=allow, reason_code=reason_code, charges=charges, price_version=price_version
    )


def parse_limits(value: JsonValue) -> tuple[Limit, ...]:
    """The value of pdp/budget/limits, by id. Raises PolicyError (policy_invalid)."""
    limits = [_known_limit(item) for item in _list(value, "limits", MAX_LIMITS)]
    if len({limit.id for limit in limits}) != len(limits):
        raise _invalid("a limit's id stands twice")
    return tuple(sorted(limits, key=lambda limit: limit.id))


_VERDICT_OPTIONS: Final = {"scopes", "permit", "charge", "approval"}
_APPROVAL: Final = {"roles", "expires_seconds", "four_eyes"}
_PERMIT: Final = {"binds", "ttl_seconds", "max_uses"}
_PRICED: Final = {"charges", "price_version"}
_PRICE_VERSION: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LIMIT: Final = {"id", "budget", "unit", "window", "limit", "scope"}
_ONLY_FOR_RATES: Final = {"seconds", "burst"}
_ONLY_FOR_CALENDARS: Final = {"timezone", "warn_at", "on_expiry"}
_LIMIT_OPTIONS: Final = _ONLY_FOR_RATES | _ONLY_FOR_CALENDARS | {"enforced"}


@dataclass(frozen=True, slots=True)
class _Permit:
    ttl_seconds: int | None
    binds_arguments: bool
    max_uses: int


def _permit(value: JsonValue) -> _Permit:
    permit = _object(value, required=set(), optional=_PERMIT)
    binds = permit.get("binds", _TOOL_AND_ARGUMENTS)
    if binds not in (_TOOL_AND_ARGUMENTS, _TOOL):
        raise _invalid('permit.binds must be ["tool", "arguments"] or ["tool"]')
    max_uses = _integer(permit.get("max_uses", 1), "permit.max_uses", least=1, most=MAX_USES)
    if binds != _TOOL and max_uses != 1:
        raise _invalid('permit.max_uses must be 1 unless permit.binds is ["tool"]')
    ttl_seconds: int | None = None
    if "ttl_seconds" in permit:
        ttl_seconds = _integer(
            permit["ttl_seconds"], "permit.ttl_seconds", least=1, most=MAX_TTL_SECONDS
        )
    return _Permit(ttl_seconds, binds_arguments=binds != _TOOL, max_uses=max_uses)


def _charges(value: JsonValue, field: str, *, times: int = 1) -> tuple[Charge, ...]:
    """Charges, in an order of their own, as the engines list a set in different ones."""
    charges = [_charge(item) for item in _list(value, field, MAX_CHARGES)]
    if any(charge.amount * times > MAX_AMOUNT for charge in charges):
        raise _invalid(f"{field} for permit.max_uses calls must be at most {MAX_AMOUNT}")
    if len({(charge.budget, charge.unit) for charge in charges}) != len(charges):
        raise _invalid(f"{field} names a budget and unit twice")
    return tuple(sorted(charges, key=lambda charge: (charge.budget, charge.unit)))


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


def _known_limit(value: JsonValue) -> Limit:
    """As :func:`_limit`, which takes ten times as long: a policy names the same limits for
    one call after the other, and most of them for one tenant as for another.
    """
    try:
        written = marshal.dumps(value, _MARSHAL_WITHOUT_REFERENCES)
    except ValueError:
        raise _invalid("a limit can not be read") from None
    known = _known_limits.get(written)
    if known is None:
        known = _limit(value)
        if len(_known_limits) >= MAX_KNOWN_LIMITS:
            _known_limits.clear()
        _known_limits[written] = known
    return known


_MARSHAL_WITHOUT_REFERENCES: Final = 2
"""In this version of marshal's format the same bytes always stand for the same value."""
_known_limits: Final[dict[bytes, Limit]] = {}


def _limit(value: JsonValue) -> Limit:
    limit = _object(value, required=_LIMIT, optional=_LIMIT_OPTIONS)
    window = _member(limit["window"], "limit.window", Window)
    is_rate = window is Window.ROLLING
    most = _integer(limit["limit"], "limit.limit", least=int(is_rate), most=MAX_AMOUNT)
    seconds, burst = _rate(limit, most) if is_rate else (0, 0)
    if not is_rate and not _ONLY_FOR_RATES.isdisjoint(limit):
        raise _invalid('limit.seconds and limit.burst are for window "rolling" only')
    if not window.is_calendar and not _ONLY_FOR_CALENDARS.isdisjoint(limit):
        raise _invalid(
            "limit.timezone, limit.warn_at and limit.on_expiry are for limits that count spend:"
            ' not for window "rolling" or "concurrent"'
        )
    return Limit(
        id=_text(limit["id"], "limit.id", _NAME),
        budget=_text(limit["budget"], "limit.budget", _NAME),
        unit=_text(limit["unit"], "limit.unit", _NAME),
        window=window,
        limit=most,
        scope=_member(limit["scope"], "limit.scope", Scope),
        timezone=_timezone(limit["timezone"]) if "timezone" in limit else "UTC",
        seconds=seconds,
        burst=burst,
        warn_at=_warn_at(limit["warn_at"]) if "warn_at" in limit else DEFAULT_WARN_AT,
        enforced=_flag(limit["enforced"], "limit.enforced") if "enforced" in limit else True,
        on_expiry=_member(limit["on_expiry"], "limit.on_expiry", OnExpiry)
        if "on_expiry" in limit
        else OnExpiry.RELEASE,
    )


def _rate(limit: JsonObject, most: int) -> tuple[int, int]:
    if "seconds" not in limit:
        raise _invalid('window "rolling" needs limit.seconds')
    seconds = _integer(limit["seconds"], "limit.seconds", least=1, most=MAX_RATE_SECONDS)
    burst = limit.get("burst", most)
    return seconds, _integer(burst, "limit.burst", least=1, most=MAX_BUCKET // seconds)


def _timezone(value: JsonValue) -> str:
    if not isinstance(value, str) or not is_timezone(value):
        raise _invalid("limit.timezone is no name of the IANA time zone database")
    return value


def _warn_at(value: JsonValue) -> tuple[int, ...]:
    percents = tuple(
        _integer(each, "limit.warn_at", least=1, most=100)
        for each in _list(value, "limit.warn_at", MAX_WARNINGS)
    )
    if list(percents) != sorted(set(percents)):
        raise _invalid("limit.warn_at must ascend")
    return percents


def _flag(value: JsonValue, field: str) -> bool:
    if not isinstance(value, bool):
        raise _invalid(f"{field} must be true or false")
    return value


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
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return kind(value)
    raise _invalid(f"{field} must be one of {_listed(kind)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _invalid(what: str) -> PolicyError:
    return PolicyError(
        ReasonCode.POLICY_INVALID, f"The policy's answer is not of the agreed form: {what}."
    )
