"""A thousand at once: what a limit is for, and what once means."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from pdp.api.v1 import (
    authorization_pb2,
    authorization_pb2_grpc,
    budget_pb2,
    budget_pb2_grpc,
    common_pb2,
    execution_pb2,
    execution_pb2_grpc,
)
from pdp.canonical import sha256_hex
from pdp.testing import SidecarProcess, TokenIssuer, build_bundle

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
TRIES = 50
METADATA = [("authorization", f"Bearer {ISSUER.token('tenant_acme', 'user-7', roles=['agent'])}")]


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    directory = tmp_path_factory.mktemp("concurrency")
    bundle = build_bundle(
        ROOT / "tests/server/policy", directory / "bundle.tar.gz", opa=ROOT / ".tools/opa"
    )
    # Above max_concurrent_streams gRPC resets calls (UNAVAILABLE) before the sidecar sees them.
    tenants = {"max_concurrent_calls": 1_000, "burst": 10_000}
    config = {"limits": {"max_concurrent_streams": 1_024, "tenants": tenants}}
    with SidecarProcess(directory, issuer=ISSUER, bundle=bundle, config=config) as process:
        yield process


def test_1000_concurrent_reservations_against_a_limit_for_50_admit_exactly_50(
    sidecar: SidecarProcess,
) -> None:
    async def attempt(stub: budget_pb2_grpc.BudgetServiceAsyncStub) -> str:
        request = budget_pb2.ReserveBudgetRequest(
            idempotency_key=str(uuid.uuid4()),
            charges=[common_pb2.Charge(budget="fifty", unit="calls", amount=1)],
        )
        for _ in range(TRIES):
            try:
                await stub.ReserveBudget(request, metadata=METADATA)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    continue  # a slow machine has no engine free in time: asked again, same key
                return error.code().name
            return "OK"
        return "UNAVAILABLE"

    async def storm() -> tuple[Counter[str], common_pb2.LimitStatus]:
        async with grpc.aio.insecure_channel(sidecar.target) as channel:
            stub: budget_pb2_grpc.BudgetServiceAsyncStub
            stub = budget_pb2_grpc.BudgetServiceStub(channel)
            outcomes = await asyncio.gather(*(attempt(stub) for _ in range(1_000)))
            state = await stub.GetBudget(budget_pb2.GetBudgetRequest(), metadata=METADATA)
            (fifty,) = (limit for limit in state.limits if limit.limit_id == "fifty")
            return Counter(outcomes), fifty

    outcomes, fifty = asyncio.run(storm())

    assert outcomes == {"OK": 50, "RESOURCE_EXHAUSTED": 950}
    assert (fifty.held, fifty.spent, fifty.remaining) == (50, 0, 0)


def test_100_concurrent_redeemers_of_one_permit_redeem_it_once(sidecar: SidecarProcess) -> None:
    async def redeem(stub: execution_pb2_grpc.ExecutionServiceAsyncStub, permit: str) -> str:
        request = execution_pb2.RedeemPermitRequest(
            permit=permit,
            idempotency_key=str(uuid.uuid4()),
            tool="orders.read",
            arguments_sha256=sha256_hex({}),
            audience="tools",
        )
        try:
            await stub.RedeemPermit(request)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async def storm() -> Counter[str]:
        async with grpc.aio.insecure_channel(sidecar.target) as channel:
            asking: authorization_pb2_grpc.AuthorizationServiceAsyncStub
            asking = authorization_pb2_grpc.AuthorizationServiceStub(channel)
            using: execution_pb2_grpc.ExecutionServiceAsyncStub
            using = execution_pb2_grpc.ExecutionServiceStub(channel)
            answer = await asking.Authorize(
                authorization_pb2.AuthorizeRequest(
                    request_id="once", action=authorization_pb2.Action(name="orders.read")
                ),
                metadata=METADATA,
            )
            return Counter(
                await asyncio.gather(*(redeem(using, answer.permit) for _ in range(100)))
            )

    assert asyncio.run(storm()) == {"OK": 1, "FAILED_PRECONDITION": 99}
