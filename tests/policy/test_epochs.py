"""The clock of deadlines: it runs while something runs, and rests otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from pdp.policy import epochs as epochs_module
from pdp.policy.epochs import Epochs


class CountingEngine:
    """Stands for wasmtime's engine, which does not tell its epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def increment_epoch(self) -> None:
        self.epoch += 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> CountingEngine:
    monkeypatch.setattr(epochs_module, "REST_AFTER_SECONDS", 0.05)
    return CountingEngine()


def until(met: Callable[[], bool], *, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def rests(engine: CountingEngine) -> bool:
    before = engine.epoch
    threading.Event().wait(0.1)
    return engine.epoch == before


def test_epochs_pass_while_an_evaluation_runs_and_stop_after_the_last(
    engine: CountingEngine,
) -> None:
    epochs = Epochs(engine)  # type: ignore[arg-type]
    try:
        with epochs, epochs:
            until(lambda: engine.epoch > 30)  # longer than it takes to fall asleep
        until(lambda: rests(engine))
        before = engine.epoch
        with epochs:
            until(lambda: engine.epoch > before)
    finally:
        epochs.close()


def test_a_resting_clock_closes(engine: CountingEngine) -> None:
    epochs = Epochs(engine)  # type: ignore[arg-type]
    until(lambda: engine.epoch > 1)
    until(lambda: rests(engine))
    epochs.close()
    assert not epochs._thread.is_alive()
