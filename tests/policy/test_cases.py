"""The starter bundle decides as the cases say, in Wasm as in OPA itself."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from pdp.budget.ledger import Charge
from pdp.canonical import JsonObject, JsonValue
from pdp.identity.subject import Subject
from pdp.policy.bundle import Bundle
from pdp.policy.engine import Entrypoint
from pdp.policy.question import authorize_input, budget_input
from pdp.policy.verdict import parse_budget_verdict, parse_limits, parse_verdict
from pdp.policy.wasm import WasmEngine

ROOT: Final = Path(__file__).resolve().parent.parent.parent
CASES: Final = Path(__file__).resolve().parent / "cases"
MORE_CONTEXT: Final[Mapping[str, Any]] = {"time": 1_795_521_600.0, "request_id": "req-1"}
ALL_ROLES: Final = ("support_agent", "analyst")
ALL_SCOPES: Final = ("orders:read", "orders:write", "mail:send", "reports:generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    entrypoint: Entrypoint
    document: JsonObject
    expected: JsonValue
    """Where it is a bool, only ``allow`` is compared."""


def read(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = yaml.safe_load((CASES / name).read_text(encoding="utf-8"))
    return rows


def subject(token: Mapping[str, Any]) -> Subject:
    return Subject(
        tenant=token["tenant"],
        actor="alice",
        roles=tuple(token["roles"]),
        scopes=tuple(token.get("scopes", ())),
    )


def refusal(row: Mapping[str, Any]) -> JsonObject:
    return {"allow": False, "reason_code": row["refused"]}


def authz_cases() -> list[Case]:
    return [
        Case(
            name=row["name"],
            entrypoint=Entrypoint.AUTHZ_DECISION,
            document=authorize_input(
                subject(row["token"]),
                **{"resource": None, "context": {}, **MORE_CONTEXT, **row["call"]},
            ),
            expected=row.get("decision") or refusal(row),
        )
        for row in read("authz_decision.yaml")
    ]


def argument_cases() -> list[Case]:
    return [
        Case(
            name=row["name"],
            entrypoint=Entrypoint.AUTHZ_DECISION,
            document=authorize_input(
                Subject(tenant=row["tenant"], actor="alice", roles=ALL_ROLES, scopes=ALL_SCOPES),
                tool=row["tool"],
                arguments=row["arguments"],
                resource=None,
                context={},
                **MORE_CONTEXT,
            ),
            expected=row["allow"] or {"allow": False, "reason_code": "argument_not_allowed"},
        )
        for row in read("arguments.yaml")
    ]


def budget_cases() -> list[Case]:
    cases = []
    for row in read("budget.yaml"):
        spend = row["spend"]
        document = budget_input(
            subject(row["token"]),
            operation=spend["operation"],
            charges=[Charge(*charge) for charge in spend["charges"]],
            tool=spend.get("tool", ""),
            **MORE_CONTEXT,
        )
        allowed: JsonObject = {"allow": True, "reason_code": "ok"}
        cases.append(
            Case(
                name=row["name"],
                entrypoint=Entrypoint.BUDGET_DECISION,
                document=document,
                expected=allowed if row.get("allowed") else refusal(row),
            )
        )
    return cases


def limit_cases() -> list[Case]:
    """Each tenant's limits are those in its data, and none where it has no say."""
    tenants = json.loads((ROOT / "policies" / "tenants" / "data.json").read_text())
    expected = {
        "tenant_acme": tenants["tenant_acme"]["limits"],
        "tenant_globex": tenants["tenant_globex"]["limits"],
        "tenant_initech": [],
        "tenant_nobody": [],
    }
    return [
        Case(
            name=f"limits of {tenant}",
            entrypoint=Entrypoint.BUDGET_LIMITS,
            document=budget_input(
                Subject(tenant=tenant, actor="alice", roles=ALL_ROLES),
                operation="get",
                charges=(),
                tool="",
                **MORE_CONTEXT,
            ),
            expected=limits,
        )
        for tenant, limits in expected.items()
    ]


ALL: Final = [*authz_cases(), *argument_cases(), *budget_cases(), *limit_cases()]


@pytest.fixture(scope="module")
def answers(starter: Bundle) -> list[JsonValue]:
    """What the embedded engine says of every case."""
    engine = WasmEngine(starter, deadline_ms=5_000, workers=2, memory_max_mib=128)

    async def ask() -> list[JsonValue]:
        try:
            return [await engine.evaluate(case.entrypoint, case.document) for case in ALL]
        finally:
            await engine.close()

    return asyncio.run(ask())


@pytest.mark.parametrize("number", range(len(ALL)), ids=[case.name for case in ALL])
def test_the_case_is_decided_as_written(answers: list[JsonValue], number: int) -> None:
    case, answer = ALL[number], answers[number]
    if case.expected is True:
        assert isinstance(answer, dict)
        assert answer["allow"] is True
    else:
        assert answer == case.expected


def test_opa_itself_gives_the_very_same_answers(
    opa: Path, answers: list[JsonValue], tmp_path: Path
) -> None:
    """One process for all cases, from the sources that the bundle was built of."""
    questions = tmp_path / "input.json"
    questions.write_text(
        json.dumps([{"entrypoint": case.entrypoint, "input": case.document} for case in ALL])
    )
    query = """[answer |
        some question in input
        document := question.input
        authz := data.pdp.authz.decision with input as document
        budget := data.pdp.budget.decision with input as document
        limits := data.pdp.budget.limits with input as document
        answer := {
            "pdp/authz/decision": authz,
            "pdp/budget/decision": budget,
            "pdp/budget/limits": limits,
        }[question.entrypoint]
    ]"""
    command: list[str | Path] = [
        opa,
        "eval",
        "--bundle",
        ROOT / "policies",
        "--input",
        questions,
        "--format",
        "raw",
    ]
    done = subprocess.run(
        [*command, query],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert json.loads(done.stdout) == answers


def test_every_answer_is_of_the_agreed_form(answers: list[JsonValue]) -> None:
    parsers: dict[Entrypoint, Any] = {
        Entrypoint.AUTHZ_DECISION: parse_verdict,
        Entrypoint.BUDGET_DECISION: parse_budget_verdict,
        Entrypoint.BUDGET_LIMITS: parse_limits,
    }
    for case, answer in zip(ALL, answers, strict=True):
        parsers[case.entrypoint](answer)


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in (authz_cases(), argument_cases(), budget_cases()):
        assert len({case.name for case in cases}) == len(cases)
