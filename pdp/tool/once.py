"""Do a mutation once, however often its call comes.

A runtime that lost the answer asks again, with the same request id, which reaches the
tool as the permit's ``transaction``. By tenant, tool and transaction the tool finds what
it did the first time, and gives that result again.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from pdp.canonical import JsonValue, check
from pdp.errors import PdpError
from pdp.permit import Permit
from pdp.reason import ReasonCode

if TYPE_CHECKING:
    from redis import Redis

KEEP_SECONDS: Final = 86_400
MAX_RESULT_BYTES: Final = 256 * 1024
_FORGET_AT_ONCE: Final = 8


class OnceError(PdpError):
    """The mutation is not done now.

    Reason codes: permit_mismatch, where the permit is for any arguments, and so its
    transaction does not tell one mutation from another; call_under_way, whose result is not there yet, or never will be, where the
    tool died half way: what it did must then be looked up, and :meth:`Once.forget` lets it
    run again; idempotency_key_reused, where the transaction has other arguments.
    """


class OnceStore(Protocol):
    """Where results are kept. Names are unique across tenants."""

    def begin(self, name: str, content: str) -> tuple[str, str | None] | None:
        """Claim the name. None when it is claimed now; else the content and the result
        (None while there is none) that are there.
        """
        ...

    def finish(self, name: str, result: str) -> None:
        """Keep the result of a claimed name."""
        ...

    def forget(self, name: str) -> None:
        """Give the name free."""
        ...


class Once:
    """Runs each call's mutation once, and gives its first result again.

    A result is JSON of at most 256 KiB; one that is not raises ValueError, after the
    mutation, which then does not run again. A mutation that raises leaves no trace, and
    runs again when it is tried again. Results are kept for a day.
    """

    def __init__(self, store: OnceStore) -> None:
        self._store = store

    def run(self, permit: Permit, mutation: Callable[[], JsonValue]) -> JsonValue:
        """The mutation's result, of now or of the first time. Raises OnceError, and what
        the mutation raises.
        """
        name = _name(permit)
        first = self._first(permit, name)
        if first is not None:
            return json.loads(first)  # type: ignore[no-any-return]
        try:
            result = mutation()
        except BaseException:
            self._store.forget(name)
            raise
        self._store.finish(name, _encoded(result))
        return result

    async def run_async(
        self, permit: Permit, mutation: Callable[[], Awaitable[JsonValue]]
    ) -> JsonValue:
        """As :meth:`run`, for a coroutine; the store itself is asked in a thread."""
        import asyncio  # noqa: PLC0415 - not everybody's

        name = _name(permit)
        first = await asyncio.to_thread(self._first, permit, name)
        if first is not None:
            return json.loads(first)  # type: ignore[no-any-return]
        try:
            result = await mutation()
        except BaseException:
            # Not awaited: whoever cancelled this does not wait for it.
            self._store.forget(name)
            raise
        await asyncio.shield(asyncio.to_thread(self._store.finish, name, _encoded(result)))
        return result

    def forget(self, permit: Permit) -> None:
        """Let the call's mutation run again, once it is known that it was not done."""
        self._store.forget(_name(permit))

    def _first(self, permit: Permit, name: str) -> str | None:
        found = self._store.begin(name, permit.arguments_sha256)
        if found is None:
            return None
        content, result = found
        if content != permit.arguments_sha256:
            raise OnceError(
                ReasonCode.IDEMPOTENCY_KEY_REUSED,
                "The transaction was used before, with other arguments: make a new one.",
            )
        if result is None:
            raise OnceError(
                ReasonCode.CALL_UNDER_WAY,
                "The call is under way, or was cut off: ask again for its result.",
            )
        return result


class SqliteOnce:
    """Results in one SQLite file. Processes of one machine may share it."""

    def __init__(
        self,
        path: Path,
        *,
        keep_seconds: int = KEEP_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(
            path, isolation_level=None, check_same_thread=False, timeout=10
        )
        # No write-ahead log: before SQLite 3.51.3 it can lose commits of several
        # connections (https://sqlite.org/wal.html#walresetbug).
        self._connection.execute("PRAGMA journal_mode = DELETE")
        # Not FULL: it lets loss of power bring back the journal of what was committed last,
        # which then is undone.
        self._connection.execute("PRAGMA synchronous = EXTRA")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS call (name TEXT PRIMARY KEY, content TEXT NOT NULL,"
            " result TEXT, forget_at INTEGER NOT NULL)"
        )
        self._connection.execute("CREATE INDEX IF NOT EXISTS call_by_age ON call (forget_at)")

    def begin(self, name: str, content: str) -> tuple[str, str | None] | None:
        """See OnceStore.begin."""
        now = int(self._clock())
        with self._transaction() as connection:
            connection.execute(
                "DELETE FROM call WHERE name IN (SELECT name FROM call WHERE forget_at <= ?"
                " ORDER BY forget_at LIMIT ?) OR (name = ? AND forget_at <= ?)",
                (now, _FORGET_AT_ONCE, name, now),
            )
            row: tuple[str, str | None] | None = connection.execute(
                "SELECT content, result FROM call WHERE name = ?", (name,)
            ).fetchone()
            if row is None:
                connection.execute(
                    "INSERT INTO call VALUES (?, ?, NULL, ?)",
                    (name, content, now + self._keep_seconds),
                )
        return row

    def finish(self, name: str, result: str) -> None:
        """See OnceStore.finish."""
        with self._transaction() as connection:
            connection.execute("UPDATE call SET result = ? WHERE name = ?", (result, name))

    def forget(self, name: str) -> None:
        """See OnceStore.forget."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM call WHERE name = ?", (name,))

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            with self._connection:
                yield self._connection


class RedisOnce:
    """Results in Redis or Valkey, for tool servers on any number of machines."""

    def __init__(
        self, redis: Redis, *, prefix: str = "pdp-once:", keep_seconds: int = KEEP_SECONDS
    ) -> None:
        """``redis`` is a client of the package ``redis``; it stays the caller's."""
        self._redis = redis
        self._prefix = prefix
        self._keep_seconds = keep_seconds

    def begin(self, name: str, content: str) -> tuple[str, str | None] | None:
        """See OnceStore.begin."""
        key = self._prefix + name
        claim = json.dumps([content, None])
        for _ in range(2):  # once more where it was forgotten in between
            if self._redis.set(key, claim, nx=True, ex=self._keep_seconds):
                return None
            found = self._redis.get(key)
            if found is not None:
                content, result = json.loads(found)
                return content, result
        raise OnceError(ReasonCode.CALL_UNDER_WAY, "The call is under way: ask again.")

    def finish(self, name: str, result: str) -> None:
        """See OnceStore.finish."""
        key = self._prefix + name
        found = self._redis.get(key)
        content = json.loads(found)[0] if found is not None else ""
        self._redis.set(key, json.dumps([content, result]), ex=self._keep_seconds)

    def forget(self, name: str) -> None:
        """See OnceStore.forget."""
        self._redis.delete(self._prefix + name)


def _name(permit: Permit) -> str:
    if not permit.arguments_sha256:
        raise OnceError(
            ReasonCode.PERMIT_MISMATCH,
            "The permit is for any arguments, so it can not be told which of its calls this is:"
            ' the policy must let the permits of this tool bind ["tool", "arguments"].',
        )
    return json.dumps([permit.tenant, permit.actor, permit.tool, permit.transaction])


def _encoded(result: JsonValue) -> str:
    check({"result": result})
    text = json.dumps(result)
    if len(text.encode("utf-8")) > MAX_RESULT_BYTES:
        raise ValueError(f"the result is larger than {MAX_RESULT_BYTES} bytes")
    return text
