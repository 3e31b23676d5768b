"""Keeps permits for several calls as long as they count, and reports on them in the end.

It has a connection and two threads of its own, for either face of the guard: one hears
what the sidecar's Watch tells, the other reports. So they do their work also while an
event loop does not run, or is busy. There are none before the first such permit.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from pdp.api.v1 import authorization_pb2
from pdp.channel import CallError, Connection, Metadata
from pdp.client.acting import Acting, Identity
from pdp.client.call import Tool
from pdp.client.desk import PermitDesk, Steps, Use, Wait, log_unreported, walk
from pdp.client.pool import InForce, Kept, Key, PermitPool

_log: Final = logging.getLogger(__name__)

_PAUSE_SECONDS: Final = 1.0
"""Between tries to open a Watch that was refused or lost, and to send what could not be
sent."""


class Keeper:
    """What a guard spends without asking."""

    def __init__(
        self,
        desk: PermitDesk,
        identity: Identity,
        connection: Connection,
        *,
        keeps: bool,
        wait_seconds: float,
    ) -> None:
        """``connection`` is for its use alone. Without ``keeps`` no permit is kept.
        ``wait_seconds`` is how long a caller waits for another who asks the same.
        """
        self._wait_seconds = wait_seconds
        self._desk = desk
        self._identity = identity
        self._connection = connection
        self._keeps = keeps
        self._pool = PermitPool(keeps=keeps, on_change=self._changed)
        self.forget()
        _keepers.add(self)

    def forget(self) -> None:
        """Begin anew, in the child of a fork: threads and permits are the parent's."""
        self._pool.forget()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._due = threading.Event()
        self._watch: Any = None
        """The call under way."""
        self._watching: threading.Thread | None = None
        self._reporting: threading.Thread | None = None
        self._watch_again_at = 0.0

    def take(self, tool: Tool) -> Kept | None:
        """A use of a permit that is kept for such a call; None where it is to be asked
        for, or refused.
        """
        acting = self._identity.in_force()
        if acting is None or tool.asks_each_time:
            return None
        return self._pool.take(self._key(acting, tool))

    def obtain(self, tool: Tool, bound: inspect.BoundArguments) -> Steps[Use]:
        """Ask for a permit: for the one call, or for several, of which this is one. While
        another caller asks for just the same, wait for what comes of that. Raises
        PermitDenied and IdentityLacking.
        """
        acting = self._identity.current()
        key = self._key(acting, tool)
        while self._pool.in_force is not None and tool.permits_several:
            question = self._pool.turn(key)
            if question is None:
                return (yield from self._obtain_in_turn(tool, bound, key))
            is_kept = yield Wait(question, self._wait_seconds)
            use = self.take(tool)
            if use is not None:
                return use
            if not is_kept:
                break
        return (yield from self._obtain(tool, bound))

    def _obtain_in_turn(self, tool: Tool, bound: inspect.BoundArguments, key: Key) -> Steps[Use]:
        is_kept = False
        try:
            use = yield from self._obtain(tool, bound)
            is_kept = isinstance(use, Kept) and use.left > 0
        finally:
            self._pool.asked(key, kept=is_kept)
        return use

    def _obtain(self, tool: Tool, bound: inspect.BoundArguments) -> Steps[Use]:
        asked = self._pool.moment()
        grant = yield from self._desk.obtain(tool.describe(bound))
        is_for_several = grant.permit.max_uses > 1
        keeps = self._keeps and is_for_several and not tool.asks_each_time
        tool.permits_several = keeps
        if not is_for_several:
            return grant
        if keeps and asked.in_force is None:
            self._open_watch(grant.asked_by)
        if not keeps:
            asked = replace(asked, in_force=None)
        return self._pool.put(grant, self._key(grant.asked_by, tool), asked=asked)

    def _key(self, acting: Acting, tool: Tool) -> Key:
        return acting.token, acting.context_json, tool.name, tool.audience

    def close(self) -> None:
        """Keep nothing any more, and report on what was kept; a use that is still under
        way is reported on when it ends. A guarded tool that is called begins anew.
        """
        self._stopping.set()
        with self._lock:
            watch, watching, reporting = self._watch, self._watching, self._reporting
        if watch is not None:
            watch.cancel()
        self._pool.told(None)
        self._due.set()
        for thread in (watching, reporting):
            if thread is not None:
                thread.join()
        self._report_due()
        unsent = self._pool.abandon_due()
        if unsent:
            _log.warning(
                "the uses of %d permits could not be reported; what they held expires by itself",
                unsent,
            )
        self._connection.close()
        with self._lock:
            self._watching = self._reporting = None
            self._watch_again_at = 0.0
        self._stopping.clear()

    def _changed(self) -> None:
        with self._lock:
            if self._reporting is None and not self._stopping.is_set():
                self._reporting = _started("pdp-report", self._report)
        self._due.set()

    def _open_watch(self, acting: Acting) -> None:
        """Open a Watch as the caller, unless there is one, or there was none just now."""
        metadata = tuple(pair for pair in acting.metadata if pair[0] != "traceparent")
        with self._lock:
            under_way = self._watching is not None and self._watching.is_alive()
            if under_way or self._stopping.is_set() or time.monotonic() < self._watch_again_at:
                return
            self._watch_again_at = time.monotonic() + _PAUSE_SECONDS
            self._watching = _started("pdp-watch", functools.partial(self._hear, metadata))

    def _hear(self, metadata: Metadata) -> None:
        """Hear what a Watch tells, until it ends in whatever way."""
        watch: Any = None
        revision = ""
        try:
            watch = self._connection.stream("Watch", authorization_pb2.WatchRequest(), metadata)
            self._watch = watch
            if self._stopping.is_set():
                return
            for event in watch:
                if event.HasField("policy"):
                    revision = event.policy.revision
                elif event.HasField("draining"):
                    break
                # Whatever else it may tell: what was permitted before may not count.
                self._pool.told(InForce(revision))
        except Exception as error:  # noqa: BLE001 - however it ends, there is none any more
            _log.info("the Watch for kept permits has ended (%s)", type(error).__name__)
        finally:
            self._pool.told(None)
            if watch is not None:
                watch.cancel()

    def _report(self) -> None:
        """Drop what ends, and report on what is dropped, when its time comes."""
        while not self._stopping.is_set():
            seconds = self._pool.seconds_to_next_end()
            if self._report_due():
                self._due.wait(seconds)
                self._due.clear()
            else:
                self._stopping.wait(_PAUSE_SECONDS)

    def _report_due(self) -> bool:
        """False where the sidecar can not be told now."""
        while (kept := self._pool.next_due()) is not None:
            try:
                walk(self._connection, kept.report())
            except CallError as error:
                if self._pool.report_later(kept, error):
                    return False
            except Exception as error:  # noqa: BLE001 - the others are reported all the same
                log_unreported(error)
        return True


def _started(name: str, work: Callable[[], None]) -> threading.Thread | None:
    """A thread that does the work; None where there can be no more."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError as error:
        _log.warning("permits for several calls are not kept: %s", error)
        return None
    return thread


_keepers: Final[weakref.WeakSet[Keeper]] = weakref.WeakSet()


def _begin_anew() -> None:
    for keeper in _keepers:
        keeper.forget()


def _close_all() -> None:
    for keeper in tuple(_keepers):
        keeper.close()


if hasattr(os, "register_at_fork"):  # which Windows has not, nor forks
    os.register_at_fork(after_in_child=_begin_anew)
atexit.register(_close_all)
