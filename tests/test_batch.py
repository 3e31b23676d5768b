"""Batches of all or nothing: whatever fails, and wherever they are cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pdp import batch, decision
from pdp.admission import Admission, Lane
from pdp.audit.record import AuditReceipt, AuditRecord
from pdp.budget.sqlite import SqliteLedger
from pdp.canonical import JsonObject, JsonValue, sha256_hex
from pdp.config import TenantLimits
from pdp.errors import PdpError
from pdp.identity.resolver import Credentials
from pdp.identity.subject import Subject
from pdp.permit.claims import Permit, PermitError
from pdp.permit.issuer import PermitIssuer
from pdp.permit.signing import SigningKey
from pdp.permit.uses import PermitUses
from pdp.permit.verifier import PermitVerifier
from pdp.policy.engine import Entrypoint
from pdp.policy.live import LivePolicy
from pdp.revocation.file import RevocationFile
from pdp.revocation.revocations import Revocations
from pdp.rooms import Rooms
from pdp.storage import Durability
from pdp.strangers import Strangers

NOW = 1_800_000_000.0
KEY = SigningKey.generate()
SUBJECT = Subject(tenant="tenant_acme", actor="user-7", issuer="https://id.example")
LIMIT: JsonObject = {
    "id": "day",
    "budget": "tools",
    "unit": "calls",
    "window": "day",
    "limit": 10,
    "scope": "tenant",
}


class PowerCut(BaseException):
    """Nothing is done from here on."""


@dataclass
class Power:
    """Goes out at the given step: before it is done, or right after."""

    steps_left: int | None = None
    after: bool = False
    failing: dict[str, Exception] = field(default_factory=dict)
    steps: int = 0

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        if name in self.failing:
            raise self.failing[name]
        self.steps += 1
        if self.steps_left is not None:
            if self.steps_left == 0 and not self.after:
                self.steps_left = -1
            if self.steps_left < 0:
                raise PowerCut
            self.steps_left -= 1
        yield
        if self.steps_left == -1:
            raise PowerCut


class Ledger(SqliteLedger):
    power: Power

    async def reserve(self, *args: Any, **kwargs: Any) -> Any:
        with self.power.step(f"reserve {args[1].key}"):
            return await super().reserve(*args, **kwargs)

    async def release(self, *args: Any, **kwargs: Any) -> Any:
        with self.power.step("release"):
            return await super().release(*args, **kwargs)


class Uses(PermitUses):
    power: Power

    async def close_permit(self, permit: Permit) -> Any:
        with self.power.step("close"):
            return await super().close_permit(permit)


@dataclass
class Audit:
    power: Power
    records: list[AuditRecord]
    healthy = True

    async def append(self, record: AuditRecord) -> AuditReceipt:
        with self.power.step(f"record {record.reason_code}"):
            self.records.append(record)
            return AuditReceipt(len(self.records), "0" * 64)

    async def close(self) -> None: ...


class Identity:
    async def resolve(self, credentials: Credentials) -> Subject:
        return SUBJECT


class Policy:
    """Refuses the tool "closed"; every other costs the amount in its name."""

    revision = "revision-1"

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:
        if entrypoint is Entrypoint.BUDGET_LIMITS:
            return [LIMIT]
        tool = str(document["tool"])
        if tool == "closed":
            return {"allow": False, "reason_code": "closed_on_sundays"}
        charge: JsonObject = {"budget": "tools", "unit": "calls", "amount": int(tool)}
        return {"allow": True, "reason_code": "ok", "charge": [charge] if int(tool) else []}

    async def close(self) -> None: ...


@dataclass
class Scene:
    """A sidecar's rooms, which may lose their power and be opened again."""

    directory: Path
    records: list[AuditRecord] = field(default_factory=list)
    signed: dict[str, Permit] = field(default_factory=dict)

    def ask(
        self, *tools: str, power: Power | None = None, all_or_nothing: bool = True
    ) -> tuple[batch.Result, ...]:
        """Ask for calls of these tools, with the request ids r-0, r-1, ..."""
        ids = [f"r-{index}" for index in range(len(tools))]
        asked = batch.Batch(
            questions=tuple(
                question(name, tool, batch.digest_of(ids) if all_or_nothing else "")
                for name, tool in zip(ids, tools, strict=True)
            ),
            digest=batch.digest_of(ids) if all_or_nothing else "",
        )
        return asyncio.run(self._ask(asked, power or Power()))

    async def _ask(self, asked: batch.Batch, power: Power) -> tuple[batch.Result, ...]:
        rooms, ledger, uses = self.rooms(power)
        try:
            results = await batch.authorize_batch(rooms, Credentials(bearer="token"), asked)
        finally:
            await ledger.close()
            await uses.close()
        for result in results:
            if isinstance(result, decision.Recorded) and result.answer.permit is not None:
                self.signed[result.answer.permit.id] = result.answer.permit
        return results

    def rooms(self, power: Power) -> tuple[Rooms, Ledger, Uses]:
        ledger = Ledger(
            self.directory / "ledger.db", durability=Durability.PROCESS, clock=lambda: NOW
        )
        uses = Uses(self.directory / "permits.db", durability=Durability.PROCESS, clock=lambda: NOW)
        ledger.power = uses.power = power
        rooms = Rooms(
            identity=Identity(),
            admission=Admission(
                max_concurrent_calls=2,
                max_waiting_calls=100,
                classes=lambda _: TenantLimits().service_class,
            ),
            policy=LivePolicy(Policy()),
            ledger=ledger,
            permits=PermitIssuer(KEY, issuer="agent-pdp"),
            permit_verifier=PermitVerifier(KEY.public_set, issuer="agent-pdp", audience="tools"),
            permit_uses=uses,
            audit=Audit(power, self.records),
            digest_key=b"k" * 32,
            permit_ttl_seconds=60,
            hold_ttl_seconds=120,
            ledger_id="ledger-1",
            strangers=Strangers(),
            revocations=Revocations(RevocationFile(Path("nowhere"))),
            clock=lambda: NOW,
        )
        return rooms, ledger, uses

    def held(self) -> list[int]:
        """The amounts that are held."""

        async def look() -> list[int]:
            _, ledger, uses = self.rooms(Power())
            found = await ledger.holds(SUBJECT.tenant, most=100)
            await ledger.close()
            await uses.close()
            return sorted(hold.parts[0].charge.amount for hold in found)

        return asyncio.run(look())

    def redeemable(self, permit_ids: set[str]) -> set[str]:
        """Which of these permits can still be used."""

        async def look() -> set[str]:
            _, ledger, uses = self.rooms(Power())
            found = set()
            for permit_id in permit_ids:
                try:
                    await uses.redeem(permit_of(permit_id), key="1")
                except PermitError:
                    continue
                found.add(permit_id)
            await ledger.close()
            await uses.close()
            return found

        return asyncio.run(look())


def permit_of(permit_id: str) -> Permit:
    return Permit(
        id=permit_id,
        issuer="agent-pdp",
        audience="tools",
        tenant=SUBJECT.tenant,
        actor=SUBJECT.actor,
        tool="1",
        arguments_sha256="0" * 64,
        scopes=(),
        transaction="r-0",
        decision_id="decision",
        policy_revision="1",
        ledger="ledger-1",
        issued_at=int(NOW),
        expires_at=int(NOW) + 60,
        hold_id="",
    )


held_up: list[tuple[asyncio.Event, asyncio.Event]] = []
"""Where there is one, a question that is read sets the first and waits for the second."""


def question(request_id: str, tool: str, digest: str) -> decision.Asked:
    async def read() -> decision.Question:
        if held_up:
            reading, release = held_up.pop()
            reading.set()
            await release.wait()
        return decision.Question(
            request_id=request_id,
            tool=tool,
            resource=None,
            arguments={},
            arguments_sha256=sha256_hex({}),
            context={},
            audience="tools",
            batch=digest,
        )

    return decision.Asked(request_id=request_id, tool=tool, trace_id=None, read=read)


def codes(results: tuple[batch.Result, ...]) -> list[str]:
    return [
        result.answer.reason_code if isinstance(result, decision.Recorded) else str(result)
        for result in results
    ]


def test_a_batch_that_is_allowed_holds_all_of_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert codes(scene.ask("1", "0", "3")) == ["ok", "ok", "ok"]
    assert scene.held() == [1, 3]


@pytest.mark.parametrize(
    ("tools", "expected"),
    (
        (("1", "closed", "0"), ["batch_refused", "closed_on_sundays", "batch_refused"]),
        (("6", "6"), ["batch_refused", "tenant_budget_exceeded"]),
    ),
)
def test_one_refusal_undoes_the_rest_on_record(
    tmp_path: Path, tools: tuple[str, ...], expected: list[str]
) -> None:
    scene = Scene(tmp_path)
    results = scene.ask(*tools)
    assert sorted(codes(results)) == sorted(expected)
    assert scene.held() == []
    for result, code in zip(results, codes(results), strict=True):
        assert isinstance(result, decision.Recorded)
        assert (result.answer.permit, result.answer.charges) == (None, ())
        record = scene.records[result.receipt.sequence - 1]
        assert (record.outcome, record.reason_code) == ("denied", code)
        assert record.decision_id == result.answer.decision_id
    given = {record.permit_id for record in scene.records if record.outcome == "allowed"}
    assert {"released": [{"budget": "tools", "unit": "calls", "amount": int(tools[0])}]} in [
        record.detail for record in scene.records
    ]
    assert scene.redeemable({each for each in given if each}) == set()


def test_a_batch_of_each_on_its_own_undoes_nothing(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert codes(scene.ask("1", "closed", all_or_nothing=False)) == ["ok", "closed_on_sundays"]
    assert scene.held() == [1]


def test_a_fault_in_one_question_is_its_own(tmp_path: Path) -> None:
    power = Power(failing={"reserve r-1": RuntimeError("a fault")})
    scene = Scene(tmp_path)
    assert codes(scene.ask("1", "2", "3", power=power, all_or_nothing=False)) == [
        "ok", "a fault", "ok",
    ]  # fmt: skip
    assert scene.held() == [1, 3]


def test_a_fault_in_one_question_refuses_a_batch_of_all_or_nothing_for_good(
    tmp_path: Path,
) -> None:
    power = Power(failing={"reserve r-1": RuntimeError("a fault")})
    scene = Scene(tmp_path)
    assert codes(scene.ask("1", "2", power=power)) == ["batch_refused", "a fault"]
    assert scene.held() == []
    assert codes(scene.ask("1", "2")) == ["batch_refused", "batch_refused"]
    assert scene.held() == []


@pytest.mark.parametrize("step", ("release", "close", "record batch_refused"))
def test_what_can_not_be_undone_is_no_answer_and_is_undone_when_asked_again(
    tmp_path: Path, step: str
) -> None:
    scene = Scene(tmp_path)
    fault = PdpError("budget_unavailable", "Try again.")
    with pytest.raises(PdpError, match="Try again"):
        scene.ask("1", "closed", power=Power(failing={step: fault}))
    assert codes(scene.ask("1", "closed")) == ["batch_refused", "closed_on_sundays"]
    assert scene.held() == []


@pytest.mark.parametrize("after", (False, True))
@pytest.mark.parametrize(
    ("tools", "expected", "held"),
    (
        (("1", "closed", "2"), ["batch_refused", "closed_on_sundays", "batch_refused"], []),
        (("1", "0", "2"), ["ok", "ok", "ok"], [1, 2]),
    ),
)
def test_a_batch_comes_to_the_same_wherever_it_is_cut_off(
    tmp_path: Path,
    tools: tuple[str, ...],
    expected: list[str],
    held: list[int],
    *,
    after: bool,
) -> None:
    whole = Power()
    Scene(tmp_path / "whole").directory.mkdir()
    Scene(tmp_path / "whole").ask(*tools, power=whole)
    for steps in range(whole.steps):
        scene = Scene(tmp_path / f"{steps}")
        scene.directory.mkdir()
        with pytest.raises(PowerCut):
            scene.ask(*tools, power=Power(steps_left=steps, after=after))
        for _ in range(2):
            assert codes(scene.ask(*tools)) == expected, steps
            assert scene.held() == held, steps
        given = {each.permit_id for each in scene.records if each.permit_id}
        assert scene.redeemable(given) == set(scene.signed), steps


def test_the_same_request_id_alone_or_in_another_batch_is_another_question(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.ask("1", "closed")
    (alone,) = scene.ask("1", all_or_nothing=False)
    (other,) = scene.ask("1")
    for result in (alone, other):
        assert isinstance(result, PdpError)
        assert result.reason_code == "idempotency_key_reused"
    assert scene.held() == []


def test_a_batch_with_other_content_undoes_nothing_of_the_first(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.ask("1", "2")
    with pytest.raises(PdpError) as refused:
        scene.ask("1", "3")
    assert refused.value.reason_code == "idempotency_key_reused"
    assert scene.held() == [1, 2]
    assert codes(scene.ask("1", "2")) == ["ok", "ok"]


def test_a_fault_while_a_batch_is_answered_again_undoes_nothing_of_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.ask("1", "2")
    power = Power(failing={"reserve r-1": RuntimeError("a fault")})
    with pytest.raises(RuntimeError, match="a fault"):
        scene.ask("1", "2", power=power)
    assert scene.held() == [1, 2]
    assert codes(scene.ask("1", "2")) == ["ok", "ok"]


def test_what_waits_to_be_let_in_leaves_with_the_batch_s_caller(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    ids = ["r-0", "r-1", "r-2"]
    asked = batch.Batch(questions=tuple(question(each, "1", "") for each in ids))

    async def run() -> tuple[batch.Result, ...]:
        rooms, ledger, uses = scene.rooms(Power())
        async with rooms.admission.admitted("tenant_globex", Lane.QUESTIONS):
            asking = asyncio.create_task(
                batch.authorize_batch(rooms, Credentials(bearer="token"), asked)
            )
            # One of them is let in, and holds its place; the others wait.
            release, reading = asyncio.Event(), asyncio.Event()
            held_up.append((reading, release))
            await reading.wait()
            assert rooms.admission.waiting == 2
            rooms.admission.abandon(asking)
            await asyncio.sleep(0)
            assert rooms.admission.waiting == 0
            release.set()
            results = await asking
        await ledger.close()
        await uses.close()
        return results

    held_up.clear()
    first, *rest = asyncio.run(run())
    assert codes((first,)) == ["ok"]
    for result in rest:
        assert isinstance(result, PdpError)
        assert result.reason_code == "deadline_exceeded"
    assert scene.held() == [1]
