"""What is left when a step after a permit fails: nothing is spent twice, or lost."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pdp import execution, spending
from pdp.admission import Admission
from pdp.audit.record import AuditError, AuditReceipt, AuditRecord, Outcome
from pdp.budget.ledger import (
    Account,
    Charge,
    IdempotencyKey,
    LedgerError,
    Limit,
    LimitState,
    Scope,
    Window,
)
from pdp.budget.sqlite import SqliteLedger
from pdp.canonical import JsonObject, JsonValue, sha256_hex
from pdp.config import TenantLimits
from pdp.identity.resolver import Credentials, SingleTenant
from pdp.permit.claims import Permit, PermitError
from pdp.permit.issuer import PermitIssuer
from pdp.permit.signing import SigningKey
from pdp.permit.uses import PermitUses
from pdp.permit.verifier import PermitVerifier
from pdp.policy.engine import Entrypoint
from pdp.policy.live import LivePolicy
from pdp.reason import ReasonCode
from pdp.revocation.file import RevocationFile
from pdp.revocation.revocations import Revocations
from pdp.rooms import Rooms
from pdp.storage import Durability
from pdp.strangers import Strangers

T = TypeVar("T")

NOW = 1_800_000_000.0
KEY = SigningKey.generate()
DAY = Limit(id="day", budget="tools", unit="calls", window=Window.DAY, limit=10, scope=Scope.TENANT)
ACCOUNT = Account(tenant="default", actor="user-7", tool="orders.update")
CREDENTIALS = Credentials(bearer=None)
LIMITS: list[JsonValue] = [
    {
        "id": "day",
        "budget": "tools",
        "unit": "calls",
        "window": "day",
        "limit": 10,
        "scope": "tenant",
    }
]


@dataclass
class Audit:
    """Keeps records in memory, while there is room."""

    full: bool = False
    records: list[AuditRecord] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not self.full

    async def append(self, record: AuditRecord) -> AuditReceipt:
        if self.full:
            raise AuditError(ReasonCode.AUDIT_UNAVAILABLE, "Not written.")
        self.records.append(record)
        return AuditReceipt(len(self.records), "0" * 64)

    async def close(self) -> None: ...


class Policy:
    """Lets everything be charged."""

    revision = "revision-1"

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        if entrypoint is Entrypoint.BUDGET_LIMITS:
            return LIMITS
        return {"allow": True, "reason_code": "ok"}

    async def close(self) -> None: ...


@dataclass
class Scene:
    """Real ledger, permits and uses; a call that holds 3."""

    rooms: Rooms
    audit: Audit
    ledger: SqliteLedger
    uses: PermitUses
    permit: Permit

    async def amounts(self) -> tuple[int, int]:
        state: LimitState
        (state,) = await self.ledger.state(ACCOUNT, limits=[DAY])
        return state.spent, state.held

    def redemption(self, key: str) -> execution.Redemption:
        return execution.Redemption(
            permit=self.permit.token,
            idempotency_key=key,
            tool=self.permit.tool,
            arguments_sha256=self.permit.arguments_sha256,
            audience=self.permit.audience,
        )

    def report(self, *, executed: bool = True) -> execution.Report:
        return execution.Report(
            permit=self.permit.token, executed=executed, charges=(), error_type=""
        )


def play(directory: Path, act: Callable[[Scene], Awaitable[T]]) -> T:
    async def opened() -> T:
        ledger = SqliteLedger(
            directory / "ledger.db", durability=Durability.PROCESS, clock=lambda: NOW
        )
        uses = PermitUses(
            directory / "permits.db", durability=Durability.PROCESS, clock=lambda: NOW
        )
        audit = Audit()
        held = await ledger.reserve(
            ACCOUNT,
            IdempotencyKey(operation="authorize", key="request-1", content_sha256="0" * 64),
            charges=[Charge("tools", "calls", 3)],
            limits=[DAY],
            ttl_seconds=120,
        )
        issuer = PermitIssuer(KEY, issuer="agent-pdp")
        permit = issuer.sign(
            Permit(
                id=str(uuid.uuid4()),
                issuer="agent-pdp",
                audience="tools",
                tenant=ACCOUNT.tenant,
                actor=ACCOUNT.actor,
                tool=ACCOUNT.tool,
                arguments_sha256=sha256_hex({}),
                scopes=(),
                transaction="request-1",
                decision_id=str(uuid.uuid4()),
                policy_revision="revision-1",
                ledger="ledger-1",
                issued_at=int(NOW),
                expires_at=int(NOW) + 60,
                hold_id=held.id,
            )
        )
        rooms = Rooms(
            admission=Admission(
                max_concurrent_calls=1,
                max_waiting_calls=0,
                classes=lambda _: TenantLimits().service_class,
            ),
            identity=SingleTenant(actor="user-7", roles=(), scopes=()),
            policy=LivePolicy(Policy()),
            ledger=ledger,
            permits=issuer,
            permit_verifier=PermitVerifier(
                KEY.public_set, issuer="agent-pdp", audience="tools", clock=lambda: NOW
            ),
            permit_uses=uses,
            audit=audit,
            digest_key=b"k" * 32,
            permit_ttl_seconds=60,
            hold_ttl_seconds=120,
            ledger_id="ledger-1",
            strangers=Strangers(),
            revocations=Revocations(RevocationFile(Path("nowhere"))),
            clock=lambda: NOW,
        )
        try:
            return await act(Scene(rooms, audit, ledger, uses, permit))
        finally:
            await ledger.close()
            await uses.close()

    return asyncio.run(opened())


def test_a_use_whose_record_was_lost_is_still_that_use(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        scene.audit.full = True
        with pytest.raises(AuditError):
            await execution.redeem(scene.rooms, scene.redemption("use-1"))
        scene.audit.full = False
        with pytest.raises(PermitError) as refused:
            await execution.redeem(scene.rooms, scene.redemption("use-2"))
        assert refused.value.reason_code == "permit_used"
        assert (await execution.redeem(scene.rooms, scene.redemption("use-1"))).use.replayed

    play(tmp_path, act)


def test_a_report_whose_record_was_lost_settles_once(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        scene.audit.full = True
        with pytest.raises(AuditError):
            await execution.report(scene.rooms, scene.report())
        scene.audit.full = False
        again = await execution.report(scene.rooms, scene.report())
        assert again.result.replayed
        assert again.settled == (Charge("tools", "calls", 3),)
        assert await scene.amounts() == (3, 0)
        (record,) = scene.audit.records
        assert (record.outcome, record.replayed) == (Outcome.EXECUTED, True)

    play(tmp_path, act)


def test_a_permit_that_can_not_be_closed_leaves_its_hold(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.uses.close()
        for call in (
            execution.report(scene.rooms, scene.report()),
            execution.redeem(scene.rooms, scene.redemption("use-1")),
        ):
            with pytest.raises(PermitError) as refused:
                await call
            assert refused.value.reason_code == "permit_unavailable"
        assert await scene.amounts() == (0, 3)
        assert [record.outcome for record in scene.audit.records] == [Outcome.DENIED] * 2

    play(tmp_path, act)


def test_the_hold_of_a_permit_is_ended_by_its_outcome_alone(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        end = spending.HoldEnd(idempotency_key="end-1", hold_id=scene.permit.hold_id, charges=())
        for end_by_hand in (spending.settle, spending.release):
            with pytest.raises(LedgerError) as refused:
                await end_by_hand(scene.rooms, CREDENTIALS, end)
            assert refused.value.reason_code == "hold_not_found"
        reported = await execution.report(scene.rooms, scene.report())
        assert reported.settled == (Charge("tools", "calls", 3),)
        assert await scene.amounts() == (3, 0)

    play(tmp_path, act)


@pytest.mark.parametrize("operation", (spending.charge, spending.reserve))
def test_spend_whose_record_was_lost_is_made_once(tmp_path: Path, operation: Any) -> None:
    async def act(scene: Scene) -> None:
        spend = spending.Spend(
            idempotency_key="spend-1", charges=(Charge("tools", "calls", 4),), tool=""
        )
        scene.audit.full = True
        with pytest.raises(AuditError):
            await operation(scene.rooms, CREDENTIALS, spend)
        scene.audit.full = False
        first = await operation(scene.rooms, CREDENTIALS, spend)
        again = await operation(scene.rooms, CREDENTIALS, spend)
        assert first.result.replayed
        assert (first.result.id, first.decision_id) == (again.result.id, again.decision_id)
        assert sum(await scene.amounts()) == 3 + 4
        assert {record.decision_id for record in scene.audit.records} == {first.decision_id}

    play(tmp_path, act)
