"""The clock of deadlines: it runs while something runs, and rests otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pdp.policy import epochs as epochs_module
from pdp.policy.epochs import TICK_SECONDS, Epochs


class CountingEngine:
    """Stands for wasmtime's engine, which does not tell its epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def increment_epoch(self) -> None:
        self.epoch += 1


class Clock:
    """The real time, moved on by hand; counts how often it is read."""

    def __init__(self) -> None:
        self.ahead_seconds = 0.0
        self.readings = 0

    def __call__(self) -> float:
        self.readings += 1
        return time.monotonic() + self.ahead_seconds


@pytest.fixture
def engine() -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def epochs(
    engine: CountingEngine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Epochs]:
    monkeypatch.setattr(epochs_module, "REST_AFTER_SECONDS", 0.05)
    epochs = Epochs(engine.increment_epoch, clock=clock)
    yield epochs
    until(lambda: epochs._thread is None)


def until(met: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def rests(clock: Clock) -> bool:
    before = clock.readings
    threading.Event().wait(0.1)
    return clock.readings == before


def test_epochs_pass_while_an_evaluation_runs_and_stop_after_the_last(
    epochs: Epochs, engine: CountingEngine, clock: Clock
) -> None:
    with epochs, epochs:
        until(lambda: engine.epoch > 30)  # longer than it takes to fall asleep
    passed = engine.epoch
    until(lambda: rests(clock))
    assert engine.epoch == passed
    with epochs:
        until(lambda: engine.epoch > passed)


def test_ticks_that_came_late_are_made_up_for(
    epochs: Epochs, engine: CountingEngine, clock: Clock
) -> None:
    with epochs:
        clock.ahead_seconds = 1_000 * TICK_SECONDS
        until(lambda: engine.epoch >= 1_000)


def test_an_evaluation_does_not_pay_for_what_went_before_it(
    epochs: Epochs, engine: CountingEngine, clock: Clock
) -> None:
    clock.ahead_seconds = 1_000 * TICK_SECONDS
    with epochs:
        assert engine.epoch < 1_000
        clock.ahead_seconds += 1_000 * TICK_SECONDS
        with epochs:
            assert engine.epoch >= 1_000  # counted before the second one's deadline is set


def test_a_clock_at_rest_has_no_thread(epochs: Epochs, engine: CountingEngine) -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        with epochs:
            assert len(set(threading.enumerate()) - before) == 1
        until(lambda: set(threading.enumerate()) <= before)


def test_evaluations_side_by_side_share_one_thread(epochs: Epochs) -> None:
    before = set(threading.enumerate())
    with epochs, epochs, epochs:
        assert len(set(threading.enumerate()) - before) == 1
