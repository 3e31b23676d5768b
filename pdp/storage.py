"""One SQLite file, one connection, one writer thread, group commit.

Each file has exactly one connection, which keeps the file locked for as long as
it is open: no other process, and no second writer in this one, can change or
read what it owns. Whatever waits when a commit ends goes into the next
transaction together, so a slow disk costs one wait for many callers. Who asks off the
event loop commits by itself, when it is its turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw

from pdp.errors import PdpError
from pdp.off_loop import running_loop
from pdp.reason import ReasonCode

T = TypeVar("T")

OLDEST_SQLITE: Final = (3, 51, 3)
"""Older versions can lose commits (https://sqlite.org/wal.html#walresetbug)."""

MAX_QUEUED: Final = 4096
"""Operations that wait at most; one more is refused at once."""

MAX_BATCH: Final = 128
"""Operations in one transaction at most, so that none waits for long."""

_log: Final = logging.getLogger(__name__)


class Durability(StrEnum):
    """What an acknowledged write survives."""

    PROCESS = "process"
    """The death of the process at any moment, kill -9 included."""
    POWER = "power"
    """Loss of power too: every commit waits for the disk."""


class StorageError(PdpError):
    """The store could not be opened, or could not take an operation.

    Its reason code is ``internal``: only the caller knows what the store is for,
    and raises an error of its own from this one. A message raised on opening
    names the file and is for operators.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ReasonCode.INTERNAL, message)


class SqliteWriter:
    """Runs operations on one SQLite file, and answers when they are committed.

    Opening creates the file with mode 0600 where it does not exist, and applies
    ``schema`` (SQL statements) to a file that has none yet. ``schema_version``
    goes up with every change of ``schema``. Raises StorageError when the file is
    in use, is of another version, or can not be read.
    """

    def __init__(
        self, path: Path, *, schema: str, durability: Durability, schema_version: int = 1
    ) -> None:
        self._name = path.name
        self._connection = _open(path, schema, schema_version, durability)
        self._queue: queue.SimpleQueue[_QueuedJob | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._committing = threading.Lock()
        """Held while the connection is used."""
        self._closed = False
        self._failing = False
        self._thread = threading.Thread(
            target=self._work, name=f"sqlite-writer {self._name}", daemon=True
        )
        self._thread.start()

    async def run(self, operation: Callable[[apsw.Connection], T]) -> T:
        """Run ``operation`` in the writer thread or, off the event loop, in this one, and
        return its result once it is committed.

        What it raises is raised here, after its own changes, and only those, are
        undone. StorageError: too many operations wait, the writer is closed, or
        SQLite failed; then nothing of the operation was done. Cancelling the
        awaiting task does not stop the operation.
        """
        loop = running_loop()
        job = self._run_here(operation) if loop is None else await self._queue_up(operation, loop)
        if job.error is not None:
            try:
                raise job.error
            finally:
                del job  # which its traceback would keep until garbage is collected
        result: T = job.result
        return result

    async def close(self) -> None:
        """Finish what waits, move it from the log into the file, let the file go."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    def _run_here(self, operation: Callable[[apsw.Connection], Any]) -> _Job:
        job = _Job(operation)
        with self._committing:
            self._refuse_if_closed()
            self._commit([job])
        return job

    async def _queue_up(
        self, operation: Callable[[apsw.Connection], Any], loop: asyncio.AbstractEventLoop
    ) -> _Job:
        job = _QueuedJob(operation, loop)
        with self._lock:
            self._refuse_if_closed()
            if self._queue.qsize() >= MAX_QUEUED:
                raise StorageError(
                    "Too many operations wait for the store; nothing was done. Try again later."
                )
            self._queue.put(job)
        await job.committed
        return job

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise StorageError("The store is closed; nothing was done.")

    def _work(self) -> None:
        closing = False
        while not closing:
            jobs, closing = self._take()
            if jobs:
                with self._committing:
                    self._commit(jobs)
                _answer(jobs)
            del jobs  # they are not to outlive their callers while this thread waits
        with self._committing:
            self._let_go()

    def _take(self) -> tuple[list[_QueuedJob], bool]:
        """What waits, and whether it is the last."""
        jobs: list[_QueuedJob] = []
        job = self._queue.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == MAX_BATCH:
                return jobs, False
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return jobs, False
        return jobs, True

    def _let_go(self) -> None:
        try:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        except apsw.Error as error:
            # What was acknowledged is in the write-ahead log, and stays there.
            _log.warning("%s: no checkpoint on closing: %s", self._name, _describe(error))
        self._connection.close()

    def _commit(self, jobs: Sequence[_Job]) -> None:
        """Run the jobs in one transaction; if that fails, all of them have failed."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            if len(jobs) == 1:
                # The transaction undoes a job that is alone. A savepoint costs 15 us.
                jobs[0].result = jobs[0].operation(self._connection)
            else:
                for job in jobs:
                    self._attempt(job)
            self._connection.execute("COMMIT")
        except BaseException as error:  # noqa: BLE001 it belongs to the awaiting tasks
            if self._connection.in_transaction:
                with contextlib.suppress(apsw.Error):
                    self._connection.execute("ROLLBACK")
            for job in jobs:
                self._fail(job, error)
        else:
            self._note_health(None)

    def _attempt(self, job: _Job) -> None:
        """Run one job of several. Raises apsw.Error if the transaction is lost."""
        self._connection.execute("SAVEPOINT operation")
        try:
            job.result = job.operation(self._connection)
        except BaseException as error:  # noqa: BLE001 it belongs to the awaiting task
            self._connection.execute("ROLLBACK TO operation")
            self._fail(job, error)
        self._connection.execute("RELEASE operation")

    def _fail(self, job: _Job, error: BaseException) -> None:
        job.result = None
        job.error = error
        if isinstance(error, PdpError | apsw.Error):
            # Its frames know the job: both would stay until garbage is collected.
            error.with_traceback(None)
        if isinstance(error, apsw.Error):
            self._note_health(error)
            job.error = StorageError("The store could not take the operation; nothing was done.")
            job.error.__cause__ = error

    def _note_health(self, error: apsw.Error | None) -> None:
        """Log the first failure and the recovery, not each failure of an outage."""
        if error is not None and not self._failing:
            _log.error("%s: the store fails: %s", self._name, _describe(error))
        elif error is None and self._failing:
            _log.warning("%s: the store works again", self._name)
        self._failing = error is not None


class _Job:
    """An operation, and what came of it."""

    __slots__ = ("error", "operation", "result")

    def __init__(self, operation: Callable[[apsw.Connection], Any]) -> None:
        self.operation = operation
        self.result: Any = None
        self.error: BaseException | None = None


class _QueuedJob(_Job):
    """One of the writer thread's, and where its answer goes."""

    __slots__ = ("committed", "loop")

    def __init__(
        self, operation: Callable[[apsw.Connection], Any], loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(operation)
        self.loop = loop
        self.committed: asyncio.Future[None] = loop.create_future()
        """Also set when the operation failed: then ``error`` says why."""


def _answer(jobs: Sequence[_QueuedJob]) -> None:
    """Wake each event loop once, with all the answers for it."""
    answers: dict[asyncio.AbstractEventLoop, list[_QueuedJob]] = {}
    for job in jobs:
        answers.setdefault(job.loop, []).append(job)
    for loop, answered in answers.items():
        # A loop that was closed meanwhile has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_deliver, answered)


def _deliver(jobs: Sequence[_QueuedJob]) -> None:
    for job in jobs:
        if not job.committed.done():  # else cancelled: it is done, and nobody asks
            job.committed.set_result(None)


def _open(path: Path, schema: str, schema_version: int, durability: Durability) -> apsw.Connection:
    _refuse_old_sqlite(apsw.sqlite_lib_version())
    try:
        _make_private(path)
    except OSError as error:
        raise StorageError(f"{path} can not be opened: {error.strerror}.") from error
    try:
        connection = apsw.Connection(str(path))
    except apsw.Error as error:
        raise StorageError(f"{path} can not be opened: {_describe(error)}.") from error
    try:
        # Exclusive: no shared memory file, fewer system calls, no second reader
        # or writer. Set before WAL mode, as SQLite asks for.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        level = "FULL" if durability is Durability.POWER else "NORMAL"
        connection.execute(f"PRAGMA synchronous = {level}")
        # No temporary files: a full or read-only /tmp is no reason to fail.
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("BEGIN EXCLUSIVE")
        _apply_schema(connection, path, schema, schema_version)
        connection.execute("COMMIT")
    except apsw.BusyError as error:
        connection.close()
        raise StorageError(
            f"{path} is in use by another process: stop it, or use another state directory."
        ) from error
    except apsw.Error as error:
        connection.close()
        raise StorageError(f"{path} can not be used as a store: {_describe(error)}.") from error
    except StorageError:
        connection.close()
        raise
    return connection


def _refuse_old_sqlite(version: str) -> None:
    if tuple(int(part) for part in version.split(".")) < OLDEST_SQLITE:
        oldest = ".".join(str(part) for part in OLDEST_SQLITE)
        raise StorageError(
            f"SQLite {version} can lose commits: install an apsw that brings {oldest} or later."
        )


def _make_private(path: Path) -> None:
    """Create the file, or narrow it: only its owner may read and write it.

    SQLite gives its log the same mode. A file that exists is not opened here:
    when a process closes any descriptor of a file, it loses all its locks on it,
    those of a writer that has it open too (https://sqlite.org/howtocorrupt.html).
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        path.chmod(0o600)


def _apply_schema(
    connection: apsw.Connection, path: Path, schema: str, schema_version: int
) -> None:
    found = connection.pragma("user_version")
    if found == 0:
        connection.execute(schema)
        connection.pragma("user_version", schema_version)
    elif found != schema_version:
        raise StorageError(
            f"{path} has schema version {found}, and this sidecar reads version"
            f" {schema_version}: use the sidecar that wrote it, or another state directory."
        )


def _describe(error: apsw.Error) -> str:
    return f"{type(error).__name__}: {error}"
