"""No token, permit or argument is found anywhere but where it was sent."""

from __future__ import annotations

import urllib.request
import uuid
from pathlib import Path

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.testing import Caller, SidecarProcess, TokenIssuer, build_bundle, refusal_of

ROOT = Path(__file__).parents[2]
PLANTED = "planted-secret-4711"
"""Stands in every argument, in the context, and in what is malformed."""


def test_secrets_are_in_no_file_of_the_sidecar_no_metric_and_no_error(tmp_path: Path) -> None:
    issuer = TokenIssuer()
    bundle = build_bundle(
        ROOT / "tests/server/policy", tmp_path / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    token = issuer.token("tenant_acme", "user-7", roles=["agent"])
    secrets = [PLANTED, token, token.split(".")[2]]
    said: list[str] = []
    verbose = {"PYTHONASYNCIODEBUG": "1"}
    sidecar = SidecarProcess(
        tmp_path,
        issuer=issuer,
        bundle=bundle,
        config={"listen": {"metrics": "127.0.0.1:0"}},
        environment=verbose,
    )
    with sidecar, Caller(sidecar.target, token=token) as caller:
        arguments = {"password": PLANTED, PLANTED: 1}
        for tool in (
            "orders.update",
            "orders.read",
            "tools.closed",
            "tools.conflict",
            "tools.none",
        ):
            answer = caller.authorize(
                tool, arguments, context_json=f'{{"note":"{PLANTED}"}}'.encode()
            )
            if answer.permit:
                secrets += [answer.permit, answer.permit.split(".")[2]]
                said += refusals(caller, answer.permit)
        caller.budget.ChargeBudget(
            budget_pb2.ChargeBudgetRequest(
                idempotency_key=str(uuid.uuid4()),
                charges=[common_pb2.Charge(budget="llm", unit="tokens_out", amount=1)],
            )
        )
        for bad in (f'{{"a":"{PLANTED}', f'{{"{PLANTED}":1,"{PLANTED}":2}}', f'["{PLANTED}"]'):
            request = authorization_pb2.AuthorizeRequest(
                request_id="a",
                action=authorization_pb2.Action(name="orders.read"),
                arguments_json=bad.encode(),
            )
            said.append(str(refusal_of(caller.authorization.Authorize, request)))
        said.append(str(refusal_of(caller.authorize, f"{PLANTED} with a space")))
        with Caller(sidecar.target, token=f"{token[:-6]}{PLANTED}") as forged:
            said.append(str(refusal_of(forged.authorize, "orders.read")))
        address = sidecar.log.read_text(encoding="utf-8").split("http://")[1].split(" ")[0]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as metrics:
            said.append(metrics.read().decode())
        found = leaks(sidecar, secrets)  # with the write-ahead logs still there
        assert sidecar.terminate() == 0
    found += leaks(sidecar, secrets)
    assert found == []
    for secret in secrets:
        assert not any(secret in text for text in said)


def refusals(caller: Caller, permit: str) -> list[str]:
    """Errors about a permit: redeemed for something else, forged, reported twice."""
    wrong = execution_pb2.RedeemPermitRequest(
        permit=permit,
        idempotency_key=str(uuid.uuid4()),
        tool="orders.delete",
        arguments_sha256="0" * 64,
        audience="tools",
    )
    executed = execution_pb2.ReportOutcomeRequest(
        permit=permit, outcome=execution_pb2.OUTCOME_EXECUTED
    )
    failed = execution_pb2.ReportOutcomeRequest(permit=permit, outcome=execution_pb2.OUTCOME_FAILED)
    mismatch = refusal_of(caller.execution.RedeemPermit, wrong)
    wrong.permit = permit[:-8] + "AAAAAAAA"
    forged = refusal_of(caller.execution.RedeemPermit, wrong)
    caller.execution.ReportOutcome(executed)
    again = refusal_of(caller.execution.ReportOutcome, failed)
    return [str(mismatch), str(forged), str(again)]


def leaks(sidecar: SidecarProcess, secrets: list[str]) -> list[str]:
    """The files that hold one of the secrets: the whole state, and the log."""
    files = [path for path in sidecar.state.rglob("*") if path.is_file()]
    assert {"ledger.db", "permits.db"} <= {path.name for path in files}
    return [
        f"{path.name} holds secret {number}"
        for path in (*files, sidecar.log)
        for number, secret in enumerate(secrets)
        if secret.encode() in path.read_bytes()
    ]
