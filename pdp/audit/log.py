"""The audit log: a chain of records in files, each durable before its answer.

Whatever waits when a write ends goes into the next write together, so a slow disk
costs one wait for many callers. When nothing is under way a record is written at
once. Who asks off the event loop writes by itself, when it is its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from pathlib import Path
from typing import Final

import pdp
from pdp.audit.chain import FIRST_PREV_HASH, GAP, START, STOP, Members, encode, seal
from pdp.audit.record import AuditError, AuditReceipt, AuditRecord, Outcome
from pdp.audit.recovery import find_chain_end
from pdp.audit.segments import DamagedError, SegmentWriter
from pdp.canonical import JsonError, JsonObject
from pdp.off_loop import running_loop
from pdp.private_files import sync_directory
from pdp.reason import ReasonCode
from pdp.storage import Durability

MAX_BATCH: Final = 256
"""Records in one write at most, so that none waits for long."""

SYNC_INTERVAL_SECONDS: Final = 1.0
"""With Durability.PROCESS: how long written records may wait for the disk."""

RETRY_INTERVAL_SECONDS: Final = 1.0
"""How often a failing log tries by itself whether it can be written again."""

_log: Final = logging.getLogger(__name__)


class ChainedAuditLog:
    """Implements AuditLog in a directory of its own.

    Opening takes up the chain where it ended, cuts off a torn write, and records
    the start of a new epoch. The directory gets mode 0700, its files 0600. Raises
    AuditError when the directory is in use, can not be written, or the log in it
    is broken; its message names the directory and is for operators.

    With Durability.PROCESS an acknowledged record survives the process at once,
    and loss of power after about SYNC_INTERVAL_SECONDS. ``clock`` gives Unix time
    in nanoseconds.
    """

    def __init__(
        self,
        directory: Path,
        *,
        instance: str,
        durability: Durability,
        segment_max_bytes: int = 64 * 1024 * 1024,
        clock: Callable[[], int] = time.time_ns,
        max_pending: int = 4096,
    ) -> None:
        self._directory = directory
        self._instance = instance
        self._durability = durability
        self._clock = clock
        self._max_pending = max_pending
        self._queue: queue.SimpleQueue[_QueuedEntry | _Signal] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        """Held while the chain is made longer."""
        self._closed = False
        self._damaged = False
        self._refused = 0
        """Records refused since the last one that could be written."""
        self._unsynced = threading.Event()
        self._finishing = threading.Event()

        with contextlib.ExitStack() as on_failure:
            try:
                self._guard = _lock_directory(directory)
                on_failure.callback(os.close, self._guard)
                end = find_chain_end(directory)
                self._segments = SegmentWriter(
                    directory, max_bytes=segment_max_bytes, newest=end.segment
                )
                on_failure.callback(self._segments.close)
                self._sequence = end.last.sequence if end.last else 0
                self._hash = end.last.hash if end.last else FIRST_PREV_HASH
                self._epoch = end.last.epoch + 1 if end.last else 1
                detail: JsonObject = {"version": pdp.__version__}
                if end.torn_bytes:
                    detail["torn_bytes"] = end.torn_bytes
                self._segments.sync()  # before the start is written: see recovery
                self._extend([self._encode_own(START, detail=detail)])
                self._segments.sync()
                self._unsynced.clear()
            except (OSError, DamagedError) as error:
                raise AuditError(
                    ReasonCode.AUDIT_UNAVAILABLE,
                    f"The audit log in {directory} can not be written: {_describe(error)}.",
                ) from error
            on_failure.pop_all()
        if end.torn_bytes:
            _log.warning(
                "audit: cut %d bytes off the log, of records that were not on disk yet; they lie"
                " beside it",
                end.torn_bytes,
            )
        self._syncer = threading.Thread(
            target=self._sync_in_background, name="audit-syncer", daemon=True
        )
        self._writer = threading.Thread(target=self._work, name="audit-writer", daemon=True)
        self._syncer.start()
        self._writer.start()

    @property
    def healthy(self) -> bool:
        """False while records can not be written, and after closing."""
        return not (self._closed or self._damaged or self._refused)

    async def append(self, record: AuditRecord) -> AuditReceipt:
        """See AuditLog.append."""
        try:
            members = encode(record, instance=self._instance)
        except JsonError as error:
            raise AuditError(
                ReasonCode.AUDIT_UNAVAILABLE,
                f"The audit record {error}, so it can not be written and nothing was allowed.",
            ) from None
        loop = running_loop()
        entry = self._write_here(members) if loop is None else await self._queue_up(members, loop)
        if entry.receipt is None:
            raise AuditError(
                ReasonCode.AUDIT_UNAVAILABLE,
                "The audit record could not be written, so nothing was allowed. Try again later.",
            )
        return entry.receipt

    def _write_here(self, members: Members) -> _Entry:
        entry = _Entry(members)
        with self._writing:
            self._refuse_if_closed()
            self._commit([entry])
            if self._refused == 1:
                self._queue.put(_Signal.TRY_AGAIN)
        return entry

    async def _queue_up(self, members: Members, loop: asyncio.AbstractEventLoop) -> _Entry:
        entry = _QueuedEntry(members, loop)
        with self._lock:
            self._refuse_if_closed()
            if self._queue.qsize() >= self._max_pending:
                raise AuditError(
                    ReasonCode.AUDIT_UNAVAILABLE,
                    "Too many records wait for the audit log; nothing was allowed. Try again later.",
                )
            self._queue.put(entry)
        await entry.done
        return entry

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise AuditError(
                ReasonCode.AUDIT_UNAVAILABLE, "The audit log is closed; nothing was allowed."
            )

    async def close(self) -> None:
        """See AuditLog.close. A failure goes to the log: nobody waits for it."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(_Signal.CLOSE)
        await asyncio.to_thread(self._writer.join)

    def _work(self) -> None:
        closing = False
        while not closing:
            batch, closing = self._take()
            with self._writing:
                self._commit(batch)
            _answer(batch)
        with self._writing:
            self._finish()

    def _take(self) -> tuple[list[_QueuedEntry], bool]:
        """What waits, or nothing when it is time to try a failing log again; and
        whether it is the last.
        """
        batch: list[_QueuedEntry] = []
        try:
            item = self._queue.get(timeout=RETRY_INTERVAL_SECONDS if self._refused else None)
            while item is not _Signal.CLOSE:
                if isinstance(item, _QueuedEntry):
                    batch.append(item)
                if len(batch) == MAX_BATCH:
                    return batch, False
                item = self._queue.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def _commit(self, batch: Sequence[_Entry]) -> None:
        """Write the batch, and note the receipts; or none of it."""
        if self._damaged:
            return
        try:
            receipts = self._extend([entry.members for entry in batch])
        except OSError as error:
            if not self._refused:
                _log.error("audit: records can not be written: %s", _describe(error))
            self._refused += len(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
            self._damage(error)
        else:
            for entry, receipt in zip(batch, receipts, strict=True):
                entry.receipt = receipt

    def _extend(self, records: Sequence[Members]) -> list[AuditReceipt]:
        """Add records to the chain: all of them, or none and OSError. DamagedError
        when the log can not go on.
        """
        own: list[Members] = []
        if self._refused:
            own.append(self._encode_own(GAP, detail={"refused": self._refused}))
        if not own and not records:
            return []
        sequence, last_hash = self._sequence, self._hash
        lines: list[bytes] = []
        receipts: list[AuditReceipt] = []
        for members in (*own, *records):
            sequence += 1
            line, last_hash = seal(
                members,
                sequence=sequence,
                epoch=self._epoch,
                time_ns=self._clock(),
                prev_hash=last_hash,
            )
            lines.append(line)
            receipts.append(AuditReceipt(sequence, last_hash))
        power = self._durability is Durability.POWER
        self._segments.write(b"".join(lines), first_sequence=self._sequence + 1, sync=power)
        self._sequence, self._hash = sequence, last_hash
        if not power and not self._unsynced.is_set():
            self._unsynced.set()
        if self._refused:
            _log.warning("audit: records are written again; %d were refused", self._refused)
            self._refused = 0
        return receipts[len(own) :]

    def _encode_own(self, kind: str, *, detail: JsonObject | None = None) -> Members:
        """A record that the log writes about itself."""
        failed = kind == GAP
        record = AuditRecord(
            type=kind,
            tenant_id=None,
            actor_id=None,
            action=f"audit.{kind}",
            outcome=Outcome.FAILED if failed else Outcome.EXECUTED,
            reason_code=ReasonCode.AUDIT_UNAVAILABLE if failed else ReasonCode.OK,
            detail=detail,
        )
        return encode(record, instance=self._instance)

    def _sync_in_background(self) -> None:
        """With Durability.PROCESS: sync what is written, once an interval."""
        while True:
            self._unsynced.wait()
            if self._finishing.is_set():
                return
            self._unsynced.clear()
            try:
                self._segments.sync()
            except DamagedError as error:
                self._damage(error)
                return
            self._finishing.wait(SYNC_INTERVAL_SECONDS)

    def _finish(self) -> None:
        """End the epoch: from here on nothing is taken in."""
        self._finishing.set()
        self._unsynced.set()
        self._syncer.join()
        if not self._damaged:
            try:
                self._extend([self._encode_own(STOP)])
                self._segments.sync()
            except Exception as error:  # noqa: BLE001 - the file must be let go of
                _log.error("audit: the log was not closed cleanly: %s", _describe(error))
        self._segments.close()
        os.close(self._guard)

    def _damage(self, error: Exception) -> None:
        """Refuse everything from here on: what the disk holds is not known."""
        self._damaged = True
        _log.critical(
            "audit: the log is closed for writing until the sidecar starts again, after: %s",
            _describe(error),
        )


class _Signal(Enum):
    """What the writer thread is told."""

    TRY_AGAIN = auto()
    """Another thread could not write."""
    CLOSE = auto()


class _Entry:
    """A record, and where it came to lie."""

    __slots__ = ("members", "receipt")

    def __init__(self, members: Members) -> None:
        self.members = members
        self.receipt: AuditReceipt | None = None
        """Set once the record is written."""


class _QueuedEntry(_Entry):
    """One of the writer thread's, and where its answer goes."""

    __slots__ = ("done", "loop")

    def __init__(self, members: Members, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(members)
        self.loop = loop
        self.done: asyncio.Future[None] = loop.create_future()
        """Also set when the record was not written."""


def _answer(batch: Sequence[_QueuedEntry]) -> None:
    """Wake each event loop once, with all the answers for it."""
    answers: dict[asyncio.AbstractEventLoop, list[_QueuedEntry]] = {}
    for entry in batch:
        answers.setdefault(entry.loop, []).append(entry)
    for loop, answered in answers.items():
        # A loop that was closed meanwhile has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_deliver, answered)


def _deliver(batch: Sequence[_QueuedEntry]) -> None:
    for entry in batch:
        if not entry.done.done():  # else cancelled: it is written, and nobody asks
            entry.done.set_result(None)


def _lock_directory(directory: Path) -> int:
    """Make the directory and keep everyone else out, other logs included: the
    descriptor holds the lock. Raises OSError and AuditError.
    """
    if not directory.is_dir():
        directory.mkdir(mode=0o700, parents=True)
        sync_directory(directory.parent)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.fchmod(descriptor, 0o700)
    except BlockingIOError:
        os.close(descriptor)
        raise AuditError(
            ReasonCode.AUDIT_UNAVAILABLE,
            f"The audit log in {directory} is in use by another sidecar: stop that one, or give"
            " this one another state directory.",
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _describe(error: Exception) -> str:
    """What happened, without content: an error of the system, or the kind of error."""
    cause = error.__cause__ if isinstance(error, DamagedError) else error
    if isinstance(cause, OSError):
        return f"{cause.strerror} (errno {cause.errno})"
    return type(cause or error).__name__
