"""What docs/policy-authors.md shows and tells is so: the page is walked from its first
block to its last, as a new author would.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from pdp.budget.ledger import OnExpiry, Scope, Window
from pdp.identity.subject import Subject
from pdp.policy.bundle import load_bundle
from pdp.policy.engine import Entrypoint
from pdp.policy.question import Usage, authorize_input, budget_input
from pdp.policy.tools import parse_visible_tools
from pdp.policy.verdict import parse_budget_verdict, parse_limits, parse_verdict
from pdp.policy.wasm import WasmEngine, WasmEvaluator
from pdp.reason import ReasonCode
from pdp.testing import Caller, SidecarProcess, TokenIssuer

pytestmark = pytest.mark.timeout(300)  # the walk is some twenty commands

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "policy-authors.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)(?: (\S+))?\n(.*?)```", PAGE, flags=re.DOTALL)
INPUT, DECISION, LIMITS, KINDS, PRICED, TOOLS = (
    json.loads(text) for language, name, text in BLOCKS if language == "json" and not name
)
CLERK = Subject(
    tenant="tenant_acme", actor="bo", roles=("refund_clerk",), scopes=("refunds:write",)
)
ISSUER = TokenIssuer()
REFUND = {"order_id": "918", "cents": 500}


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


@dataclass
class Walk:
    """The page, done: its folder, what the commands said, and what a clerk was answered
    by the running sidecar after each release.
    """

    folder: Path
    said: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    sidecar: SidecarProcess | None = None

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            text = json.dumps(merged(json.loads(file.read_text()), json.loads(text)), indent=2)
        elif name.endswith(".yaml"):
            there = merged(yaml.safe_load(file.read_text()), yaml.safe_load(text))
            text = yaml.safe_dump(there, sort_keys=False)
        file.write_text(text)

    def run(self, commands: str) -> None:
        opa = ROOT / ".tools"
        done = subprocess.run(
            ["/bin/sh", "-euc", commands],
            cwd=self.folder,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{opa}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, commands + done.stdout + done.stderr
        self.said[commands] = done.stdout

    def start_sidecar(self, section: str) -> None:
        self.sidecar = SidecarProcess(
            self.folder,
            issuer=ISSUER,
            bundle=self.folder / "live.tar.gz",
            config=yaml.safe_load(section),
        ).start()

    def ask_when_released(self, revision: str) -> None:
        """What a clerk is answered as soon as the sidecar has taken a release up."""
        assert self.sidecar is not None
        token = ISSUER.token(
            CLERK.tenant, CLERK.actor, roles=list(CLERK.roles), scopes=list(CLERK.scopes)
        )
        deadline = time.monotonic() + 30
        with Caller(self.sidecar.target, token=token) as caller:
            while True:
                answer = caller.authorize("refunds.create", REFUND)
                if answer.policy_revision == revision:
                    break
                assert time.monotonic() < deadline, self.sidecar.log.read_text()
                time.sleep(0.05)
        self.answers[revision] = answer.reason_code


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, opa: Path) -> Iterator[Walk]:
    walk = Walk(tmp_path_factory.mktemp("authors"))
    try:
        for language, name, text in BLOCKS:
            if name == "sidecar":
                walk.start_sidecar(text)
            elif name:
                walk.write(name, text)
            elif language == "sh":
                walk.run(text)
            if (walk.sidecar is not None and "releases/" in text) or name == "sidecar":
                for revision in re.findall(r"--revision (\S+)", text) or ["orders-1"]:
                    walk.ask_when_released(revision)
        (walk.folder / "input.json").write_text(json.dumps(INPUT))
        yield walk
    finally:
        if walk.sidecar is not None:
            walk.sidecar.close()


@pytest.fixture(scope="module")
def folder(walk: Walk) -> Path:
    return walk.folder


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


def test_every_kind_of_limit_is_shown_in_the_agreed_form() -> None:
    shown = parse_limits(KINDS)
    assert {limit.window for limit in shown} >= {Window.ROLLING, Window.CONCURRENT, Window.DAY}
    assert {limit.enforced for limit in shown} == {True, False}
    assert {limit.on_expiry for limit in shown} == set(OnExpiry)
    assert {limit.scope for limit in shown} >= {Scope.ORGANISATION, Scope.TEAM, Scope.SESSION}


def test_the_starter_bundle_prices_as_told() -> None:
    subject = Subject(tenant="tenant_acme", actor="planner", roles=("agent",))
    usage = Usage("gpt-x", (("tokens_in", 1200), ("tokens_out", 4000)))
    document = budget_input(
        subject, operation="reserve", charges=(), tool="", time=0, request_id="r", usage=usage
    )
    with WasmEvaluator(load_bundle(ROOT / "policies" / "bundle.tar.gz")) as evaluator:
        answer = parse_budget_verdict(evaluator.evaluate(Entrypoint.BUDGET_DECISION, document))
    assert answer == parse_budget_verdict(PRICED)


def test_the_listing_on_the_page_is_of_the_agreed_form() -> None:
    assert [tool.name for tool in parse_visible_tools(TOOLS)] == ["orders.read", "reports.generate"]


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


def test_every_command_works(walk: Walk) -> None:
    assert list(walk.said) == [text for language, _, text in BLOCKS if language == "sh"]


def test_each_release_is_taken_up_and_decides(walk: Walk) -> None:
    assert walk.answers == {
        "orders-1": "tool_not_allowed",
        "orders-2": "ok",
        "orders-3": "tool_not_allowed",
    }


def said(walk: Walk, command: str) -> str:
    (output,) = (output for commands, output in walk.said.items() if command in commands)
    return output


def test_the_limit_of_the_new_tool_shows_before_it_is_released(walk: Walk) -> None:
    output = said(walk, "pdp policy matrix")
    small, large = re.findall(r"^│ refunds.create \((?:small|large)\).*", output, re.MULTILINE)[:2]

    assert "allow: refunds 1 calls" in small
    assert "argument_not_allowed" in large
    assert "refund_clerk, refunds.create: tool_not_allowed -> allow: refunds 1 calls" in output
    assert "where bound = 10000, value = 20000" in output


def test_a_tool_that_is_added_as_told_is_allowed_and_limited(folder: Path, opa: Path) -> None:
    arguments = {"order_id": "918", "cents": 10_000, "note": "Arrived broken."}
    decision, limits = decide(folder / "policy", CLERK, "refunds.create", arguments, opa)
    verdict = parse_verdict(decision)
    assert verdict.allow
    assert verdict.permit_ttl_seconds == 30
    assert [charge.budget for charge in verdict.charges] == ["refunds"]
    assert "refunds-per-actor-hour" in {limit.id for limit in parse_limits(limits)}


def test_a_tool_whose_permits_are_for_several_calls_as_told(folder: Path, opa: Path) -> None:
    subject = Subject(
        tenant="tenant_acme", actor="bo", roles=("support_agent",), scopes=("orders:read",)
    )
    decision, _ = decide(folder / "policy", subject, "orders.search", {"text": "lamp"}, opa)
    verdict = parse_verdict(decision)
    assert (verdict.allow, verdict.binds_arguments, verdict.max_uses) == (True, False, 20)
    long, _ = decide(folder / "policy", subject, "orders.search", {"text": "l" * 201}, opa)
    assert parse_verdict(long).reason_code == "argument_not_allowed", "of the first call"


def test_a_tenant_that_is_added_as_told_is_allowed_and_limited(folder: Path, opa: Path) -> None:
    subject = Subject(
        tenant="tenant_umbrella",
        actor="bo",
        roles=("support_agent",),
        scopes=("orders:read", "orders:write"),
    )
    arguments = {"order_id": "918", "status": "shipped"}
    decision, limits = decide(folder / "policy", subject, "orders.update", arguments, opa)
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
