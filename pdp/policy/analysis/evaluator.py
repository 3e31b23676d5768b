"""What the analyses ask: one bundle, evaluated in this process, one question at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from pdp.budget.ledger import Charge
from pdp.canonical import JsonObject, JsonValue
from pdp.policy.bundle import Bundle
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.verdict import parse_verdict
from pdp.policy.wasm import WasmEvaluator
from pdp.reason import ReasonCode

DEADLINE_MS: Final = 1_000
MEMORY_MAX_MIB: Final = 2_048


class Evaluator(Protocol):
    """One loaded bundle, for one thread."""

    def evaluate(self, entrypoint: str, document: JsonObject) -> JsonValue:
        """The value of a rule for ``input = document``. Raises PolicyError."""
        ...

    def set_data(self, data: bytes) -> None:
        """Put another data document, one JSON object, in place of the bundle's."""
        ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What the sidecar would make of the policy's answer to one question."""

    allow: bool
    reason_code: str
    scopes: tuple[str, ...] = ()
    charges: tuple[Charge, ...] = ()
    ttl_seconds: int | None = None
    binds_arguments: bool = True
    max_uses: int = 1

    def is_wider_than(self, other: Answer) -> bool:
        """Whether its permit is for calls that the other's is not for."""
        return self.max_uses > other.max_uses or (
            other.binds_arguments and not self.binds_arguments
        )


def open_evaluator(
    bundle: Bundle,
    *,
    clock: Callable[[], float],
    entrypoints: Sequence[str] = (Entrypoint.AUTHZ_DECISION,),
) -> AbstractContextManager[Evaluator]:
    """Load a bundle, whose ``time.now_ns()`` is ``clock``, in Unix seconds. Raises BundleError."""
    return WasmEvaluator(
        bundle,
        deadline_ms=DEADLINE_MS,
        memory_max_mib=MEMORY_MAX_MIB,
        entrypoints=entrypoints,
        clock_ns=lambda: int(clock() * 1e9),
    )


def decide(evaluator: Evaluator, document: JsonObject) -> Answer:
    """The decision on one call. As in the sidecar, an answer that fails or is not of the
    agreed form is a denial.
    """
    try:
        verdict = parse_verdict(evaluator.evaluate(Entrypoint.AUTHZ_DECISION, document))
    except PolicyError as error:
        return Answer(allow=False, reason_code=error.reason_code)
    if not verdict.allow:
        return Answer(allow=False, reason_code=verdict.reason_code)
    return Answer(
        allow=True,
        reason_code=ReasonCode.OK.value,
        scopes=verdict.scopes,
        charges=verdict.charges,
        ttl_seconds=verdict.permit_ttl_seconds,
        binds_arguments=verdict.binds_arguments,
        max_uses=verdict.max_uses,
    )


def raw(evaluator: Evaluator, entrypoint: str, document: JsonObject) -> JsonValue:
    """The value of any rule; the reason code in its place when there is none."""
    try:
        return evaluator.evaluate(entrypoint, document)
    except PolicyError as error:
        return {"error": error.reason_code}
