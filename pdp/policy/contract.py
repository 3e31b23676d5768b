"""What a bundle must answer before it is put in force."""

from __future__ import annotations

from typing import Final

from pdp.canonical import JsonObject, JsonValue
from pdp.identity.subject import Subject
from pdp.policy.engine import BundleError, Entrypoint, PolicyEngine, PolicyError
from pdp.policy.question import authorize_input, budget_input, tools_input
from pdp.policy.service_class import parse_service_class, service_class_input
from pdp.policy.tools import parse_visible_tools
from pdp.policy.verdict import parse_budget_verdict, parse_limits, parse_verdict
from pdp.reason import ReasonCode

_NOBODY: Final = Subject(
    tenant="pdp-probe", actor="pdp-probe", roles=(), scopes=(), issuer="pdp-probe"
)
"""A subject that no tenant has."""


async def check_contract(engine: PolicyEngine) -> None:
    """Ask each entrypoint once, for a subject that does not exist.

    Each must answer, in the agreed form or with nothing at all. Raises BundleError.
    """
    for entrypoint, document in _probes().items():
        try:
            check_answer(entrypoint, await engine.evaluate(entrypoint, document))
        except PolicyError as error:
            if error.reason_code != ReasonCode.POLICY_UNDEFINED:
                raise BundleError(
                    ReasonCode.POLICY_UNAVAILABLE,
                    f"The policy bundle {engine.revision} does not do what {entrypoint} is there"
                    f" for: {error.message}",
                ) from None


def check_answer(entrypoint: Entrypoint, value: JsonValue) -> None:
    """Whether a value is what the entrypoint may answer. Raises PolicyError (policy_invalid)."""
    parse = {
        Entrypoint.AUTHZ_DECISION: parse_verdict,
        Entrypoint.BUDGET_DECISION: parse_budget_verdict,
        Entrypoint.BUDGET_LIMITS: parse_limits,
        Entrypoint.SERVICE_CLASS: parse_service_class,
        Entrypoint.TOOLS_VISIBLE: parse_visible_tools,
    }[entrypoint]
    parse(value)


def _probes() -> dict[Entrypoint, JsonObject]:
    call = authorize_input(
        _NOBODY,
        tool="pdp.probe",
        arguments={},
        resource=None,
        time=0,
        request_id="probe",
        context={},
    )
    spend = budget_input(
        _NOBODY, operation="charge", charges=(), tool="", time=0, request_id="probe"
    )
    return {
        Entrypoint.AUTHZ_DECISION: call,
        Entrypoint.BUDGET_DECISION: spend,
        Entrypoint.BUDGET_LIMITS: call,
        Entrypoint.SERVICE_CLASS: service_class_input(_NOBODY.tenant),
        Entrypoint.TOOLS_VISIBLE: tools_input(_NOBODY, time=0, context={}),
    }
