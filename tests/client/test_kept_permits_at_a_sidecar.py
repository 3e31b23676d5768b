"""Permits for several calls, spent at a real sidecar: what ends them, and what they cost."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pdp.api.v1 import budget_pb2
from pdp.client import AsyncGuard, Guard, Permit, PermitDenied, current_permit
from pdp.permit import PermitError, PermitRedeemer
from pdp.policy.archive import pack, read_archive
from pdp.testing import Caller, SidecarProcess, TokenIssuer
from tests.client.faces import Awaiting, Blocking, Face
from tests.e2e.operating import command, records, soon

ROOT = Path(__file__).parents[2]
ISSUER = TokenIssuer()
STARTER = read_archive((ROOT / "policies/bundle.tar.gz").read_bytes(), place="starter")
MAX_USES = 100
SHARE = 3
"""What a call of orders.read is charged, in calls."""
CONFIG: dict[str, Any] = {
    "limits": {"tenants": {"calls_per_second": 100_000, "burst": 100_000}},
}


def release(path: Path, number: int, *, max_uses: int = MAX_USES) -> str:
    """Put a bundle there under which reading orders is permitted for several calls at
    once, and updating them for several within two seconds; its revision.
    """
    manifest = json.loads(STARTER[".manifest"]) | {
        "revision": f"r{number}",
        "metadata": {"pdp": {"sequence": number}},
    }
    data = json.loads(STARTER["data.json"])
    read, update = data["tools"]["orders.read"], data["tools"]["orders.update"]
    read["charge"] = [{"budget": "tools", "unit": "calls", "amount": SHARE}]
    read["permit"] = {"binds": ["tool"], "max_uses": max_uses, "ttl_seconds": 60}
    update["permit"] = {"binds": ["tool"], "max_uses": max_uses, "ttl_seconds": 2}
    for tenant in ("tenant_acme", "tenant_globex"):
        data["tenants"][tenant]["limits"] = [
            {
                "id": "calls", "budget": "tools", "unit": "calls", "window": "lifetime",
                "limit": 10**9, "scope": "actor",
            }
        ]  # fmt: skip
    files = {".manifest": json.dumps(manifest).encode(), "data.json": json.dumps(data).encode()}
    draft = path.with_suffix(".draft")
    draft.write_bytes(pack({**STARTER, **files}))
    draft.replace(path)
    return f"r{number}"


def serving(directory: Path, **config: Any) -> SidecarProcess:
    path = directory / "bundle.tar.gz"
    release(path, 1)
    policy = {"bundles": {"main": {"path": str(path), "poll_seconds": 0.1}}}
    return SidecarProcess(
        directory, issuer=ISSUER, bundle=path, config={**CONFIG, "policy": policy, **config}
    )


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    with serving(tmp_path_factory.mktemp("several")) as sidecar:
        yield sidecar


@pytest.fixture(scope="module")
def unsettled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    """One to which something happens in each test; afterwards it serves again."""
    with serving(tmp_path_factory.mktemp("unsettled")) as sidecar:
        yield sidecar


@pytest.fixture(params=(Blocking, Awaiting), ids=("guard", "async_guard"))
def face(sidecar: SidecarProcess, request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param(sidecar.target)
    yield face
    face.dispose()


@pytest.fixture
def actor() -> str:
    return f"user-{uuid.uuid4()}"


@functools.cache
def token_of(actor: str, tenant: str = "tenant_acme") -> str:
    """The same whenever it is asked for."""
    scopes = ["orders:read", "orders:write"]
    return ISSUER.token(tenant, actor, roles=["support_agent"], scopes=scopes)


def spent(sidecar: SidecarProcess, actor: str) -> tuple[int, int]:
    """What the actor has spent of its budget, and what is held."""
    with Caller(sidecar.target, token=token_of(actor)) as caller:
        [limit] = caller.budget.GetBudget(budget_pb2.GetBudgetRequest(tool="orders.read")).limits
        return limit.spent, limit.held


def reports(sidecar: SidecarProcess, actor: str) -> list[dict[str, Any]]:
    return [
        record
        for record in records(sidecar)
        if record["actor_id"] == actor and record["type"] == "outcome"
    ]


def is_reported(sidecar: SidecarProcess, actor: str, permit: Permit) -> bool:
    return permit.id in {record["permit_id"] for record in reports(sidecar, actor)}


def decisions(sidecar: SidecarProcess, actor: str) -> list[dict[str, Any]]:
    return [
        record
        for record in records(sidecar)
        if record["actor_id"] == actor and record["type"] == "decision"
    ]


def reader(guard: Face | Guard) -> tuple[Callable[..., Permit], list[Permit]]:
    """A tool, and the permits of its calls."""
    permits: list[Permit] = []

    @guard.tool("orders.read")
    def read_order(order_id: str = "918") -> Permit:
        permits.append(current_permit())
        return permits[-1]

    return read_order, permits


def begin(guard: Face | Guard, read_order: Callable[..., Permit], token: str) -> Permit:
    """Call until a permit is kept."""
    found: list[Permit] = []
    with guard.acting_for(token):

        def is_kept() -> bool:
            found.append(read_order())
            return len(found) > 1 and found[-1].id == found[-2].id

        assert soon(is_kept)
    return found[-1]


def test_what_is_settled_is_what_was_used_and_the_rest_returns(
    sidecar: SidecarProcess, face: Face, actor: str
) -> None:
    read_order, permits = reader(face)
    kept = begin(face, read_order, token_of(actor))
    with face.acting_for(token_of(actor)):
        for number in range(30):
            read_order(str(number))
    spent_before, held = spent(sidecar, actor)
    assert held == MAX_USES * SHARE
    assert spent_before == SHARE * sum(permit.id != kept.id for permit in permits)
    face.close()
    assert spent(sidecar, actor) == (SHARE * len(permits), 0)
    found = {record["permit_id"]: record["detail"]["uses"] for record in reports(sidecar, actor)}
    assert found == Counter(permit.id for permit in permits)
    assert len(decisions(sidecar, actor)) == len(found)


def test_a_call_that_fails_costs_nothing_and_the_others_their_share(
    sidecar: SidecarProcess, face: Face, actor: str
) -> None:
    read_order, permits = reader(face)

    @face.tool("orders.read")
    def fails(order_id: str = "918") -> None:
        raise KeyError("secret")

    begin(face, read_order, token_of(actor))
    with face.acting_for(token_of(actor)):
        for _ in range(3):
            with pytest.raises(KeyError):
                fails()
    face.close()
    assert spent(sidecar, actor) == (SHARE * len(permits), 0)


def test_where_every_call_fails_nothing_is_spent(
    sidecar: SidecarProcess, face: Face, actor: str
) -> None:
    @face.tool("orders.read")
    def fails(order_id: str = "918") -> None:
        raise KeyError("secret")

    with face.acting_for(token_of(actor)):
        for _ in range(3):
            with pytest.raises(KeyError):
                fails()
    face.close()
    assert spent(sidecar, actor) == (0, 0)
    assert {record["reason_code"] for record in reports(sidecar, actor)} == {"tool_failed"}


def test_a_tools_own_cost_is_what_is_settled(
    sidecar: SidecarProcess, face: Face, actor: str
) -> None:
    costs: list[int] = []

    @face.tool("orders.read", cost=lambda cost: [("tools", "calls", cost)])
    def read_order(order_id: str = "918") -> int:
        costs.append(len(costs) % 3)
        return costs[-1]

    with face.acting_for(token_of(actor)):
        for _ in range(20):
            read_order()
    face.close()
    assert spent(sidecar, actor) == (sum(costs), 0)


def test_a_permit_from_authorize_is_for_one_call(
    sidecar: SidecarProcess, face: Face, actor: str
) -> None:
    with face.acting_for(token_of(actor)):
        executed, failed = (face.authorize("orders.read", {"order_id": "918"}) for _ in range(2))
    assert executed.max_uses == MAX_USES
    face.executed(executed)
    face.failed(failed, KeyError("secret"))
    assert spent(sidecar, actor) == (SHARE, 0)


def test_the_tool_server_takes_each_use_of_a_kept_permit_and_no_more(
    sidecar: SidecarProcess, actor: str
) -> None:
    redeemed: list[str] = []
    with Guard(sidecar.target) as guard, PermitRedeemer(sidecar.target) as tool_server:

        @guard.tool("orders.read")
        def read_order(order_id: str = "918") -> Permit:
            permit = current_permit()
            tool_server.redeem(permit)
            redeemed.append(permit.id)
            return permit

        kept = begin(guard, read_order, token_of(actor))
        with guard.acting_for(token_of(actor)):
            while redeemed.count(kept.id) < MAX_USES:
                read_order()
        with pytest.raises(PermitError):
            tool_server.redeem(kept)
    assert max(Counter(redeemed).values()) == MAX_USES
    assert spent(sidecar, actor) == (SHARE * len(redeemed), 0)


def test_32_threads_of_two_tenants_never_overspend_a_permit_nor_share_one(
    sidecar: SidecarProcess, actor: str
) -> None:
    tenants = ("tenant_acme", "tenant_globex")
    seen: list[tuple[str, Permit]] = []
    with Guard(sidecar.target, timeout_seconds=30) as guard:
        read_order, _ = reader(guard)
        for tenant in tenants:
            begin(guard, read_order, token_of(actor, tenant))
        before = Counter(record["permit_id"] for record in decisions(sidecar, actor))
        gate = threading.Barrier(32)
        tokens = [(tenant, token_of(actor, tenant)) for tenant in tenants]

        def spend(number: int) -> None:
            tenant, token = tokens[number % 2]
            gate.wait()
            for _ in range(50):
                with guard.acting_for(token):
                    seen.append((tenant, read_order(str(number))))

        with ThreadPoolExecutor(32) as pool:
            list(pool.map(spend, range(32)))
    assert all(permit.tenant == tenant for tenant, permit in seen)
    assert max(Counter(permit.id for _, permit in seen).values()) <= MAX_USES
    settled = [record["detail"]["uses"] for record in reports(sidecar, actor)]
    known = len({permit.id for _, permit in seen} | before.keys())
    assert len(settled) == len(decisions(sidecar, actor)) == known
    calls = sum(settled) - len(seen)
    assert 0 < calls < 2 * MAX_USES  # those that began
    assert max(settled) <= MAX_USES


def test_a_thousand_tasks_never_overspend_a_permit(sidecar: SidecarProcess, actor: str) -> None:
    seen: list[str] = []

    async def run() -> None:
        async with AsyncGuard(sidecar.target, timeout_seconds=30) as guard:

            @guard.tool("orders.read")
            async def read_order(order_id: str) -> None:
                seen.append(current_permit().id)
                await asyncio.sleep(0)

            with guard.acting_for(token_of(actor)):
                while len(set(seen)) == len(seen):
                    await read_order("918")
                    await asyncio.sleep(0.005)
                await asyncio.gather(*(read_order(str(number)) for number in range(1_000)))

    asyncio.run(run())
    found = {record["permit_id"]: record["detail"]["uses"] for record in reports(sidecar, actor)}
    assert found == Counter(seen)
    assert max(found.values()) == MAX_USES
    assert spent(sidecar, actor) == (SHARE * len(seen), 0)
    assert len(decisions(sidecar, actor)) < 30


def test_another_token_of_the_same_user_is_asked_for_anew(
    sidecar: SidecarProcess, face: Face, actor: str
) -> None:
    read_order, _ = reader(face)
    kept = begin(face, read_order, token_of(actor))
    lesser = ISSUER.token("tenant_acme", actor, roles=[], scopes=["orders:read"])
    with face.acting_for(lesser), pytest.raises(PermitDenied) as denied:
        read_order()
    assert denied.value.reason_code == "role_not_allowed"
    rotated = ISSUER.token(
        "tenant_acme", actor, roles=["support_agent"], scopes=["orders:read"], jti="another"
    )
    with face.acting_for(rotated):
        assert read_order().id != kept.id


def test_a_permit_that_expires_is_reported_on_by_itself(
    sidecar: SidecarProcess, face: Face, actor: str
) -> None:
    @face.tool("orders.update")
    def update_order(order_id: str = "918", status: str = "shipped") -> Permit:
        return current_permit()

    kept = begin(face, update_order, token_of(actor))
    assert soon(lambda: is_reported(sidecar, actor, kept))
    with face.acting_for(token_of(actor)):
        assert update_order().id != kept.id


def test_a_new_revision_ends_what_an_earlier_one_permitted(
    unsettled: SidecarProcess, actor: str
) -> None:
    with Guard(unsettled.target) as guard:
        read_order, permits = reader(guard)
        kept = begin(guard, read_order, token_of(actor))
        revision = release(unsettled.directory / "bundle.tar.gz", 2)
        assert soon(lambda: bool(reports(unsettled, actor)[1:]))  # with no call to come
        with guard.acting_for(token_of(actor)):
            assert read_order().id != kept.id
        assert begin(guard, read_order, token_of(actor)).policy_revision == revision
    assert spent(unsettled, actor) == (SHARE * len(permits), 0)


def test_a_revocation_ends_what_was_permitted_before_also_for_the_revoked(
    unsettled: SidecarProcess, actor: str
) -> None:
    other = f"{actor}-other"
    with Guard(unsettled.target) as guard:
        read_order, permits = reader(guard)
        begin(guard, read_order, token_of(other))  # as whom it watches
        kept = begin(guard, read_order, token_of(actor))
        command(unsettled, "revoke", "actor", "tenant_acme", actor, "--reason", "left")

        def refusal() -> str:
            try:
                with guard.acting_for(token_of(actor)):
                    read_order()
            except PermitDenied as denied:
                return denied.reason_code
            return ""

        calls = len(permits)
        assert soon(lambda: refusal() == "actor_revoked")
        assert soon(lambda: is_reported(unsettled, actor, kept))
        assert begin(guard, read_order, token_of(other)).actor == other
        assert len(permits) >= calls


def test_a_watch_whose_own_caller_is_revoked_ends_and_another_caller_opens_one(
    unsettled: SidecarProcess, actor: str
) -> None:
    other = f"{actor}-other"
    with Guard(unsettled.target) as guard:
        read_order, _ = reader(guard)
        begin(guard, read_order, token_of(actor))
        command(unsettled, "revoke", "actor", "tenant_acme", actor, "--reason", "left")

        def is_refused() -> bool:
            try:
                with guard.acting_for(token_of(actor)):
                    read_order()
            except PermitDenied as denied:
                return denied.reason_code == "actor_revoked"
            return False

        assert soon(is_refused)
        begin(guard, read_order, token_of(other))


def test_a_killed_sidecar_ends_all_and_is_told_of_their_uses_when_it_is_back(
    unsettled: SidecarProcess, actor: str
) -> None:
    with Guard(unsettled.target) as guard:
        read_order, permits = reader(guard)
        begin(guard, read_order, token_of(actor))
        unsettled.kill()

        def refusal() -> str:
            try:
                with guard.acting_for(token_of(actor)):
                    read_order()
            except PermitDenied as denied:
                return denied.reason_code
            return ""

        assert soon(lambda: refusal() == "pdp_unavailable")
        calls = len(permits)
        assert calls < MAX_USES
        unsettled.start()
        assert soon(lambda: spent(unsettled, actor) == (SHARE * calls, 0))
        begin(guard, read_order, token_of(actor))
    assert spent(unsettled, actor) == (SHARE * len(permits), 0)


def test_a_sidecar_that_drains_ends_all_that_it_permitted(
    unsettled: SidecarProcess, actor: str
) -> None:
    with Guard(unsettled.target) as guard:
        read_order, permits = reader(guard)
        begin(guard, read_order, token_of(actor))
        assert unsettled.terminate() == 0
        with guard.acting_for(token_of(actor)), pytest.raises(PermitDenied):
            read_order()
        calls = len(permits)
        unsettled.start()
        assert soon(lambda: spent(unsettled, actor) == (SHARE * calls, 0))


@pytest.mark.slow
def test_a_use_that_outlasts_what_is_held_is_settled_late_with_the_others(
    tmp_path: Path, actor: str
) -> None:
    brief = {"permit": {"ttl_seconds": 4}, "budget": {"hold_ttl_seconds": 4}}
    calls = []
    with serving(tmp_path, **brief) as sidecar:

        @(guard := Guard(sidecar.target)).tool("orders.read")
        def read_order(order_id: str = "918") -> Permit:
            calls.append(order_id)
            if order_id == "919":
                assert soon(lambda: spent(sidecar, actor)[1] == 0)  # what was held expires
            return current_permit()

        with guard:
            kept = begin(guard, read_order, token_of(actor))
            with guard.acting_for(token_of(actor)):
                assert read_order("919").id == kept.id
            assert soon(lambda: is_reported(sidecar, actor, kept))
        assert spent(sidecar, actor) == (SHARE * len(calls), 0)


@pytest.mark.slow
def test_every_use_is_settled_once_however_often_the_sidecar_is_killed(
    tmp_path: Path, actor: str
) -> None:
    over = threading.Event()
    permits: list[str] = []
    with serving(tmp_path) as sidecar, Guard(sidecar.target) as guard:

        @guard.tool("orders.read")
        def read_order(order_id: str) -> None:
            permits.append(current_permit().id)

        def spend() -> None:
            while not over.is_set():
                with guard.acting_for(token_of(actor)):
                    try:
                        read_order("918")
                    except PermitDenied as denied:
                        refused.add(denied.reason_code)

        refused: set[str] = set()
        with ThreadPoolExecutor(16) as pool:
            spending = [pool.submit(spend) for _ in range(16)]
            for number in range(2, 6):
                calls = len(permits)
                assert soon(lambda calls=calls: len(permits) > calls + 500)  # type: ignore[misc]
                release(tmp_path / "bundle.tar.gz", number)
                sidecar.kill()
                sidecar.start()
            over.set()
            for each in spending:
                each.result()
        guard.close()
        assert soon(lambda: spent(sidecar, actor)[0] == SHARE * len(permits))
        settled = {
            record["permit_id"]: record["detail"]["uses"]
            for record in reports(sidecar, actor)
            if record["outcome"] == "executed"
        }
    assert settled == Counter(permits)
    assert refused <= {"pdp_unavailable", "deadline_exceeded", "permit_used", "rate_limited"}


@pytest.mark.slow
def test_a_sidecar_that_hangs_is_missed_and_what_it_permitted_ends(
    tmp_path: Path, actor: str
) -> None:
    permits: list[str] = []
    with serving(tmp_path) as sidecar, Guard(sidecar.target) as guard:
        read_order, _ = reader(guard)
        kept = begin(guard, read_order, token_of(actor))
        assert sidecar.process is not None
        sidecar.process.send_signal(signal.SIGSTOP)
        hangs_since = time.monotonic()

        def refusal() -> str:
            try:
                with guard.acting_for(token_of(actor)):
                    permits.append(read_order().id)
            except PermitDenied as denied:
                return denied.reason_code
            time.sleep(0.5)
            return ""

        try:
            while not (why := refusal()):
                assert time.monotonic() < hangs_since + 45
        finally:
            sidecar.process.send_signal(signal.SIGCONT)
    assert why in {"deadline_exceeded", "pdp_unavailable"}
    assert set(permits) == {kept.id}
    assert len(permits) < MAX_USES - 10  # it was not used up, nor did it expire
