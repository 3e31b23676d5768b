"""No token, permit or argument is found anywhere but where it was sent."""

from __future__ import annotations

import json
import time
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


def test_secrets_of_agents_workloads_streams_and_batches_are_nowhere_either(
    tmp_path: Path,
) -> None:
    users = TokenIssuer()
    cluster = TokenIssuer("https://kubernetes.default.svc", audience="pdp", kid="cluster")
    bundle = build_bundle(
        ROOT / "tests/server/policy", tmp_path / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    config = {
        "listen": {"metrics": "127.0.0.1:0"},
        "identity": {
            "mode": "jwt",
            "issuers": [
                {
                    "issuer": users.issuer,
                    "audiences": [users.audience],
                    "jwks_file": str(users.write_jwks(tmp_path / "users.json")),
                }
            ],
            "workload": {
                "issuers": [
                    {
                        "issuer": cluster.issuer,
                        "audiences": [cluster.audience],
                        "jwks_file": str(cluster.write_jwks(tmp_path / "cluster.json")),
                    }
                ]
            },
        },
    }
    token, workload_token = users.token("tenant_acme", "user-7", roles=["agent"]), account(cluster)
    secrets, said = [PLANTED, token, workload_token], list[str]()
    verbose = {"PYTHONASYNCIODEBUG": "1"}
    shown = [("workload-authorization", f"Bearer {workload_token}")]
    with (
        SidecarProcess(
            tmp_path, issuer=users, bundle=bundle, config=config, environment=verbose
        ) as sidecar,
        Caller(sidecar.target, token=token, metadata=shown) as user,
    ):
        agent = user.authorization.Delegate(delegation("orders.read")).token
        secrets.append(agent)
        said.append(str(refusal_of(user.authorization.Delegate, delegation(PLANTED * 20))))
        with Caller(sidecar.target, token=agent, metadata=shown) as caller:
            wider = refusal_of(caller.authorization.Delegate, delegation("orders.update"))
            assert wider.reason_code == "delegation_too_wide"
            batch = authorization_pb2.AuthorizeBatchRequest(
                questions=[question("orders.read"), question("tools.conflict")]
            )
            results = caller.authorization.AuthorizeBatch(batch).results
            secrets.append(results[0].answer.permit)
            all_or_nothing = authorization_pb2.AuthorizeBatchRequest(
                questions=[question("orders.read"), question("orders.update")],
                all_or_nothing=True,
            )
            said += [str(wider), str(caller.authorization.AuthorizeBatch(all_or_nothing))]
        for forged in (agent[:-6] + PLANTED, workload_token):
            with Caller(sidecar.target, token=forged) as caller:
                said.append(str(refusal_of(caller.authorize, "orders.read")))
        bad = [("workload-authorization", f"Bearer {workload_token[:-6]}{PLANTED}")]
        with Caller(sidecar.target, token=token, metadata=bad) as caller:
            said.append(str(refusal_of(caller.authorize, "orders.read")))
        for response in user.authorization.AuthorizeStream(
            iter(
                [
                    message(1, agent, workload_token),
                    message(2, agent[:-6] + PLANTED, workload_token),
                    message(3, token, PLANTED),
                    message(4, token, workload_token, traceparent=PLANTED),
                ]
            )
        ):
            assert response.id in {1, 4} or response.failure.reason_code
            secrets += [response.answer.permit] if response.answer.permit else []
            said += [str(response.failure)]
        address = sidecar.log.read_text(encoding="utf-8").split("http://")[1].split(" ")[0]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as metrics:
            said.append(metrics.read().decode())
        assert len(secrets) == 7
        secrets += [secret.split(".")[2] for secret in secrets if "." in secret]
        found = leaks(sidecar, secrets)
        assert sidecar.terminate() == 0
    found += leaks(sidecar, secrets)
    assert found == []
    for number, secret in enumerate(secrets):
        assert not any(secret in text for text in said), number


def account(cluster: TokenIssuer) -> str:
    """The token of a pod's service account."""
    now = int(time.time())
    claims = {
        "iss": cluster.issuer,
        "aud": [cluster.audience],
        "sub": "system:serviceaccount:acme:agent",
        "iat": now,
        "exp": now + 3_600,
        "kubernetes.io": {
            "namespace": "acme",
            "pod": {"name": "agent-7d9c"},
            "serviceaccount": {"name": "agent"},
        },
    }
    return cluster.sign(json.dumps(claims).encode(), header={"typ": None})


def delegation(tool: str) -> authorization_pb2.DelegateRequest:
    """Of one tool, under a rule that stands for a raw argument."""
    return authorization_pb2.DelegateRequest(
        request_id=str(uuid.uuid4()),
        delegate="reader",
        tools=[tool],
        arguments_json=json.dumps({tool: {"note": {"one_of": [PLANTED]}}}).encode(),
    )


def question(tool: str) -> authorization_pb2.AuthorizeRequest:
    return authorization_pb2.AuthorizeRequest(
        request_id=str(uuid.uuid4()),
        action=authorization_pb2.Action(name=tool),
        arguments_json=json.dumps({"note": PLANTED}).encode(),
    )


def message(
    number: int, bearer: str, workload_token: str, *, traceparent: str = ""
) -> authorization_pb2.AuthorizeStreamRequest:
    return authorization_pb2.AuthorizeStreamRequest(
        id=number,
        bearer=bearer,
        workload_token=workload_token,
        traceparent=traceparent,
        question=question("orders.read"),
    )


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
