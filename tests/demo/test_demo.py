"""The demonstration as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

STEPS = ["identify", "isolate", "authorize", "execute", "audit"]
REQUIRED = {"step", "tenant_id", "actor_id", "action", "outcome", "reason_code"}
CHECKS = {
    "main_job",
    "prompt_names_other_tenant",
    "payload_names_other_tenant",
    "tool_off_the_allowlist",
    "viewer_role",
    "forged_token",
    "expired_token",
    "permit_used_twice",
    "permit_with_other_arguments",
    "permit_at_other_tenants_tool",
    "budget_exhausted",
    "calls_retried",
    "sidecar_stopped",
    "other_order_untouched",
    "order_changed_once_per_permit",
    "one_mail",
    "budgets_as_expected",
    "other_budgets_untouched",
    "audit_chain_intact",
    "audit_names_one_tenant",
    "refusals_on_record",
}


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pdp", "demo", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


@dataclass(frozen=True)
class JsonRun:
    tenant: str
    other: str
    actor: str
    ended: subprocess.CompletedProcess[str]

    def records(self, scene: str) -> list[dict[str, Any]]:
        return [record for record in self.all() if record["scene"] == scene]

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def text_run() -> subprocess.CompletedProcess[str]:
    return demo()


@pytest.fixture(scope="module", params=("default", "other request and tenant"))
def json_run(request: pytest.FixtureRequest) -> JsonRun:
    if request.param == "default":
        return JsonRun("tenant_acme", "tenant_globex", "maria", demo("--output", "json"))
    wish = "Cancel order #731 and send confirmation to the customer"
    return JsonRun(
        "tenant_globex",
        "tenant_acme",
        "hank",
        demo("--output", "json", "--request", wish, "--tenant", "tenant_globex"),
    )


def test_the_readable_demo_succeeds_and_shows_every_step_and_code(
    text_run: subprocess.CompletedProcess[str],
) -> None:
    assert text_run.returncode == 0, text_run.stdout + text_run.stderr
    assert text_run.stderr == ""
    shown = text_run.stdout
    for expected in (
        *(step.capitalize() for step in STEPS),
        "orders.update",
        "mail.send",
        "argument_not_allowed",
        "tool_not_allowed",
        "role_not_allowed",
        "token_invalid",
        "token_expired",
        "permit_used",
        "permit_mismatch",
        "tenant_budget_exceeded",
        "pdp_unavailable",
        "the tenant boundary works",
    ):
        assert expected in shown
    assert "FAILED" not in shown


def test_the_readable_demo_is_no_wider_than_100_columns(
    text_run: subprocess.CompletedProcess[str],
) -> None:
    assert max(len(line) for line in text_run.stdout.splitlines()) <= 100


def test_json_output_is_records_and_nothing_else(json_run: JsonRun) -> None:
    assert json_run.ended.returncode == 0, json_run.ended.stdout + json_run.ended.stderr
    assert json_run.ended.stderr == ""
    for record in json_run.all():
        assert record.keys() >= REQUIRED
        assert record["step"] in [*STEPS, "check"]


def test_the_request_goes_through_the_five_steps_tool_by_tool(json_run: JsonRun) -> None:
    records = json_run.records("main_job")
    assert [(record["action"], record["step"]) for record in records] == [
        (tool, step) for tool in ("orders.update", "mail.send") for step in STEPS
    ]
    for record in records:
        assert record["tenant_id"] == json_run.tenant
        assert record["actor_id"] == json_run.actor
        assert record["reason_code"] == "ok"
        assert record["duration_ms"] >= 0
    assert [record["outcome"] for record in records if record["step"] == "execute"] == [
        "executed",
        "executed",
    ]


@pytest.mark.parametrize(
    ("scene", "ending"),
    (
        ("prompt_names_other_tenant", [("execute", "ok"), ("audit", "ok")]),
        ("payload_names_other_tenant", [("authorize", "argument_not_allowed")]),
        ("tool_off_the_allowlist", [("authorize", "tool_not_allowed")]),
        ("viewer_role", [("authorize", "role_not_allowed")]),
        ("forged_token", [("identify", "token_invalid")]),
        ("expired_token", [("identify", "token_expired")]),
        ("permit_used_twice", [("execute", "ok"), ("execute", "permit_used")]),
        ("permit_with_other_arguments", [("execute", "permit_mismatch")]),
        ("permit_at_other_tenants_tool", [("execute", "permit_mismatch")]),
        ("budget_exhausted", [("authorize", "tenant_budget_exceeded")]),
        ("calls_retried", [("authorize", "permit_used")]),
        ("sidecar_stopped", [("execute", "pdp_unavailable"), ("identify", "pdp_unavailable")]),
    ),
)
def test_each_attack_ends_with_its_own_reason_code(
    json_run: JsonRun, scene: str, ending: list[tuple[str, str]]
) -> None:
    steps = [(record["step"], record["reason_code"]) for record in json_run.records(scene)]
    if ending[-1][0] == "authorize":
        assert steps[-1] == ("audit", ending[-1][1])
        steps = steps[:-1]
    assert steps[-len(ending) :] == ending


def test_nothing_is_ever_done_for_the_other_tenant(json_run: JsonRun) -> None:
    assert json_run.other not in {record["tenant_id"] for record in json_run.all()}


def test_only_refused_identities_name_no_tenant(json_run: JsonRun) -> None:
    nameless = {record["scene"] for record in json_run.all() if record["tenant_id"] is None}
    assert nameless == {"forged_token", "expired_token", "sidecar_stopped"}


def test_every_promise_is_one_of_the_checks(json_run: JsonRun) -> None:
    checks = json_run.records("checks")
    assert {check["action"] for check in checks} == CHECKS
    assert {(check["outcome"], check["reason_code"]) for check in checks} == {("passed", "ok")}


def test_no_token_permit_or_password_is_shown(
    text_run: subprocess.CompletedProcess[str], json_run: JsonRun
) -> None:
    # A JWS begins with eyJ; the passwords are 43 letters of this alphabet.
    secret = re.compile(r"eyJ|[A-Za-z0-9_-]{43,}")
    for ended in (text_run, json_run.ended):
        assert not secret.search(ended.stdout + ended.stderr)


def test_a_status_that_the_policy_does_not_know_fails_the_demo() -> None:
    ended = demo("--output", "json", "--request", "Mark order 12 as lost")
    assert ended.returncode == 1
    records = [json.loads(line) for line in ended.stdout.splitlines()]
    failed = {record["action"] for record in records if record["outcome"] == "failed"}
    assert failed == {"main_job", "calls_retried"}
    assert [
        record["reason_code"]
        for record in records
        if (record["scene"], record["step"]) == ("main_job", "authorize")
    ] == ["argument_not_allowed"]


@pytest.mark.parametrize("wish", ("Make me a sandwich", "Cancel orders #1 and #2"))
def test_a_request_that_can_not_be_read_is_a_usage_error(wish: str) -> None:
    ended = demo("--request", wish)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "exactly one order" in " ".join(ended.stderr.split())


def test_an_unknown_tenant_is_a_usage_error_that_names_the_choices() -> None:
    ended = demo("--tenant", "tenant_initech")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "tenant_acme" in ended.stderr
    assert "tenant_globex" in ended.stderr
