from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from pdp.policy.analysis.workers import WorkerError, spread
from pdp.policy.engine import BundleError
from pdp.reason import ReasonCode


@contextmanager
def ten() -> Iterator[int]:
    yield 10


def unusable() -> AbstractContextManager[int]:
    raise BundleError(ReasonCode.POLICY_UNAVAILABLE, "The policy is not one.")


def add(state: int, item: int) -> int:
    return state + item


def end(_state: int, _item: int) -> None:
    os._exit(1)


@pytest.mark.parametrize("processes", (1, 2))
def test_results_come_in_the_order_of_the_items(processes: int) -> None:
    assert list(spread(ten, add, range(9), processes=processes)) == [*range(10, 19)]


@pytest.mark.parametrize("processes", (1, 2))
def test_what_the_setup_raises_reaches_the_caller(processes: int) -> None:
    with pytest.raises(BundleError, match="The policy is not one"):
        list(spread(unusable, add, range(3), processes=processes))


def test_a_worker_that_is_ended_is_told_with_what_to_do() -> None:
    with pytest.raises(WorkerError, match="--tenant"):
        list(spread(ten, end, range(3), processes=2))
