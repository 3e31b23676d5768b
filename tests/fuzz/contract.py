"""What holds for every input, whatever it is an input of."""

from __future__ import annotations

import asyncio
import importlib
import resource
import selectors
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Final, Protocol, TypeVar, cast

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
"""Inputs that reach what others do not, by target."""
FOUND: Final = HERE / "found"
"""Inputs that broke something once, by target."""

SECRET: Final = "planted-6f1d0c9b2a"
"""Stands where a secret may stand, and may not be seen again."""

SHORT: Final = 16

MAX_CPU_SECONDS: Final = 2.0
"""For one input. Of the processor, as machines of tests are busy."""
MAX_MORE_KILOBYTES: Final = 256 * 1024
"""By which one input may raise the most memory that the process has held."""

T = TypeVar("T")


class Target(Protocol):
    """A module that takes in what strangers, or broken disks, may bring."""

    def one_input(self, data: bytes) -> bool:
        """Whether the input was taken for a good one. AssertionError, and anything else that
        is not the documented refusal, is a finding.
        """
        ...

    def samples(self) -> Iterable[bytes]:
        """Inputs that are taken: where a fuzzer begins."""
        ...


def names() -> list[str]:
    """All targets."""
    return sorted(path.stem for path in (HERE / "targets").glob("[a-z]*.py"))


def load(name: str) -> Target:
    """The target of that name."""
    return cast("Target", importlib.import_module(f"tests.fuzz.targets.{name}"))


def run(target: Target, data: bytes) -> bool:
    """One input, within the bounds of time and memory."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    taken = target.one_input(data)
    seconds = time.process_time() - began
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes
    assert seconds <= MAX_CPU_SECONDS, f"took {seconds:.1f} s of the processor"
    assert more <= MAX_MORE_KILOBYTES, f"took {more} KiB of memory"
    return taken


def refuses(act: Callable[[], T], *kinds: type[Exception], secret: str = SECRET) -> T | None:
    """What comes of it; None where it is refused with one of these errors, which show neither
    SECRET nor what is secret besides: a short text may stand in an error by chance.
    """
    try:
        return act()
    except kinds as error:
        shown = f"{error} {error!r} {error.__cause__} {error.__cause__!r}"
        for hidden in (SECRET, secret):
            if len(hidden) > SHORT and hidden in shown:
                raise AssertionError(f"a {type(error).__name__} shows what is secret") from None
        return None


def at_once(coroutine: Coroutine[object, None, T]) -> T:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    coroutine.close()
    raise AssertionError("it waited for something")


def skipping_time(coroutine: Coroutine[object, None, T]) -> T:
    """The result of a coroutine on a loop whose clock leaps to whatever is waited for. Not for
    what waits for threads or others, as deadlines then pass at once.
    """
    with asyncio.Runner(loop_factory=_LeapingLoop) as runner:
        return runner.run(coroutine)


class _LeapingLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._leapt = 0.0
        super().__init__(_LeapingSelector(self._leap))

    def time(self) -> float:
        return super().time() + self._leapt

    def _leap(self, seconds: float) -> None:
        self._leapt += seconds


class _LeapingSelector(selectors.SelectSelector):
    def __init__(self, leap: Callable[[float], None]) -> None:
        super().__init__()
        self._leap = leap

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            self._leap(timeout)
            timeout = 0.0
        return super().select(timeout)
