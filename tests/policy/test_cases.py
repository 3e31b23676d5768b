"""Every golden case, in every engine: the decision as written, and its audit record.

A case goes the whole way that a call goes, from the token to the record, with real
rooms. What the engines write down must then be the same, byte for byte.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import pytest

from pdp.canonical import JsonObject
from pdp.identity.subject import Subject
from pdp.policy.bundle import Bundle
from pdp.policy.engine import Entrypoint, PolicyError
from pdp.policy.question import Usage, budget_input
from pdp.policy.verdict import parse_limits
from pdp.testing.issuer import TokenIssuer
from tests.policy.cases.engines import ENGINES, active
from tests.policy.cases.reading import (
    CURRENT_PRICES,
    Erring,
    price_answer,
    read,
    refusal,
    starter_cases,
    workload_cases,
    workload_data,
)
from tests.policy.cases.walk import Case, Seen, arguments_digest, walk
from tests.policy.conftest import Files

ROOT: Final = Path(__file__).resolve().parents[2]
POLICIES: Final = ROOT / "policies"
STARTER: Final = starter_cases()
ERRING: Final = Erring()
WORKLOADS: Final = list(workload_cases())
WALKS: Final = (STARTER, WORKLOADS, ERRING.cases, ERRING.endless)
ALL: Final = [case for cases in WALKS for case in cases]
REQUESTS: Final = [number for cases in WALKS for number in range(len(cases))]
"""The number of a case within its own walk."""
WALK_OF: Final = [walk for walk, cases in enumerate(WALKS) for _ in cases]
DEADLINE_MS: Final = 1_500
"""Long for a machine with much else to do."""
SHORT_DEADLINE_MS: Final = 200
"""For policies that never end. Where one met the end of its memory first, the embedded engine
would say policy_error; OPA has no such end."""
OF_THE_CHAIN: Final = frozenset({"v", "instance", "seq", "epoch", "time", "prev_hash", "hash"})
IDS: Final = frozenset({"decision_id", "permit_id", "hold_id"})


@dataclass(frozen=True, slots=True)
class Walked:
    """What came of all the cases in one engine."""

    seen: list[Seen]
    records: list[JsonObject]
    log: bytes
    """The audit logs themselves."""
    revisions: tuple[str, ...]
    """Of the policy of each walk."""


@pytest.fixture(scope="module")
def erring(build_policy: Callable[[Files], Bundle]) -> Bundle:
    return build_policy(ERRING.files)


@pytest.fixture(scope="module")
def with_workloads(build_policy: Callable[[Files], Bundle]) -> Bundle:
    """The policy that the product ships, with data of workloads."""
    listed, by_tenant = workload_data()
    files = {
        str(file.relative_to(POLICIES)): file.read_text(encoding="utf-8")
        for file in (
            *POLICIES.rglob("*.rego"),
            *POLICIES.rglob("data.json"),
            POLICIES / ".manifest",
        )
        if not file.name.endswith("_test.rego")
    }
    tenants = json.loads(files["tenants/data.json"])
    for tenant, workloads in by_tenant.items():
        tenants[tenant]["workloads"] = workloads
    return build_policy(
        {**files, "tenants/data.json": json.dumps(tenants), "workloads/data.json": listed}
    )


@pytest.fixture(scope="module")
def walked(
    starter: Bundle,
    with_workloads: Bundle,
    erring: Bundle,
    opa: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Walked]:
    """All the cases in every engine."""
    issuer = TokenIssuer()

    async def run(engine: str) -> Walked:
        seen: list[Seen] = []
        log = b""
        for bundle, cases, deadline_ms in (
            (starter, STARTER, DEADLINE_MS),
            (with_workloads, WORKLOADS, DEADLINE_MS),
            (erring, ERRING.cases, DEADLINE_MS),
            (erring, ERRING.endless, SHORT_DEADLINE_MS),
        ):
            directory = tmp_path_factory.mktemp(engine)
            async with active(engine, bundle, opa, deadline_ms=deadline_ms) as policy:
                seen += await walk(cases, policy, issuer, directory)
            log += b"".join(
                file.read_bytes() for file in sorted((directory / "audit").glob("*.jsonl"))
            )
        records = [json.loads(line) for line in log.splitlines()]
        return Walked(
            seen,
            [record for record in records if record["type"] in {"decision", "budget"}],
            log,
            tuple(bundle.revision for bundle in (starter, with_workloads, erring, erring)),
        )

    return {engine: asyncio.run(run(engine)) for engine in ENGINES}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", range(len(ALL)), ids=[case.name for case in ALL])
def test_the_case_is_decided_and_recorded_as_written(
    walked: dict[str, Walked], engine: str, number: int
) -> None:
    case, seen = ALL[number], walked[engine].seen[number]
    assert seen.reason_code == case.reason_code
    if case.answer is not None:
        assert seen.heard[0] == case.answer
    assert (seen.permit is not None) is (case.call is not None and case.reason_code == "ok")

    record = walked[engine].records[number]
    said = {name: value for name, value in record.items() if name not in OF_THE_CHAIN | IDS}
    revision = walked[engine].revisions[WALK_OF[number]]
    assert said == expected_record(case, seen, REQUESTS[number], revision)
    assert ("permit_id" in record) is (seen.permit is not None)


def expected_record(case: Case, seen: Seen, number: int, revision: str) -> JsonObject:
    """What follows from the case, and from the charge that the policy named."""
    allowed = case.reason_code == "ok"
    record: JsonObject = {
        "tenant_id": case.token["tenant"],
        "actor_id": "alice",
        "identity": {
            "issuer": "https://id.example",
            **({"workload": case.workload} if case.workload else {}),
        },
        "outcome": "allowed" if allowed else "denied",
        "reason_code": case.reason_code,
        "request_id": f"req-{number}",
        "policy_revision": revision,
    }
    if case.limit_id is not None:
        record["limit_id"] = case.limit_id
    if case.spend is not None:
        operation = case.spend["operation"]
        charges: list[Any] = [
            {"budget": budget, "unit": unit, "amount": amount}
            for budget, unit, amount in case.spend.get("charges", ())
        ]
        detail = dict(case.detail)
        if "tool" in case.spend:
            detail["tool"] = case.spend["tool"]
        priced = case.answer
        if "usage" in case.spend and isinstance(priced, dict) and priced["allow"]:
            charges = cast("list[Any]", priced["charges"])
            detail["model"] = case.spend["usage"]["model"]
            detail["price_version"] = priced["price_version"]
        return {
            **record,
            "type": "budget",
            "action": f"budget.{operation}",
            "outcome": f"{operation.removesuffix('e')}ed" if allowed else "denied",
            **({"charges": charges} if charges else {}),
            **({"detail": detail} if detail else {}),
        }
    assert case.call is not None
    record |= {"type": "decision", "action": case.call["tool"]}
    if not seen.heard:  # no tenant, no policy
        del record["policy_revision"], record["identity"]
        return record | {"tenant_id": None, "actor_id": seen.actor}
    record["arguments_digest"] = arguments_digest(case)
    if "resource" in case.call:
        record["resource"] = case.call["resource"]
    verdict = seen.heard[0]
    if allowed and isinstance(verdict, dict) and verdict.get("charge"):
        charges = list(cast("list[Any]", verdict["charge"]))
        charges.sort(key=lambda charge: (charge["budget"], charge["unit"]))
        record["charges"] = charges
    if seen.permit is not None and seen.permit.max_uses > 1:
        record["detail"] = {"max_uses": seen.permit.max_uses}
    return record


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "embedded"])
def test_every_engine_leaves_the_very_same_audit_log(
    walked: dict[str, Walked], engine: str
) -> None:
    assert walked[engine].log == walked["embedded"].log


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "embedded"])
def test_every_engine_says_the_very_same(walked: dict[str, Walked], engine: str) -> None:
    for case, here, there in zip(ALL, walked["embedded"].seen, walked[engine].seen, strict=True):
        assert [_typed(said) for said in here.heard] == [_typed(said) for said in there.heard], (
            case.name
        )
        assert _claims(here) == _claims(there), case.name


def _typed(value: Any) -> str:
    """Tells 1 from 1.0 and true, as == does not."""
    return json.dumps(value, sort_keys=True)


def _claims(seen: Seen) -> object:
    permit = seen.permit
    return permit and (permit.scopes, permit.expires_at - permit.issued_at, permit.tool)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_differs_between_the_engines_is_known(erring: Bundle, opa: Path, engine: str) -> None:
    async def run() -> None:
        async with active(engine, erring, opa, deadline_ms=DEADLINE_MS) as policy:
            for case, row in ERRING.differing:
                assert case.call is not None
                document: JsonObject = {
                    "action": {
                        "name": case.call["tool"],
                        "properties": {"arguments": case.call["arguments"]},
                    }
                }
                expected = row["embedded" if engine == "embedded" else "opa"]
                with policy.pin() as pinned:
                    assert await _answer(pinned, document) == expected, case.name

    asyncio.run(run())


async def _answer(policy: Any, document: JsonObject) -> Any:
    try:
        return await policy.evaluate(Entrypoint.AUTHZ_DECISION, document)
    except PolicyError as error:
        return None if error.reason_code == "policy_undefined" else error.reason_code


@pytest.mark.parametrize("engine", ENGINES)
def test_each_tenants_limits_are_those_in_its_data_and_none_where_it_has_no_say(
    starter: Bundle, opa: Path, engine: str
) -> None:
    tenants = json.loads((ROOT / "policies" / "tenants" / "data.json").read_text())
    expected = {
        "tenant_acme": tenants["tenant_acme"]["limits"],
        "tenant_globex": tenants["tenant_globex"]["limits"],
        "tenant_initech": [],
        "tenant_nobody": [],
    }

    async def run() -> None:
        async with active(engine, starter, opa, deadline_ms=DEADLINE_MS) as policy:
            for tenant, limits in expected.items():
                document = budget_input(
                    Subject(tenant=tenant, actor="alice", roles=("support_agent",)),
                    operation="get",
                    charges=(),
                    tool="",
                    time=0,
                    request_id="req-1",
                )
                with policy.pin() as pinned:
                    answer = await pinned.evaluate(Entrypoint.BUDGET_LIMITS, document)
                assert answer == limits
                parse_limits(answer)

    asyncio.run(run())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_settlement_is_priced_as_written(starter: Bundle, opa: Path, engine: str) -> None:
    async def run() -> None:
        async with active(engine, starter, opa, deadline_ms=DEADLINE_MS) as policy:
            for row in read("prices.yaml"):
                document = budget_input(
                    Subject(tenant=row.get("tenant", "tenant_acme"), actor="alice"),
                    operation="settle",
                    charges=(),
                    usage=Usage(row.get("model", "gpt-x"), tuple(row["usage"].items())),
                    price_version=row.get("at", CURRENT_PRICES),
                    tool="",
                    time=0,
                    request_id="req-1",
                )
                with policy.pin() as pinned:
                    answer = await pinned.evaluate(Entrypoint.BUDGET_DECISION, document)
                assert _typed(answer) == _typed(_price(row)), row["name"]

    asyncio.run(run())


def _price(row: dict[str, Any]) -> JsonObject:
    if "refused" in row:
        return refusal(row["refused"])
    charges = [("llm", unit, amount) for unit, amount in row["charges"]]
    return price_answer(charges, row.get("version", CURRENT_PRICES))


def test_every_case_has_a_name_of_its_own() -> None:
    for cases in WALKS:
        names = [case.name for case in cases]
        assert sorted(set(names)) == sorted(names)


def test_every_reason_code_of_the_shipped_policy_has_a_case(starter: Bundle) -> None:
    written = {
        code
        for name, text in starter.rego.items()
        if not name.endswith("_test.rego")
        for code in re.findall(r'(?:reason_code|else) := "(\w+)"', text)
    }
    assert len(written) > 5
    assert written <= {case.reason_code for case in (*STARTER, *WORKLOADS)}, (
        "add a case to cases/*.yaml"
    )
