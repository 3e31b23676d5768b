"""Whether what one tenant may do depends on another tenant's data.

This searches for a counterexample; it proves nothing about inputs that it did not try.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from pdp.budget.ledger import Charge
from pdp.canonical import JsonObject, JsonValue
from pdp.identity.subject import Subject
from pdp.policy.analysis.cases import Cases
from pdp.policy.analysis.evaluator import Evaluator, open_evaluator, raw
from pdp.policy.analysis.matrix import chunks
from pdp.policy.analysis.mutations import Mutation, Neighbours
from pdp.policy.analysis.questions import (
    ACTOR,
    REQUEST_ID,
    Estate,
    Only,
    Question,
    Questionnaire,
)
from pdp.policy.analysis.workers import Progress, spread
from pdp.policy.bundle import Bundle
from pdp.policy.engine import REQUIRED_ENTRYPOINTS, Entrypoint
from pdp.policy.question import budget_input, tools_input
from pdp.policy.service_class import service_class_input

TENANTS_PER_TASK: Final = 16
FEW_EVALUATIONS: Final = 20_000
ALONE_AT_MOST: Final = 16
"""With so few tenants each one is asked about while all others are changed at once."""
MAX_LEAKS: Final = 100
"""Counterexamples that are kept; the others are counted."""
NARROWED_AT_MOST: Final = 10
"""Counterexamples of which it is sought whose data alone makes them."""
MAX_CHARGES: Final = 16
_MENTIONED: Final = ("tenant", "tenant_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """A counterexample: something of one tenant moved with another tenant's."""

    tenant: str
    role: str
    tool: str
    """Empty for a spend without a tool."""
    entrypoint: str
    changed: str
    """What was changed, in words."""
    before: JsonValue
    after: JsonValue
    document: JsonObject = field(repr=False)
    """The input, the same before and after unless the input is what was changed."""
    mutation: Mutation | None = None
    """None where the input was changed and not the data."""
    others: tuple[str, ...] = ()
    """The tenants whose data was changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What was tried, and what it found."""

    tenants: int
    questions: int
    evaluations: int
    data_documents: int
    """How often other data was loaded."""
    leaks: tuple[Leak, ...]
    """At most MAX_LEAKS of those that were found."""
    leaks_found: int


@dataclass(frozen=True, slots=True)
class _Ask:
    role: str
    tool: str
    entrypoint: Entrypoint
    document: JsonObject
    question: Question | None


@dataclass(slots=True)
class _Found:
    """What one task has found and counted."""

    questions: int = 0
    evaluations: int = 0
    data_documents: int = 0
    leaks: list[Leak] = field(default_factory=list)
    leaks_found: int = 0
    kinds: set[tuple[str, ...]] = field(default_factory=set)

    def add(self, leak: Leak) -> None:
        self.leaks_found += 1
        # Of one kind the first is enough; what is left has room for others.
        kind = (leak.tenant, leak.tool, leak.entrypoint, leak.changed)
        if len(self.leaks) < MAX_LEAKS and kind not in self.kinds:
            self.kinds.add(kind)
            self.leaks.append(leak)


class _Desk:
    """One bundle, its data to be changed, and the questions about it."""

    def __init__(self, evaluator: Evaluator, bundle: Bundle, cases: Cases, only: Only) -> None:
        self.evaluator = evaluator
        self.estate = Estate(bundle.data)
        self.questions = Questionnaire([self.estate], cases, only, widely=True)
        self.neighbours = Neighbours(self.estate.document)

    def load(self, data: JsonObject) -> None:
        self.evaluator.set_data(json.dumps(data, ensure_ascii=False).encode())

    def asks(self, tenant: str) -> Iterator[_Ask]:
        """Everything that is asked about a tenant."""
        scopes = self.questions.scopes(tenant)
        for question in self.questions.of(tenant):
            document = question.document()
            for entrypoint in (Entrypoint.AUTHZ_DECISION, Entrypoint.BUDGET_LIMITS):
                yield _Ask(question.role, question.tool, entrypoint, document, question)
        for role in self.questions.roles(tenant):
            subject = Subject(
                tenant=tenant, actor=ACTOR, roles=(role,) if role else (), scopes=scopes
            )
            listing = tools_input(subject, time=self.questions.time, context={})
            yield _Ask(role, "", Entrypoint.TOOLS_VISIBLE, listing, None)
            for charge in _charges(self.estate, tenant, role):
                document = budget_input(
                    subject,
                    operation="charge",
                    charges=(charge,),
                    tool="",
                    time=self.questions.time,
                    request_id=REQUEST_ID,
                )
                for entrypoint in (Entrypoint.BUDGET_DECISION, Entrypoint.BUDGET_LIMITS):
                    yield _Ask(role, "", entrypoint, document, None)
        yield _Ask("", "", Entrypoint.SERVICE_CLASS, service_class_input(tenant), None)

    def value(self, ask: _Ask) -> JsonValue:
        return raw(self.evaluator, ask.entrypoint, ask.document)


@contextmanager
def _desk(bundle: Bundle, cases: Cases, only: Only) -> Iterator[_Desk]:
    with open_evaluator(
        bundle, clock=lambda: cases.time, entrypoints=REQUIRED_ENTRYPOINTS
    ) as evaluator:
        yield _Desk(evaluator, bundle, cases, only)


def search(
    bundle: Bundle, cases: Cases, only: Only, *, processes: int, progress: Progress
) -> Search:
    """Change the data of every other tenant, and what a call mentions, and compare.

    Raises BundleError.
    """
    with _desk(bundle, cases, only) as desk:
        tenants = desk.questions.tenants()
        if not tenants or _evaluations(desk, tenants[0]) * len(tenants) <= FEW_EVALUATIONS:
            processes = 1
        found = _Found()
        done = 0
        tasks = chunks(tenants, TENANTS_PER_TASK)
        setup = partial(_desk, bundle, cases, only)
        for part in spread(setup, _search_some, tasks, processes=processes):
            found.questions += part.questions
            found.evaluations += part.evaluations
            found.data_documents += part.data_documents
            found.leaks += part.leaks[: MAX_LEAKS - len(found.leaks)]
            found.leaks_found += part.leaks_found
            done += TENANTS_PER_TASK
            progress(min(done, len(tenants)), len(tenants))
        narrowed = [_narrowed(desk, leak) for leak in found.leaks[:NARROWED_AT_MOST]]
    return Search(
        tenants=len(tenants),
        questions=found.questions,
        evaluations=found.evaluations,
        data_documents=found.data_documents,
        leaks=(*narrowed, *found.leaks[NARROWED_AT_MOST:]),
        leaks_found=found.leaks_found,
    )


def _evaluations(desk: _Desk, tenant: str) -> int:
    others = max(1, len(desk.neighbours.tenants) - 1)
    return sum(1 for _ in desk.asks(tenant)) * (2 + (len(Mutation) - 1) * others.bit_length())


def _search_some(desk: _Desk, tenants: list[str]) -> _Found:
    found = _Found()
    desk.load(desk.estate.document)
    found.data_documents += 1
    asks = {tenant: list(desk.asks(tenant)) for tenant in tenants}
    before: dict[str, list[JsonValue]] = {}
    for tenant in tenants:
        before[tenant] = [desk.value(ask) for ask in asks[tenant]]
        found.questions += len(asks[tenant])
        found.evaluations += len(asks[tenant])
        _mention_others(desk, asks[tenant], found)
    for kept, mutation, bit in _loads(desk.neighbours.tenants, tenants):
        data, others = desk.neighbours.changed(mutation, kept=kept, bit=bit)
        if not others:
            continue
        desk.load(data)
        found.data_documents += 1
        for tenant in tenants:
            if tenant not in kept:
                continue
            found.evaluations += len(asks[tenant])
            for ask, was in zip(asks[tenant], before[tenant], strict=True):
                value = desk.value(ask)
                if value != was:
                    found.add(
                        Leak(
                            tenant=tenant,
                            role=ask.role,
                            tool=ask.tool,
                            entrypoint=ask.entrypoint.value,
                            changed=mutation.told,
                            before=was,
                            after=value,
                            document=ask.document,
                            mutation=mutation,
                            others=tuple(others),
                        )
                    )
    return found


def _loads(
    every: Sequence[str], tenants: Sequence[str]
) -> Iterator[tuple[frozenset[str], Mutation, int]]:
    """Which tenants keep their data, and what becomes of the others'.

    Two tenants differ in a bit of their index, so for each pair there is a load in which
    one is kept and the other is changed: O(log n) loads for n tenants. All others are
    deleted at once besides, as that load is small.
    """
    for tenant in tenants:
        for mutation in Mutation if len(every) <= ALONE_AT_MOST else (Mutation.DELETED,):
            yield frozenset({tenant}), mutation, 0
    if len(every) <= ALONE_AT_MOST:
        return
    for bit in range((len(every) - 1).bit_length()):
        for side in (0, 1):
            kept = frozenset(name for index, name in enumerate(every) if (index >> bit) & 1 == side)
            if kept.intersection(tenants):
                for mutation in Mutation:
                    if mutation is not Mutation.DELETED:
                        yield kept, mutation, bit


def _mention_others(desk: _Desk, asks: Sequence[_Ask], found: _Found) -> None:
    """Ask with another tenant's name in arguments, context and resource: the answer must
    be the same as with the name of nobody.
    """
    for ask in asks:
        if ask.question is None or ask.entrypoint is not Entrypoint.AUTHZ_DECISION:
            continue
        for name in desk.neighbours.near(ask.question.tenant):
            nobody = desk.neighbours.nobody_like(name)
            pairs = zip(
                _mentioning(ask.question, name), _mentioning(ask.question, nobody), strict=True
            )
            for (place, question), (_, likewise) in pairs:
                document = question.document()
                value = raw(desk.evaluator, ask.entrypoint, document)
                was = raw(desk.evaluator, ask.entrypoint, likewise.document())
                found.evaluations += 2
                if value != was:
                    found.add(
                        Leak(
                            tenant=ask.question.tenant,
                            role=ask.role,
                            tool=ask.tool,
                            entrypoint=ask.entrypoint.value,
                            changed=f"{place} of the call names another tenant, and not nobody",
                            before=was,
                            after=value,
                            document=document,
                            others=(name,),
                        )
                    )


def _mentioning(question: Question, name: str) -> Iterator[tuple[str, Question]]:
    mentions: JsonObject = dict.fromkeys(_MENTIONED, name)
    yield "the context", replace(question, context={**question.context, **mentions})
    yield "the resource", replace(question, resource={"type": "tenant", "id": name})
    yield "an argument", replace(question, arguments={**question.arguments, **mentions})
    for key, value in question.arguments.items():
        if isinstance(value, str):
            yield "an argument", replace(question, arguments={**question.arguments, key: name})


def _narrowed(desk: _Desk, leak: Leak) -> Leak:
    """The same with fewer tenants changed, while what was asked about still moves."""
    if leak.mutation is None:
        return leak
    ask = _Ask(leak.role, leak.tool, Entrypoint(leak.entrypoint), leak.document, None)

    def value_with(others: Sequence[str]) -> JsonValue:
        kept = frozenset(desk.neighbours.tenants) - frozenset(others)
        data, _ = desk.neighbours.changed(leak.mutation or Mutation.DELETED, kept=kept, bit=0)
        desk.load(data)
        return desk.value(ask)

    others, after = leak.others, leak.after
    while len(others) > 1:
        half = len(others) // 2
        for part in (others[:half], others[half:]):
            value = value_with(part)
            if value != leak.before:
                others, after = part, value
                break
        else:
            break
    return replace(leak, others=others, after=after)


def _charges(estate: Estate, tenant: str, role: str) -> list[Charge]:
    """One of each budget and unit that the tenant's limits or the role name."""
    found: dict[tuple[str, str], Charge] = {}
    for budget, unit in estate.budgets(tenant, role):
        found.setdefault((budget, unit), Charge(budget=budget, unit=unit, amount=1))
    return list(found.values())[:MAX_CHARGES]
