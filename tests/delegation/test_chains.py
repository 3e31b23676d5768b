"""Agents that act one for another, across processes: each with less, and all for one tenant."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pdp.client import Guard, PermitDenied
from pdp.permit import PermitError, PermitRedeemer
from pdp.permit.ring import LiveKeys
from pdp.testing import SidecarProcess
from tests.budget.redis_server import RedisServer
from tests.delegation.parties import BUNDLE, IDP
from tests.e2e.operating import command, records, soon

AGENT = Path(__file__).with_name("agent.py")
UPDATE = {"order_id": "918", "status": "shipped"}
READ = {"order_id": "918"}


@pytest.fixture
def guard(sidecar: SidecarProcess) -> Iterator[Guard]:
    with Guard(sidecar.target) as guard:
        yield guard


def user(actor: str = "user-7", **claims: Any) -> str:
    return IDP.token(
        "tenant_acme",
        actor,
        roles=["support_agent", "agent"],
        scopes=["orders:read", "orders:write", "mail:send"],
        **claims,
    )


def outcome(guard: Guard, tool: str, arguments: dict[str, Any]) -> str:
    """Why the call is refused; "ok" where it is allowed."""
    try:
        guard.authorize(tool, arguments)
    except PermitDenied as denied:
        return denied.reason_code
    return "ok"


def agent(sidecar: SidecarProcess, tool: str, hops: int = 0) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(AGENT), sidecar.target, tool, str(hops)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def of_actor(sidecar: SidecarProcess, actor: str) -> list[dict[str, Any]]:
    return [each for each in records(sidecar) if each["actor_id"] == actor]


def test_a_chain_of_five_agents_keeps_tenant_and_actor(sidecar: SidecarProcess) -> None:
    with Guard(sidecar.target) as guard, guard.acting_for(user("chained")):
        first = guard.delegate("hop-5", tools=["orders.read", "orders.update", "mail.send"])
    process = agent(sidecar, "orders.update", hops=4)
    said, _ = process.communicate(first.to_message(), timeout=90)
    assert process.returncode == 0
    names = ["hop-5", "hop-4", "hop-3", "hop-2", "hop-1"]
    assert said.decode().splitlines() == [
        *(f"tenant_acme chained {' '.join(names[: n + 1])}" for n in range(4)),
        "tool_not_delegated",
    ]

    told = of_actor(sidecar, "chained")
    assert {each["tenant_id"] for each in told} == {"tenant_acme"}
    made = [each for each in told if each["action"] == "delegate"]
    assert [each["detail"]["delegate"] for each in made] == names
    ids = [each["detail"]["delegation_id"] for each in made]
    calls = [each for each in told if each["action"] == "orders.update"]
    decided = [each for each in calls if each["type"] == "decision"]
    for depth, record in enumerate(decided, start=1):
        assert record["identity"]["agents"] == names[:depth]
        assert record["identity"]["delegations"] == ids[:depth]
        assert record["identity"]["issuer"] == IDP.issuer
    assert [each["outcome"] for each in decided] == ["allowed"] * 4 + ["denied"]
    ended = [each for each in calls if each["type"] == "outcome"]
    assert [each["identity"]["agents"] for each in ended] == [names[:n] for n in range(1, 5)]
    assert [each["identity"]["delegations"] for each in ended] == [ids[:n] for n in range(1, 5)]


def test_parallel_branches_act_each_within_its_own(sidecar: SidecarProcess) -> None:
    tools = ("orders.read", "orders.update", "mail.send")
    with Guard(sidecar.target) as guard, guard.acting_for(user("fanned")):
        branches = [guard.delegate(f"branch-{tool}", tools=[tool]) for tool in tools]
    processes = [agent(sidecar, "orders.read") for _ in branches]
    said = [
        process.communicate(branch.to_message(), timeout=60)[0].decode().strip()
        for process, branch in zip(processes, branches, strict=True)
    ]
    assert said == [
        "tenant_acme fanned branch-orders.read",
        "tool_not_delegated",
        "tool_not_delegated",
    ]
    decided = [each for each in of_actor(sidecar, "fanned") if each["action"] == "orders.read"]
    assert {each["tenant_id"] for each in decided} == {"tenant_acme"}


def test_a_workflow_prepares_in_parallel_and_commits_at_the_end(guard: Guard) -> None:
    with guard.acting_for(user("flowing")):
        workflow = guard.delegate(
            "workflow", tools=["orders.read", "orders.update"], budget=[("tools", "calls", 1)]
        )
    with guard.accept(workflow.metadata()):
        readers = [guard.delegate(f"reader-{n}", tools=["orders.read"]) for n in range(3)]
        committer = guard.delegate(
            "committer",
            tools=["orders.update"],
            arguments={"orders.update": {"status": {"one_of": ["shipped"]}}},
        )
    for reader in readers:
        with guard.accept(reader.headers()):
            assert outcome(guard, "orders.read", READ) == "ok"
            assert outcome(guard, "orders.update", UPDATE) == "tool_not_delegated"
    with guard.accept(committer.a2a_metadata()):
        cancelled = {**UPDATE, "status": "cancelled"}
        assert outcome(guard, "orders.update", cancelled) == "argument_not_delegated"
        permit = guard.authorize("orders.update", UPDATE)
        guard.executed(permit)
        assert (permit.tenant, permit.agents) == ("tenant_acme", ("workflow", "committer"))
        # The workflow's one call is made.
        assert outcome(guard, "orders.update", UPDATE) == "tenant_budget_exceeded"


def test_whoever_asks_for_more_than_the_policy_gives_gets_no_more(guard: Guard) -> None:
    viewer = IDP.token("tenant_acme", "viewer-1", roles=["viewer"], scopes=["orders:read"])
    with guard.acting_for(viewer):
        delegation = guard.delegate("worker", tools=["orders.read", "orders.update", "no.such"])
    with guard.accept(delegation):
        assert outcome(guard, "orders.read", READ) == "ok"
        assert outcome(guard, "orders.update", UPDATE) == "role_not_allowed"
        assert outcome(guard, "no.such", {}) == "tool_not_allowed"


# Other sidecars, and revoking


def sharing(
    directory: Path, server: RedisServer, stack: ExitStack, **config: Any
) -> list[SidecarProcess]:
    """Two sidecars with one key and one store."""
    key = directory / "permit-key.pem"
    LiveKeys(key, make=True)
    sidecars = []
    for name in ("one", "two"):
        folder = directory / name
        folder.mkdir()
        sections = {
            "permit": {"key_file": str(key)},
            "budget": {"store": {"unix": str(server.socket), "timeout_ms": 5000}},
            **config,
        }
        sidecar = SidecarProcess(folder, issuer=IDP, bundle=BUNDLE, config=sections)
        sidecars.append(stack.enter_context(sidecar))
    return sidecars


def test_sidecars_on_one_store_count_a_slice_and_a_revocation_together(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    with ExitStack() as stack:
        one, two = sharing(tmp_path, redis_server, stack)
        here, there = (stack.enter_context(Guard(each.target)) for each in (one, two))
        tool_server = stack.enter_context(PermitRedeemer(two.target))
        with here.acting_for(user(jti="root-1")):
            parent = here.delegate(
                "planner", tools=["orders.update", "orders.read"], budget=[("tools", "calls", 3)]
            )
        with there.accept(parent):
            child = there.delegate("worker", tools=["orders.update"])
            sibling = there.delegate(
                "checker", tools=["orders.update"], budget=[("tools", "calls", 1)]
            )
        with there.accept(sibling):
            assert outcome(there, "orders.update", UPDATE) == "ok"
            assert outcome(there, "orders.update", UPDATE) == "tenant_budget_exceeded"
        with here.accept(child):
            permit = here.authorize("orders.update", UPDATE)
        with there.accept(child):
            assert outcome(there, "orders.update", UPDATE) == "ok"
            assert outcome(there, "orders.update", UPDATE) == "tenant_budget_exceeded"
        with here.accept(parent):
            assert outcome(here, "orders.update", UPDATE) == "tenant_budget_exceeded"
            assert outcome(here, "orders.read", READ) == "ok"

        # Of a child's own, the parent and its siblings know nothing.
        command(one, "revoke", "token", "tenant_acme", sibling.id, "--reason", "lost")
        with there.accept(sibling):
            assert soon(lambda: outcome(there, "orders.update", UPDATE) == "token_revoked")
        with there.accept(parent):
            assert outcome(there, "orders.read", READ) == "ok"

        command(one, "revoke", "token", "tenant_acme", parent.id, "--reason", "lost")
        for guard in (here, there):
            with guard.accept(child):
                assert soon(lambda: outcome(guard, "orders.update", UPDATE) == "token_revoked")  # noqa: B023 - asked at once
        with pytest.raises(PermitError) as caught:
            tool_server.redeem(permit)
        assert caught.value.reason_code == "permit_revoked"


@pytest.mark.slow
def test_a_sidecar_that_leases_overspends_no_slice(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    store = {"unix": str(redis_server.socket), "timeout_ms": 5000}
    config = {"budget": {"store": store, "lease": {"seconds": 5, "share": 0.5}}}
    with (
        SidecarProcess(tmp_path, issuer=IDP, bundle=BUNDLE, config=config) as sidecar,
        Guard(sidecar.target) as guard,
    ):
        with guard.acting_for(user()):
            parent = guard.delegate("p", tools=["orders.update"], budget=[("tools", "calls", 40)])
        with guard.accept(parent):
            child = guard.delegate("c", tools=["orders.update"], budget=[("tools", "calls", 30)])
        spent = {}
        for delegation in (child, parent):
            with guard.accept(delegation):
                told = [outcome(guard, "orders.update", UPDATE) for _ in range(32)]
            spent[delegation.agents[-1]] = told.count("ok")
            assert set(told) <= {"ok", "tenant_budget_exceeded"}
        # What is leased for the one is missing to the other for a while.
        assert 0 < spent["c"] <= 30
        assert sum(spent.values()) <= 40


def test_revoking_the_users_token_ends_whatever_was_delegated_under_it(
    sidecar: SidecarProcess, guard: Guard
) -> None:
    with guard.acting_for(user("left", jti="root-2")):
        parent = guard.delegate("planner", tools=["orders.read"])
    with guard.acting_for(user("left", jti="root-3")):
        other = guard.delegate("planner", tools=["orders.read"])
    with guard.accept(parent):
        child = guard.delegate("worker", tools=["orders.read"])
    with guard.accept(child):
        assert outcome(guard, "orders.read", READ) == "ok"
        command(sidecar, "revoke", "token", "tenant_acme", "root-2", "--reason", "logged out")
        assert soon(lambda: outcome(guard, "orders.read", READ) == "token_revoked")
    with guard.accept(other):
        assert outcome(guard, "orders.read", READ) == "ok"


def test_a_sidecar_of_another_domain_counts_what_it_may_and_no_slices(
    tmp_path: Path, sidecar: SidecarProcess
) -> None:
    folders = [tmp_path / name for name in ("theirs", "ours")]
    for folder in folders:
        folder.mkdir()
    theirs_keys, jwks = tmp_path / "theirs.pem", tmp_path / "theirs.json"
    jwks.write_text(LiveKeys(theirs_keys, make=True).to_jwks())
    partner = {"issuer": "partner", "jwks_file": str(jwks), "tenants": ["tenant_acme"]}
    configs: list[dict[str, Any]] = [
        {"permit": {"issuer": "partner", "key_file": str(theirs_keys)}},
        {"delegation": {"trusted": [partner]}},
    ]
    with ExitStack() as stack:
        theirs, ours = (
            stack.enter_context(SidecarProcess(folder, issuer=IDP, bundle=BUNDLE, config=config))
            for folder, config in zip(folders, configs, strict=True)
        )
        there = stack.enter_context(Guard(theirs.target, permit_issuer="partner"))
        here = stack.enter_context(Guard(ours.target))
        elsewhere = stack.enter_context(Guard(sidecar.target))
        with there.acting_for(user()):
            free = there.delegate("worker", tools=["orders.read", "orders.update"])
            paid = there.delegate("worker", tools=["orders.update"], budget=[("tools", "calls", 1)])
        globex = IDP.token("tenant_globex", "user-1", roles=["viewer"], scopes=["orders:read"])
        with there.acting_for(globex):
            foreign = there.delegate("worker", tools=["orders.read"])
        with here.accept(free):
            assert outcome(here, "orders.update", UPDATE) == "ok"
            assert outcome(here, "mail.send", {}) == "tool_not_delegated"
        with here.accept(paid):
            assert outcome(here, "orders.update", UPDATE) == "budget_not_delegated"
        with here.accept(foreign):
            assert outcome(here, "orders.read", READ) == "tenant_unknown"
        with elsewhere.accept(free):
            assert outcome(elsewhere, "orders.read", READ) == "token_invalid"
