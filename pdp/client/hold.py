"""A hold while it is spent, and who tells the sidecar of it beside the caller."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from pdp.client.spend import Charge, Reservation

if TYPE_CHECKING:
    import asyncio

    from pdp.client.meter import Meter


class Hold:
    """What ``with guard.reserve(...)`` gives: amounts that are held, to be spent."""

    def __init__(self, meter: Meter, wake: Callable[[bool], None]) -> None:
        self._meter = meter
        self._wake = wake

    @property
    def reservation(self) -> Reservation:
        """What is held, until when, and which thresholds that has crossed."""
        return self._meter.reservation

    def spent(self, charges: Sequence[Charge] = (), /, **quantities: int) -> None:
        """Count what has been spent since the last time: quantities of what was reserved
        with Usage, ``spent(tokens_out=120)``, or else charges that were reserved,
        ``spent([("llm", "usd_micros", 40)])``. It never waits: the sidecar is told in the
        background.

        More than was reserved is counted too. Raises ValueError or TypeError for what was
        not reserved and what is no amount, and all that is held then counts as spent;
        RuntimeError after the end of the ``with``. An AsyncGuard's is called in its event
        loop.
        """
        self._wake(self._meter.add(charges, quantities))


class TellingThread:
    """Tells from time to time, on a thread of its own; there is none before the first
    :meth:`wake`.
    """

    def __init__(self, tell: Callable[[], None], *, every_seconds: float) -> None:
        """``tell`` must not raise."""
        self._tell = tell
        self._every_seconds = every_seconds
        self._lock = threading.Lock()
        self._due = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def wake(self, due: bool) -> None:  # noqa: FBT001 - the one thing that it is told
        """There is something to tell: when the time comes, or now."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pdp-spend", daemon=True)
                self._thread.start()
        if due:
            self._due.set()

    def stop(self) -> None:
        """Tell no more, once what is under way is told."""
        self._stopping = True
        self._due.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._due.wait(self._every_seconds)
            self._due.clear()
            if self._stopping:
                return
            self._tell()


class TellingTask:
    """The same as a task of the running event loop."""

    def __init__(self, tell: Callable[[], Awaitable[None]], *, every_seconds: float) -> None:
        """``tell`` must not raise."""
        import asyncio  # noqa: PLC0415 - importing the stub stays cheap until it is used

        self._tell = tell
        self._every_seconds = every_seconds
        self._due = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def wake(self, due: bool) -> None:  # noqa: FBT001 - as above
        """There is something to tell: when the time comes, or now."""
        import asyncio  # noqa: PLC0415

        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        if due:
            self._due.set()

    async def stop(self) -> None:
        """Tell no more, once what is under way is told."""
        import asyncio  # noqa: PLC0415

        self._stopping = True
        self._due.set()
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        import asyncio  # noqa: PLC0415

        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_seconds):
                    await self._due.wait()
            self._due.clear()
            if self._stopping:
                return
            await self._tell()
