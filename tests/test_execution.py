"""What is left when a step after a permit fails: nothing is spent twice, or lost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdp import base64url, execution, spending
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
from pdp.canonical import JsonObject, JsonValue, canonical_bytes, sha256_hex
from pdp.config import TenantLimits
from pdp.errors import PdpError
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
class Clock:
    """The ledger's; everybody else's stands still."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now


@dataclass
class Scene:
    """Real ledger, permits and uses; a call that holds 3."""

    rooms: Rooms
    audit: Audit
    ledger: SqliteLedger
    uses: PermitUses
    permit: Permit
    clock: Clock

    async def amounts(self) -> tuple[int, int]:
        state: LimitState
        (state,) = await self.ledger.state(ACCOUNT, limits=[DAY])
        return state.spent, state.held

    async def sign(self, **changes: Any) -> None:
        """Let the call's permit be another one."""
        self.permit = self.rooms.permits.sign(replace(self.permit, **changes))

    async def hold_several(self, max_uses: int, amount: int) -> None:
        """Let the permit be for several calls, each of which costs that."""
        held = await self.ledger.reserve(
            ACCOUNT,
            IdempotencyKey(operation="authorize", key="request-2", content_sha256="0" * 64),
            charges=[Charge("tools", "calls", max_uses * amount)],
            limits=[DAY],
            ttl_seconds=120,
        )
        await self.sign(
            id=str(uuid.uuid4()), arguments_sha256="", max_uses=max_uses, hold_id=held.id
        )

    async def redeem(self, *keys: str) -> None:
        for key in keys:
            await execution.redeem(self.rooms, self.redemption(key))

    def redemption(self, key: str) -> execution.Redemption:
        return execution.Redemption(
            permit=self.permit.token,
            idempotency_key=key,
            tool=self.permit.tool,
            arguments_sha256=self.permit.arguments_sha256,
            audience=self.permit.audience,
        )

    def report(self, *, executed: bool = True, **fields: Any) -> execution.Report:
        return execution.Report(
            permit=self.permit.token,
            executed=executed,
            **{"charges": (), "error_type": "", **fields},
        )

    async def reported(self, **fields: Any) -> execution.Reported:
        return await execution.report(self.rooms, self.report(**fields))

    async def refused(self, **fields: Any) -> str:
        """Why the report is not taken in."""
        with pytest.raises(PdpError) as refused:
            await self.reported(**fields)
        assert self.audit.records[-1].outcome is Outcome.DENIED
        assert self.audit.records[-1].reason_code == refused.value.reason_code
        return refused.value.reason_code


def play(directory: Path, act: Callable[[Scene], Awaitable[T]]) -> T:
    async def opened() -> T:
        clock = Clock()
        ledger = SqliteLedger(directory / "ledger.db", durability=Durability.PROCESS, clock=clock)
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
            return await act(Scene(rooms, audit, ledger, uses, permit, clock))
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


def test_nothing_is_kept_of_a_report_that_is_not_taken_in(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.reported()
        with contextlib.suppress(PermitError):
            await scene.reported(executed=False)
        await scene.ledger.tenants(most=1)  # its thread has let go of it by then
        assert scene.audit.records[-1].reason_code == "outcome_already_reported"
        assert not any(isinstance(kept, execution.Report) for kept in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        play(tmp_path, act)
    finally:
        gc.enable()


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


# Permits for several calls. Of the limit of 10, 3 are held by another call all the while.


def test_a_use_is_redeemed_whatever_its_arguments_and_no_more_than_are_allowed(
    tmp_path: Path,
) -> None:
    async def act(scene: Scene) -> None:
        await scene.hold_several(3, 2)
        left = []
        for number in range(3):
            redemption = replace(
                scene.redemption(f"use-{number}"), arguments_sha256=sha256_hex({"n": number})
            )
            left.append((await execution.redeem(scene.rooms, redemption)).use.uses_left)
        assert left == [2, 1, 0]
        with pytest.raises(PermitError) as refused:
            await scene.redeem("use-3")
        assert refused.value.reason_code == "permit_used"
        assert [record.detail for record in scene.audit.records[:3]] == [
            {"audience": "tools", "uses_left": number} for number in (2, 1, 0)
        ]

    play(tmp_path, act)


@pytest.mark.parametrize("executed", (True, False))
@pytest.mark.parametrize("uses", (1, 2, 3))
def test_what_is_settled_is_the_share_of_the_calls_made(
    tmp_path: Path, uses: int, *, executed: bool
) -> None:
    async def act(scene: Scene) -> None:
        await scene.hold_several(3, 2)
        assert await scene.amounts() == (0, 3 + 6)
        reported = await scene.reported(uses=uses, executed=executed)
        assert reported.settled == (Charge("tools", "calls", 2 * uses),)
        assert await scene.amounts() == (2 * uses, 3)
        again = await scene.reported(uses=uses, executed=executed)
        assert (again.result.replayed, again.settled) == (True, reported.settled)
        assert await scene.amounts() == (2 * uses, 3)
        assert scene.audit.records[0].detail == {"uses": uses}

    play(tmp_path, act)


def test_of_a_permit_under_which_nothing_was_called_all_returns(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.hold_several(3, 2)
        reported = await scene.reported(executed=False)
        assert reported.settled == ()
        assert await scene.amounts() == (0, 3)
        with pytest.raises(PermitError) as refused:
            await scene.redeem("late")
        assert refused.value.reason_code == "permit_used"

    play(tmp_path, act)


def test_a_report_that_comes_late_settles_the_share_all_the_same(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.hold_several(3, 2)
        scene.clock.now += 1_000
        assert await scene.amounts() == (0, 0)
        reported = await scene.reported(uses=2)
        assert (reported.settled, reported.result.late) == ((Charge("tools", "calls", 4),), True)
        assert await scene.amounts() == (4, 0)

    play(tmp_path, act)


def test_charges_that_are_named_are_what_all_calls_cost(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.hold_several(3, 2)
        reported = await scene.reported(uses=3, charges=(Charge("tools", "calls", 1),))
        assert reported.settled == (Charge("tools", "calls", 1),)
        assert await scene.amounts() == (1, 3)

    play(tmp_path, act)


@pytest.mark.parametrize(("uses", "executed"), ((0, False), (1, False), (1, True)))
def test_fewer_calls_than_tools_have_redeemed_can_not_be_reported(
    tmp_path: Path, uses: int, *, executed: bool
) -> None:
    async def act(scene: Scene) -> None:
        await scene.hold_several(3, 2)
        await scene.redeem("use-1", "use-2")
        reported = await scene.reported(uses=uses, executed=executed)
        assert reported.settled == (Charge("tools", "calls", 4),)
        assert await scene.amounts() == (4, 3)
        assert scene.audit.records[-1].detail == {"uses": 2, "uses_reported": uses}

    play(tmp_path, act)


def test_more_calls_than_the_permit_allows_are_not_taken_in_and_close_nothing(
    tmp_path: Path,
) -> None:
    async def act(scene: Scene) -> None:
        assert await scene.refused(uses=2) == "request_invalid"
        assert await scene.refused(uses=-1) == "request_invalid"
        await scene.hold_several(3, 2)
        assert await scene.refused(uses=4) == "request_invalid"
        assert await scene.refused(uses=0) == "request_invalid", "that ran without a call"
        costs = (Charge("tools", "calls", 1),)
        assert await scene.refused(uses=0, executed=False, charges=costs) == "request_invalid"
        assert await scene.amounts() == (0, 3 + 6)
        await scene.redeem("use-1")

    play(tmp_path, act)


def test_the_calls_of_a_permit_are_reported_once(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.hold_several(3, 2)
        await scene.reported(uses=3)
        assert await scene.refused(uses=1) == "outcome_already_reported"
        assert await scene.refused(executed=False) == "outcome_already_reported"
        assert await scene.amounts() == (6, 3)

    play(tmp_path, act)


def test_a_report_on_one_call_may_say_that_it_was_one(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.reported(uses=1)
        assert (await scene.reported()).result.replayed
        assert await scene.amounts() == (3, 0)
        assert scene.audit.records[0].detail is None

    play(tmp_path, act)


def test_a_permit_for_several_calls_that_cost_nothing_is_reported_on_too(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        await scene.sign(arguments_sha256="", max_uses=3, hold_id="")
        assert (await scene.reported(uses=2)).settled == ()
        assert scene.audit.records[0].detail == {"uses": 2}

    play(tmp_path, act)


@settings(max_examples=15, deadline=None)
@given(
    max_uses=st.integers(2, 3),
    cost=st.integers(1, 2),
    steps=st.lists(
        st.sampled_from("abcdef").map(lambda key: ("redeem", key))
        | st.tuples(st.just("report"), st.tuples(st.integers(-1, 5), st.booleans())),
        max_size=10,
    ),
)
def test_in_whatever_order_what_is_spent_is_what_was_used_and_no_more_than_was_held(
    max_uses: int, cost: int, steps: list[tuple[str, Any]]
) -> None:
    async def act(scene: Scene) -> None:
        await scene.hold_several(max_uses, cost)
        redeemed: set[str] = set()
        reported: tuple[int, bool] | None = None
        for what, how in steps:
            try:
                if what == "redeem":
                    await scene.redeem(how)
                    assert reported is None, "a permit that is reported on is closed"
                    redeemed.add(how)
                else:
                    uses, executed = how
                    await scene.reported(uses=uses, executed=executed)
                    assert reported in {None, how}
                    reported = how
            except PdpError as error:
                assert error.reason_code in {  # noqa: PT017 - any of these, or none
                    "permit_used", "request_invalid", "outcome_already_reported"
                }  # fmt: skip
            assert len(redeemed) <= max_uses
            if reported is None:
                assert await scene.amounts() == (0, 3 + max_uses * cost)
            else:
                assert await scene.amounts() == (cost * max(reported[0], len(redeemed)), 3)

    with tempfile.TemporaryDirectory() as folder:
        play(Path(folder), act)


# Attacks


def test_a_redemption_that_names_no_arguments_is_none_of_a_permit_for_some(tmp_path: Path) -> None:
    async def act(scene: Scene) -> None:
        redemption = replace(scene.redemption("use-1"), arguments_sha256="")
        with pytest.raises(PermitError) as refused:
            await execution.redeem(scene.rooms, redemption)
        assert refused.value.reason_code == "permit_mismatch"

    play(tmp_path, act)


@pytest.mark.parametrize("change", ({"max_uses": 9}, {"arguments_sha256": ""}, {"resource": ""}))
def test_a_permit_whose_words_were_changed_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    async def act(scene: Scene) -> None:
        await scene.sign(resource="order/918")
        header, _, signature = scene.permit.token.split(".")
        claims = replace(scene.permit, **change).to_claims()
        payload = base64url.encode(canonical_bytes(claims))
        scene.permit = replace(scene.permit, token=f"{header}.{payload}.{signature}")
        with pytest.raises(PermitError) as refused:
            await scene.redeem("use-1")
        assert refused.value.reason_code == "permit_invalid"
        assert await scene.refused(executed=False) == "permit_invalid"

    play(tmp_path, act)


def test_no_permit_for_some_arguments_is_for_several_calls_even_where_it_is_signed(
    tmp_path: Path,
) -> None:
    async def act(scene: Scene) -> None:
        await scene.sign(max_uses=10)
        with pytest.raises(PermitError) as refused:
            await scene.redeem("use-1")
        assert refused.value.reason_code == "permit_invalid"

    play(tmp_path, act)


def test_only_who_has_the_certificate_reports_on_a_permit_that_is_bound_to_it(
    tmp_path: Path,
) -> None:
    async def act(scene: Scene) -> None:
        await scene.sign(certificate_sha256="m" * 43)
        for stolen in ("", "s" * 43):
            assert await scene.refused(certificate_sha256=stolen) == "permit_mismatch"
        assert await scene.amounts() == (0, 3)
        await scene.redeem("use-1")
        await scene.reported(certificate_sha256="m" * 43)
        assert await scene.amounts() == (3, 0)

    play(tmp_path, act)
