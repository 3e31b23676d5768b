"""Redis or Valkey as a store that several sidecars share: connections, deadlines, scripts.

A reply belongs to the call that asked for it: calls run in tasks of their own, which
a caller that goes away does not interrupt; a connection whose call was interrupted
is dropped; and every script repeats in its reply whose it is.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import quote, unquote

from redis.asyncio import Connection, ConnectionPool, Redis, RedisCluster, SSLConnection
from redis.asyncio.connection import UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)

from pdp.config import RedisSettings, SharedDurability
from pdp.storage import StorageError

T = TypeVar("T")

OLDEST_VERSION: Final = (7, 0)
START_SECONDS: Final = 10.0
"""How long the first look at the store may take, however short its operations are."""
MAX_WAITING: Final = 4096
"""Operations under way and waiting at most; one more is refused at once."""
FREE_SECONDS: Final = 60.0
"""A connection that was not needed for so long is closed: what one moment needed is not
held open for ever by each of thousands of sidecars."""
TRIES: Final = 3
"""How often an operation is sent where the store does not take it, or the connection
breaks. Every script can be sent twice: it knows its own first answer."""
_PAUSES: Final = (0.02, 0.1)
_MOMENTARY: Final = (
    RedisConnectionError,
    OSError,
    ReadOnlyError,
    BusyLoadingError,
    ClusterDownError,
    RedisClusterException,
    MasterDownError,
    TryAgainError,
    MovedError,
    AskError,
)
"""What may be over in a moment: a restart, a failover, slots on the move."""
_UNREADABLE: Final = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What comes of a reply of another shape than was asked for: of what is no Redis, or has keys
that others have written."""
_KEY_PREFIX: Final = "pdp:"
_IDENTITY: Final = _KEY_PREFIX + "ledger"

_KNOWN_OWNERS: Final = 10_000
_SCANNED_AT_ONCE: Final = 1000
_KEYS_TO_TRY: Final = 4096
"""To meet every node of a cluster with its slots."""
_PLAIN: Final = re.compile(r"[A-Za-z0-9._~-]*", re.ASCII)
"""Names that quoting would leave as they are, which is most of them."""

_log: Final = logging.getLogger(__name__)


class Script:
    """A Lua script, which the server knows by its digest once it has seen it."""

    def __init__(self, *files: Path) -> None:
        self.text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        self.sha1 = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()


def tenant_key(tenant: str, kind: str, *names: str) -> str:
    """A key of a tenant. All of a tenant's lie in one slot; no name can end the hash
    tag, or pass for several.
    """
    return _key("t", tenant, kind, names)


def organisation_key(organisation: str, kind: str, *names: str) -> str:
    """A key of an organisation: as a tenant's, and never one of a tenant."""
    return _key("o", organisation, kind, names)


def _key(owns: str, owner: str, kind: str, names: tuple[str, ...]) -> str:
    key = _slot(owns, owner) + kind
    return f"{key}:{key_names(*names)}" if names else key


@functools.lru_cache(maxsize=_KNOWN_OWNERS)
def _slot(owns: str, owner: str) -> str:
    """What the keys of an owner begin with."""
    return f"{_KEY_PREFIX}{{{owns}:{key_names(owner)}}}:"


def key_names(*names: str) -> str:
    """Names as they stand in keys."""
    return ":".join(name if _PLAIN.fullmatch(name) else quote(name, safe="") for name in names)


def names_in_key(text: str) -> list[str]:
    """The names that :func:`key_names` has written."""
    return [unquote(name) for name in text.split(":")]


def _tenant_of(key: str) -> str:
    return unquote(key[key.index("{t:") + 3 : key.index("}")])


@dataclass(frozen=True, slots=True)
class _Request:
    """A command, and what comes after it on the same connection."""

    command: Sequence[str | int]
    attempt: str
    """With what the reply must begin, unless it is empty."""
    replicas: int
    """How many to wait for; 0: none."""
    wait_ms: int


class _Sender(Protocol):
    """One way to reach the server that has a key."""

    async def send(self, key: str, request: _Request) -> Any:  # noqa: ANN401 - replies are what they are
        """Send it to the server that has the key. Raises what :func:`_converse` does."""
        ...

    async def places(self) -> Sequence[str]:
        """A key for each server that can be asked for one."""
        ...

    async def close(self) -> None: ...


class _TooFewReplicasError(Exception):
    """The command is done, and is not on as many replicas as was asked for."""


class RedisStore:
    """Runs scripts on Redis or Valkey. Made by :func:`open_redis`."""

    def __init__(self, settings: RedisSettings, sender: _Sender) -> None:
        self._sender = sender
        self._timeout_seconds = settings.timeout_ms / 1000
        self._replicas = settings.replicas if settings.durability is SharedDurability.STRICT else 0
        self._turns = asyncio.Semaphore(settings.connections)
        self._operations: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._failing = False
        self.is_cluster = settings.cluster
        """Whether a script can only touch what belongs to one owner."""
        self.id = ""
        """Names what is stored: random, made once, the same for all who share it."""

    @property
    def strict(self) -> bool:
        """Whether what is answered is on replicas too."""
        return self._replicas > 0

    async def complete(
        self, operation: Callable[[], Awaitable[T]], *, seconds: float | None = None
    ) -> T:
        """Run what calls :meth:`run` and reads the reply, within the configured time, or
        ``seconds``; cancelling the awaiting task does not stop it. Raises StorageError: the
        store did not answer, refused, or answered what can not be read; whether anything was
        done is unknown, and the same operation can be tried again.
        """
        if self._closed:
            raise StorageError("The store is closed; nothing was done.")
        if len(self._operations) >= MAX_WAITING:
            raise StorageError(
                "Too many operations wait for the store; nothing was done. Try again later."
            )
        task = asyncio.create_task(self._in_time(operation, seconds or self._timeout_seconds))
        self._operations.add(task)
        task.add_done_callback(self._forget)
        return await asyncio.shield(task)

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[str]) -> list[str]:
        """What the script replies, without its first part, which repeats the first
        argument. Only within :meth:`complete`.
        """
        reply = await self._evaluate(script, keys, arguments)
        return [part.decode() for part in reply[1:]]

    async def close(self) -> None:
        """Finish what has begun, and let go of the connections."""
        self._closed = True
        if self._operations:
            await asyncio.wait(self._operations)
        await self._sender.close()

    async def command(self, key: str, *command: str | int) -> Any:  # noqa: ANN401
        """Send one command to the server that has the key, and wait for no replica.
        Only within complete.
        """
        return await self._try(lambda: self._send(key, *command))

    async def places(self) -> Sequence[str]:
        """A key for each server, for :meth:`command`. Only within complete."""
        return await self._try(self._sender.places)

    async def tenants(self, kind: str, *, most: int) -> set[str]:
        """Tenants with a key of that kind, of at most ``most`` such keys that are met first.
        Walks through everything that is stored: for operators. Only within complete.
        """
        found: set[str] = set()
        pattern = f"{_KEY_PREFIX}{{t:*}}:{kind}"
        for place in await self.places():
            cursor = b"0"
            while len(found) < most:
                cursor, keys = await self.command(
                    place, "SCAN", cursor.decode(), "MATCH", pattern, "COUNT", _SCANNED_AT_ONCE
                )
                found.update(_tenant_of(key.decode()) for key in keys)
                if cursor == b"0":
                    break
        return found

    async def _in_time(self, operation: Callable[[], Awaitable[T]], seconds: float) -> T:
        try:
            async with asyncio.timeout(seconds), self._turns:
                result = await operation()
        except TimeoutError:
            raise self._failed("no answer in time") from None
        except _TooFewReplicasError:
            raise self._failed("too few replicas have what was written") from None
        except _NotItsReplyError:
            raise self._failed("a reply was another call's") from None
        except _OtherStoreError:
            raise self._failed(
                "it has lost what it kept, or is another one; restore it, or restart the"
                " sidecars to begin with nothing spent"
            ) from None
        except (RedisError, RedisClusterException, OSError) as error:
            # Its text may quote keys, addresses and names of users.
            raise self._failed(type(error).__name__) from None
        except _UNREADABLE as error:
            raise self._failed(f"a reply can not be read: {type(error).__name__}") from None
        self._works()
        return result

    def _failed(self, what: str) -> StorageError:
        if not self._failing:
            _log.error("the shared store fails: %s", what)
        self._failing = True
        return StorageError(
            "The store did not take the operation in time; try again with the same key."
        )

    def _works(self) -> None:
        """Log the first failure and the recovery, not each failure of an outage."""
        if self._failing:
            _log.warning("the shared store works again")
        self._failing = False

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._operations.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may have gone

    async def _evaluate(self, script: Script, keys: Sequence[str], arguments: Sequence[str]) -> Any:  # noqa: ANN401
        rest: tuple[str | int, ...] = (len(keys), *keys, *arguments)
        send = functools.partial(self._send, keys[0], attempt=arguments[0], replicas=self._replicas)

        async def evaluate() -> Any:  # noqa: ANN401
            try:
                return await send("EVALSHA", script.sha1, *rest)
            except NoScriptError:
                return await send("EVAL", script.text, *rest)

        return await self._try(evaluate)

    async def _try(self, attempt: Callable[[], Awaitable[T]]) -> T:
        for pause in _PAUSES:
            try:
                return await attempt()
            except _MOMENTARY:
                await asyncio.sleep(pause)
        return await attempt()

    async def _send(
        self, key: str, *command: str | int, attempt: str = "", replicas: int = 0
    ) -> Any:  # noqa: ANN401
        request = _Request(command, attempt, replicas, max(1, int(self._timeout_seconds * 500)))
        try:
            return await self._sender.send(key, request)
        except _RefusedError as refused:
            raise refused.error from None


class _NotItsReplyError(Exception):
    """A reply that does not repeat whose it is."""


class _PoolSender:
    """One server, or the primary that sentinels name. The pool makes the connections;
    the free ones are kept here, so that giving one back never waits.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        sentinels: Sequence[Redis] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._sentinels = sentinels
        self._clock = clock
        self._free: list[tuple[Any, float]] = []
        """Each with the time since when it is free; the last is used next, so that the
        first is one that is not needed."""
        self._failures = 0

    async def send(self, key: str, request: _Request) -> Any:  # noqa: ANN401, ARG002
        """See _Sender.send."""
        if self._free:
            connection, _ = self._free.pop()
        else:
            connection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        failures = self._failures
        try:
            await connection.connect()
            reply = await _converse(connection, request)
        except (_RefusedError, _TooFewReplicasError):
            await self._give_back(connection, failures)
            raise
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if not isinstance(error, asyncio.CancelledError):
                self._failures += 1
                await self._close_free()
            raise
        await self._give_back(connection, failures)
        return reply

    async def _give_back(self, connection: Any, failures: int) -> None:  # noqa: ANN401
        """Where one connection failed meanwhile, the others lead to the same server, which
        is to be looked at anew.
        """
        if failures != self._failures:
            await connection.disconnect(nowait=True)
            return
        now = self._clock()
        self._free.append((connection, now))
        if now - self._free[0][1] > FREE_SECONDS:
            unneeded, _ = self._free.pop(0)
            await unneeded.disconnect(nowait=True)

    async def places(self) -> Sequence[str]:
        """See _Sender.places."""
        return (_IDENTITY,)

    async def close(self) -> None:
        """Close every connection. None is in use any more."""
        await self._close_free()
        for sentinel in self._sentinels:
            await sentinel.aclose()

    async def _close_free(self) -> None:
        free, self._free = self._free, []
        for connection, _ in free:
            await connection.disconnect(nowait=True)


class _RefusedError(Exception):
    """The server refused the command, and the connection is as good as before."""

    def __init__(self, error: ResponseError) -> None:
        super().__init__()
        self.error = error


async def _converse(
    connection: Any,  # noqa: ANN401 - redis-py's connections share no typed base
    request: _Request,
) -> Any:  # noqa: ANN401
    """Send a command and read its reply. Raises _RefusedError, or _TooFewReplicasError,
    when the connection can be used again, and whatever else when it can not.
    """
    packed = _pack(request.command)
    if request.replicas:
        packed += _pack(("WAIT", request.replicas, request.wait_ms))
    await connection.send_packed_command(packed, check_health=False)
    replies = []
    for _ in range(2 if request.replicas else 1):
        try:
            replies.append(await connection.read_response())
        except ReadOnlyError:
            raise  # a primary no more
        except ResponseError as error:
            replies.append(error)
    if isinstance(replies[0], ResponseError):
        raise _RefusedError(replies[0])
    if request.attempt and not (
        isinstance(replies[0], list) and replies[0][:1] == [request.attempt.encode()]
    ):
        raise _NotItsReplyError
    if request.replicas and not (isinstance(replies[1], int) and replies[1] >= request.replicas):
        raise _TooFewReplicasError
    return replies[0]


def _pack(command: Sequence[str | int]) -> bytes:
    """A command as it is sent; redis-py's own takes four times as long."""
    parts = [str(part).encode() for part in command]
    return b"*%d\r\n" % len(parts) + b"".join(
        [b"$%d\r\n%b\r\n" % (len(part), part) for part in parts]
    )


class _ClusterSender:
    """A cluster: whichever node has the key's slot."""

    def __init__(self, cluster: RedisCluster) -> None:
        self._cluster = cluster
        self._failures = 0

    async def send(self, key: str, request: _Request) -> Any:  # noqa: ANN401 - replies are what they are
        """See _Sender.send. Raises MovedError after the new place has been learnt."""
        await self._cluster.initialize()
        node = self._cluster.get_node_from_key(key)
        if node is None:
            raise ClusterDownError("no node has the slot")
        connection = node.acquire_connection()
        failures = self._failures
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            return await _converse(connection, request)
        except _TooFewReplicasError:
            raise
        except _RefusedError as refused:
            if isinstance(refused.error, (MovedError, ClusterDownError)):
                await self._look_anew(failures)
            raise
        except BaseException as error:
            await connection.disconnect(nowait=True)
            if not isinstance(error, asyncio.CancelledError):
                await self._look_anew(failures)
            raise
        finally:
            node.release(connection)

    async def _look_anew(self, failures: int) -> None:
        """What is known of the nodes is old, unless another call found out meanwhile.
        Calls under way lose their connections too, and are sent again.
        """
        if failures == self._failures:
            self._failures += 1
            await self._cluster.aclose()

    async def places(self) -> Sequence[str]:
        """See _Sender.places."""
        await self._cluster.initialize()
        keys: dict[str, str] = {}
        for number in range(_KEYS_TO_TRY):
            key = f"{_KEY_PREFIX}{number}"
            node = self._cluster.get_node_from_key(key)
            if node is not None:
                keys.setdefault(node.name, key)
        return tuple(keys.values())

    async def close(self) -> None:
        """Close every connection."""
        await self._cluster.aclose()


async def open_redis(settings: RedisSettings) -> RedisStore:
    """Connect, and see that the server keeps what it is given. Raises StorageError,
    whose message is for operators and says what to do.
    """
    identity = _Identity()
    store = RedisStore(settings, _sender(settings, identity))
    try:
        store.id = await store.complete(lambda: _look(store, settings), seconds=START_SECONDS)
    except _UnfitError as error:
        await store.close()
        raise StorageError(str(error)) from None
    except StorageError:
        await store.close()
        raise StorageError(
            "The shared store does not answer (budget.store): see that it runs, that address,"
            " user, password and certificates are right, and that the user may run HELLO,"
            " GET, SET and EVAL on pdp:*."
        ) from None
    identity.known = store.id
    return store


class _Identity:
    """Sees to it, on each new connection, that the store is still the one that it was."""

    def __init__(self) -> None:
        self.known = ""
        """Empty while it is not known yet."""

    async def check(self, connection: Any) -> None:  # noqa: ANN401
        """What redis-py does on connecting, and one question more."""
        await connection.on_connect()
        if self.known:
            await connection.send_command("GET", _IDENTITY)
            found = await connection.read_response()
            if found is None or found.decode() != self.known:
                raise _OtherStoreError


class _OtherStoreError(RedisError):
    """The store has lost what it kept, or another answers in its place."""


class _UnfitError(Exception):
    """The server can not be trusted with budgets; the text says why and what to do."""


async def _look(store: RedisStore, settings: RedisSettings) -> str:
    """Refuse a server that forgets; the identity of what is stored."""
    for place in await store.places():
        hello = await store.command(place, "HELLO")
        version = dict(zip(hello[::2], hello[1::2], strict=True))[b"version"].decode()
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_VERSION:
            raise _UnfitError(f"The shared store is version {version}: 7.0 or later is needed.")
        if not settings.unchecked:
            await _refuse_forgetful(store, place, allowed=settings.allow_volatile)
    made = uuid.uuid4().hex
    await store.command(_IDENTITY, "SET", _IDENTITY, made, "NX")
    identity = await store.command(_IDENTITY, "GET", _IDENTITY)
    return str(identity.decode())


async def _refuse_forgetful(store: RedisStore, place: str, *, allowed: bool) -> None:
    faults = []
    if await _configured(store, place, "appendonly") != "yes":
        faults.append("it would lose what is spent when it restarts (set appendonly yes)")
    if await _configured(store, place, "maxmemory-policy") != "noeviction":
        faults.append("it may evict what is spent (set maxmemory-policy noeviction)")
    if faults and not allowed:
        raise _UnfitError(
            f"The shared store can not be trusted with budgets: {'; '.join(faults)}. Or set"
            " budget.store.allow_volatile: true, and lose budgets."
        )
    for fault in faults:
        _log.warning("the shared store is not to be trusted with budgets: %s", fault)


async def _configured(store: RedisStore, place: str, name: str) -> str:
    try:
        answer = await store.command(place, "CONFIG", "GET", name)
    except ResponseError:  # no permission, or, where others run the server, no such command
        raise _UnfitError(
            "Whether the shared store keeps what it is given can not be seen: its user may not"
            " run CONFIG GET. Allow it (ACL rule +config|get), or see to appendonly yes and"
            " maxmemory-policy noeviction yourself and set budget.store.unchecked: true."
        ) from None
    if len(answer) < 2:  # noqa: PLR2004 - name and value
        raise _UnfitError(
            f"The shared store does not know its own setting {name}; if that is as it should"
            " be, set budget.store.unchecked: true."
        )
    return str(answer[1].decode())


def _sender(settings: RedisSettings, identity: _Identity) -> _Sender:
    options: dict[str, Any] = {
        "username": _secret(settings.username_file),
        "password": _secret(settings.password_file),
        "protocol": 2,
        "socket_timeout": None,  # the deadline is the operation's, not each packet's
        "socket_connect_timeout": settings.timeout_ms / 1000,
        "retry": Retry(NoBackoff(), 0),
        "client_name": "pdp",
    }
    tls: dict[str, Any] = {}
    if settings.tls:
        tls = {
            "ssl_ca_certs": str(settings.ca_file) if settings.ca_file else None,
            "ssl_certfile": _path(settings.client_certificate_file),
            "ssl_keyfile": _path(settings.client_key_file),
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
        }
    if not settings.cluster:
        # In a cluster each node knows other keys.
        options["redis_connect_func"] = identity.check
    if settings.unix is not None:
        return _PoolSender(
            ConnectionPool(UnixDomainSocketConnection, path=str(settings.unix), **options)
        )
    hosts = [_host_and_port(address) for address in settings.addresses]
    if settings.sentinel is not None:
        ssl = {"ssl": True, **tls} if settings.tls else {}
        guard = {
            "username": _secret(settings.sentinel.username_file),
            "password": _secret(settings.sentinel.password_file),
            "socket_timeout": settings.timeout_ms / 1000,
            **ssl,
        }
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            hosts, sentinel_kwargs=guard, **ssl, **options
        )
        primary = sentinel.master_for(settings.sentinel.service)
        return _PoolSender(primary.connection_pool, sentinel.sentinels)
    if settings.cluster:
        from redis.asyncio.cluster import ClusterNode  # noqa: PLC0415 - for clusters only

        return _ClusterSender(
            RedisCluster(
                startup_nodes=[ClusterNode(host, port) for host, port in hosts],
                max_connections=settings.connections,
                **({"ssl": True, **tls} if settings.tls else {}),
                **options,
            )
        )
    (host, port), *_ = hosts
    kind = SSLConnection if settings.tls else Connection
    return _PoolSender(ConnectionPool(kind, host=host, port=port, **tls, **options))


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _secret(path: Path | None) -> str | None:
    """What a file holds, without the line's end."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StorageError(f"{path} can not be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise StorageError(f"{path} does not hold text.") from None
