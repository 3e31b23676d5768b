"""What research drew from all these stories as tests of acceptance, where none of them is it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pdp.api.v1 import budget_pb2
from pdp.client import (
    AsyncGuard,
    BudgetRefused,
    Call,
    DelegationRefused,
    Guard,
    ListingRefused,
    PermitDenied,
)
from pdp.client.decision import Decision
from pdp.permit import PermitError
from pdp.testing import Caller, SidecarProcess, refusal_of
from tests.client.stand_in import StandIn
from tests.field.shop import SHIPPED, door_of, serving, tell
from tests.field.world import of, prepared, token, usd_micros, write_bundle

Ran = list[str]
REFUSALS: Final = (BudgetRefused, DelegationRefused, ListingRefused, PermitDenied)
BEARER: Final = "the.users.token"


def by_decorator(guard: Guard, ran: Ran) -> None:
    @guard.tool("orders.update")
    def update(order_id: str, status: str) -> None:
        ran.append(order_id)

    update(**SHIPPED)


def by_hand(guard: Guard, ran: Ran) -> None:
    ran.append(guard.authorize("orders.update", dict(SHIPPED)).token)


def in_a_batch(guard: Guard, ran: Ran) -> None:
    (answer,) = guard.authorize_all([Call("orders.update", dict(SHIPPED))])
    if isinstance(answer, PermitDenied):
        raise answer
    ran.append(answer.token)


def reserving(guard: Guard, ran: Ran) -> None:
    with guard.reserve([("llm", "usd_micros", 1)]):
        ran.append("spent")


def delegating(guard: Guard, ran: Ran) -> None:
    ran.append(guard.delegate("worker", tools=["orders.update"]).token)


def listing(guard: Guard, ran: Ran) -> None:
    ran += [tool.name for tool in guard.tools()]


FACES: Final = (by_decorator, by_hand, in_a_batch, reserving, delegating, listing)


def away(_stand_in: StandIn) -> None:
    """Nobody listens: see :func:`faulty`."""


def slow(stand_in: StandIn) -> None:
    def wait(*_: object) -> bytes:
        stand_in.released.wait(20)
        return b""

    answers(stand_in, wait)


def malformed(stand_in: StandIn) -> None:
    answers(stand_in, lambda *_: b"\xff\xff\xff")


def empty(stand_in: StandIn) -> None:
    answers(stand_in, lambda *_: b"")


def answers(stand_in: StandIn, answer: Callable[..., bytes]) -> None:
    stand_in.answer, stand_in.answer_batch, stand_in.hold = answer, answer, answer


@pytest.fixture(params=(away, slow, malformed, empty))
def faulty(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a sidecar should answer, and does not, or nonsense. It knows no delegation and no
    listing, which is a fault as well.
    """
    with StandIn() as stand_in:
        request.param(stand_in)
        yield f"{stand_in.target}.away" if request.param is away else stand_in.target


@pytest.mark.parametrize("face", FACES)
def test_whatever_is_wrong_with_the_sidecar_every_face_of_the_guard_blocks(
    faulty: str, face: Callable[[Guard, Ran], None]
) -> None:
    """Acceptance: sidecar down, slow, malformed reply."""
    ran: Ran = []
    with (
        Guard(faulty, timeout_seconds=0.3) as guard,
        guard.acting_for(BEARER),
        pytest.raises(REFUSALS) as caught,
    ):
        face(guard, ran)
    assert not ran
    assert BEARER not in str(caught.value)


def test_whatever_is_wrong_with_the_sidecar_the_awaited_guard_blocks(faulty: str) -> None:
    """Acceptance: the same, of the other guard."""
    ran: Ran = []

    async def run() -> None:
        async with AsyncGuard(faulty, timeout_seconds=0.3) as guard:

            @guard.tool("orders.update")
            async def update(order_id: str, status: str) -> None:
                ran.append(order_id)

            with guard.acting_for(BEARER), pytest.raises(PermitDenied):
                await update(**SHIPPED)

    asyncio.run(run())
    assert not ran


def test_a_fault_in_the_guard_itself_blocks(sidecar: SidecarProcess) -> None:
    """Acceptance: guard bug."""
    ran: Ran = []

    def observe(_decision: Decision) -> None:
        raise ZeroDivisionError

    with (
        Guard(sidecar.target, timeout_seconds=20, observe=observe) as guard,
        guard.acting_for(token()),
        pytest.raises(PermitDenied) as caught,
    ):
        by_decorator(guard, ran)
    assert caught.value.reason_code == "guard_failed"
    assert not ran


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("sdk", "fastmcp"))
def test_a_tool_server_whose_sidecar_is_away_lets_nobody_in(tmp_path: Path, kind: str) -> None:
    """Acceptance: every adapter blocks, those of tool servers too."""
    with prepared(tmp_path) as process, Guard(process.target, timeout_seconds=20) as guard:
        with guard.acting_for(token()):
            permits = [guard.authorize("orders.update", dict(SHIPPED)) for _ in range(3)]
        with door_of(process.target) as door, serving(process.target, kind) as (connect, ran):
            assert tell(connect, permits[0].token) == "918 of tenant_acme"
            door.admit(permits[1].token, tool="orders.update", arguments=dict(SHIPPED))
            process.kill()
            with pytest.raises(PermitError) as caught:
                door.admit(permits[2].token, tool="orders.update", arguments=dict(SHIPPED))
            assert caught.value.reason_code == "pdp_unavailable"
            assert tell(connect, permits[2].token) == "pdp_unavailable"
            assert len(ran.calls) == 1


@pytest.mark.slow
def test_a_crash_between_hold_and_settlement_neither_doubles_nor_locks(tmp_path: Path) -> None:
    """Acceptance: crash between reserve and settle, of the sidecar this time."""
    with prepared(tmp_path) as process:
        with Caller(process.target, token=token("tenant_late", "user-7")) as caller:
            hold = caller.budget.ReserveBudget(
                budget_pb2.ReserveBudgetRequest(
                    idempotency_key="hold", charges=usd_micros(900_000), ttl_seconds=600
                )
            ).hold_id
        end = budget_pb2.SettleBudgetRequest(
            idempotency_key="end", hold_id=hold, charges=usd_micros(400_000)
        )
        process.kill()
        process.start()
        with Caller(process.target, token=token("tenant_late", "user-7")) as caller:
            assert (of(caller, "money").spent, of(caller, "money").held) == (0, 900_000)
            assert not caller.budget.SettleBudget(end).replayed
        process.kill()
        process.start()
        with Caller(process.target, token=token("tenant_late", "user-7")) as caller:
            assert caller.budget.SettleBudget(end).replayed
            end.idempotency_key = str(uuid.uuid4())
            refused = refusal_of(caller.budget.SettleBudget, end)
            assert refused.reason_code == "hold_already_settled"
            assert (of(caller, "money").spent, of(caller, "money").held) == (400_000, 0)


def test_a_candidate_is_asked_what_was_asked_and_each_tenants_flips_are_listed(
    sidecar: SidecarProcess, guard: Guard, tmp_path: Path
) -> None:
    """Acceptance: replay of recorded decisions against a candidate bundle."""

    def change(data: Any) -> None:
        data["tenants"]["tenant_globex"]["allowlist"].remove("orders.update")
        data["tenants"]["tenant_acme"]["roles"]["viewer"]["tools"].append("orders.update")

    write_bundle(tmp_path / "candidate.tar.gz", release=9, change=change)
    asked = []
    for tenant, roles in (("tenant_acme", ["viewer"]), ("tenant_globex", ["support_agent"])):
        with guard.acting_for(token(tenant, roles=roles)):
            for tool, arguments in (("orders.read", {"order_id": "1"}), ("orders.update", SHIPPED)):
                try:
                    asked.append(guard.authorize(tool, dict(arguments)).decision_id)
                except PermitDenied as denied:
                    asked.append(denied.decision_id)
    replayed = subprocess.run(
        [
            *(sys.executable, "-m", "pdp", "policy", "replay", str(sidecar.state / "audit")),
            *("--bundle", str(tmp_path / "candidate.tar.gz"), "--output", "json"),
        ],
        capture_output=True,
        check=True,
        timeout=60,
    )
    found = json.loads(replayed.stdout)
    flips = [
        (flip["tenant"], flip["tool"], flip["change"], flip["before"], flip["after"])
        for flip in found["flips"]
        if flip["decision_id"] in asked
    ]
    assert flips == [
        ("tenant_acme", "orders.update", "grant", "role_not_allowed", "ok"),
        ("tenant_globex", "orders.update", "revoke", "ok", "tool_not_allowed"),
    ]
    assert found["replayed_by_tenant"]["tenant_acme"] >= 2
