"""Killed in the middle of a load, again and again: nothing acknowledged is lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import grpc
import pytest

from pdp.api.v1 import budget_pb2, common_pb2
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle

ROOT: Final = Path(__file__).parents[2]
KILLS: Final = 20
CALLERS: Final = 6
ISSUER: Final = TokenIssuer()


@dataclass
class Known:
    """What one caller knows: its keys, and the receipts that it got for them."""

    acknowledged: dict[str, tuple[int, str]] = field(default_factory=dict)
    charge_ids: dict[str, str] = field(default_factory=dict)
    unanswered: set[str] = field(default_factory=set)


def charge(key: str) -> budget_pb2.ChargeBudgetRequest:
    return budget_pb2.ChargeBudgetRequest(
        idempotency_key=key,
        charges=[common_pb2.Charge(budget="llm", unit="tokens_out", amount=1)],
    )


def ask(caller: Caller, known: Known, key: str) -> None:
    """Charge under a key; a key whose answer is lost is kept for another try."""
    known.unanswered.add(key)
    try:
        answer = caller.budget.ChargeBudget(charge(key), timeout=5)
    except grpc.RpcError:
        return
    known.unanswered.discard(key)
    known.acknowledged[key] = (answer.audit.sequence, answer.audit.hash)
    # A retried key is the same charge.
    assert known.charge_ids.setdefault(key, answer.charge_id) == answer.charge_id


def spent(caller: Caller) -> int:
    limits = caller.budget.GetBudget(budget_pb2.GetBudgetRequest()).limits
    (tokens,) = (limit for limit in limits if limit.limit_id == "tokens")
    assert tokens.held == 0
    return tokens.spent


def acknowledged(known: Sequence[Known]) -> int:
    return sum(len(mine.acknowledged) for mine in known)


def check_spend(caller: Caller, known: Sequence[Known]) -> None:
    """What was acknowledged is spent, what was not may be, and nothing is spent twice."""
    in_doubt = sum(len(mine.unanswered) for mine in known)
    assert acknowledged(known) <= spent(caller) <= acknowledged(known) + in_doubt
    for mine in known:
        for key in tuple(mine.unanswered):
            ask(caller, mine, key)
        assert not mine.unanswered
        for key in tuple(mine.acknowledged)[:20]:
            assert caller.budget.ChargeBudget(charge(key)).charge_id == mine.charge_ids[key]
    assert spent(caller) == acknowledged(known)


def chain(sidecar: SidecarProcess) -> dict[int, str]:
    return {
        record["seq"]: record["hash"]
        for segment in sorted((sidecar.state / "audit").glob("*.jsonl"))
        for record in map(json.loads, segment.read_text(encoding="utf-8").splitlines())
    }


@pytest.mark.slow
def test_kill_9_under_load_loses_no_acknowledged_charge_and_no_record(tmp_path: Path) -> None:
    bundle = build_bundle(
        ROOT / "tests/server/policy", tmp_path / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    token = ISSUER.token("tenant_acme", "user-7", roles=["agent"], lifetime_seconds=3_600)
    chance = random.Random(918)  # noqa: S311 - when to kill is no secret
    known = [Known() for _ in range(CALLERS)]
    finished = threading.Event()

    def load(mine: Known) -> None:
        with Caller(sidecar.target, token=token) as caller:
            while not finished.is_set():
                # Half of the time: a key whose answer was lost, as a caller would.
                lost = next(iter(mine.unanswered), None)
                ask(caller, mine, lost if lost and chance.random() < 0.5 else str(uuid.uuid4()))
                if len(mine.unanswered) > 50:
                    time.sleep(0.05)

    # As fast as the sidecar goes: what a tenant may ask in a second is not the matter here.
    config = {"limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}}}
    with SidecarProcess(tmp_path, issuer=ISSUER, bundle=bundle, config=config) as sidecar:
        threads = [threading.Thread(target=load, args=(mine,)) for mine in known]
        for thread in threads:
            thread.start()
        for _ in range(KILLS):
            enough = acknowledged(known) + chance.randrange(10, 120)
            while acknowledged(known) < enough:
                time.sleep(0.001)
            sidecar.kill()
            sidecar.start()
        finished.set()
        for thread in threads:
            thread.join()
        with Caller(sidecar.target, token=token) as caller:
            check_spend(caller, known)
        assert sidecar.terminate() == 0

    receipts = {receipt for mine in known for receipt in mine.acknowledged.values()}
    assert receipts <= set(chain(sidecar).items()), "an acknowledged record is not in the chain"
    verified = subprocess.run(
        [sys.executable, "-m", "pdp", "audit", "verify", str(sidecar.state / "audit")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout
    assert f"{KILLS + 1} epochs" in verified.stdout
