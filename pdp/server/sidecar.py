"""The sidecar's life: open the rooms, listen, serve, drain, close."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hmac
import logging
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdp import __version__
from pdp.admission import Admission
from pdp.api.v1 import (
    authorization_pb2,
    authorization_pb2_grpc,
    budget_pb2,
    budget_pb2_grpc,
    execution_pb2,
    execution_pb2_grpc,
)
from pdp.audit.log import ChainedAuditLog
from pdp.budget.ledger import Ledger
from pdp.budget.sqlite import SqliteLedger
from pdp.canonical import JsonObject
from pdp.config import Config
from pdp.free_memory import give_back_memory, keep_giving_back_memory
from pdp.off_loop import DiskThread
from pdp.permit.issuer import PermitIssuer
from pdp.permit.ring import LiveKeys
from pdp.permit.uses import PermitUses, UsedPermits
from pdp.permit.verifier import PermitVerifier
from pdp.policy.engine import ActivePolicy
from pdp.policy.service_class import ServiceClasses
from pdp.private_files import NotPrivateError, make_directory, write_once
from pdp.revocation.file import RevocationFile
from pdp.revocation.record import record_revocation
from pdp.revocation.revocations import Revocations, RevocationStore
from pdp.rooms import Rooms
from pdp.server.admin import admin_socket
from pdp.server.delegations import delegation_terms
from pdp.server.http import HttpListener
from pdp.server.identity import open_identity, tenant_of_listener
from pdp.server.listeners import bind, listeners, options, read_file
from pdp.server.locks import ExclusiveLock, StartError
from pdp.server.metrics import Metrics
from pdp.server.policy import Loaded, PolicyRoom, open_policy
from pdp.server.policy_records import PolicyRecords
from pdp.server.readiness import Readiness
from pdp.server.runner import CallRunner
from pdp.server.services import (
    AuthorizationServicer,
    BudgetServicer,
    ExecutionServicer,
)
from pdp.server.stream import Streams
from pdp.server.trusted_keys import TrustedKeys
from pdp.server.watch import Watchers
from pdp.storage import Durability
from pdp.strangers import Strangers

_log: Final = logging.getLogger(__name__)

SERVICE_NAMES: Final = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (authorization_pb2, "AuthorizationService"),
        (budget_pb2, "BudgetService"),
        (execution_pb2, "ExecutionService"),
    )
)
"""Each has a health status of its own, beside the server's ("")."""


@contextlib.asynccontextmanager
async def open_rooms(
    config: Config,
    keys: LiveKeys,
    policy: ActivePolicy,
    *,
    trusted_keys: TrustedKeys,
    service_class_failed: Callable[[str], None],
) -> AsyncIterator[Rooms]:
    """The rooms that the configuration describes, the policy being loaded. Closed in
    the order in which nothing that was answered can be lost: audit last.

    ``service_class_failed`` is told the reason code of each class that the policy fails
    to give.
    """
    state = config.state_dir
    async with contextlib.AsyncExitStack() as stack:
        audit = ChainedAuditLog(
            state / "audit",
            instance=config.instance or socket.gethostname(),
            durability=config.audit.durability,
            segment_max_bytes=config.audit.segment_max_bytes,
        )
        stack.push_async_callback(audit.close)
        digest_key = _secret(state / "audit-digest.key")
        ledger, permit_uses, revocation_store, budget_id = await _open_budget(
            config, digest_key, stack
        )
        disk = None
        # Where each commit waits for the disk, many are to wait for it together.
        if config.budget.store == "sqlite" and Durability.POWER not in {
            config.budget.durability,
            config.audit.durability,
        }:
            disk = DiskThread()
            stack.push_async_callback(disk.close)
        revocations = Revocations(revocation_store)
        await revocations.look()
        heard = partial(record_revocation, audit)
        stack.callback(asyncio.create_task(revocations.keep_looking(heard)).cancel)
        classes = ServiceClasses(
            policy, config.limits.tenants.service_class, failed=service_class_failed
        )
        await stack.enter_async_context(classes.kept_current())
        stack.callback(asyncio.create_task(keys.keep_looking()).cancel)
        identity = open_identity(config, keys, trusted_keys, stack, changed=revocations.tell)
        await stack.enter_async_context(trusted_keys.kept_fresh())
        yield Rooms(
            identity=identity,
            admission=Admission(
                max_concurrent_calls=config.limits.max_concurrent_calls,
                max_waiting_calls=config.limits.max_waiting_calls,
                classes=classes.of,
            ),
            policy=policy,
            ledger=ledger,
            permits=PermitIssuer(keys, issuer=config.permit.issuer),
            permit_verifier=PermitVerifier(
                keys,
                issuer=config.permit.issuer,
                audience=config.permit.default_audience,
                leeway_seconds=0,  # its own clock, and the hold ends with the permit
            ),
            permit_uses=permit_uses,
            audit=audit,
            ledger_id=budget_id,
            strangers=Strangers(),
            revocations=revocations,
            digest_key=digest_key,
            binds_permits=config.permit.bind_to_certificate,
            permit_ttl_seconds=config.permit.ttl_seconds,
            hold_ttl_seconds=config.budget.hold_ttl_seconds,
            delegation=delegation_terms(config),
            disk=disk,
            records_policy_input=config.audit.record_policy_input,
        )


async def _open_budget(
    config: Config, digest_key: bytes, stack: contextlib.AsyncExitStack
) -> tuple[Ledger, UsedPermits, RevocationStore, str]:
    """Ledger, permit uses, revocations, and what names the first two in permits. Raises
    StorageError.
    """
    settings, state = config.budget, config.state_dir
    if settings.store == "sqlite":
        ledger = SqliteLedger(state / "ledger.db", durability=settings.durability)
        stack.push_async_callback(ledger.close)
        permit_uses = PermitUses(state / "permits.db", durability=settings.durability)
        stack.push_async_callback(permit_uses.close)
        revocations = RevocationFile(config.revocation_file)
        return ledger, permit_uses, revocations, ledger_id(digest_key)
    # Only here: what needs no shared store needs no client of one either.
    from pdp.budget.redis_ledger import RedisLedger  # noqa: PLC0415
    from pdp.permit.redis_uses import RedisPermitUses  # noqa: PLC0415
    from pdp.redis_store import open_redis  # noqa: PLC0415
    from pdp.revocation.redis import RedisRevocations  # noqa: PLC0415

    store = await open_redis(settings.store)
    stack.push_async_callback(store.close)
    if settings.lease is None:
        return RedisLedger(store), RedisPermitUses(store), RedisRevocations(store), store.id
    from pdp.budget.lease_pool import LeaseTerms  # noqa: PLC0415
    from pdp.budget.leased_ledger import open_leased  # noqa: PLC0415

    leased = await open_leased(
        RedisLedger(store),
        state,
        durability=settings.durability,
        terms=LeaseTerms.of(settings.lease, hold_ttl_seconds=settings.hold_ttl_seconds),
        holder=config.instance or socket.gethostname(),
    )
    stack.push_async_callback(leased.close)
    # Holds under leases are known here alone, and so are the permits that they pay for.
    permit_uses = PermitUses(state / "permits.db", durability=settings.durability)
    stack.push_async_callback(permit_uses.close)
    return leased, permit_uses, RedisRevocations(store), ledger_id(digest_key)


async def serve(config: Config, *, loaded: Future[Loaded], started: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; then finish what has begun, and close.

    ``loaded`` is the policy, which may still be loading. ``started`` is called with a
    line for the operator once calls are answered.
    Raises StartError, and the rooms' own errors when one can not be opened.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        _open_state_directory(config.state_dir)
        lock = ExclusiveLock(
            config.state_dir / "lock", holds=f"The state directory {config.state_dir}"
        )
        stack.callback(lock.release)
        keys = _permit_keys(config)
        metrics = Metrics()
        trusted_keys = TrustedKeys(metrics)
        records, shadow_records = PolicyRecords(metrics), PolicyRecords(metrics, action="shadow")
        policy = await stack.enter_async_context(
            open_policy(
                config.policy,
                await _meanwhile_collected(loaded),
                counted=metrics.shadow_compared,
                differs=shadow_records.differs,
            )
        )
        rooms = await stack.enter_async_context(
            open_rooms(
                config,
                keys,
                policy.active,
                trusted_keys=trusted_keys,
                service_class_failed=metrics.service_class_failed,
            )
        )
        records.audit = shadow_records.audit = rooms.audit
        await records.activated(policy.active.revision)
        if policy.live is not None:
            metrics.policy_times_are(policy.live)
        metrics.calls_wait_for(rooms.admission)
        runner = CallRunner(
            metrics, rooms.admission, timeout_seconds=config.limits.call_timeout_seconds
        )
        probes = health.aio.HealthServicer()
        watchers = Watchers(rooms.policy, rooms.revocations, draining=stop)
        servers, places = [], []
        for listener in listeners(config.listen):
            server = grpc.aio.server(options=options(config.limits))
            _add_services(
                server,
                rooms,
                runner,
                metrics,
                watchers,
                Streams(runner, metrics, draining=stop),
                keys,
                config,
                listener.name,
            )
            health_pb2_grpc.add_HealthServicer_to_server(probes, server)
            places += bind(listener, server, stack)
            servers.append(server)
        readiness = Readiness(
            probes,
            ("", *SERVICE_NAMES),
            policy_answers=policy.answers,
            audit_is_healthy=lambda: rooms.audit.healthy,
            keys_are_usable=lambda: trusted_keys.usable,
        )
        await stack.enter_async_context(
            policy.kept_up_to_date(config.state_dir, events=records, shadow_events=shadow_records)
        )

        if config.listen.metrics is not None:
            status = partial(_status, config, rooms, policy, readiness, trusted_keys)
            http = _http_listener(config, metrics, keys, readiness, stop, status)
            stack.push_async_callback(asyncio.to_thread, http.close)
            places.append(f"http://{config.listen.metrics.rpartition(':')[0]}:{http.port}")
        if config.listen.admin:
            operators = CallRunner(
                metrics, rooms.admission, timeout_seconds=config.limits.call_timeout_seconds
            )
            await stack.enter_async_context(admin_socket(config.admin_socket, rooms, operators))
        await readiness.look()
        looking = asyncio.create_task(readiness.keep_looking())
        stack.callback(looking.cancel)
        _keep_memory_low(stack)
        for server in servers:
            await server.start()
            stack.push_async_callback(server.stop, None)
        started(f"serving on {', '.join(places)} with policy {rooms.policy.revision}")
        await stop.wait()
        _log.info("draining")
        looking.cancel()
        await probes.enter_graceful_shutdown()
        await _drain(servers, runner, config.limits.drain_seconds)


def _status(
    config: Config,
    rooms: Rooms,
    policy: PolicyRoom,
    readiness: Readiness,
    trusted_keys: TrustedKeys,
) -> JsonObject:
    """How things stand, for operators."""
    return {
        "version": __version__,
        "instance": config.instance or socket.gethostname(),
        "audit": {"healthy": rooms.audit.healthy},
        "policy": {**policy.status(), "answers": readiness.policy_answers},
        "issuers": trusted_keys.status(),
    }


def _add_services(
    server: grpc.aio.Server,
    rooms: Rooms,
    runner: CallRunner,
    metrics: Metrics,
    watchers: Watchers,
    streams: Streams,
    keys: LiveKeys,
    config: Config,
    listener: str,
) -> None:
    """What is answered on a listener of this name."""
    authorization_pb2_grpc.add_AuthorizationServiceServicer_to_server(
        AuthorizationServicer(
            rooms,
            runner,
            metrics,
            watchers,
            streams,
            default_audience=config.permit.default_audience,
            listener=listener,
        ),
        server,
    )
    budget_pb2_grpc.add_BudgetServiceServicer_to_server(
        BudgetServicer(rooms, runner, metrics, listener=listener), server
    )
    execution_pb2_grpc.add_ExecutionServiceServicer_to_server(
        ExecutionServicer(
            rooms, runner, metrics, keys, route_tenant=tenant_of_listener(config, listener)
        ),
        server,
    )
    reflection.enable_server_reflection(
        (*SERVICE_NAMES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name), server
    )


def _keep_memory_low(stack: contextlib.AsyncExitStack) -> None:
    """Give back what the start took and, from now on, what calls take.

    Collect garbage less often, and never in what is there from the start: a look
    through all of it stops every call for 50 to 100 ms, and took place every few
    seconds under load. What a call leaves in cycles is young, and is still found.

    `pdp serve` starts with no collection at all: it ends here.
    """
    _collect_once()
    gc.set_threshold(*_GC_THRESHOLDS)
    gc.enable()
    give_back_memory()
    stack.callback(asyncio.create_task(keep_giving_back_memory()).cancel)


async def _meanwhile_collected(loaded: Future[Loaded]) -> Loaded:
    """What was loaded. To look through all that was imported takes 45 ms, which cost no
    time while the policy is compiled on another thread.
    """
    _collect_once()
    return await asyncio.wrap_future(loaded)


def _collect_once() -> None:
    """Collect what is garbage now, and never look again at what is not."""
    gc.collect()
    gc.freeze()


_GC_THRESHOLDS: Final = (5_000, 10, 20)
"""Python's own are (700, 10, 10)."""


async def _drain(
    servers: Sequence[grpc.aio.Server], runner: CallRunner, drain_seconds: float
) -> None:
    """Take no new calls, finish those under way, and then end the streams of whoever
    watches health or reflection, which would go on for as long as they are let.
    """

    async def stop(seconds: float) -> None:
        await asyncio.gather(*(server.stop(seconds) for server in servers))

    stopping = asyncio.create_task(stop(drain_seconds))
    calls_done = asyncio.create_task(runner.drained())
    await asyncio.wait({stopping, calls_done}, return_when=asyncio.FIRST_COMPLETED)
    await stop(min(drain_seconds, _LAST_ANSWERS_SECONDS))
    await stopping
    await calls_done
    await runner.drained()


_LAST_ANSWERS_SECONDS: Final = 0.5
"""For answers that are ready and on their way out, and for calls that had just come in."""


def _http_listener(
    config: Config,
    metrics: Metrics,
    keys: LiveKeys,
    readiness: Readiness,
    stop: asyncio.Event,
    status: Callable[[], JsonObject],
) -> HttpListener:
    address = config.listen.metrics
    assert address is not None  # noqa: S101 - asked before
    try:
        return HttpListener(
            address,
            registry=metrics.registry,
            jwks=keys.to_jwks,
            is_ready=lambda: not stop.is_set() and readiness.ready,
            status=status,
        )
    except OSError as error:
        raise StartError(
            f"The address {address} can not be listened on: {error.strerror}."
        ) from None


def _open_state_directory(path: Path) -> None:
    try:
        make_directory(path)
    except NotPrivateError as error:
        raise StartError(f"The state directory {path} {error}.") from None
    except OSError as error:
        raise StartError(
            f"The state directory {path} can not be made: {error.strerror}. Make it, or name"
            " another one in the configuration (state_dir)."
        ) from None


def _permit_keys(config: Config) -> LiveKeys:
    """The configured keys, which must be there, or the sidecar's own, made if need be."""
    return LiveKeys(config.permit_key_file, make=config.permit.key_file is None)


def ledger_id(digest_key: bytes) -> str:
    """The same for the same state directory, and another for any other."""
    return hmac.digest(digest_key, b"ledger", "sha256").hex()[:32]


def _secret(path: Path) -> bytes:
    """32 random bytes, kept in a file that nobody but its owner may read."""
    write_once(path, lambda: secrets.token_bytes(_SECRET_BYTES))
    secret = read_file(path)
    if len(secret) != _SECRET_BYTES:
        raise StartError(f"{path} does not hold {_SECRET_BYTES} bytes; restore it.")
    return secret


_SECRET_BYTES: Final = 32
