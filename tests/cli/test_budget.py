"""`pdp budget`, as an operator runs it beside a sidecar that is serving."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pdp.api.v1 import budget_pb2, common_pb2
from pdp.testing import Caller, SidecarProcess, TokenIssuer
from tests.budget.redis_server import RedisServer
from tests.e2e.operating import refused

BUNDLE = Path(__file__).parents[2] / "policies" / "bundle.tar.gz"
IDP = TokenIssuer()
ACME = "tenant_acme"


@pytest.fixture(params=("sqlite", "redis"))
def sidecar(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SidecarProcess]:
    config: dict[str, Any] = {}
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        config["budget"] = {"store": {"unix": str(server.socket), "timeout_ms": 5000}}
    with SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE, config=config) as sidecar:
        yield sidecar


@pytest.fixture
def agent(sidecar: SidecarProcess) -> Iterator[Caller]:
    with Caller(sidecar.target, token=IDP.token(ACME, "planner", roles=["agent"])) as caller:
        yield caller


def run(sidecar: SidecarProcess, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    ran = subprocess.run(
        [sys.executable, "-m", "pdp", "budget", *words, "--config", str(sidecar.config_file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran


def asked(sidecar: SidecarProcess, *words: str) -> list[dict[str, Any]]:
    lines = run(sidecar, *words, "--output", "json").stdout.splitlines()
    return [json.loads(line) for line in lines]


def tokens(amount: int) -> list[common_pb2.Charge]:
    return [common_pb2.Charge(budget="llm", unit="tokens_in", amount=amount)]


def charge(agent: Caller, amount: int) -> str:
    request = budget_pb2.ChargeBudgetRequest(
        idempotency_key=str(uuid.uuid4()), charges=tokens(amount)
    )
    return agent.budget.ChargeBudget(request).charge_id


def reserve(agent: Caller, amount: int) -> str:
    request = budget_pb2.ReserveBudgetRequest(
        idempotency_key=str(uuid.uuid4()), charges=tokens(amount)
    )
    return agent.budget.ReserveBudget(request).hold_id


def left(agent: Caller) -> int:
    limits = agent.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
    return min(each.remaining for each in limits if each.unit == "tokens_in")


def test_what_stands_is_shown_for_people_and_machines(
    sidecar: SidecarProcess, agent: Caller
) -> None:
    charge(agent, 1_000)
    hold = reserve(agent, 500)
    shown = run(sidecar, "show", ACME).stdout
    assert "llm-tokens-in-per-day" in shown
    assert ACME in run(sidecar, "show").stdout
    assert "1000" in json.dumps(asked(sidecar, "show", ACME))
    assert ACME in json.dumps(asked(sidecar, "show"))
    assert hold in run(sidecar, "holds", ACME).stdout
    assert hold in json.dumps(asked(sidecar, "holds", ACME))
    assert "planner" in run(sidecar, "history", ACME).stdout
    actions = [each["action"] for each in asked(sidecar, "history", ACME)]
    assert actions[-2:] == ["budget.charge", "budget.reserve"]


def test_grants_refunds_and_releases_are_done_once_and_on_record(
    sidecar: SidecarProcess, agent: Caller
) -> None:
    charged, hold = charge(agent, 1_000), reserve(agent, 500)
    before = left(agent)
    why = ("--reason", "INC-7", "--by", "eve")
    key = ("--key", str(uuid.uuid4()))
    for replayed in (False, True):
        [granted] = asked(sidecar, "grant", ACME, "llm-tokens-in-per-day", "250", *why, *key)
        assert granted["replayed"] is replayed
    assert left(agent) == before + 250
    [refunded] = asked(sidecar, "refund", ACME, charged, "--charge", "llm/tokens_in=300", *why)
    assert refunded["refunded"] == [{"budget": "llm", "unit": "tokens_in", "amount": 300}]
    [released] = asked(sidecar, "release", ACME, hold, *why)
    assert released["released"] == [{"budget": "llm", "unit": "tokens_in", "amount": 500}]
    assert left(agent) == before + 250 + 300 + 500

    refused = run(sidecar, "refund", ACME, charged, "--charge", "llm/tokens_in=900", *why, code=1)
    assert "refund_exceeds_spend" in refused.stderr
    assert "hold_expired" in run(sidecar, "release", ACME, hold, *why, code=1).stderr
    assert "account_not_found" in run(sidecar, "grant", ACME, "none", "1", *why, code=1).stderr

    by_operator = [
        (each["action"], each["outcome"], each["reason_code"], each["detail"]["reason"])
        for each in asked(sidecar, "history", ACME)
        if each["actor_id"] == "operator:eve"
    ]
    assert ("budget.grant", "granted", "ok", "INC-7") in by_operator
    assert ("budget.refund", "refunded", "ok", "INC-7") in by_operator
    assert ("budget.release", "released", "ok", "INC-7") in by_operator
    assert ("budget.refund", "denied", "refund_exceeds_spend", "INC-7") in by_operator


def test_what_can_not_be_asked_says_what_to_do(tmp_path: Path) -> None:
    assert "--config or by --socket" in refused("budget", "show")
    assert "is no socket" in refused("budget", "show", "--socket", str(tmp_path / "admin.sock"))
    assert "--config or by --audit" in refused("budget", "history", ACME)
    assert "BUDGET/UNIT=AMOUNT" in refused(
        "budget",
        "refund",
        ACME,
        "hold",
        "--charge",
        "llm",
        "--reason",
        "x",
        "--socket",
        "admin.sock",
    )
