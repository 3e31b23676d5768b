"""Approvals and delegations that were wider than what they were given for, in the products of
others.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from pdp.client import DelegationRefused, Guard, current_permit
from pdp.permit import Permit, PermitError, PermitRedeemer, PermitVerifier, Sidecars
from pdp.testing import Caller, SidecarProcess, build_bundle
from pdp.tool import PermitDoor
from tests.e2e.operating import command, soon
from tests.field.shop import SHIPPED, door_of
from tests.field.world import IDP, ROOT, prepared, reason, token, write_bundle

OTHER_CALLS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("orders.update", {**SHIPPED, "order_id": "919"}),
    ("orders.update", {**SHIPPED, "status": "refunded"}),
    ("orders.update", {"order_id": "918"}),
    ("orders.update", {**SHIPPED, "note": ""}),
    ("orders.delete", dict(SHIPPED)),
)


def refusal(door: PermitDoor, permit: str, tool: str, arguments: dict[str, Any]) -> str:
    """Why the tool's door refuses the call; "ok" where it lets it in."""
    try:
        door.admit(permit, tool=tool, arguments=arguments)
    except PermitError as error:
        return error.reason_code
    return "ok"


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    """A sidecar whose policy wants a person's word for the tool tools.approved."""
    folder = tmp_path_factory.mktemp("asking")
    sources, opa = ROOT / "tests/server/policy", ROOT / ".tools/opa"
    bundle = build_bundle(sources, folder / "bundle.tar.gz", opa=opa)
    with SidecarProcess(folder, issuer=IDP, bundle=bundle) as sidecar:
        yield sidecar


@pytest.mark.parametrize(("tool", "arguments"), OTHER_CALLS)
def test_agenta_4854_a_yes_to_one_call_is_none_to_another(
    sidecar: SidecarProcess, guard: Guard, tool: str, arguments: dict[str, Any]
) -> None:
    """Agenta-AI/agenta#4854: a person's yes was kept by the tool's name, so that it ran with
    other arguments. There are no approvals here yet; what there is, a permit, is for one call.
    """
    with guard.acting_for(token()):
        permit = guard.authorize("orders.update", dict(SHIPPED))
    with door_of(sidecar.target) as door:
        assert refusal(door, permit.token, tool, arguments) == "permit_mismatch"
        assert refusal(door, permit.token, "orders.update", dict(SHIPPED)) == "ok"


def test_extra_139_where_a_person_must_say_yes_nothing_runs_without(
    asking: SidecarProcess,
) -> None:
    """extra-org/extra#139: one approval opened the gate for calls that nobody had seen. Here
    nobody can approve yet: where the policy wants it, no arguments and no retry bring a permit.
    """
    with Caller(asking.target, token=token(roles=["agent"])) as caller:
        said: tuple[dict[str, Any], ...]
        said = ({}, {"approved": True}, {"approval": {"by": "manager"}})
        for number, arguments in enumerate(said):
            for _ in range(2):
                answer = caller.authorize("tools.approved", arguments, request_id=f"call-{number}")
                assert (answer.decision, answer.permit) == (False, "")
                assert answer.reason_code == "approval_required"


GATED: Final = """
import sys
from pdp.client import Guard, PermitDenied
guard = Guard(sys.argv[1])

@guard.tool("tools.approved")
def act():
    print("it has run")

with guard.acting_for(sys.argv[2]):
    try:
        act()
    except PermitDenied as denied:
        print(denied.reason_code)
guard.close()
"""


@pytest.mark.parametrize("stdin", ("closed", "empty"))
def test_crewai_6859_a_gate_that_can_ask_nobody_stays_shut(
    asking: SidecarProcess, stdin: str
) -> None:
    """crewAIInc/crewAI#6859: with stdin closed the question for a person failed, and the tool
    ran; here the answer comes from the sidecar, and without a yes nothing runs.
    """
    command = [sys.executable, "-c", GATED, asking.target, token(roles=["agent"])]
    if stdin == "closed":
        command = ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *command]
    ran = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout == "approval_required\n"


def several(data: Any) -> None:
    """Reads are permitted for many calls at once."""
    data["tools"]["orders.read"]["permit"] = {"binds": ["tool"], "max_uses": 100}


@pytest.mark.slow
def test_agenta_4854_what_was_permitted_for_several_calls_ends_with_the_policy(
    tmp_path: Path,
) -> None:
    """And a yes outlived the rules under which it was given; here what the stub keeps for later
    calls ends when another revision is in force.
    """
    process = prepared(tmp_path)
    write_bundle(process.directory / "bundle.tar.gz", change=several)
    with process, Guard(process.target, timeout_seconds=20) as guard:
        under: list[Permit] = []

        @guard.tool("orders.read")
        def read(order_id: str) -> None:
            under.append(current_permit())

        with guard.acting_for(token()):

            def is_kept() -> bool:
                read("1")
                read("2")
                return under[-1].id == under[-2].id

            assert soon(is_kept)
            kept = under[-1]
            revision = write_bundle(process.directory / "bundle.tar.gz", release=2, change=several)

            def is_asked_anew() -> bool:
                read("3")
                return under[-1].id != kept.id

            assert soon(is_asked_anew)
        assert (kept.policy_revision, under[-1].policy_revision) == ("field-1", revision)


def test_aisvs_1104_a_delegate_has_a_part_of_what_its_parent_has(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """OWASP/AISVS#1104: sub-agents got their own, wider permissions; here tools, arguments and
    budget of a child lie within its parent's, or nothing is delegated.
    """
    shipped_only = {"orders.update": {"status": {"one_of": ["shipped"]}}}
    with guard.acting_for(token()):
        parent = guard.delegate(
            "planner",
            tools=["orders.read", "orders.update"],
            arguments=shipped_only,
            budget=[("tools", "calls", 3)],
        )
    with guard.accept(parent.metadata()):
        for wider in (
            {"tools": ["orders.read", "mail.send"]},
            {"tools": ["orders.update"], "budget": [("tools", "calls", 4)]},
            {"tools": ["orders.update"], "budget": [("llm", "usd_micros", 1)]},
        ):
            with pytest.raises(DelegationRefused) as caught:
                guard.delegate("worker", **wider)
            assert caught.value.reason_code in {"delegation_too_wide", "budget_not_delegated"}
        child = guard.delegate("worker", tools=["orders.update"])
    with guard.accept(child.metadata()):
        assert reason(guard.authorize, "orders.read", {"order_id": "1"}) == "tool_not_delegated"
        refunded = {**SHIPPED, "status": "refunded"}
        assert reason(guard.authorize, "orders.update", refunded) == "argument_not_delegated"
        assert reason(guard.authorize, "orders.update", dict(SHIPPED)) == "ok"


def test_opencode_26700_a_coordinator_without_a_tool_has_none_to_give(guard: Guard) -> None:
    """anomalyco/opencode#26700, the counter-case: coordinators that hold no tools but may hand
    them on. Here nobody hands on what it has not: it narrows by rules for arguments instead.
    """
    with guard.acting_for(token(roles=["viewer"])):
        worker = guard.delegate("worker", tools=["orders.update"])
    with guard.accept(worker.metadata()):
        assert reason(guard.authorize, "orders.update", dict(SHIPPED)) == "role_not_allowed"
    with guard.acting_for(token()):
        coordinator = guard.delegate("coordinator", tools=["orders.update"])
    with guard.accept(coordinator.metadata()):
        one = {"orders.update": {"order_id": {"one_of": ["918"]}}}
        worker = guard.delegate("worker", tools=["orders.update"], arguments=one)
    with guard.accept(worker.metadata()):
        assert reason(guard.authorize, "orders.update", dict(SHIPPED)) == "ok"
        other = {**SHIPPED, "order_id": "919"}
        assert reason(guard.authorize, "orders.update", other) == "argument_not_delegated"


# Acceptance: a permit is refused by the tool when


def test_a_permit_for_another_server_is_refused(sidecar: SidecarProcess, guard: Guard) -> None:
    """Acceptance: wrong audience."""
    with guard.acting_for(token()):
        permit = guard.authorize("orders.update", dict(SHIPPED), audience="mail")
    with door_of(sidecar.target) as door:
        assert refusal(door, permit.token, "orders.update", dict(SHIPPED)) == "permit_mismatch"


def test_a_permit_of_another_tenant_is_refused(sidecar: SidecarProcess, guard: Guard) -> None:
    """Acceptance: other tenant."""
    with guard.acting_for(token("tenant_globex")):
        permit = guard.authorize("orders.update", dict(SHIPPED))
    with door_of(sidecar.target, only_tenant="tenant_acme") as door:
        assert refusal(door, permit.token, "orders.update", dict(SHIPPED)) == "permit_mismatch"


def test_a_permit_is_refused_the_second_time(sidecar: SidecarProcess, guard: Guard) -> None:
    """Acceptance: second use."""
    with guard.acting_for(token()):
        permit = guard.authorize("orders.update", dict(SHIPPED))
    with door_of(sidecar.target) as door:
        told = [refusal(door, permit.token, "orders.update", dict(SHIPPED)) for _ in range(3)]
    assert told == ["ok", "permit_used", "permit_used"]


def test_a_permit_is_refused_after_its_time(sidecar: SidecarProcess, guard: Guard) -> None:
    """Acceptance: expired, by the tool server's clock."""
    with guard.acting_for(token()):
        permit = guard.authorize("orders.update", dict(SHIPPED))
    with PermitRedeemer(sidecar.target) as redeemer, Sidecars([redeemer]) as sidecars:
        verifier = PermitVerifier(
            sidecars, issuer="agent-pdp", audience="tools", clock=lambda: time.time() + 120
        )
        door = PermitDoor(verifier, sidecars)
        assert refusal(door, permit.token, "orders.update", dict(SHIPPED)) == "permit_expired"


def test_a_permit_falls_with_the_delegation_above_it(sidecar: SidecarProcess, guard: Guard) -> None:
    """Acceptance: revoked parent."""
    with guard.acting_for(token(jti="field-root")):
        parent = guard.delegate("planner", tools=["orders.update"])
    with guard.accept(parent.metadata()):
        child = guard.delegate("worker", tools=["orders.update"])
    with guard.accept(child.metadata()):
        permit = guard.authorize("orders.update", dict(SHIPPED))
        words = ("revoke", "token", "tenant_acme", "field-root", "--reason", "logged out")
        command(sidecar, *words)
        ended = "token_revoked"
        assert soon(lambda: reason(guard.authorize, "orders.update", dict(SHIPPED)) == ended)
    with door_of(sidecar.target) as door:
        assert refusal(door, permit.token, "orders.update", dict(SHIPPED)) == "permit_revoked"


def test_a_delegation_that_was_widened_by_hand_is_refused(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    """Acceptance: widened child."""
    with guard.acting_for(token()):
        child = guard.delegate("worker", tools=["orders.read"])
    header, payload, signature = child.token.split(".")
    wider = payload[:-4] + ("AAAA" if payload[-4:] != "AAAA" else "BBBB")
    for forged in (f"{header}.{wider}.{signature}", f"{header}.{payload}.{signature[::-1]}"):
        with guard.acting_for(forged):
            assert reason(guard.authorize, "orders.read", {"order_id": "1"}) == "token_invalid"
