"""The same work for many items, in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

from pdp.errors import PdpError
from pdp.reason import ReasonCode

_State = TypeVar("_State")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class WorkerError(PdpError):
    """A worker process has ended before its work was done."""

    def __init__(self) -> None:
        super().__init__(
            ReasonCode.INTERNAL,
            "A worker process was ended from outside, most likely for want of memory. Ask about"
            " fewer tenants at a time (--tenant).",
        )


Progress = Callable[[int, int], None]
"""Is told how much is done, and how much there is in all."""


def spread(
    setup: Callable[[], AbstractContextManager[_State]],
    work: Callable[[_State, _Item], _Result],
    items: Sequence[_Item],
    *,
    processes: int,
) -> Iterator[_Result]:
    """``work(state, item)`` for each item, in their order.

    Each process opens one state of its own. With more than one process everything
    that is passed in must be picklable; with one, all is done here.
    """
    if processes <= 1:
        with setup() as state:
            for item in items:
                yield work(state, item)
        return
    # Threads of the Wasm runtime do not survive a fork, so each process starts anew.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _Worker.prepare, (_Worker(setup, work),)) as pool:
        try:
            yield from pool.map(_Worker.run, items)
        except BrokenProcessPool:
            raise WorkerError from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Worker:
    """The one in a worker process."""

    here: Any = None

    def __init__(
        self, setup: Callable[[], AbstractContextManager[Any]], work: Callable[[Any, Any], Any]
    ) -> None:
        self._setup = setup
        self._work = work
        self._stack = ExitStack()
        """Stays open: what it holds ends with the process."""
        self._state: Any = None

    @classmethod
    def prepare(cls, worker: _Worker) -> None:
        cls.here = worker

    @classmethod
    def run(cls, item: Any) -> Any:  # noqa: ANN401 - as the functions that it calls
        worker = cls.here
        # Not in the initializer, so that what it raises reaches the parent.
        if worker._state is None:  # noqa: SLF001 - of its own
            worker._state = worker._stack.enter_context(worker._setup())  # noqa: SLF001
        return worker._work(worker._state, item)  # noqa: SLF001
