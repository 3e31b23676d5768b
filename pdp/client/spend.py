"""What is spent: charges, what a model uses, and what the sidecar holds for it."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pdp.api.v1 import common_pb2

if TYPE_CHECKING:
    from pdp.api.v1 import budget_pb2

Charge = tuple[str, str, int]
"""What something costs: budget, unit, amount."""
MAX_AMOUNT: Final = 2**53 - 1
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, init=False)
class Usage:
    """What a model is asked for at most, by unit: ``Usage("gpt-x", tokens_in=1200,
    tokens_out=4000)``. The policy's price table makes charges of it.
    """

    model: str
    quantities: Mapping[str, int]

    def __init__(self, model: str, /, **quantities: int) -> None:
        """Raises TypeError and ValueError for what is no unit or no amount."""
        object.__setattr__(self, "model", model)
        object.__setattr__(
            self,
            "quantities",
            {checked_name(unit): checked_amount(amount) for unit, amount in quantities.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """What the sidecar holds, for whoever spends it or watches the guard. It holds no
    secret.
    """

    hold_id: str
    expires_at: float
    """Unix seconds by the ledger's clock."""
    tool: str
    model: str
    """Empty where charges were reserved."""
    charges: tuple[Charge, ...]
    """What is held."""
    warnings: tuple[tuple[str, int], ...]
    """Thresholds that the hold has crossed: id of the limit, percent of it."""
    shadow_refusals: tuple[str, ...]
    """Ids of the limits that would have refused, if they were enforced."""
    decision_id: str
    """The decision in the audit log."""
    policy_revision: str
    audit_sequence: int
    audit_hash: str
    """Where the audit record lies, as in Decision."""

    @classmethod
    def of(
        cls,
        request: budget_pb2.ReserveBudgetRequest,
        response: budget_pb2.ReserveBudgetResponse,
    ) -> Reservation:
        """Read an answer."""
        return cls(
            hold_id=response.hold_id,
            expires_at=response.expires_at.seconds + response.expires_at.nanos / 1e9,
            tool=request.tool,
            model=request.usage.model,
            charges=charges_of(response.charges),
            warnings=warnings_of(response.warnings),
            shadow_refusals=tuple(limit.limit_id for limit in response.shadow_refusals),
            decision_id=response.decision_id,
            policy_revision=response.policy_revision,
            audit_sequence=response.audit.sequence,
            audit_hash=response.audit.hash,
        )


def checked_name(name: object) -> str:
    """The name of a budget or unit. Raises ValueError where it is none."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            "the name of a budget or unit is 1 to 64 characters of [a-z0-9._-], the first a letter"
            " or digit"
        )
    return name


def checked_amount(amount: object) -> int:
    """The amount. Raises TypeError for what is no integer, and ValueError for one that
    can not be spent.
    """
    number = operator.index(amount)  # type: ignore[arg-type]  # what is none raises TypeError
    if not 0 <= number <= MAX_AMOUNT:
        raise ValueError(f"an amount is 0 to {MAX_AMOUNT} whole units")
    return number


def checked_charges(charges: Iterable[Charge]) -> tuple[Charge, ...]:
    """The charges. Raises TypeError and ValueError for what is none."""
    return tuple(
        (checked_name(budget), checked_name(unit), checked_amount(amount))
        for budget, unit, amount in charges
    )


def charges_of(charges: Iterable[common_pb2.Charge]) -> tuple[Charge, ...]:
    """Charges off the wire."""
    return tuple((charge.budget, charge.unit, charge.amount) for charge in charges)


def charge_messages(charges: Sequence[Charge]) -> list[common_pb2.Charge]:
    """Charges for the wire."""
    return [
        common_pb2.Charge(budget=budget, unit=unit, amount=amount)
        for budget, unit, amount in charges
    ]


def quantity_messages(quantities: Mapping[str, int]) -> list[common_pb2.Quantity]:
    """Quantities for the wire."""
    return [common_pb2.Quantity(unit=unit, amount=amount) for unit, amount in quantities.items()]


def warnings_of(warnings: Iterable[common_pb2.BudgetWarning]) -> tuple[tuple[str, int], ...]:
    """Warnings off the wire."""
    return tuple((warning.limit_id, warning.percent) for warning in warnings)
