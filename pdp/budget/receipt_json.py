"""Receipts as JSON: how a store keeps the first answer, to give it again."""

from __future__ import annotations

import json
from typing import Any, Final

from pdp.budget.ledger import Charge, Limit, LimitState, Receipt, Scope, Window


def receipt_to_json(receipt: Receipt) -> str:
    """What is needed to give the receipt again: all but its note, which is kept
    beside it, and the limits, which are not given again.
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


def _state_fields(state: LimitState) -> dict[str, dict[str, str | int] | int | None]:
    limit = state.limit
    return {
        "limit": {
            "id": limit.id,
            "budget": limit.budget,
            "unit": limit.unit,
            "window": limit.window,
            "limit": limit.limit,
            "scope": limit.scope,
        },
        "spent": state.spent,
        "held": state.held,
        "resets_at": state.resets_at,
    }


def _state(fields: dict[str, Any]) -> LimitState:
    limit = fields["limit"]
    return LimitState(
        limit=Limit(
            id=limit["id"],
            budget=limit["budget"],
            unit=limit["unit"],
            window=Window(limit["window"]),
            limit=limit["limit"],
            scope=Scope(limit["scope"]),
        ),
        spent=fields["spent"],
        held=fields["held"],
        resets_at=fields["resets_at"],
    )


_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))
