"""Who may do what: one decision for every tenant x role x tool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final

from pdp.policy.analysis.cases import Cases
from pdp.policy.analysis.evaluator import Answer, Evaluator, decide, open_evaluator
from pdp.policy.analysis.questions import Estate, Only, Questionnaire
from pdp.policy.analysis.workers import Progress, spread
from pdp.policy.bundle import Bundle

TENANTS_PER_TASK: Final = 8
FEW_QUESTIONS: Final = 4_000
"""So many are answered sooner here than by other processes, which have to load the bundle."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The decision on one call."""

    tenant: str
    role: str
    tool: str
    case: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class _Asker:
    """What a process needs to answer for a tenant."""

    evaluator: Evaluator
    questions: Questionnaire


def matrix(
    bundle: Bundle, cases: Cases, only: Only, *, processes: int, progress: Progress
) -> Iterator[Cell]:
    """Every cell, tenant by tenant. Raises BundleError."""
    questions = Questionnaire([Estate(bundle.data)], cases, only)
    tenants = questions.tenants()
    done, total = 0, len(tenants)
    setup = partial(_asker, bundle, cases, only)
    processes = 1 if is_small(questions, tenants) else processes
    for cells in spread(setup, _cells, chunks(tenants, TENANTS_PER_TASK), processes=processes):
        yield from cells
        done += TENANTS_PER_TASK
        progress(min(done, total), total)


def chunks(names: Sequence[str], size: int) -> list[list[str]]:
    """The names in lists of at most ``size``."""
    return [list(names[start : start + size]) for start in range(0, len(names), size)]


def is_small(questions: Questionnaire, tenants: Sequence[str]) -> bool:
    """Whether other processes are not worth their start; judged by the first tenant."""
    return not tenants or sum(1 for _ in questions.of(tenants[0])) * len(tenants) <= FEW_QUESTIONS


@contextmanager
def _asker(bundle: Bundle, cases: Cases, only: Only) -> Iterator[_Asker]:
    with open_evaluator(bundle, clock=lambda: cases.time) as evaluator:
        yield _Asker(evaluator, Questionnaire([Estate(bundle.data)], cases, only))


def _cells(asker: _Asker, tenants: list[str]) -> list[Cell]:
    same: dict[Answer, Answer] = {}
    cells = []
    for tenant in tenants:
        for question in asker.questions.of(tenant):
            answer = decide(asker.evaluator, question.document())
            # Equal answers as one object: a tenth of the bytes between processes.
            answer = same.setdefault(answer, answer)
            cells.append(Cell(tenant, question.role, question.tool, question.case, answer))
    return cells
