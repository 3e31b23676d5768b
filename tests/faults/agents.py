"""Agents that use a sidecar, and remember all that it acknowledged.

Each does one thing after the other until its sidecar is gone, and then knows of every key
whether it has an answer, and which. What it knows can be held against the sidecar that is
started next.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from pdp.api.v1 import authorization_pb2, budget_pb2, common_pb2, execution_pb2
from pdp.audit.verify import verify
from pdp.base64url import decode
from pdp.canonical import JsonObject, sha256_hex
from pdp.testing import Caller, SidecarProcess, TokenIssuer, refusal_of
from tests.e2e.operating import records

ARGUMENTS: Final[JsonObject] = {"order_id": "918", "status": "shipped", "note": "x" * 2_000}
HOLD_SECONDS: Final = 3_600
SESSION_LIMIT: Final = 40
"""As the policy says it."""
GONE: Final = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)
"""How calls end whose sidecar is killed. Its own refusals have a reason code besides."""
TOOLS: Final = ("orders.update", "orders.search")


class BrokenPromiseError(AssertionError):
    """What the sidecar says now is not what it said."""


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A mutating call under its key; it can be made again and again."""

    method: str
    key: str
    request: Any = field(repr=False)
    about: str = ""
    """The request id that got the permit, for what is done with one."""
    may_be_full: bool = False
    """Whether it spends of the narrow limit."""

    def send(self, caller: Caller, *, waits: bool = True) -> Message:
        """The answer; ``waits`` for a sidecar that can not be reached yet. Raises
        grpc.RpcError.
        """
        service = getattr(caller, _SERVICES[self.method])
        method = getattr(service, self.method)
        answer: Message = method(self.request, timeout=10, wait_for_ready=waits)
        return answer


@dataclass
class HeldPermit:
    """A permit that an agent got."""

    token: str = field(repr=False)
    tool: str
    calls: int
    """What is held for it."""
    max_uses: int
    redeemed: int = 0
    is_reported: bool = False


@dataclass
class Knowledge:
    """What one agent knows for sure, and what it is in doubt about."""

    answered: dict[Ask, tuple[Any, ...]] = field(default_factory=dict)
    """With what must be the same in every later answer."""
    in_doubt: dict[Ask, None] = field(default_factory=dict)
    receipts: dict[int, tuple[str, float]] = field(default_factory=dict)
    """By sequence number, the hash of each record that was acknowledged, and when that was."""
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens held, by the id of the hold."""
    open_holds: list[str] = field(default_factory=list)
    """Those that nobody has tried to end."""
    permits: dict[str, HeldPermit] = field(default_factory=dict)
    """By the request id that got them."""
    unreported: list[str] = field(default_factory=list)
    """Request ids of permits whose outcome nobody has tried to report."""
    delegated: list[str] = field(default_factory=list)
    """Tokens of delegations."""
    spent: Counter[str] = field(default_factory=Counter)
    """By limit, for sure."""
    held: Counter[str] = field(default_factory=Counter)


class Agent:
    """One agent of one tenant. Not for threads to share."""

    def __init__(
        self,
        name: str,
        tenant: str,
        issuer: TokenIssuer,
        dice: random.Random,
        *,
        bears: Collection[str] = (),
        gone: Collection[grpc.StatusCode] = GONE,
    ) -> None:
        """``bears`` are reason codes that leave a call in doubt, to be asked again later, and
        ``gone`` how calls end when the sidecar does.
        """
        self.name = name
        self.refused: Counter[str] = Counter()
        """What it was refused with, of those."""
        self._bears = bears
        self._gone = gone
        self.tenant = tenant
        self.knows = Knowledge()
        self._issuer = issuer
        self._dice = dice
        self._target = ""
        self._answered_before = 0
        self._caller: Caller | None = None

    def meet(self, target: str, session: str) -> None:
        """Go to a sidecar, in a session that all agents of the tenant share."""
        self.leave()
        self._target = target
        self._answered_before = len(self.knows.answered)
        token = self._issuer.token(
            self.tenant, self.name, roles=["agent"], lifetime_seconds=7_200, session=session
        )
        self._caller = Caller(target, token=token)

    def leave(self) -> None:
        """Let go of the sidecar."""
        if self._caller is not None:
            self._caller.close()
            self._caller = None

    @property
    def most_tokens(self) -> int:
        """What it has asked for, answered or not."""
        asked = (*self.knows.answered, *self.knows.in_doubt)
        return sum(
            _sum(ask.request.charges)
            for ask in asked
            if ask.method in {"ChargeBudget", "ReserveBudget"} and not ask.may_be_full
        )

    @property
    def caller(self) -> Caller:
        assert self._caller is not None, "the agent has no sidecar"
        return self._caller

    def act(self) -> bool:
        """Do one thing more. False when the sidecar is gone."""
        acts: list[Callable[[], Ask]] = [self._charge, self._charge_session, self._reserve]
        acts += [self._authorize, self._authorize, self._delegate]
        if self.knows.open_holds:
            acts += [self._settle, self._release]
        if self.knows.unreported:
            acts += [self._redeem, self._redeem, self._report]
        return self._try(self._dice.choice(acts)())

    def settle_doubts(self) -> None:
        """Ask for the answers that never came. Raises BrokenPromiseError."""
        for ask in tuple(self.knows.in_doubt):
            self._must(ask)

    def check_answers(self, most: int) -> None:
        """Ask again what was answered in this session: the latest, which were the nearest
        to the kill. Raises BrokenPromiseError.
        """
        answered = list(self.knows.answered.items())[self._answered_before :]
        for ask, first in answered[-most:]:
            permit = self.knows.permits.get(ask.about)
            if permit is not None and permit.is_reported:
                if ask.method == "RedeemPermit":
                    refused = refusal_of(ask.send, self.caller)
                    self._expect(ask, "permit_used", refused.reason_code)
                    continue
                if ask.method == "Authorize":
                    first = (False, "permit_used")  # noqa: PLW2901 - since it is reported
            answer = ask.send(self.caller)
            self._expect(ask, first, _substance(answer))

    def check_permits(self) -> None:
        """No use of a permit can be spent twice. Raises BrokenPromiseError."""
        for key in self.knows.unreported[-5:]:
            permit = self.knows.permits[key]
            while permit.redeemed < permit.max_uses:
                self._must(self._redemption(key))
            one_more = refusal_of(self._redemption(key).send, self.caller)
            self._expect(key, "permit_used", one_more.reason_code)

    def check_delegations(self) -> None:
        """Whoever was delegated to can act. Raises BrokenPromiseError."""
        for token in self.knows.delegated[-2:]:
            with Caller(self._target, token=token) as delegate:
                self._expect("delegation", True, delegate.authorize("orders.read").decision)

    def check_revoked(self) -> None:
        """The agent itself may do nothing any more. Raises BrokenPromiseError."""
        refused = refusal_of(self.caller.authorize, "orders.read")
        self._expect("revocation", "actor_revoked", refused.reason_code)

    def standing(self) -> dict[str, tuple[int, int]]:
        """(spent, held) by limit, as the sidecar sees it."""
        answer = self.caller.budget.GetBudget(budget_pb2.GetBudgetRequest())
        return {limit.limit_id: (limit.spent, limit.held) for limit in answer.limits}

    def _charge(self) -> Ask:
        charge = common_pb2.Charge(budget="llm", unit="tokens_out", amount=self._dice.randint(1, 9))
        return self._asks(budget_pb2.ChargeBudgetRequest(charges=[charge]))

    def _charge_session(self) -> Ask:
        charge = common_pb2.Charge(budget="session", unit="calls", amount=self._dice.randint(1, 3))
        return self._asks(budget_pb2.ChargeBudgetRequest(charges=[charge]), may_be_full=True)

    def _reserve(self) -> Ask:
        charge = common_pb2.Charge(
            budget="llm", unit="tokens_out", amount=self._dice.randint(5, 20)
        )
        return self._asks(
            budget_pb2.ReserveBudgetRequest(charges=[charge], ttl_seconds=HOLD_SECONDS)
        )

    def _settle(self) -> Ask:
        hold_id = self._take(self.knows.open_holds)
        amount = self._dice.randint(0, self.knows.tokens[hold_id])
        charge = common_pb2.Charge(budget="llm", unit="tokens_out", amount=amount)
        return self._asks(budget_pb2.SettleBudgetRequest(hold_id=hold_id, charges=[charge]))

    def _release(self) -> Ask:
        hold_id = self._take(self.knows.open_holds)
        return self._asks(budget_pb2.ReleaseBudgetRequest(hold_id=hold_id))

    def _authorize(self) -> Ask:
        key = self._new_key()
        request = authorization_pb2.AuthorizeRequest(
            request_id=key,
            action=authorization_pb2.Action(name=self._dice.choice(TOOLS)),
            arguments_json=json.dumps(ARGUMENTS).encode(),
        )
        return Ask("Authorize", key, request, about=key)

    def _delegate(self) -> Ask:
        key = self._new_key()
        request = authorization_pb2.DelegateRequest(
            request_id=key, delegate="helper", tools=["orders.read"]
        )
        return Ask("Delegate", key, request)

    def _redeem(self) -> Ask:
        key = self._dice.choice(self.knows.unreported)
        permit = self.knows.permits[key]
        return self._redemption(key) if permit.redeemed < permit.max_uses else self._report()

    def _redemption(self, key: str) -> Ask:
        permit = self.knows.permits[key]
        request = execution_pb2.RedeemPermitRequest(
            permit=permit.token,
            idempotency_key=self._new_key(),
            tool=permit.tool,
            arguments_sha256=sha256_hex(ARGUMENTS),
            audience="tools",
        )
        return Ask("RedeemPermit", request.idempotency_key, request, about=key)

    def _report(self) -> Ask:
        key = self._take(self.knows.unreported)
        permit = self.knows.permits[key]
        request = execution_pb2.ReportOutcomeRequest(
            permit=permit.token,
            outcome=execution_pb2.OUTCOME_EXECUTED,
            uses=max(1, permit.redeemed) if permit.max_uses > 1 else 0,
        )
        return Ask("ReportOutcome", key, request, about=key)

    def _asks(self, request: Any, *, may_be_full: bool = False) -> Ask:
        request.idempotency_key = self._new_key()
        method = type(request).__name__.removesuffix("Request")
        return Ask(method, request.idempotency_key, request, may_be_full=may_be_full)

    def _take(self, names: list[str]) -> str:
        return names.pop(self._dice.randrange(len(names)))

    def _new_key(self) -> str:
        return str(uuid.UUID(int=self._dice.getrandbits(128)))

    def _must(self, ask: Ask) -> None:
        if not self._try(ask, waits=True) or ask in self.knows.in_doubt:
            raise BrokenPromiseError(f"{self.name}: {ask} gets no answer")

    def _expect(self, what: object, expected: object, found: object) -> None:
        if expected != found:
            raise BrokenPromiseError(f"{self.name}: {what}: {expected} was said, now {found}")

    def _try(self, ask: Ask, *, waits: bool = False) -> bool:
        self.knows.in_doubt[ask] = None
        try:
            answer = ask.send(self.caller, waits=waits)
        except grpc.RpcError as error:
            refused = refusal_of(_raise, error)
            if not refused.reason_code and refused.status in self._gone:
                return False
            if refused.reason_code in self._bears:
                self.refused[refused.reason_code] += 1
                if ask.about in self.knows.unreported:
                    # Nothing more is done with the permit while that is in doubt.
                    self.knows.unreported.remove(ask.about)
                return True
            if not (ask.may_be_full and refused.reason_code == "tenant_budget_exceeded"):
                raise BrokenPromiseError(f"{self.name}: {ask} ended with {refused}") from error
        else:
            self._learn(ask, answer)
        del self.knows.in_doubt[ask]
        return True

    def _learn(self, ask: Ask, answer: Any) -> None:
        knows = self.knows
        knows.answered[ask] = _substance(answer)
        knows.receipts[answer.audit.sequence] = (answer.audit.hash, time.monotonic())
        match ask.method:
            case "ChargeBudget":
                knows.spent["session" if ask.may_be_full else "tokens"] += _sum(answer.charges)
            case "ReserveBudget":
                knows.tokens[answer.hold_id] = _sum(answer.charges)
                knows.open_holds.append(answer.hold_id)
                knows.held["tokens"] += _sum(answer.charges)
            case "SettleBudget" | "ReleaseBudget":
                knows.held["tokens"] -= knows.tokens[ask.request.hold_id]
                knows.spent["tokens"] += _sum(getattr(answer, "settled", ()))
            case "Authorize":
                if not answer.decision:
                    raise BrokenPromiseError(f"{self.name}: refused with {answer.reason_code}")
                permit = HeldPermit(
                    token=answer.permit,
                    tool=ask.request.action.name,
                    calls=_sum(answer.hold.charges),
                    max_uses=answer.max_uses,
                )
                knows.permits[ask.key] = permit
                knows.unreported.append(ask.key)
                knows.held["tools"] += permit.calls
            case "RedeemPermit":
                knows.permits[ask.about].redeemed += 1
            case "ReportOutcome":
                permit = knows.permits[ask.about]
                permit.is_reported = True
                knows.held["tools"] -= permit.calls
                knows.spent["tools"] += _sum(answer.settled)
            case "Delegate":
                knows.delegated.append(answer.token)


@contextlib.contextmanager
def at_work(
    agents: Sequence[Agent], *, goes_on: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Each of them acts, in a thread of its own, until its sidecar is gone or this says
    no. Raises whatever one of them raised.
    """
    broken: list[BaseException] = []

    def work(agent: Agent) -> None:
        try:
            while goes_on() and agent.act():
                pass
        except BaseException as error:  # noqa: BLE001 - raised below
            broken.append(error)

    threads = [threading.Thread(target=work, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    if broken:
        raise broken[0]


def check_sums(agents: Sequence[Agent], *, leased: bool = False) -> None:
    """The budgets of each tenant are what all its agents together know. Raises
    BrokenPromiseError.
    """
    for tenant in {agent.tenant for agent in agents}:
        own = [agent for agent in agents if agent.tenant == tenant]
        spent = sum((agent.knows.spent for agent in own), Counter[str]())
        held = sum((agent.knows.held for agent in own), Counter[str]())
        found = own[0].standing()
        for limit in ("tokens", "tools"):
            # Under leases more is held than what is held for agents, for a while.
            exact = found[limit] == (spent[limit], held[limit])
            if not exact and not (leased and sum(found[limit]) >= spent[limit]):
                raise BrokenPromiseError(
                    f"{tenant}, {limit}: {(spent[limit], held[limit])} was acknowledged, and"
                    f" {found[limit]} is known"
                )
        if sum(found["session"]) > SESSION_LIMIT:
            raise BrokenPromiseError(f"{tenant}: {found['session']} of {SESSION_LIMIT}")


def check_records(
    agents: Sequence[Agent], sidecar: SidecarProcess, before: float = math.inf
) -> None:
    """The log verifies, and holds every record that was acknowledged ``before``. Raises
    BrokenPromiseError.
    """
    report = verify(sidecar.state / "audit")
    if report.fault is not None:
        raise BrokenPromiseError(f"the audit log is broken: {report.fault}")
    kept = {record["seq"]: record["hash"] for record in records(sidecar)}
    for agent in agents:
        for sequence, (digest, at) in agent.knows.receipts.items():
            if at < before and kept.get(sequence) != digest:
                raise BrokenPromiseError(f"record {sequence} was acknowledged, and is lost")


_SERVICES: Final = {
    "Authorize": "authorization",
    "Delegate": "authorization",
    "ChargeBudget": "budget",
    "ReserveBudget": "budget",
    "SettleBudget": "budget",
    "ReleaseBudget": "budget",
    "RedeemPermit": "execution",
    "ReportOutcome": "execution",
}


def _substance(answer: Any) -> tuple[Any, ...]:
    """What is the same in every answer to a key, whenever it is given."""
    match answer:
        case authorization_pb2.AuthorizeResponse(decision=True):
            permit = _claims(answer.permit)
            same: tuple[Any, ...] = (
                answer.decision_id,
                permit["jti"],
                permit["exp"],
                answer.hold.hold_id,
            )
        case authorization_pb2.AuthorizeResponse():
            same = (False, answer.reason_code)
        case authorization_pb2.DelegateResponse():
            same = (answer.delegation_id, answer.expires_at.seconds)
        case execution_pb2.RedeemPermitResponse():
            same = (answer.decision_id,)
        case budget_pb2.ChargeBudgetResponse():
            same = (answer.charge_id, _sum(answer.charges))
        case budget_pb2.ReserveBudgetResponse():
            same = (answer.hold_id, answer.expires_at.seconds)
        case _:
            same = (_sum(getattr(answer, "settled", ())),)
    return same


def _claims(token: str) -> JsonObject:
    claims: JsonObject = json.loads(decode(token.split(".")[1]))
    return claims


def _sum(charges: Any) -> int:
    return sum(charge.amount for charge in charges)


def _raise(error: grpc.RpcError) -> None:
    raise error
