"""Receipts as JSON: how a store keeps the first answer, to give it again."""

from __future__ import annotations

import json
from typing import Any, Final

from pdp.budget.ledger import Charge, Limit, LimitState, OnExpiry, Receipt, Scope, Window


def receipt_to_json(receipt: Receipt) -> str:
    """What is needed to give the receipt again: all but its note, which is kept
    beside it, and what is not given again.
    """
    return _ENCODER.encode(
        {
            "id": receipt.id,
            "expires_at": receipt.expires_at,
            "charges": [[each.budget, each.unit, each.amount] for each in receipt.charges],
            "refused_by": receipt.refused_by and _state_fields(receipt.refused_by),
            "retry_after_seconds": receipt.retry_after_seconds,
            "over_hold": receipt.over_hold,
            "late": receipt.late,
        }
    )


def receipt_from_json(text: str, note: str) -> Receipt:
    """The receipt again, as the answer to a later try."""
    fields = json.loads(text)
    return Receipt(
        replayed=True,
        note=note,
        id=fields["id"],
        expires_at=fields["expires_at"],
        charges=tuple(Charge(*each) for each in fields["charges"]),
        refused_by=fields["refused_by"] and _state(fields["refused_by"]),
        retry_after_seconds=fields["retry_after_seconds"],
        over_hold=fields["over_hold"],
        late=fields["late"],
    )


def limit_to_json(limit: Limit) -> str:
    """A limit, as a store keeps it beside what counts under it."""
    return _ENCODER.encode(_limit_fields(limit))


def limit_from_json(text: str) -> Limit:
    """The limit again."""
    return _limit(json.loads(text))


def _state_fields(state: LimitState) -> dict[str, Any]:
    return {
        "limit": _limit_fields(state.limit),
        "spent": state.spent,
        "held": state.held,
        "resets_at": state.resets_at,
        "granted": state.granted,
    }


def _state(fields: dict[str, Any]) -> LimitState:
    return LimitState(
        limit=_limit(fields["limit"]),
        spent=fields["spent"],
        held=fields["held"],
        resets_at=fields["resets_at"],
        granted=fields["granted"],
    )


def _limit_fields(limit: Limit) -> list[Any]:
    return [
        limit.id,
        limit.budget,
        limit.unit,
        limit.window,
        limit.limit,
        limit.scope,
        limit.timezone,
        limit.seconds,
        limit.burst,
        limit.warn_at,
        limit.enforced,
        limit.on_expiry,
        *((limit.until,) if limit.until else ()),
    ]


def _limit(fields: list[Any]) -> Limit:
    name, budget, unit, window, most, scope, timezone, seconds, burst, warn_at, *rest = fields
    enforced, on_expiry, *ends = rest
    return Limit(
        id=name,
        budget=budget,
        unit=unit,
        window=Window(window),
        limit=most,
        scope=Scope(scope),
        timezone=timezone,
        seconds=seconds,
        burst=burst,
        warn_at=tuple(warn_at),
        enforced=enforced,
        on_expiry=OnExpiry(on_expiry),
        until=ends[0] if ends else 0,
    )


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
