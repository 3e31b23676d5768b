"""What docs/policy-authors.md shows and tells is so."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pdp.identity.subject import Subject
from pdp.policy.bundle import load_bundle
from pdp.policy.engine import Entrypoint
from pdp.policy.question import authorize_input
from pdp.policy.verdict import parse_limits, parse_verdict
from pdp.policy.wasm import WasmEngine
from pdp.reason import ReasonCode

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "policy-authors.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)(?: (\S+))?\n(.*?)```", PAGE, flags=re.DOTALL)
FILES = [(name, text) for _, name, text in BLOCKS if name]
INPUT, DECISION, LIMITS = (
    json.loads(text) for language, name, text in BLOCKS if language == "json" and not name
)
CLERK = Subject(
    tenant="tenant_acme", actor="bo", roles=("refund_clerk",), scopes=("refunds:write",)
)


def merged(there: Any, more: Any) -> Any:
    """What stands there already stays."""
    if isinstance(there, dict):
        return {
            **there,
            **{
                key: merged(there[key], value) if key in there else value
                for key, value in more.items()
            },
        }
    return there + more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the policies, changed as the page says."""
    folder = tmp_path_factory.mktemp("authors")
    shutil.copytree(ROOT / "policies", folder / "policies")
    for name, text in FILES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            changed = merged(json.loads(file.read_text()), json.loads(text))
            file.write_text(json.dumps(changed, indent=2))
        else:
            file.write_text(text)
    (folder / "input.json").write_text(json.dumps(INPUT))
    return folder


def decide(bundle: Path, subject: Subject, tool: str, arguments: dict[str, Any], opa: Path) -> Any:
    engine = WasmEngine(
        load_bundle(bundle, opa=opa), deadline_ms=1000, workers=1, memory_max_mib=64
    )
    document = authorize_input(
        subject,
        tool=tool,
        arguments=arguments,
        resource=None,
        time=0,
        request_id="req-1",
        context={},
    )

    async def ask() -> tuple[Any, Any]:
        try:
            return (
                await engine.evaluate(Entrypoint.AUTHZ_DECISION, document),
                await engine.evaluate(Entrypoint.BUDGET_LIMITS, document),
            )
        finally:
            await engine.close()

    return asyncio.run(ask())


def test_the_input_is_what_a_policy_is_asked() -> None:
    subject = Subject(
        tenant="tenant_acme",
        actor="alice",
        roles=("support_agent",),
        scopes=("orders:write", "mail:send"),
    )
    assert (
        authorize_input(
            subject,
            tool="orders.update",
            arguments={"order_id": "918", "status": "shipped"},
            resource={"type": "order", "id": "918"},
            time=datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp(),
            request_id="req-1",
            context={},
        )
        == INPUT
    )


def test_the_answers_are_of_the_agreed_form() -> None:
    assert parse_verdict(DECISION).allow
    assert [limit.id for limit in parse_limits(LIMITS)] == ["tools-per-day"]


def test_the_ladder_is_that_of_the_starter_bundle() -> None:
    told = re.findall(r"^\d\. `(\w+)`", PAGE, flags=re.MULTILINE)
    rego = (ROOT / "policies" / "pdp" / "authz" / "authz.rego").read_text()
    (fallback,) = re.findall(r'^default reason_code := "(\w+)"', rego, flags=re.MULTILINE)
    rungs = re.findall(r'(?:^reason_code|else) := "(\w+)"', rego, flags=re.MULTILINE)
    assert told == [*rungs[:-1], fallback, rungs[-1]]


def test_every_keyword_is_told() -> None:
    told = set(re.findall(r"^\| `(\w+)` \| (?:is|may) ", PAGE, flags=re.MULTILINE))
    rego = (ROOT / "policies" / "pdp" / "arguments" / "arguments.rego").read_text()
    assert told == set(re.findall(r'^keeps\("(\w+)"', rego, flags=re.MULTILINE))


def test_every_code_of_a_bad_answer_is_told() -> None:
    told = set(re.findall(r"^\| `(policy_\w+)` \|", PAGE, flags=re.MULTILINE))
    assert told == {
        ReasonCode.POLICY_UNDEFINED,
        ReasonCode.POLICY_INVALID,
        ReasonCode.POLICY_ERROR,
        ReasonCode.POLICY_TIMEOUT,
    }


@pytest.mark.parametrize("commands", [text for language, _, text in BLOCKS if language == "sh"])
def test_the_commands_work(folder: Path, opa: Path, commands: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-euc", commands],
        cwd=folder,
        env={**os.environ, "PATH": f"{opa.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_tool_that_is_added_as_told_is_allowed_and_limited(folder: Path, opa: Path) -> None:
    arguments = {"order_id": "918", "cents": 10_000, "note": "Arrived broken."}
    decision, limits = decide(folder / "policies", CLERK, "refunds.create", arguments, opa)
    verdict = parse_verdict(decision)
    assert verdict.allow
    assert verdict.permit_ttl_seconds == 30
    assert [charge.budget for charge in verdict.charges] == ["refunds"]
    assert "refunds-per-actor-hour" in {limit.id for limit in parse_limits(limits)}


def test_a_tenant_that_is_added_as_told_is_allowed_and_limited(folder: Path, opa: Path) -> None:
    subject = Subject(
        tenant="tenant_umbrella",
        actor="bo",
        roles=("support_agent",),
        scopes=("orders:read", "orders:write"),
    )
    arguments = {"order_id": "918", "status": "shipped"}
    decision, limits = decide(folder / "policies", subject, "orders.update", arguments, opa)
    assert parse_verdict(decision).allow
    assert [limit.limit for limit in parse_limits(limits)] == [200]


def test_the_whole_policy_of_three_rules_runs(folder: Path, opa: Path) -> None:
    decision, limits = decide(folder / "own", CLERK, "orders.read", {}, opa)
    assert parse_verdict(decision).allow
    assert parse_limits(limits) == ()
    refused, _ = decide(folder / "own", CLERK, "orders.update", {}, opa)
    assert parse_verdict(refused).reason_code == "not_on_our_list"


def test_every_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", PAGE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
