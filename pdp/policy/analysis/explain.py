"""One call: the decision, the rules behind it, and what would have allowed it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pdp.canonical import JsonObject
from pdp.policy.analysis.counterfactuals import Counterfactual, counterfactuals
from pdp.policy.analysis.evaluator import Answer, decide, open_evaluator
from pdp.policy.analysis.trace import Trace, TraceError, trace
from pdp.policy.bundle import Bundle
from pdp.policy.compile import find_opa
from pdp.policy.engine import BundleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What can be said of one decision."""

    revision: str
    document: JsonObject = field(repr=False)
    """The input exactly as the engine saw it."""
    answer: Answer
    trace: Trace | None
    """None when there is none, for the reason in ``no_trace``."""
    no_trace: str
    would_allow: tuple[Counterfactual, ...]


def explain_call(bundle: Bundle, document: JsonObject, *, opa: Path | None) -> Explanation:
    """Explain the decision on one input. Raises BundleError."""
    time = _time(document)
    with open_evaluator(bundle, clock=lambda: time) as evaluator:
        answer = decide(evaluator, document)
        would_allow = () if answer.allow else counterfactuals(evaluator, bundle.data, document)
    found, no_trace = None, ""
    try:
        command = find_opa(opa)
        found = trace(bundle, document, opa=command, reason_code=answer.reason_code)
    except TraceError as error:
        no_trace = error.message
    except BundleError:
        no_trace = "there is no opa command on PATH. Install OPA, or name it with --opa."
    return Explanation(
        revision=bundle.revision,
        document=document,
        answer=answer,
        trace=found,
        no_trace=no_trace,
        would_allow=would_allow,
    )


def _time(document: JsonObject) -> float:
    """The time of the call, for rules that ask the clock; the epoch when it has none."""
    context = document.get("context")
    text = context.get("time") if isinstance(context, dict) else None
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return 0.0
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
