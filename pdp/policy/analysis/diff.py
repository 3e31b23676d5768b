"""What a change of the bundle grants and takes away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

from pdp.canonical import JsonObject
from pdp.policy.analysis.cases import Cases
from pdp.policy.analysis.evaluator import Answer, Evaluator, decide, open_evaluator
from pdp.policy.analysis.matrix import TENANTS_PER_TASK, chunks, is_small
from pdp.policy.analysis.questions import Estate, Only, Questionnaire
from pdp.policy.analysis.workers import Progress, spread
from pdp.policy.bundle import Bundle


class Change(StrEnum):
    """How a decision differs."""

    GRANT = "grant"
    """Was denied, is allowed; or the permit is for any arguments that was for some, or for
    more calls."""
    REVOKE = "revoke"
    """Was allowed, is denied."""
    TERMS = "terms"
    """Is allowed by both, on other terms: scopes, charges, lifetime of the permit, or fewer
    calls."""
    REASON = "reason"
    """Is denied by both, for another reason."""


@dataclass(frozen=True, slots=True)
class Differing:
    """All calls of one tenant, role and tool whose answers changed alike."""

    change: Change
    tenant: str
    role: str
    tool: str
    calls: int
    """How many of the calls that were asked about."""
    before: Answer
    after: Answer
    example: JsonObject = field(repr=False)
    """The input of one such call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What only one of the two bundles knows."""

    tenants_added: tuple[str, ...]
    tenants_removed: tuple[str, ...]
    roles_added: tuple[tuple[str, str], ...]
    """(tenant, role), of tenants that both know."""
    roles_removed: tuple[tuple[str, str], ...]
    tools_added: tuple[str, ...]
    tools_removed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The whole difference of two bundles."""

    names: Names
    asked: int
    """Calls that both were asked about."""
    differing: tuple[Differing, ...]

    def of(self, change: Change) -> list[Differing]:
        """What changed in one way."""
        return [each for each in self.differing if each.change is change]


@dataclass(frozen=True, slots=True)
class _Pair:
    old: Evaluator
    new: Evaluator
    questions: Questionnaire


def compare(
    old: Bundle, new: Bundle, cases: Cases, only: Only, *, processes: int, progress: Progress
) -> Comparison:
    """Ask both bundles the same. Raises BundleError.

    Asked is about every tenant, role and tool that either knows, with tokens that hold
    the scopes of both. Where the rules for a tool's arguments differ, arguments at the
    edges of both rules are asked about too, and everywhere if the Rego differs.
    """
    before, after = Estate(old.data), Estate(new.data)
    setup = partial(_pair, old, new, cases, only)
    questions = _questionnaire(old, new, cases, only)
    tenants = questions.tenants()
    processes = 1 if is_small(questions, tenants) else processes
    asked = 0
    differing: list[Differing] = []
    done = 0
    for count, found in spread(
        setup, _differences, chunks(tenants, TENANTS_PER_TASK), processes=processes
    ):
        asked += count
        differing += found
        done += TENANTS_PER_TASK
        progress(min(done, len(tenants)), len(tenants))
    return Comparison(names=_names(before, after), asked=asked, differing=tuple(differing))


def change_of(before: Answer, after: Answer) -> Change | None:
    """How one decision differs; None when it does not."""
    if before == after:
        return None
    if before.allow != after.allow:
        return Change.GRANT if after.allow else Change.REVOKE
    if not after.allow:
        return Change.REASON
    return Change.GRANT if after.is_wider_than(before) else Change.TERMS


def _questionnaire(old: Bundle, new: Bundle, cases: Cases, only: Only) -> Questionnaire:
    return Questionnaire(
        [Estate(old.data), Estate(new.data)],
        cases,
        only,
        edges=True,
        all_edges=_rules(old) != _rules(new),
    )


def _rules(bundle: Bundle) -> object:
    """What decides besides the data: the sources where the bundle has them."""
    rego = {name: text for name, text in bundle.rego.items() if not name.endswith("_test.rego")}
    return rego or bundle.wasm


@contextmanager
def _pair(old: Bundle, new: Bundle, cases: Cases, only: Only) -> Iterator[_Pair]:
    with (
        open_evaluator(old, clock=lambda: cases.time) as before,
        open_evaluator(new, clock=lambda: cases.time) as after,
    ):
        yield _Pair(before, after, _questionnaire(old, new, cases, only))


def _differences(pair: _Pair, tenants: list[str]) -> tuple[int, list[Differing]]:
    asked = 0
    found: dict[tuple[object, ...], Differing] = {}
    for tenant in tenants:
        for question in pair.questions.of(tenant):
            asked += 1
            document = question.document()
            before, after = decide(pair.old, document), decide(pair.new, document)
            change = change_of(before, after)
            if change is None:
                continue
            key = (tenant, question.role, question.tool, before, after)
            first = found.get(key)
            found[key] = Differing(
                change,
                tenant,
                question.role,
                question.tool,
                first.calls + 1 if first else 1,
                before,
                after,
                first.example if first else document,
            )
    return asked, list(found.values())


def _names(before: Estate, after: Estate) -> Names:
    both = before.tenants.keys() & after.tenants.keys()

    def roles(one: Estate, other: Estate) -> tuple[tuple[str, str], ...]:
        found = one.all_roles() - other.all_roles()
        return tuple(sorted(pair for pair in found if pair[0] in both))

    return Names(
        tenants_added=_only_in(after.tenants, before.tenants),
        tenants_removed=_only_in(before.tenants, after.tenants),
        roles_added=roles(after, before),
        roles_removed=roles(before, after),
        tools_added=_only_in(after.tools, before.tools),
        tools_removed=_only_in(before.tools, after.tools),
    )


def _only_in(one: JsonObject, other: JsonObject) -> tuple[str, ...]:
    return tuple(sorted(one.keys() - other.keys()))


def summary(differing: Iterable[Differing]) -> list[list[Differing]]:
    """What changed alike for the same role and tool, for however many tenants, together."""
    alike: dict[tuple[object, ...], list[Differing]] = {}
    for each in differing:
        key = (each.role, each.tool, each.before, each.after)
        alike.setdefault(key, []).append(each)
    return list(alike.values())
