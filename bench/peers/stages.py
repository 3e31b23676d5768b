"""A sidecar that does one thing more at each stage, so that each can be told its price.

Run by :mod:`bench.peers.servers`: ``python -m bench.peers.stages CONFIG ADDRESS``.

Every stage is the product's own decision, in the rooms that ``pdp serve`` opens, but with
those that a stage does not have yet put aside: callers who are taken for whom they stand, a
policy that allows all without a look, keys that sign nothing, a log and a ledger that keep
nothing. It is reached over a bare stream,
without the wire of the sidecar and without the stub: what these two cost is what lies between
the last stage and the whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import grpc
import uvloop

from pdp.api.v1 import authorization_pb2
from pdp.audit.record import AuditReceipt, AuditRecord
from pdp.budget.ledger import Account, Charge, IdempotencyKey, Limit, Receipt
from pdp.canonical import JsonObject, JsonValue
from pdp.config import Config, load_config
from pdp.decision import authorize
from pdp.identity.resolver import Credentials, SingleTenant
from pdp.permit.issuer import PermitIssuer
from pdp.permit.ring import LiveKeys
from pdp.policy.bundle import load_bundle
from pdp.policy.engine import Entrypoint
from pdp.policy.live import LivePolicy
from pdp.policy.wasm import WasmEngine
from pdp.rooms import Rooms
from pdp.server.metrics import Metrics
from pdp.server.sidecar import open_rooms
from pdp.server.trusted_keys import TrustedKeys
from pdp.server.wire import QuestionReader, authorize_response

SERVICE: Final = "bench.Stages"
EMPTY, WALK, IDENTITY, REGO, PERMIT, AUDIT, HOLD = STAGES = (
    "Empty",
    "Walk",
    "Identity",
    "Rego",
    "Permit",
    "Audit",
    "Hold",
)
UNARY: Final = "EmptyUnary"


class AllowsAll:
    """A policy that says yes before it is asked, and names no charge."""

    revision = "none"

    async def evaluate(self, entrypoint: Entrypoint, document: JsonObject) -> JsonValue:  # noqa: ARG002
        return {"allow": True, "reason_code": "ok", "scopes": []}

    @contextlib.contextmanager
    def pin(self) -> Iterator[AllowsAll]:
        yield self

    async def changed_from(self, revision: str) -> str:  # noqa: ARG002
        return await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        """There is nothing to let go of."""


class SignsNothing:
    def sign(self, payload: JsonObject, *, kind: str = "") -> str:  # noqa: ARG002
        return "unsigned"


class KeepsNoRecord:
    healthy = True

    async def append(self, record: AuditRecord) -> AuditReceipt:  # noqa: ARG002
        return AuditReceipt(1, "0" * 64)

    async def close(self) -> None:
        """There is nothing to close."""


class HoldsNothing:
    async def reserve(
        self,
        account: Account,  # noqa: ARG002
        key: IdempotencyKey,
        *,
        charges: tuple[Charge, ...],
        limits: tuple[Limit, ...],  # noqa: ARG002
        ttl_seconds: int,  # noqa: ARG002
    ) -> Receipt:
        return Receipt(replayed=False, note=key.note, charges=charges)


def rooms_of(stage: str, rooms: Rooms) -> Rooms:
    """The rooms as far as a stage has them."""
    lacks: dict[str, Any] = {
        IDENTITY: {"identity": SingleTenant(actor="alice", roles=(), scopes=())},
        REGO: {"policy": AllowsAll()},
        PERMIT: {"permits": PermitIssuer(SignsNothing(), issuer=rooms.permits.issuer)},
        AUDIT: {"audit": KeepsNoRecord()},
        HOLD: {"ledger": HoldsNothing()},
    }
    for later in STAGES[STAGES.index(stage) + 1 :]:
        rooms = replace(rooms, **lacks.get(later, {}))
    return rooms


@contextlib.asynccontextmanager
async def opened(config: Config) -> AsyncIterator[Rooms]:
    config.state_dir.mkdir(mode=0o700, exist_ok=True)
    metrics = Metrics()
    policy = LivePolicy(
        WasmEngine(
            load_bundle(Path(str(config.policy.bundle))),
            deadline_ms=config.policy.evaluation_timeout_ms,
            workers=config.policy.workers,
            memory_max_mib=config.policy.max_memory_mib,
        )
    )
    try:
        async with open_rooms(
            config,
            LiveKeys(config.permit_key_file, make=True),
            policy,
            trusted_keys=TrustedKeys(metrics),
            service_class_failed=metrics.service_class_failed,
        ) as rooms:
            yield rooms
    finally:
        await policy.close()


def handlers(config: Config, rooms: Rooms) -> grpc.GenericRpcHandler:
    reader = QuestionReader(default_audience=config.permit.default_audience)
    nothing = authorization_pb2.AuthorizeResponse(decision=True).SerializeToString()

    def streamed(stage: str) -> grpc.RpcMethodHandler:
        own = rooms_of(stage, rooms)

        async def answer(asked: bytes) -> bytes:
            if stage == EMPTY:
                return nothing
            message = authorization_pb2.AuthorizeStreamRequest.FromString(asked)
            recorded = await authorize(
                own,
                Credentials(bearer=message.bearer),
                reader.asked(message.question, trace_id=None),
            )
            return authorize_response(recorded).SerializeToString()

        async def exchange(_requests: object, context: Any) -> None:  # noqa: ANN401 - gRPC's own shape
            while isinstance(asked := await context.read(), bytes):
                await context.write(await answer(asked))

        return grpc.stream_stream_rpc_method_handler(exchange)

    async def unary(_asked: bytes, _context: object) -> bytes:
        return nothing

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {stage: streamed(stage) for stage in STAGES}
        | {UNARY: grpc.unary_unary_rpc_method_handler(unary)},
    )


async def serve(config: Config, address: str) -> None:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # noqa: PLC0415

    async with opened(config) as rooms:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers([handlers(config, rooms)])
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        server.add_insecure_port(address)
        await server.start()
        await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(serve(load_config(Path(sys.argv[1]), {}), sys.argv[2]))
