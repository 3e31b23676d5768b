"""For random chains: whatever a child may do its parent may do, and no slice is overspent."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import tempfile
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdp.api.v1 import authorization_pb2
from pdp.budget.ledger import Account, Charge, IdempotencyKey, Limit, Scope, Window
from pdp.budget.sqlite import SqliteLedger
from pdp.canonical import JsonObject, JsonValue
from pdp.delegating import DelegationError, DelegationRequest, issuer_of, narrowed
from pdp.identity.delegation import TYPE, DelegatedIdentity, claims_of
from pdp.identity.resolver import Credentials, SingleTenant
from pdp.identity.subject import Link, Subject
from pdp.narrowing import SLICE, NotDelegated, limits_within, links_of, refusal, slices_of
from pdp.permit.signing import SigningKey
from pdp.storage import Durability
from pdp.testing import Caller, SidecarProcess
from tests.delegation.parties import IDP

NOW = 1_795_521_600
KEY = SigningKey.generate()
USER = Subject(tenant="acme", actor="user-7", roles=("a",), scopes=("b",), token_id="root")
TOOLS = ("orders.read", "orders.update", "mail.send")
PAIRS = (("tools", "calls"), ("llm", "usd_micros"))
IDENTITY = DelegatedIdentity(
    SingleTenant(actor="local", roles=(), scopes=()),
    [issuer_of("agent-pdp", KEY.public_set, keys_version=lambda: KEY)],
    clock=lambda: NOW,
)

texts = st.text("ab/\u0301\u00e9", max_size=4)
scalars: st.SearchStrategy[JsonValue] = st.one_of(
    st.integers(-3, 3), st.sampled_from([1.0, -0.0, 2.5]), st.booleans(), texts
)
numbers = st.one_of(st.integers(-3, 3), st.sampled_from([1.5, -0.5]))
rules = st.fixed_dictionaries(
    {},
    optional={
        "one_of": st.lists(scalars, min_size=1, max_size=4),
        "min": numbers,
        "max": numbers,
        "prefix": texts.filter(bool),
    },
).filter(bool)
arguments: st.SearchStrategy[JsonObject] = st.dictionaries(
    st.sampled_from("xy"), st.one_of(scalars, st.none(), st.lists(scalars, max_size=1)), max_size=2
)
slices = st.lists(
    st.tuples(st.sampled_from(PAIRS), st.integers(1, 6)), max_size=2, unique_by=lambda each: each[0]
).map(lambda found: tuple(Charge(*pair, amount) for pair, amount in found))


@st.composite
def requests(draw: st.DrawFn) -> DelegationRequest:
    tools = draw(st.sets(st.sampled_from(TOOLS), min_size=1))
    ruled = draw(
        st.dictionaries(
            st.sampled_from(sorted(tools)),
            st.dictionaries(st.sampled_from("xy"), rules, min_size=1, max_size=2),
            max_size=2,
        )
    )
    return DelegationRequest(
        request_id="r",
        delegate="agent",
        tools=tuple(sorted(tools)),
        arguments=json.loads(json.dumps(ruled)),
        ttl_seconds=draw(st.integers(1, 600)),
        budget=draw(slices),
    )


def made(parent: Subject, asked: DelegationRequest, number: int) -> Subject:
    """The child as any sidecar sees it that is shown its token. Raises DelegationError."""
    ends_at = NOW + asked.ttl_seconds
    link = Link(
        id=f"d{number}",
        agent=asked.delegate,
        budget=tuple((each.budget, each.unit, each.amount) for each in asked.budget),
        expires_at=min(ends_at, int(parent.expires_at)) if parent.expires_at else ends_at,
    )
    child = narrowed(parent, asked, link=link, max_depth=8, ledger_id="here")
    token = KEY.sign(claims_of(child, issuer="agent-pdp", issued_at=NOW), kind=TYPE)
    with pytest.raises(StopIteration) as seen:  # nothing in it waits, so it needs no event loop
        IDENTITY.resolve(Credentials(bearer=token)).send(None)
    assert seen.value.value == child
    return child


def chain_of(asked: Sequence[DelegationRequest]) -> list[Subject]:
    """The user and the agents; whoever asks for too much is left out."""
    chain = [USER]
    for number, each in enumerate(asked):
        with contextlib.suppress(DelegationError):
            chain.append(made(chain[-1], each, number))
    return chain


@given(st.lists(requests(), min_size=1, max_size=5), st.sampled_from(TOOLS), arguments)
@settings(max_examples=100, deadline=None)
def test_what_a_child_may_ask_its_parent_may_ask(
    asked: list[DelegationRequest], tool: str, given_arguments: JsonObject
) -> None:
    for parent, child in itertools.pairwise(chain_of(asked)):
        assert (child.tenant, child.actor, child.roles, child.scopes) == (
            parent.tenant,
            parent.actor,
            parent.roles,
            parent.scopes,
        )
        assert not parent.expires_at or child.expires_at <= parent.expires_at
        assert child.token_ids[: len(parent.token_ids)] == parent.token_ids
        if refusal(child, tool=tool, arguments=given_arguments) is None:
            assert refusal(parent, tool=tool, arguments=given_arguments) is None


@given(st.lists(requests(), min_size=1, max_size=5), slices, st.integers(0, 2))
@settings(max_examples=80, deadline=None)
def test_what_bounds_a_parents_spend_bounds_its_childs(
    asked: list[DelegationRequest], charges: tuple[Charge, ...], bounded: int
) -> None:
    policys = [_limit(*pair) for pair in PAIRS[:bounded]]
    account = Account(tenant="acme", actor="user-7")

    def found(subject: Subject) -> set[Limit] | None:
        try:
            limits = limits_within(subject, account, charges, policys, "here")
        except NotDelegated:
            return None
        pairs = {(each.budget, each.unit) for each in charges}
        return {each for each in limits if (each.budget, each.unit) in pairs}

    for parent, child in itertools.pairwise(chain_of(asked)):
        of_child, of_parent = found(child), found(parent)
        if of_child is not None:
            assert of_parent is not None
            assert of_parent <= of_child


def _limit(budget: str, unit: str) -> Limit:
    return Limit(
        id=f"policy-{budget}",
        budget=budget,
        unit=unit,
        window=Window.DAY,
        limit=1_000,
        scope=Scope.TENANT,
    )


# Budgets, in a real ledger


@dataclass(frozen=True)
class Spend:
    who: int
    """Which of the agents, counted around."""
    amount: int
    is_held: bool
    settled: int


spends = st.lists(
    st.builds(
        Spend,
        who=st.integers(0, 100),
        amount=st.integers(1, 4),
        is_held=st.booleans(),
        settled=st.integers(0, 4),
    ),
    min_size=1,
    max_size=25,
)


def tree_of(asked: Sequence[tuple[int, DelegationRequest]]) -> list[Subject]:
    """The user, and agents that one of those before has delegated to."""
    everybody = [USER]
    for number, (parent, request) in enumerate(asked):
        with contextlib.suppress(DelegationError):
            everybody.append(made(everybody[parent % len(everybody)], request, number))
    return everybody


CALL = Charge("tools", "calls", 1)
ACCOUNT = Account(tenant="acme", actor="user-7")


async def spent(ledger: SqliteLedger, subject: Subject, wanted: Spend) -> int:
    """What then counts as spent or held by the subject."""

    def key(operation: str) -> IdempotencyKey:
        return IdempotencyKey(operation=operation, key=str(uuid.uuid4()), content_sha256="0" * 64)

    charges = [replace(CALL, amount=wanted.amount)]
    try:
        limits = limits_within(subject, ACCOUNT, charges, [_limit("tools", "calls")], "here")
    except NotDelegated:
        return 0
    held = await ledger.reserve(
        ACCOUNT, key("reserve"), charges=charges, limits=limits, ttl_seconds=60
    )
    if held.refused_by is not None:
        return 0
    if wanted.is_held:
        return wanted.amount
    settled = min(wanted.settled, wanted.amount)
    await ledger.settle(
        ACCOUNT, key("settle"), hold_id=held.id, charges=[replace(CALL, amount=settled)]
    )
    return settled


@given(st.lists(st.tuples(st.integers(0, 100), requests()), min_size=1, max_size=6), spends)
@settings(max_examples=25, deadline=None)
def test_no_slice_is_ever_overspent(
    asked: list[tuple[int, DelegationRequest]], wanted: list[Spend]
) -> None:
    everybody = tree_of(asked)
    used: Counter[str] = Counter()

    async def run(folder: Path) -> None:
        ledger = SqliteLedger(
            folder / "ledger.db", durability=Durability.PROCESS, clock=lambda: NOW
        )
        for each in wanted:
            subject = everybody[each.who % len(everybody)]
            amount = await spent(ledger, subject, each)
            used.update(dict.fromkeys(links_of(subject), amount))
        await ledger.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))
    for limit in {limit for subject in everybody for limit in slices_of(subject)}:
        if (limit.budget, limit.unit) == (CALL.budget, CALL.unit):
            assert used[limit.id.removeprefix(SLICE)] <= limit.limit


# Real decisions

CALLS: tuple[tuple[str, JsonObject], ...] = (
    ("orders.read", {"order_id": "918"}),
    ("orders.update", {"order_id": "918", "status": "shipped"}),
    ("orders.update", {"order_id": "818", "status": "cancelled"}),
    ("mail.send", {"to": "a@customers.example", "subject": "x", "body": "y"}),
    ("orders.read", {"order_id": "x"}),
    ("reports.generate", {"topic": "x"}),
)
real_requests = st.fixed_dictionaries(
    {
        "tools": st.lists(
            st.sampled_from(sorted({tool for tool, _ in CALLS})), min_size=1, unique=True
        ),
        "order_id": st.sampled_from([None, {"prefix": "91"}, {"one_of": ["918", "818"]}]),
        "calls": st.sampled_from([0, 0, 20, 25]),
    }
)


def real_request(drawn: dict[str, Any]) -> authorization_pb2.DelegateRequest:
    request = authorization_pb2.DelegateRequest(
        request_id=str(uuid.uuid4()), delegate="agent", tools=drawn["tools"]
    )
    ruled = {tool: {"order_id": drawn["order_id"]} for tool in drawn["tools"] if "order" in tool}
    if drawn["order_id"] and ruled:
        request.arguments_json = json.dumps(ruled).encode()
    if drawn["calls"]:
        request.budget.add(budget="tools", unit="calls", amount=drawn["calls"])
        request.budget.add(budget="spend", unit="usd_micros", amount=drawn["calls"] * 10_000)
    return request


@given(st.lists(real_requests, min_size=1, max_size=3))
@settings(max_examples=12, deadline=None)
def test_what_a_child_is_allowed_its_parent_is_allowed(
    sidecar: SidecarProcess, drawn: list[dict[str, Any]]
) -> None:
    roles = ["support_agent", "analyst"]
    scopes = ["orders:read", "orders:write", "mail:send"]
    token = IDP.token("tenant_acme", f"user-{uuid.uuid4().hex[:8]}", roles=roles, scopes=scopes)
    allowed: list[set[int]] = []
    for each in [None, *drawn]:
        if each is not None:
            with Caller(sidecar.target, token=token) as parent, contextlib.suppress(grpc.RpcError):
                token = parent.authorization.Delegate(real_request(each)).token
        with Caller(sidecar.target, token=token) as asker:
            allowed.append({n for n, call in enumerate(CALLS) if asker.authorize(*call).decision})
    for of_parent, of_child in itertools.pairwise(allowed):
        assert of_child <= of_parent
    assert allowed[0] == {0, 1, 2, 3}
